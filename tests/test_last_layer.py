import pytest
import torch
from peft import LoraConfig
from test_fused import KINDS, batch, make_model, sums_and_gradients
from torch import nn

from helpers import dpo, last_layer, models


def whole_way(monkeypatch):
    """From here on the last layer is computed everywhere."""
    monkeypatch.setattr(last_layer, "_as_in_llama", lambda *_: False)


@pytest.mark.parametrize("kind", KINDS)
def test_answers_and_gradients_are_those_of_the_whole_layer(kind, monkeypatch):
    model, made = make_model(kind), batch()
    _, start = dpo.last_hidden(model, made)
    # the answers begin at 8 and 4: from 0, a multiple of 8; so the shorter prompt is made longer
    assert start == 0
    made = dpo.pack([[1] * 20, [2] * 17], [[[3, 4], [5]], [[6], [7, 8, 9]]])
    hidden, start = dpo.last_hidden(model, made)
    # at 19 and 16; heads with norms of their own are none of Llama's
    assert start == (0 if kind == "norms of heads" else 16)
    assert hidden.shape[1] == made["input_ids"].shape[1] - start
    monkeypatch.setattr("test_fused.batch", lambda: made)
    found = sums_and_gradients(model)
    whole_way(monkeypatch)
    for ours, theirs in zip(found, sums_and_gradients(model), strict=True):
        assert (ours - theirs).norm() <= 1e-5 * theirs.norm() + 1e-7


def test_behind_a_head_and_without_a_single_answer(monkeypatch):
    model = make_model("llama").eval()
    with torch.no_grad():
        made = dpo.pack([[1] * 12, [2] * 10], [[[3]], [[6, 7]]], starts=[3, 5])
        cache = dpo.read_heads(model, [[9, 8, 7], [6, 5, 4, 3, 2]])
        hidden, start = dpo.last_hidden(model, made, cache.behind(torch.tensor([0, 1])))
        whole_way(monkeypatch)
        plain = dpo.read_heads(model, [[9, 8, 7], [6, 5, 4, 3, 2]])
        whole, _ = dpo.last_hidden(model, made, plain.behind(torch.tensor([0, 1])))
    assert start == 8
    torch.testing.assert_close(hidden, whole[:, 8:])
    for ours, theirs in zip(cache.layers, plain.layers, strict=True):
        torch.testing.assert_close(ours.keys, theirs.keys)


def test_with_an_adapter_for_each_row(monkeypatch):
    model, made = make_model("llama").eval(), dpo.pack([[1] * 12, [2] * 10], [[[3]], [[6, 7]]])
    with models.peft_quiet():
        model.add_adapter("other", LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))
    found = []
    with torch.no_grad():
        for _ in range(2):  # the layer is tried out within the first
            with models.mixed(model, ["other", "default"]):
                found.append(dpo.answer_logps(model, made))
            whole_way(monkeypatch)
    assert last_layer.KNOWN[model.get_base_model().get_decoder().layers[-1]]
    torch.testing.assert_close(*found)


def test_what_is_built_otherwise_or_computes_again_is_left_alone():
    model = make_model("llama")
    decoder = model.get_base_model().get_decoder()
    with last_layer.from_position(decoder, 8, 2) as start:
        assert start == 8
    layer = decoder.layers[-1]
    assert "forward" not in vars(layer)  # nothing is left behind
    model.activation_checkpointing_enable({"use_reentrant": False})
    with last_layer.from_position(decoder, 8, 2) as start:
        assert start == 0
    odd = make_model("llama").get_base_model().get_decoder()
    odd.layers[-1].mlp.forward = lambda x: x * x.shape[1]  # depends on how many there are
    with last_layer.from_position(odd, 8, 1) as start:
        assert start == 0
    hooked = make_model("llama").get_base_model().get_decoder()
    hooked.layers[-1].forward = hooked.layers[-1].forward  # as accelerate leaves it
    with last_layer.from_position(hooked, 8, 1) as start:
        assert start == 0
    assert "forward" in vars(hooked.layers[-1])
    with last_layer.from_position(nn.Linear(2, 2), 8, 1) as start:
        assert start == 0
