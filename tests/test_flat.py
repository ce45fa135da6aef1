import pytest
import torch
from transformers import (
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from helpers import dpo, flat

SIZES = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
         "num_key_value_heads": 2, "initializer_range": 0.2, "attn_implementation": "sdpa"}
KINDS = {"llama": (LlamaForCausalLM, LlamaConfig(**SIZES)),
         "mistral": (MistralForCausalLM, MistralConfig(**SIZES, sliding_window=6)),  # shorter than the rows
         "qwen2": (Qwen2ForCausalLM, Qwen2Config(**SIZES)), "qwen3": (Qwen3ForCausalLM, Qwen3Config(**SIZES, head_dim=12))}


@pytest.fixture(params=KINDS)
def model(request):
    torch.manual_seed(3)
    return KINDS[request.param][0](KINDS[request.param][1]).eval()


def batch(n_answers: int = 2) -> dict[str, torch.Tensor]:
    """Rows of 7 to 54 tokens; the first prompt is a single token, the last row has one answer less."""
    rng = torch.Generator().manual_seed(1)
    prompts = [torch.randint(1, 97, (n,), generator=rng).tolist() for n in (1, 19, 50)]
    answers = [[torch.randint(1, 97, (n + k,), generator=rng).tolist() for k in range(n_answers)] for n in (3, 5, 4)]
    answers[2].pop()
    return dpo.pack(prompts, answers)


def whole(model, rows) -> torch.Tensor:
    """What the decoder itself gives at the answers' positions."""
    return dpo.last_hidden(model, rows)[rows["targets"] != dpo.IGNORE]


def test_places_by_hand():
    # tokens 0 2 | 4 are chosen of rows of three; the list is filled up to 64, of which the last (63) is nobody's
    found = flat.places(torch.tensor([[True, False, True], [False, True, False]]), width=2)
    assert found.tokens.tolist() == [0, 2, 4] + [0] * 61
    assert found.slots.tolist() == [[0, 1], [2, 63]]
    assert found.homes.tolist() == [0, 1, 2] + [0] * 61
    x = torch.arange(64.0)[:, None, None]
    assert found.rows(x).flatten().tolist() == [0, 1, 2, 63]
    assert found.listed(found.rows(x).transpose(1, 2))[:3].flatten().tolist() == [0, 1, 2]
    assert flat.places(torch.ones(1, 9, dtype=torch.bool)).slots.shape == (1, 16)  # a multiple of 8
    assert len(flat.places(torch.ones(1, 64, dtype=torch.bool)).tokens) == 128  # there is always some fill


def test_hidden_states_equal_the_decoders(model):
    assert flat.known(model.get_decoder())
    rows = batch()
    with torch.no_grad():
        expected = whole(model, rows)
        found = dpo.answer_hidden(model, rows)
    assert len(found) == flat.MULTIPLE > len(expected)
    torch.testing.assert_close(found[:len(expected)], expected, rtol=1e-5, atol=1e-5)


def test_gradients_equal_the_decoders(model):
    rows, weights = batch(), list(model.parameters())
    expected = whole(model, rows)
    pull = torch.randn(expected.shape, generator=torch.Generator().manual_seed(2))
    theirs = torch.autograd.grad((expected * pull).sum(), weights, allow_unused=True)
    for recomputed in (False, True):
        if recomputed:
            model.train().activation_checkpointing_enable({"use_reentrant": False})
        found = dpo.answer_hidden(model, rows)[:len(expected)]
        for a, b in zip(torch.autograd.grad((found * pull).sum(), weights, allow_unused=True), theirs, strict=True):
            assert (a is None) == (b is None)
            assert a is None or (a - b).norm() <= 1e-5 * b.norm() + 1e-7


def test_in_bfloat16_they_are_as_near_as_the_decoders(model):
    rows = batch()
    with torch.no_grad():
        exact = whole(model, rows)
        with torch.autocast("cpu", torch.bfloat16):
            theirs, ours = whole(model, rows), dpo.answer_hidden(model, rows)[:len(exact)]
    assert (ours - exact).norm() <= 1.2 * (theirs - exact).norm()


def test_of_the_last_layer_prompts_have_keys_and_values_alone(model):
    rows, seen = batch(), []
    for layer in model.get_decoder().layers[1:]:
        layer.mlp.down_proj.register_forward_hook(lambda module, args, out: seen.append(len(out)))
    with torch.no_grad():
        dpo.answer_hidden(model, rows)
    assert seen == [64 * (1 + n // 64) for n in ((rows["segments"] >= 0).sum(), rows["counts"].sum())]
    assert seen[0] > seen[1]


def test_what_is_not_known_is_left_to_the_decoder(model):
    torch.manual_seed(3)
    other = GPTNeoXForCausalLM(GPTNeoXConfig(vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                                             num_attention_heads=4, attn_implementation="sdpa")).eval()
    assert not flat.known(other.get_decoder())
    rows = batch()
    with torch.no_grad():
        expected = whole(other, rows)
        torch.testing.assert_close(dpo.answer_hidden(other, rows)[:len(expected)], expected)
    layer = model.get_decoder().layers[0]
    handle = layer.self_attn.q_proj.register_forward_pre_hook(lambda module, args: None)
    assert not flat.known(model.get_decoder())  # adapters that differ by row
    handle.remove()
    assert flat.known(model.get_decoder())
    layer.mlp.forward = layer.mlp.forward
    assert not flat.known(model.get_decoder())
