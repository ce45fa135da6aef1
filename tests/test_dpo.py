import math

import numpy as np
import pytest
import torch
from tiny import make_policy

from helpers import dpo, models


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return models.load_policy(make_policy(tmp_path_factory.mktemp("base")))[0]


def draw(rng, n_rows: int, n_answers: int) -> tuple[list, list]:
    """Prompts of 1 to 40 tokens and answers of 1 to 12."""

    def ids(high: int) -> list[int]:
        return rng.integers(0, 257, rng.integers(1, high)).tolist()

    return [ids(41) for _ in range(n_rows)], [[ids(13) for _ in range(n_answers)] for _ in range(n_rows)]


def plain_logps(model, prompt: list[int], answer: list[int]) -> torch.Tensor:
    """One row per answer, the whole vocabulary at every position: what everybody else computes."""
    logps = model(input_ids=torch.tensor([prompt + answer])).logits[0].float().log_softmax(-1)
    return logps[len(prompt) - 1:-1].gather(1, torch.tensor(answer)[:, None]).sum()


def test_pack_by_hand():
    # prompt 7 8, answers 1 2 and 3: row 7 | 8 1 | 8, predicting 1 2 and 3; the second row is one shorter
    batch = dpo.pack([[7, 8], [9]], [[[1, 2], [3]], [[4], [5, 6]]], multiple=1)
    assert batch["input_ids"].tolist() == [[7, 8, 1, 8], [9, 9, 5, 0]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 1], [0, 0, 1, 0]]
    assert batch["segments"].tolist() == [[0, 1, 1, 2], [1, 2, 2, -1]]
    assert batch["targets"].tolist() == [[-100, 1, 2, 3], [4, 5, 6, -100]]
    assert batch["counts"].tolist() == [[2, 1], [1, 2]]
    assert dpo.pack([[7, 8], [9]], [[[1, 2], [3]], [[4], [5, 6]]])["segments"].shape == (2, 16)


