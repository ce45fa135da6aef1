from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from tiny import make_policy, make_tokenizer
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

from helpers import dpo, models, scoring
from helpers.sharing import Asked

HEADS = ["", "The user is Ada Lind.\n", "The user likes lentil stew and a slow roast with many herbs.\n"]
TAILS = ["Question: what should I cook?\nAnswer:", "Question: where?\nAnswer:"]


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    return models.load_policy(make_policy(tmp_path_factory.mktemp("base")))


def make_pairs(n: int) -> tuple[list, list, list]:
    rng = np.random.default_rng(n)
    words = ["lentil", "stew", "slow", "roast", "herbs", "rainy", "Sunday", "fox"]
    say = [" ".join(rng.choice(words, rng.integers(1, 9))) for _ in range(2 * n)]
    return [(HEADS[i % 3], TAILS[i % 2]) for i in range(n)], say[:n], say[n:]


def plain_logp(model, tokenizer, prompt: tuple[str, str], answer: str) -> float:
    """The paper's own procedure: a row per answer, all positions computed, the answer's ones summed."""
    ids = [tokenizer(text, add_special_tokens=False)["input_ids"]
           for text in (tokenizer.bos_token, *prompt, " " + answer, tokenizer.eos_token)]
    start = sum(map(len, ids[:3]))
    row = torch.tensor([sum(ids, [])])
    with torch.inference_mode():
        logps = model(input_ids=row).logits[0].float().log_softmax(-1)
    return logps[start - 1:-1].gather(1, row[0, start:, None]).sum().item()


@pytest.mark.parametrize("token_budget", [60, 8192])
def test_scores_equal_one_row_at_a_time(policy, token_budget):
    prompts, chosen, rejected = make_pairs(11)
    found = scoring.score_pairs(*policy, prompts, chosen, rejected, token_budget, dtype="float32")
    for column, texts in (("logp_chosen", chosen), ("logp_rejected", rejected)):
        plain = [plain_logp(*policy, prompt, text) for prompt, text in zip(prompts, texts, strict=True)]
        np.testing.assert_allclose(found[column], plain, rtol=1e-5, atol=1e-5)
    assert found["n_chosen"].iloc[0] == len(policy[1](" " + chosen[0])["input_ids"]) + 1
    assert (found[["lost", "cut"]] == 0).all(axis=None)


