"""The judge laboratory: judges whose faults are known, and threes counted by hand."""

from itertools import combinations

import numpy as np
import pandas as pd
import pytest
from scipy.stats import norm

from helpers import artifacts, judge_lab, judging, llm
from helpers.schemas import check
from helpers.world.corpus import Corpus
from helpers.world.facts import load_world
from helpers.world.teacher import truth
from tests.test_judging import CFG, Fixed, tables

EMPTY_KEYS = {"judge": "j", "persona_id": "p01", "question_id": "q"}


def laboratory(fixed, n_questions=8, **sizes):
    """The askings of a judge that is not a model, after a tournament by the same judge."""
    personas, questions, responses = tables(n_questions)
    comparisons = judging.judge(fixed, personas, questions, responses, CFG, seed=1)
    fixed.requests.clear()
    rows = judge_lab.retest(fixed, "fixed", comparisons, personas, questions, responses, CFG, seed=1, **sizes)
    return rows, dict(zip(responses["response_id"], responses["text"], strict=True))


def rates(rows, texts, utility=None):
    return judge_lab.observations(rows, texts, utility).groupby("measure")["correct"].mean().to_dict()


def games(winners: dict[str, str]) -> pd.DataFrame:
    """{"ab": "a"}: of a and b, a won."""
    return pd.DataFrame([EMPTY_KEYS | {"response_a": p[0], "response_b": p[1], "winner": w} for p, w in winners.items()])


def test_the_cost_is_known_before_and_kept():
    # 120 pairs in fives are 24 requests, three times; 30 people's questions with six pairs are 36: 108 in all.
    assert judge_lab.n_requests(CFG) == 108
    fixed = Fixed()
    laboratory(fixed, pairs=20, quartets=5)
    assert len(fixed.requests) == judge_lab.n_requests(CFG, 20, 5) == 3 * 4 + 6
    assert {request.tag for request in fixed.requests} == {"judge_lab"}


def test_every_asking_has_a_seed_of_its_own_that_no_tournament_uses():
    fixed = Fixed()
    laboratory(fixed, pairs=5, quartets=1)
    assert sorted({request.seed for request in fixed.requests}) == [1000, 1001, 1002, 1003]


def test_people_take_turns_in_a_sample():
    rows = pd.DataFrame({"persona_id": ["a"] * 9 + ["b"] * 2 + ["c"] * 9, "row": range(20)})
    drawn = judge_lab.sample(rows, seed=1, n=10)
    assert drawn["persona_id"].value_counts().to_dict() == {"a": 4, "c": 4, "b": 2}
    assert drawn["row"].is_unique
    assert set(drawn["persona_id"].head(3)) == {"a", "b", "c"}
    assert set(judge_lab.sample(rows, 2, 10)["row"]) != set(drawn["row"])


def test_the_askings_are_the_same_pairs_in_the_orders_they_say():
    rows, _ = laboratory(Fixed(), pairs=20, quartets=5)
    check("retests", rows)
    keys = ["persona_id", "question_id", "response_a", "response_b"]
    first, again, swapped, six = (rows[rows["asking"] == a].set_index(keys) for a in judge_lab.ASKINGS)
    assert len(first) == 20
    assert first["shown_first"].equals(again["shown_first"])
    assert set(first.index) == set(swapped.index)
    assert (first["shown_first"] != swapped["shown_first"].reindex(first.index)).all()
    assert six.groupby(["persona_id", "question_id"]).size().tolist() == [6] * 5
    assert 8 <= sum(row.shown_first == index[2] for index, row in six.iterrows()) <= 22  # of 30 fair coins


def test_a_judge_with_a_taste_is_consistent():
    found = rates(*laboratory(Fixed(), pairs=20, quartets=5))
    assert found["same winner, asked again"] == found["same winner, order swapped"] == 1.0
    assert (found["shown first wins"], found["circles among three"]) == (0.5, 0.0)


