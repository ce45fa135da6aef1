"""Counts of pairs by hand, ROUGE as rouge_score gives it, a picture that comes out the same."""

import numpy as np
import pandas as pd
import pytest
from rouge_score.rouge_scorer import RougeScorer

from helpers import judging, questions
from helpers.config import load_profile

COLUMNS = ["question_id", "kind", "axis", "persona_id", "split", "text"]
WORDS = ["what", "should", "i", "cook", "for", "dinner", "on", "a", "rainy", "sunday", "with", "two", "friends"]


def asked(people, axes, personal, divergent):
    """So many questions of each split for every person and every axis."""
    rows = [(f"q-{whose}-{split}{i}", kind, axis, persona, split, f"{whose} {split} {i}?")
            for kind, whose, axis, persona, n in
            [("personal", p, "personal", p, personal) for p in people]
            + [("divergent", a, a, "", divergent) for a in axes]
            for split in ("train", "test") for i in range(n)]
    return pd.DataFrame(rows, columns=COLUMNS)


def cast(**axes_of):
    return pd.DataFrame({"persona_id": list(axes_of), "name": list(axes_of), "axes": list(axes_of.values())})


def test_the_papers_two_counts_of_test_pairs():
    # 50 people, 11 axes of five but one of four, so 54 memberships: one person on three axes, two on two;
    # 50 + 50 questions of each split: 50 x 50 + 54 x 50 = 5,200 against 50 x 100 = 5,000
    people = [f"p{i:02d}" for i in range(50)]
    slots = [f"axis{a}" for a in range(11) for _ in range(4 if a == 10 else 5)]
    axes_of = {p: [slots[i]] for i, p in enumerate(people)}
    for extra, person in zip(slots[50:], ["p00", "p00", "p05", "p11"], strict=True):
        axes_of[person] = sorted({*axes_of[person], extra} if extra not in axes_of[person] else
                                 {*axes_of[person], "axis2"})
    assert sum(map(len, axes_of.values())) == 54
    counts = questions.planned_pairs(cast(**axes_of), asked(people, sorted(set(slots)), 50, 50))
    totals = counts.groupby("split")[["by_memberships", "by_people", "kept"]].sum()
    assert totals.loc["test"].tolist() == [5200, 5000, 5200]
    assert totals.loc["train"].tolist() == [5200, 5000, 5000]


def test_planned_pairs_are_those_that_labelling_keeps():
    personas = cast(p01=["diet"], p02=["diet", "music"])
    table = asked(personas["persona_id"], ["diet", "music"], personal=2, divergent=3)
    table = pd.concat([table, asked([], ["travel"], 0, 3)])  # an axis that nobody is on
    counts = questions.planned_pairs(personas, table).set_index(["kind", "split"])
    # p01: 3 of diet; p02: 3 of diet and 3 of music
    assert counts.loc[("divergent", "test")].tolist() == [9, 6, 9]
    assert counts.loc[("divergent", "train")].tolist() == [9, 6, 6]
    assert counts.loc[("personal", "test")].tolist() == [4, 4, 4]
    responses = pd.DataFrame([(f"{q}-r{i}", q, f"{q} {i}", True) for q in table["question_id"] for i in range(4)],
                             columns=["response_id", "question_id", "text", "selected"])
    finals = [(m.persona_id, m.question_id, 3, m.response_a, m.response_b, m.response_a)
              for m in judging.first_rounds(personas, table, responses, seed=1) if m.round == 1]
    comparisons = pd.DataFrame(finals, columns=["persona_id", "question_id", "round", "response_a",
                                                "response_b", "winner"])
    labelled = judging.label(comparisons, table, responses, load_profile("smoke"), seed=1)
    assert labelled.groupby(["kind", "split"]).size().to_dict() == counts["kept"].to_dict()


def test_the_nearest_train_question_by_hand():
    # "what to eat on sunday" against "what to cook on sunday": 4 of 5 words in order, F1 = .8;
    # against "sunday on what to eat": the longest common subsequence is "what to eat", 3 of 5, F1 = .6
    rows = [("q1", "divergent", "diet", "", "test", "What to eat on Sunday?"),
            ("q2", "divergent", "diet", "", "train", "Sunday: on what to eat?"),
            ("q3", "divergent", "diet", "", "train", "What to cook on Sunday?"),
            ("q4", "personal", "personal", "p01", "train", "What to eat on Sunday?"),
            ("q5", "personal", "personal", "p02", "test", "Who asks?")]
    found = questions.train_test_rouge(pd.DataFrame(rows, columns=COLUMNS))
    assert found["question_id"].tolist() == ["q1"]  # p02 has no train question, and p01's belongs to p01
    assert found.loc[0, ["kind", "source", "nearest"]].tolist() == ["divergent", "diet", "What to cook on Sunday?"]
    assert found.loc[0, "rouge"] == pytest.approx(0.8)


@pytest.mark.parametrize("seed", range(3))
def test_scores_are_those_of_rouge_score_over_all_pairs(seed):
    rng = np.random.default_rng(seed)
    rows = [(f"q{i}", "divergent", f"axis{i % 2}", "", "train" if i % 4 < 2 else "test",
             " ".join(rng.choice(WORDS, size=rng.integers(1, 12)))) for i in range(60)]
    table = pd.DataFrame(rows, columns=COLUMNS)
    score = RougeScorer(["rougeL"]).score
    found = questions.train_test_rouge(table).set_index("question_id")
    for test in table[table["split"] == "test"].itertuples():
        train = table[(table["split"] == "train") & (table["axis"] == test.axis)]["text"]
        assert found.loc[test.question_id, "rouge"] == max(score(t, test.text)["rougeL"].fmeasure for t in train)
        assert score(found.loc[test.question_id, "nearest"], test.text)["rougeL"].fmeasure == found.loc[
            test.question_id, "rouge"]


def test_the_picture_follows_from_the_seed_and_keeps_groups_together():
    rng = np.random.default_rng(0)
    groups = np.repeat(rng.normal(size=(3, 8)) * 10, 12, axis=0) + rng.normal(size=(36, 8)) * 0.1
    flat = questions.project(groups, seed=5)
    assert flat.shape == (36, 2)
    np.testing.assert_array_equal(flat, questions.project(groups, seed=5))
    gap = np.linalg.norm(flat[:, None] - flat[None], axis=-1)
    np.fill_diagonal(gap, np.inf)
    assert (gap.argmin(axis=1) // 12 == np.arange(36) // 12).all()


def test_too_few_points_are_an_error_and_four_are_enough():
    with pytest.raises(ValueError, match="3 questions"):
        questions.project(np.eye(3), seed=0)
    assert questions.project(np.eye(4), seed=0).shape == (4, 2)