SIZES = {"vocab_size": 257, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
         "num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.2, "attn_implementation": "sdpa"}
SHAPES = {"llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES)),
          "mistral": lambda: MistralForCausalLM(MistralConfig(**SIZES, sliding_window=9))}  # shorter than the rows


@pytest.fixture(scope="module", params=SHAPES)
def shape(request):
    torch.manual_seed(3)
    return SHAPES[request.param]().eval()


def draw_asked(seed: int, n: int, n_answers: int) -> list[Asked]:
    """Prompts behind one of five heads of 1 to 60 tokens, some of them equal, in a random order."""
    rng = np.random.default_rng(seed)

    def ids(low: int, high: int) -> list[int]:
        return rng.integers(0, 257, rng.integers(low, high)).tolist()

    heads, questions, said = [ids(1, 61) for _ in range(5)], [ids(0, 9) for _ in range(7)], [ids(1, 20) for _ in range(9)]
    drawn = [(heads[rng.integers(5)], questions[rng.integers(7)]) for _ in range(n)]
    return [Asked(head + question, [said[i] for i in rng.integers(0, 9, n_answers)], 0, 0, len(head))
            for head, question in drawn]


def one_at_a_time(model, asked: list[Asked]) -> np.ndarray:
    """A row per answer, the whole vocabulary at every position, and nothing shared."""
    sums = []
    with torch.inference_mode():
        for one in asked:
            for answer in one.answers:
                row = torch.tensor([one.prompt + answer])
                logps = model(input_ids=row).logits[0].log_softmax(-1)[len(one.prompt) - 1:-1]
                sums.append(logps.gather(1, torch.tensor(answer)[:, None]).sum().item())
    return np.array(sums)


@pytest.mark.parametrize("n_answers", [1, 2, 4])
@pytest.mark.parametrize("pays", [0.0, 0.08, 9.0])
def test_whatever_is_shared_scores_equal_one_row_at_a_time(shape, n_answers, pays):
    asked = draw_asked(n_answers, 30, n_answers)
    plain = one_at_a_time(shape, asked)
    for budget in (40, 300, 100_000):
        found = scoring.answer_sums(shape, asked, budget, "float32", pays=pays)
        np.testing.assert_allclose(found, plain, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("pays", [0.0, 9.0])
def test_anything_else_of_an_answer_is_read_the_same_way(shape, pays):
    """The mean of its states, from the prompt's last token on, as helpers.vpl reads it."""
    asked, plain = draw_asked(2, 12, 2), []
    with torch.inference_mode():
        for one in asked:
            for answer in one.answers:
                states = shape.model(input_ids=torch.tensor([one.prompt + answer[:-1]])).last_hidden_state[0]
                plain.append(states[len(one.prompt) - 1:].mean(0).numpy())
    found = scoring.of_answers(shape, asked, dpo.answer_means, 100, "float32", pays=pays)
    np.testing.assert_allclose(found, plain, rtol=1e-4, atol=1e-5)
    assert scoring.of_answers(shape, [], dpo.answer_means).size == 0


def test_heads_are_read_once(shape, monkeypatch):
    read, real = [], dpo.read_heads
    monkeypatch.setattr(dpo, "read_heads", lambda model, heads: read.extend(heads) or real(model, heads))
    scoring.answer_sums(shape, draw_asked(2, 30, 2), 100, "float32", pays=0.0)
    assert len(read) == len({tuple(head) for head in read}) >= 3


def test_a_prompt_may_have_any_number_of_answers(shape):
    asked = [one._replace(answers=one.answers[:1 + i % 4]) for i, one in enumerate(draw_asked(7, 12, 4))]
    found = scoring.answer_sums(shape, asked, 150, "float32")
    np.testing.assert_allclose(found, one_at_a_time(shape, asked), rtol=1e-5, atol=1e-5)


def test_half_precision_behind_a_head_is_as_near_as_without(shape):
    asked = draw_asked(2, 30, 2)
    exact = one_at_a_time(shape, asked)
    for pays in (0.0, 9.0):
        found = scoring.answer_sums(shape, asked, 300, "bfloat16", pays=pays)
        # 8 bits, at most 20 tokens of up to 12 nats
        np.testing.assert_allclose(found, exact, rtol=2e-2, atol=0.3)


def test_what_is_held_in_memory_at_once_changes_nothing(policy, monkeypatch):
    prompts, chosen, rejected = make_pairs(11)
    whole = scoring.score_pairs(*policy, prompts, chosen, rejected, dtype="float32")
    monkeypatch.setattr(scoring, "AT_ONCE", 4)
    parts = scoring.score_pairs(*policy, prompts, chosen, rejected, dtype="float32")
    pd.testing.assert_frame_equal(parts, whole, rtol=1e-5)


def test_no_pairs_give_no_rows(policy):
    assert scoring.score_pairs(*policy, [], [], []).empty


def test_rule_by_hand():
    # means -2 against -3: right; -2 against -1.5 although its sum is higher: wrong; the same: a tie is wrong
    scores = pd.DataFrame({"logp_chosen": [-4.0, -2.0, -4.0], "n_chosen": [2, 1, 2],
                           "logp_rejected": [-3.0, -3.0, -4.0], "n_rejected": [1, 2, 2]})
    assert scoring.is_correct(scores).tolist() == [True, False, False]


def test_a_pair_of_twins_is_wrong_and_order_does_not_matter(policy):
    prompts, chosen, rejected = make_pairs(8)
    twins = scoring.score_pairs(*policy, prompts, chosen, chosen)
    assert not twins["correct"].any()
    there = scoring.score_pairs(*policy, prompts, chosen, rejected, dtype="float32")
    back = scoring.score_pairs(*policy, prompts[::-1], chosen[::-1], rejected[::-1], dtype="float32")
    np.testing.assert_allclose(there["logp_chosen"], back["logp_chosen"][::-1], rtol=1e-5)
    assert there["correct"].nunique() == 2  # some right, some wrong: the comparison above compares something


def test_fit_by_hand():
    # 12 tokens: 4 of question and 3 of the longer answer leave 5 of the prefix's 7
    prefix, rest, answers = [1, 2, 3, 4, 5, 6, 7], [8] * 4, [[9], [9, 9, 9]]
    assert scoring.fit(prefix, rest, answers, 12) == ([3, 4, 5, 6, 7], 2)
    assert scoring.fit(prefix, rest, answers, 12, side="right") == ([1, 2, 3, 4, 5], 2)
    assert scoring.fit(prefix, rest, answers, 14) == (prefix, 0)
    assert scoring.fit(prefix, rest, answers, 6) == ([], 7)
    # the prompt alone may have 6 tokens: 4 of question leave 2 of the prefix, however much room the answers leave
    assert scoring.fit(prefix, rest, answers, 50, max_prompt=6) == ([6, 7], 5)
    assert scoring.fit(prefix, rest, answers, 12, max_prompt=10) == ([3, 4, 5, 6, 7], 2)
    assert scoring.fit(prefix, rest, answers, 50, max_prompt=3) == ([], 7)


def test_a_long_prefix_loses_its_start_and_nothing_else_is_cut():
    tokenizer = make_tokenizer()
    prompt, texts = (HEADS[2], TAILS[0]), (["a slow roast"], ["lentil stew"])
    (whole,) = scoring.encode_pairs(tokenizer, [prompt], *texts, max_length=500)
    room = len(whole.prompt) - 3 + max(len(whole.chosen), len(whole.rejected))
    (short,) = scoring.encode_pairs(tokenizer, [prompt], *texts, max_length=room)
    assert (short.lost, short.cut) == (3, 0)
    assert short.prompt == whole.prompt[:1] + whole.prompt[4:]  # the begin token stays
    assert (short.chosen, short.rejected) == (whole.chosen, whole.rejected)
    assert tokenizer.decode(whole.chosen) == " a slow roast" + tokenizer.eos_token


def test_a_limit_of_the_prompt_cuts_the_prefix_and_never_the_question():
    texts = ["a" * 30], ["b" * 3]
    for limit, kept in ((40, 4), (19, 3), (10, 0)):
        # begin token 1 and question 15, so that of a limit of 19 three tokens are left for the prefix
        (pair,) = scoring.encode_pairs(SimpleTokenizer(), [("hijk", "q" * 15)], *texts, 100, max_prompt=limit)
        assert (pair.prompt, pair.lost, pair.cut) == ([0] + [ord(c) for c in "hijk"[4 - kept:] + "q" * 15], 4 - kept, 0)
        assert len(pair.chosen) == 32


def test_scores_heed_the_limit_of_the_prompt(policy):
    prompts, chosen, rejected = make_pairs(6)
    free = scoring.score_pairs(*policy, prompts, chosen, rejected)
    tight = scoring.score_pairs(*policy, prompts, chosen, rejected, max_prompt=1)
    bare = scoring.score_pairs(*policy, [("", tail) for _, tail in prompts], chosen, rejected)
    assert (tight["lost"] > 0).sum() == 4  # two of six have no prefix
    np.testing.assert_allclose(tight["logp_chosen"], bare["logp_chosen"], rtol=1e-5)
    assert not np.allclose(tight["logp_chosen"], free["logp_chosen"])


def test_what_is_too_long_without_a_prefix_is_cut_alike_for_every_prefix():
    # room 20 - 1; the question keeps its last 9 tokens, the answers their first 10, the prefix gets nothing
    tokenizer = SimpleTokenizer()
    pairs = [scoring.encode_pairs(tokenizer, [(head, "q" * 15)], ["a" * 30], ["b" * 3], max_length=20)[0]
             for head in ("", "hhhh")]
    assert [len(pairs[0].prompt), len(pairs[0].chosen), len(pairs[0].rejected)] == [10, 10, 5]
    assert (pairs[0].lost, pairs[0].cut) == (0, 6 + 22)  # " " + 30 + end is 32
    assert (pairs[1].lost, pairs[1].cut) == (4, 28)
    assert pairs[0][:3] == pairs[1][:3]


class SimpleTokenizer(SimpleNamespace):
    """One token a character, begun and ended by 0."""

    bos_token_id = eos_token_id = 0

    def __call__(self, texts: list[str], add_special_tokens: bool) -> dict:
        return {"input_ids": [[ord(c) for c in text] for text in texts]}
