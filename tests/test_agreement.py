"""Agreement against numbers worked by hand, and against scikit-learn and the krippendorff package."""

import krippendorff
import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import cohen_kappa_score

from helpers import agreement
from helpers.agreement import blind_choice, cohen_kappa, krippendorff_alpha, match_rate, mean_kappa, per_axis

NAN = float("nan")


def labels(rng, raters, items, codes, missing):
    """Random labels that follow a hidden answer half of the time, a share of them missing."""
    hidden, follow = rng.integers(codes, size=items), rng.random((raters, items)) < 0.5
    table = np.where(follow, hidden, rng.integers(codes, size=(raters, items))).astype(float)
    table[rng.random((raters, items)) < missing] = np.nan
    return table


def test_match_rate_and_kappa_by_hand():
    # Ten items. Both say 1 four times and 2 three times, they differ three times: match .7. a has 1 six times, b five
    # times: chance .6 x .5 + .4 x .5 = .5; kappa (.7 - .5) / (1 - .5) = .4.
    a = np.array([1, 1, 1, 1, 2, 2, 2, 1, 1, 2])
    b = np.array([1, 1, 1, 1, 2, 2, 2, 2, 2, 1])
    assert match_rate(a, b) == pytest.approx(0.7)
    assert cohen_kappa(a, b) == pytest.approx(0.4)


def test_what_one_side_did_not_label_does_not_count():
    a, b = np.array([1, 1, 2, NAN, 1]), np.array([1, 2, 2, 2, NAN])
    assert match_rate(a, b) == pytest.approx(2 / 3)
    assert cohen_kappa(a, b) == pytest.approx(cohen_kappa_score([1, 1, 2], [1, 2, 2]))


def test_the_mean_kappa_is_over_the_pairs_of_raters():
    same, other = np.array([1.0, 1, 2, 2]), np.array([2.0, 2, 1, 1])
    # kappa is 1 between the two that agree, -1 between each of them and the third: (1 - 1 - 1) / 3.
    assert mean_kappa(np.stack([same, same, other])) == pytest.approx(-1 / 3)


def test_what_is_not_determined_is_nan():
    ones, none = np.ones(5), np.full(5, NAN)
    assert np.isnan(cohen_kappa(ones, ones))  # both always say 1: chance explains it all
    assert np.isnan(krippendorff_alpha(np.stack([ones, ones])))
    assert np.isnan(krippendorff_alpha(np.stack([ones, none])))  # nothing to pair
    assert np.isnan(match_rate(ones, none))
    assert np.isnan(mean_kappa(np.stack([ones, none])))


def test_alpha_by_hand():
    # Three items, two raters: (1, 1), (2, 2), (1, 2). Six values, three of each. Observed disagreement 2/6, the two
    # ordered pairs of the third item; expected 2 x 3 x 3 / (6 x 5) = .6; alpha 1 - (1/3) / .6 = 4/9.
    assert krippendorff_alpha([[1, 2, 1], [1, 2, 2]]) == pytest.approx(4 / 9)


@pytest.mark.parametrize("seed", range(20))
def test_kappa_is_that_of_scikit_learn(seed):
    a, b = labels(np.random.default_rng(seed), 2, items=5 + seed, codes=2 + seed % 3, missing=0.2 * (seed % 2))
    both = ~np.isnan(a) & ~np.isnan(b)
    assert cohen_kappa(a, b) == pytest.approx(cohen_kappa_score(a[both], b[both]), abs=1e-12)


@pytest.mark.parametrize("seed", range(20))
def test_alpha_is_that_of_the_krippendorff_package(seed):
    table = labels(np.random.default_rng(seed), 2 + seed % 4, items=6 + seed, codes=2 + seed % 3, missing=0.15 * (seed % 4))
    expected = krippendorff.alpha(reliability_data=table, level_of_measurement="nominal")
    assert krippendorff_alpha(table) == pytest.approx(expected, abs=1e-12)


def test_blind_choice_by_hand_and_by_drawing():
    # Five people, four answers: 4 (1 - (3/4)^5) = 3.0508 answers are chosen by somebody, 5 / 3.0508 = 1.6389.
    assert blind_choice(5) == pytest.approx(1.6389, abs=5e-5)
    assert blind_choice(4) == pytest.approx(1.4629, abs=5e-5)
    draws = np.random.default_rng(0).integers(4, size=(20_000, 5))
    chosen = sum(len(set(row)) for row in draws.tolist())
    assert draws.size / chosen == pytest.approx(blind_choice(5), abs=0.01)


def finals(votes: dict[str, dict[str, str]]) -> pd.DataFrame:
    """votes: axis -> question -> one letter per person, the answer they chose."""
    rows = [(axis, f"{axis}-{q}", f"p{i}", letter) for axis, questions in votes.items()
            for q, letters in questions.items() for i, letter in enumerate(letters)]
    return pd.DataFrame(rows, columns=["axis", "question_id", "persona_id", "winner"])


def test_people_per_chosen_answer_by_hand():
    # diet: question 1 has 3 + 1 + 1 fans, question 2 has 5: ten choices of four chosen answers = 2.5, std over
    # [3, 1, 1, 5] = sqrt(11/4) = 1.658. home: everybody another one, 4 of 4 and 2 of 2 = 1.
    table = per_axis(finals({"diet": {"1": "aaabc", "2": "ddddd"}, "home": {"1": "abcd", "2": "ac"}}), n_boot=200, seed=1)
    diet, home = table.iloc[0], table.iloc[1]
    assert (diet["axis"], diet["estimate"], diet["n_people"], diet["n_questions"]) == ("diet", 2.5, 5, 2)
    assert diet["std"] == pytest.approx(np.sqrt(11 / 4))
    assert diet["blind"] == pytest.approx(blind_choice(5))
    assert (diet["low"], diet["high"]) == (pytest.approx(5 / 3), 5.0)  # twice the first or twice the second question
    assert (home["estimate"], home["std"]) == (1.0, 0.0)
    # four people on one question, two on the other: 6 choices of 4 (1 - .75^4) + 4 (1 - .75^2) expected answers
    assert home["blind"] == pytest.approx(6 / (4 * (1 - 0.75**4) + 4 * (1 - 0.75**2)))


def test_people_who_choose_blindly_are_at_the_blind_level():
    rng = np.random.default_rng(3)
    letters = {str(q): "".join(rng.choice(list("abcd"), size=8)) for q in range(400)}
    row = per_axis(finals({"diet": letters}), n_boot=500, seed=1).iloc[0]
    assert row["low"] < row["blind"] < row["high"]
    assert row["blind"] == pytest.approx(agreement.blind_choice(8))


def test_one_question_gets_a_row_without_an_interval():
    assert np.isnan(per_axis(finals({"diet": {"1": "aab"}}), n_boot=50, seed=1)["estimate"].item())
