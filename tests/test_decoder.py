from functools import partial

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from helpers import decoder, dpo, line, models

SIZES = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
         "num_key_value_heads": 2, "initializer_range": 0.2, "attn_implementation": "sdpa"}
KINDS = {"llama": (LlamaForCausalLM, LlamaConfig(**SIZES)), "biases": (Qwen2ForCausalLM, Qwen2Config(**SIZES)),
         "a window": (MistralForCausalLM, MistralConfig(**SIZES, sliding_window=6)),
         "norms of heads": (Qwen3ForCausalLM, Qwen3Config(**SIZES, head_dim=8))}


def make_model(kind: str, **lora):
    """A random model with an adapter that does something."""
    torch.manual_seed(3)
    model = KINDS[kind][0](KINDS[kind][1])
    for name, weight in model.named_parameters():
        if "norm" in name or "bias" in name:
            torch.nn.init.normal_(weight, 1.0, 0.3)
    config = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM"} | lora
    with models.peft_quiet():
        model = get_peft_model(model, LoraConfig(**config))
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, 0.0, 0.1)
    return model.train()


KNOWN = [kind for kind in KINDS if kind != "norms of heads"]


def batch(soft: bool = False) -> dict[str, torch.Tensor]:
    """Rows of unlike length, of which two begin alike; soft: with a vector each behind the first token."""
    rng = torch.Generator().manual_seed(1)

    def ids(n: int) -> list[int]:
        return torch.randint(1, 97, (n,), generator=rng).tolist()

    head = [*ids(1), *[line.SOFT] * soft, *ids(8)]
    made = dpo.pack([head + ids(2), head[:1 + soft] + ids(4), head + ids(5)],
                    [[ids(4), ids(6)], [ids(3), ids(2)], [ids(1), ids(7)]])
    return made | ({"soft": torch.randn(3, 32, generator=rng)} if soft else {})


def sums_and_gradients(model, made: dict[str, torch.Tensor], fast: decoder.Decoder | None) -> list[torch.Tensor]:
    """Of the trained weights, and of the soft vectors."""
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    if "soft" in made:
        made = made | {"soft": made["soft"].clone().requires_grad_()}
        weights.append(made["soft"])
    sums = dpo.answer_logps(model, made, decoder=fast)
    return [sums, *torch.autograd.grad((sums * torch.tensor([[1.0, -2.0], [0.5, 3.0], [-1.0, 1.0]])).sum(), weights)]


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("kind", KNOWN)
def test_sums_and_gradients_are_those_of_transformers_and_peft(kind, soft):
    model = make_model(kind)
    made, fast = batch(soft), decoder.of(model)
    for ours, theirs in zip(sums_and_gradients(model, made, fast), sums_and_gradients(model, made, None), strict=True):
        assert (ours - theirs).norm() <= 1e-5 * theirs.norm() + 1e-6
    with torch.no_grad():  # an update is seen
        for weight in model.parameters():
            if weight.requires_grad:
                weight.add_(0.05)
    for ours, theirs in zip(sums_and_gradients(model, made, fast), sums_and_gradients(model, made, None), strict=True):
        assert (ours - theirs).norm() <= 1e-5 * theirs.norm() + 1e-6


def test_in_bfloat16_they_differ_by_rounding_alone():
    model, made = make_model("llama"), batch()
    exact, fast = sums_and_gradients(model, made, None), decoder.of(model)
    with torch.autocast("cpu", torch.bfloat16):
        theirs, ours = (sums_and_gradients(model, made, way) for way in (None, fast))
    assert not torch.equal(ours[0], theirs[0])
    for a, b, right in zip(ours, theirs, exact, strict=True):
        assert (a - right).norm() <= 1.5 * (b - right).norm() + 0.01 * right.norm()  # no further off than theirs
        assert a.dtype == b.dtype


@pytest.mark.parametrize("kind", KNOWN)
def test_behind_heads_that_were_read_before(kind):
    model = make_model(kind).eval()
    made = dpo.pack([[1] * 12, [2] * 10, [1] * 12], [[[3]], [[6, 7]], [[4, 5]]], starts=[3, 5, 5])
    with torch.no_grad(), models.merged(model):
        cache = dpo.read_heads(model, [[9, 8, 7], [6, 5, 4, 3, 2]])
        # the first and the last row are alike, but not what stands before them
        cache.behind(torch.tensor([0, 1, 1]), made["input_ids"].shape[1])
        torch.testing.assert_close(dpo.answer_logps(model, made, cache, decoder.of(model)),
                                   dpo.answer_logps(model, made, cache), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(dpo.answer_means(model, made, cache, decoder.of(model)),
                                   dpo.answer_means(model, made, cache), rtol=1e-5, atol=1e-5)


def test_a_bare_base_and_one_whose_adapter_is_off_or_merged():
    made, model = batch(), make_model("llama").eval()
    base = model.get_base_model()
    ways = {"bare": make_model("llama").unload().eval(), "on": model, "off": model}
    for way, whole in ways.items():
        with torch.no_grad(), model.disable_adapter() if way == "off" else models.merged(whole, False):
            fast = decoder.of(whole)
            assert bool(fast.low) == (way == "on")
            torch.testing.assert_close(dpo.answer_logps(whole, made, decoder=fast), dpo.answer_logps(whole, made))
    with torch.no_grad(), models.merged(model):
        assert not decoder.of(model).low
        torch.testing.assert_close(dpo.answer_logps(model, made, decoder=decoder.of(model)), dpo.answer_logps(base, made))


def test_rows_that_are_too_long_for_scores_of_every_pair_are_left_to_transformers(monkeypatch):
    model, made = make_model("llama"), batch()
    fast = decoder.of(model)
    monkeypatch.setattr(dpo, "SHORT", 8)
    monkeypatch.setattr(decoder.Decoder, "__call__", partial(pytest.fail, "the fast one was used"))
    assert torch.equal(dpo.answer_logps(model, made, decoder=fast), dpo.answer_logps(model, made))


def test_what_is_not_known_is_left_alone():
    assert decoder.of(make_model("norms of heads")) is None
    assert decoder.of(make_model("llama", lora_dropout=0.1)) is None
    assert decoder.of(make_model("llama", use_dora=True)) is None
    assert decoder.of(make_model("llama", target_modules=["q_proj"])) is None  # one of three that are read together
    two = make_model("llama")
    with models.peft_quiet():
        two.add_adapter("other", LoraConfig(r=2, target_modules=["q_proj"]))
    two.base_model.set_adapter(["default", "other"])  # both at a time
    assert decoder.of(two) is None
    unequal = make_model("llama", alpha_pattern={"q_proj": 3})
    assert decoder.of(unequal) is None
    assert decoder.of(KINDS["llama"][0](KINDS["llama"][1])) is None  # its own weights are to be trained
    odd = make_model("llama")
    odd.get_base_model().model.layers[1].mlp.act_fn = torch.nn.GELU()  # built as Llama's, and is none
    assert decoder.of(odd) is None
    hooked = make_model("llama")
    layer = hooked.get_base_model().model.layers[0]
    layer.forward = layer.forward  # as accelerate leaves it
    assert decoder.of(hooked) is None
    recomputing = make_model("llama")
    recomputing.activation_checkpointing_enable({"use_reentrant": False})
    assert decoder.of(recomputing) is None
