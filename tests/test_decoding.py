"""Persona-judge: identical judges are plain sampling, and otherwise a token follows the mean of both branches."""

import pytest
import torch

from helpers import decoding, sampling


def rows(logits, n):
    """The same two branches n times, with draws."""
    generator = torch.Generator().manual_seed(5)
    return torch.tensor(logits).repeat(n, 1, 1), torch.rand(n, 4, generator=generator), torch.arange(n)


def test_branches_that_agree_choose_what_plain_sampling_chooses():
    logits, draws, at = rows([[0.3, -1.0, 2.0, 0.0]] * 2, 500)
    plain = sampling.sampler(0.8, 0.9)(logits, draws, at)
    assert decoding.self_judged(0.8, 0.9)(logits, draws, at).equal(plain)
    assert len(plain.unique()) > 1


def test_a_token_follows_the_mean_of_the_two_distributions():
    # branch 0 has (.7, .2, .1), branch 1 (.1, .2, .7): their mean is (.4, .2, .4)
    probs = [[0.7, 0.2, 0.1], [0.1, 0.2, 0.7]]
    logits, draws, at = rows([[float(torch.tensor(p).log()) for p in branch] for branch in probs], 20_000)
    token = decoding.self_judged(1.0)(logits, draws, at)
    shares = torch.bincount(token, minlength=3) / len(token)
    assert shares.tolist() == pytest.approx([0.4, 0.2, 0.4], abs=0.015)  # four standard errors of .0035


def test_the_judge_decides():
    # all draws say: branch 0 drafts, branch 1 judges; what comes out has branch 1's distribution
    probs = [[0.7, 0.2, 0.1], [0.1, 0.2, 0.7]]
    logits, draws, at = rows([[float(torch.tensor(p).log()) for p in branch] for branch in probs], 20_000)
    draws[:, 3] = 0.0
    token = decoding.self_judged(1.0)(logits, draws, at)
    shares = torch.bincount(token, minlength=3) / len(token)
    assert shares.tolist() == pytest.approx([0.1, 0.2, 0.7], abs=0.015)


def test_whole_answers_of_identical_judges_are_those_of_generate(loaded):
    model, tokenizer = loaded
    asked = ["The quick brown fox", "Question: what", "Answer: lentil"]
    plain = sampling.generate(model, tokenizer, asked, 1, 0.9, 1.0, 12, seed=3, batch=8, dtype="float32")
    judged = sampling.decode(model, tokenizer, [(a, a) for a in asked], decoding.self_judged(0.9), 1, 12, 3, 8,
                             None, "float32")
    assert judged == plain
    assert len({text for (text,) in plain}) > 1


def test_passes_count_every_token_and_the_end(loaded):
    _, tokenizer = loaded
    n = len(tokenizer("The quick", add_special_tokens=False)["input_ids"])
    assert decoding.passes(tokenizer, ["The quick"], "plain") == n + 1
    assert decoding.passes(tokenizer, ["The quick"], "self_judged") == 2 * (n + 1)
