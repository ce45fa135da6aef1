import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM

from helpers import dpo, fused, models

SIZES = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
         "num_key_value_heads": 2, "initializer_range": 0.2, "attn_implementation": "sdpa"}
KINDS = {"llama": (LlamaForCausalLM, LlamaConfig(**SIZES)), "biases": (Qwen2ForCausalLM, Qwen2Config(**SIZES)),
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


def batch() -> dict[str, torch.Tensor]:
    rng = torch.Generator().manual_seed(1)

    def ids(n: int) -> list[int]:
        return torch.randint(1, 97, (n,), generator=rng).tolist()

    return dpo.pack([ids(9), ids(5)], [[ids(4), ids(6)], [ids(3), ids(2)]])


def sums_and_gradients(model) -> list[torch.Tensor]:
    sums = dpo.answer_logps(model, batch())
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    return [sums, *torch.autograd.grad((sums * torch.tensor([[1.0, -2.0], [0.5, 3.0]])).sum(), weights)]


@pytest.mark.parametrize("kind", KINDS)
def test_fused_layers_equal_pefts_and_transformers(kind):
    model = make_model(kind)
    plain = sums_and_gradients(model)
    with fused.layers(model) as n:
        # two layers of 7 projections and 2 norms (and 2 norms of heads), and the last norm
        assert n == (23 if kind == "norms of heads" else 19)
        found = sums_and_gradients(model)
    for ours, theirs in zip(found, plain, strict=True):
        assert (ours - theirs).norm() <= 1e-5 * theirs.norm() + 1e-7
    again = sums_and_gradients(model)  # nothing is left behind
    assert all(torch.equal(a, b) for a, b in zip(again, plain, strict=True))


def test_in_bfloat16_they_differ_by_rounding_alone():
    model = make_model("llama")
    exact = sums_and_gradients(model)
    with torch.autocast("cpu", torch.bfloat16):
        theirs = sums_and_gradients(model)
        with fused.layers(model):
            ours = sums_and_gradients(model)
    assert not torch.equal(ours[0], theirs[0])
    for a, b, right in zip(ours, theirs, exact, strict=True):
        assert (a - right).norm() <= 1.5 * (b - right).norm() + 0.01 * right.norm()  # no further off than theirs
        assert a.dtype == b.dtype


def test_what_cannot_be_replaced_is_left_alone():
    with fused.layers(make_model("llama", lora_dropout=0.1)) as n:
        assert n == 5  # the norms
    with fused.layers(make_model("llama", use_dora=True)) as n:
        assert n == 5
    two = make_model("llama")
    with models.peft_quiet():
        two.add_adapter("other", LoraConfig(r=2, target_modules=["q_proj"]))
    two.base_model.set_adapter(["default", "other"])  # both at a time
    with fused.layers(two) as n:
        assert n == 5
    odd = make_model("llama")
    norm = odd.get_base_model().model.norm
    norm.forward = lambda x: x * 2  # called a norm, and is none
    with fused.layers(odd) as n:
        assert n == 18


def test_with_recomputed_activations():
    model = make_model("llama")
    plain = sums_and_gradients(model)
    model.activation_checkpointing_enable({"use_reentrant": False})
    with fused.layers(model):
        found = sums_and_gradients(model)
    for ours, theirs in zip(found, plain, strict=True):
        assert (ours - theirs).norm() <= 1e-5 * theirs.norm() + 1e-7