def test_a_judge_of_position_only_is_found_by_the_swap_and_not_by_asking_again():
    found = rates(*laboratory(Fixed(lambda a, b, ask: True), pairs=20, quartets=5))
    assert found["same winner, asked again"] == 1.0
    assert found["same winner, order swapped"] == 0.0
    assert found["shown first wins"] == 1.0


def test_ties_and_broken_answers_are_kept_in_the_table_and_out_of_the_measures():
    rows, texts = laboratory(Fixed(lambda a, b, ask: None if ask == 1001 else "broken" if ask == 1002 else "judge"),
                             pairs=20, quartets=5)
    assert rows.groupby("asking")["outcome"].unique().str[0].to_dict() == {
        "first": "clear", "again": "tie", "swapped": "unparsable", "every pair": "clear"}
    assert "same winner, asked again" not in rates(rows, texts)
    assert rows["cost_usd"].sum() == pytest.approx(0.5 * (3 * 4 + 6))


def test_circles_by_hand():
    # a beats b, b beats c, c beats a; d loses to all. Of the threes abc, abd, acd, bcd only the first is a circle.
    circle = {"ab": "a", "bc": "b", "ac": "c", "ad": "a", "bd": "b", "cd": "c"}
    assert judge_lab.circles(games(circle))["correct"].tolist() == [True, False, False, False]
    assert not judge_lab.circles(games(circle | {"ac": "a"}))["correct"].any()
    del circle["ab"]  # an open pair leaves acd and bcd
    assert judge_lab.circles(games(circle))["correct"].tolist() == [False, False]


def test_a_coin_makes_a_circle_of_a_quarter_of_the_threes():
    rng = np.random.default_rng(0)
    pairs = ["".join(pair) for pair in combinations("abcd", 2)]
    drawn = [games({p: p[i] for p, i in zip(pairs, rng.integers(2, size=6), strict=True)}).assign(question_id=str(q))
             for q in range(400)]
    # 1,600 threes; those of one set share pairs, but are pairwise independent: sd sqrt(.1875 / 1600) = .011
    coin = judge_lab.MEASURES["circles among three"]
    assert judge_lab.circles(pd.concat(drawn))["correct"].mean() == pytest.approx(coin, abs=0.04)


def test_longer_wins_by_hand():
    texts = {"a": "one two three", "b": "one two", "c": "ONE TWO THREE", "d": "averyveryverylongword"}
    found = judge_lab.longer_wins(games({"ab": "a", "ac": "a", "bd": "d"}), texts)  # a and c have three words each
    assert found[["response_b", "correct"]].to_numpy().tolist() == [["b", True], ["d", False]]


def test_against_truth_by_hand():
    # a is worth 2, b 0.5, c 2: a before b is right with margin 1.5, b before c wrong; a and c are alike and left out.
    utility = pd.DataFrame([("p01", "q", r, "divergent", u) for r, u in (("a", 2.0), ("b", 0.5), ("c", 2.0))],
                           columns=["persona_id", "question_id", "response_id", "kind", "utility"])
    found = judge_lab.against_truth(games({"ab": "a", "bc": "b", "ac": "a"}), utility)
    assert found[["correct", "margin"]].to_numpy().tolist() == [[True, 1.5], [False, 1.5]]


def test_expected_right_is_the_normal_curve():
    assert judge_lab.expected_right(pd.Series([0.0, 0.35]), 0.35) == pytest.approx([0.5, 0.8413], abs=1e-4)
    assert judge_lab.expected_right(pd.Series([0.1]), 0.0).tolist() == [1.0]
    # margin = noise = 1, ties below 1: right Phi(0) = .5, wrong Phi(-2) = .02275; of the clear ones .5 / .52275
    assert judge_lab.expected_right(pd.Series([1.0]), 1.0, tie_below=1.0) == pytest.approx([0.95648], abs=1e-5)