def test_mask_by_hand():
    # segments 0 1 1 2: the second answer (last row) sees the prompt and itself, not the first answer
    mask = dpo.answer_mask(torch.tensor([[0, 1, 1, 2]]), torch.tensor([[0, 1, 2, 1]]))[0, 0].int()
    assert mask.tolist() == [[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [1, 0, 0, 1]]
    near = dpo.answer_mask(torch.tensor([[0, 1, 1, 2]]), torch.tensor([[0, 1, 2, 1]]), window=2)[0, 0].int()
    assert near.tolist() == [[1, 0, 0, 0], [1, 1, 0, 0], [0, 1, 1, 0], [1, 0, 0, 1]]


def test_rows_behind_a_head_by_hand():
    # the head has 3 tokens: the row starts at position 3; rows of two heads see the tokens of their own alone
    batch = dpo.pack([[7, 8], [9]], [[[1]], [[4], [5, 6]]], multiple=1, starts=[3, 1])
    assert batch["input_ids"].tolist() == [[7, 8, 0], [9, 9, 5]]
    assert batch["position_ids"][0, :2].tolist() == [3, 4]
    assert batch["position_ids"][1].tolist() == [1, 1, 2]
    assert batch["counts"].tolist() == [[1, 0], [1, 2]]
    mask = dpo.answer_mask(torch.tensor([[0, 1], [1, 2]]), torch.tensor([[3, 4], [1, 1]]), heads=torch.tensor([3, 1]))
    assert mask[:, 0].int().tolist() == [[[1, 1, 1, 1, 0], [1, 1, 1, 1, 1]], [[1, 0, 0, 1, 0], [1, 0, 0, 0, 1]]]
    near = dpo.answer_mask(torch.tensor([[0, 1]]), torch.tensor([[3, 4]]), window=3, heads=torch.tensor([3]))
    assert near[0, 0].int().tolist() == [[0, 1, 1, 1, 0], [0, 0, 1, 1, 1]]


def test_few_logits_at_a_time_give_the_same(model, monkeypatch):
    prompts, answers = draw(np.random.default_rng(5), 60, 2)
    batch = dpo.pack(prompts, answers)
    assert batch["counts"].sum() > 512  # three parts of 256 or fewer
    with torch.no_grad():
        whole = dpo.answer_logps(model, batch)
        monkeypatch.setitem(dpo.LOGITS, "cpu", 1)
        torch.testing.assert_close(dpo.answer_logps(model, batch), whole, rtol=1e-6, atol=1e-6)


def test_budget_batches_by_hand():
    # sorted 5 4 2 2 1: 5 and 4 padded to 5 are 10 tokens, a third would be 15; 2 2 1 padded to 2 are 6
    batches = dpo.budget_batches([2, 5, 1, 4, 2], token_budget=12)
    assert [b.tolist() for b in batches] == [[1, 3], [0, 4, 2]]
    assert [b.tolist() for b in dpo.budget_batches([50, 3], token_budget=12)] == [[0], [1]]
    assert [len(b) for b in dpo.budget_batches([2] * 15, token_budget=12)] == [4, 4, 4, 3]  # of six that fit four


def test_a_last_batch_is_filled_up_with_its_last_row():
    assert dpo.filled(np.arange(6)).tolist() == [0, 1, 2, 3, 4, 5, 5, 5]
    assert [len(dpo.filled(np.arange(n))) for n in (1, 3, 4, 8)] == [1, 3, 4, 8]


@pytest.mark.parametrize("n_answers", [1, 2, 4])
def test_shared_rows_equal_one_row_per_answer(model, n_answers):
    prompts, answers = draw(np.random.default_rng(n_answers), 7, n_answers)
    with torch.no_grad():
        found = dpo.answer_logps(model, dpo.pack(prompts, answers))
        plain = torch.stack([torch.stack([plain_logps(model, p, a) for a in row])
                             for p, row in zip(prompts, answers, strict=True)])
    torch.testing.assert_close(found, plain, rtol=1e-5, atol=1e-5)


def test_sliding_window_rows_equal_plain_rows(tmp_path):
    from transformers import MistralConfig, MistralForCausalLM

    torch.manual_seed(1)
    model = MistralForCausalLM(MistralConfig(
        vocab_size=257, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, sliding_window=6, initializer_range=0.2, attn_implementation="sdpa")).eval()
    prompts, answers = draw(np.random.default_rng(0), 5, 2)
    with torch.no_grad():
        found = dpo.answer_logps(model, dpo.pack(prompts, answers))
        plain = torch.stack([torch.stack([plain_logps(model, p, a) for a in row])
                             for p, row in zip(prompts, answers, strict=True)])
    torch.testing.assert_close(found, plain, rtol=1e-5, atol=1e-5)


def test_gradients_equal_those_of_two_rows(model):
    prompts, answers = draw(np.random.default_rng(9), 5, 2)
    reference = torch.zeros(5)
    chosen, rejected, n_chosen, n_rejected = dpo.pair_logps(model, dpo.pack(prompts, answers))
    assert n_chosen.tolist() == [len(a) for a, _ in answers]
    assert n_rejected.tolist() == [len(b) for _, b in answers]
    weights = list(model.parameters())
    mine = torch.autograd.grad(dpo.dpo_loss(chosen, rejected, reference, reference, 0.1).mean(), weights)
    plain = [torch.stack([plain_logps(model, p, row[k]) for p, row in zip(prompts, answers, strict=True)])
             for k in (0, 1)]
    theirs = torch.autograd.grad(dpo.dpo_loss(*plain, reference, reference, 0.1).mean(), weights)
    for a, b in zip(mine, theirs, strict=True):
        assert (a - b).norm() <= 1e-5 * b.norm() + 1e-8


def test_plain_attention_equals_the_fused_one(model, monkeypatch):
    prompts, answers = draw(np.random.default_rng(4), 6, 2)
    batch = dpo.pack(prompts, answers)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        plain = dpo.answer_logps(model, batch)
        assert model.config._attn_implementation == "sdpa"  # put back
        monkeypatch.setattr(dpo, "SHORT", 0)
        fused = dpo.answer_logps(model, batch)
    # both round to bfloat16 (8 bits), here over at most 12 tokens of about 9 nats
    assert not torch.equal(plain, fused)
    torch.testing.assert_close(plain, fused, rtol=2e-2, atol=0.2)


def test_loss_by_hand():
    # log-ratios 2 - 1 = 1 and 0.5 - 1.5 = -1; margin 0.5 * 1 - 0.5 * -1 = 1; -log sigmoid(1) = 0.313262
    chosen, rejected = torch.tensor([2.0], requires_grad=True), torch.tensor([0.5], requires_grad=True)
    loss = dpo.dpo_loss(chosen, rejected, torch.tensor([1.0]), torch.tensor([1.5]), beta=0.5)
    assert loss.item() == pytest.approx(0.313262, abs=1e-6)
    # d loss / d chosen = -beta sigmoid(-1) = -0.5 * 0.268941
    loss.sum().backward()
    assert chosen.grad.item() == pytest.approx(-0.1344707, abs=1e-6)
    assert rejected.grad.item() == pytest.approx(0.1344707, abs=1e-6)
    assert dpo.dpo_loss(*torch.zeros(4, 1), beta=0.1).item() == pytest.approx(math.log(2))
    assert dpo.implicit_reward(torch.tensor([3.0]), torch.tensor([1.0]), 0.1).item() == pytest.approx(0.2)


def test_models_that_would_be_wrong_are_refused(model):
    dpo.check_model(model)
    model.set_attn_implementation("eager")
    with pytest.raises(ValueError, match="sdpa"):
        dpo.check_model(model)
    model.set_attn_implementation("sdpa")
    model.config.logit_scale = 0.5
    with pytest.raises(ValueError, match="logit_scale"):
        dpo.check_model(model)
    del model.config.logit_scale