def test_bins_hold_equally_many_and_are_named_by_their_mean():
    # 1 to 8 in four bins of two: means 1.5, 3.5, 5.5, 7.5; equal margins stay together
    assert judge_lab.margin_bins(pd.Series(range(1, 9)), 4).tolist() == [1.5, 1.5, 3.5, 3.5, 5.5, 5.5, 7.5, 7.5]
    assert judge_lab.margin_bins(pd.Series([2.0] * 5 + [3.0]), 4).nunique() <= 2


@pytest.fixture(scope="module", name="little")
def simulated_tournaments(tmp_path_factory):
    """Six people of the world, eight questions each, answers from the corpus, judged by the teacher without noise."""
    world, corpus = load_world("little"), Corpus(load_world("little"), 3)
    people = list(world.people.values())[:6]
    personas = pd.DataFrame([(f"p{i:02d}", p.name, [p.memberships[0][0]]) for i, p in enumerate(people)],
                            columns=["persona_id", "name", "axes"])
    rows = [(f"q-{axis}-{i}", "divergent", axis, "", "train", text) for axis in sorted({a for [a] in personas["axes"]})
            for i, text in enumerate(world.divergent_questions(axis)[:8])]
    questions = pd.DataFrame(rows, columns=["question_id", "kind", "axis", "persona_id", "split", "text"])
    answers = [(f"{q.question_id}-r{j}", q.question_id, corpus.answer(q.axis) + " Yes." * (j % 2), True)
               for q in questions.itertuples() for j in range(4)]
    responses = pd.DataFrame(answers, columns=["response_id", "question_id", "text", "selected"])
    store = artifacts.open_run("smoke", runs=tmp_path_factory.mktemp("runs"),
                               sets=["world_knobs.noise=0.0", "world_knobs.tie_below=0.000001"])
    comparisons = judging.judge(llm.connect(store), personas, questions, responses, store.profile, seed=1)
    return store, comparisons, personas, questions, responses


@pytest.mark.parametrize(("knobs", "measure", "low", "high"), [
    ({}, "better answer wins", 1.0, 1.0),
    ({}, "same winner, order swapped", 1.0, 1.0),
    ({}, "circles among three", 0.0, 0.0),
    ({"position_bias": 50.0}, "shown first wins", 1.0, 1.0),
    ({"position_bias": 50.0}, "same winner, order swapped", 0.0, 0.0),
    ({"length_bias": 50.0}, "longer answer wins", 1.0, 1.0),
    ({"noise": 50.0}, "same winner, asked again", 0.3, 0.7),
    ({"noise": 50.0}, "better answer wins", 0.3, 0.7),
    ({"noise": 50.0}, "circles among three", 0.1, 0.4),
])
def test_the_laboratory_sees_what_was_planted(little, knobs, measure, low, high):
    store, comparisons, personas, questions, responses = little
    teacher = judge_lab.planted(store, **knobs)
    rows = judge_lab.retest(teacher, "planted", comparisons, personas, questions, responses, store.profile, 1, 40, 12)
    texts = dict(zip(responses["response_id"], responses["text"], strict=True))
    seen = judge_lab.observations(rows, texts, truth(load_world("little"), personas, questions, responses))
    assert low <= seen.loc[seen["measure"] == measure, "correct"].mean() <= high
    assert set(seen["measure"]) == set(judge_lab.MEASURES)


def test_the_share_of_right_verdicts_follows_the_normal_curve(little):
    """With noise 1.5 and margins around it, the judge is right as often as Phi(margin / noise) says."""
    store, comparisons, personas, questions, responses = little
    teacher = judge_lab.planted(store, noise=1.5)
    rows = judge_lab.retest(teacher, "noisy", comparisons, personas, questions, responses, store.profile, 1, 140, 40)
    utility = truth(load_world("little"), personas, questions, responses)
    known = judge_lab.against_truth(rows[rows["winner"] != ""], utility)
    expected = judge_lab.expected_right(known["margin"], 1.5)
    spread = np.sqrt((expected * (1 - expected)).sum()) / len(known)
    assert abs(known["correct"].mean() - expected.mean()) < 4 * spread  # four: pairs asked twice are counted twice
    assert norm.cdf(0) < expected.mean() < 0.99
