"""Win rates and rankings against numbers worked by hand."""

import numpy as np
import pandas as pd
import pytest
from scipy.stats import binomtest

from helpers import ranking, stats
from helpers.claims import paper

OPTIONS = {"n_boot": 200, "seed": 1}


def judged(*verdicts: str, a="x", b="y", person="p01", kind="divergent") -> pd.DataFrame:
    """The two judgements of each pair: "aa" a wins in both orders, "ab" when first and b when first, "-" a tie."""
    rows = [(person, f"q{i}", kind, a, b, first, {"a": a, "b": b}.get(mark, ""),
             {"-": "tie", "?": "unparsable"}.get(mark, "clear"))
            for i, marks in enumerate(verdicts) for first, mark in zip((a, b), marks, strict=True)]
    columns = ["persona_id", "question_id", "kind", "system_a", "system_b", "shown_first", "winner", "outcome"]
    return pd.DataFrame(rows, columns=columns)


def matches(scores: list[float], a="x", b="y", people: int = 1) -> pd.DataFrame:
    """Matches that end a : b = score : 1 - score, the same for each of so many people."""
    rows = [(f"p{p}", f"q{i}", "divergent", a, b, score, "agreed" if score != 0.5 else "tie")
            for p in range(people) for i, score in enumerate(scores)]
    return pd.DataFrame(rows, columns=["persona_id", "question_id", "kind", "system_a", "system_b", "score", "how"])


def test_a_win_has_to_stand_in_both_orders():
    # won, lost, the first shown wins twice, the second shown wins twice, a tie and a win, two ties, no answer
    found = ranking.decide(judged("aa", "bb", "ab", "ba", "-a", "--", "?a"))
    assert found["score"].tolist() == [1, 0, 0.5, 0.5, 0.5, 0.5]
    assert found["how"].tolist() == ["agreed", "agreed", "disagreed", "disagreed", "tie", "tie"]
    assert found["question_id"].tolist() == [f"q{i}" for i in range(6)]
    one_order = judged("aa").iloc[:1]
    assert ranking.decide(one_order).empty
    assert list(ranking.decide(one_order).columns) == list(found.columns)


def test_rates_by_hand():
    # x : y = 1 + 1 + .5 + 0 of 4 = .625 for everybody, so any draw of the five people gives the same
    table = ranking.rates(matches([1, 1, 0.5, 0], people=5), **OPTIONS).set_index(["system", "against"])
    row = table.loc[("x", "y")]
    assert (row["rate"], row["low"], row["high"]) == (0.625, 0.625, 0.625)
    assert (row["n_people"], row["n_pairs"], row["ties"], row["disagreed"]) == (5, 20, 0.25, 0)
    assert table.loc[("y", "x"), "rate"] == 0.375
    assert (row["wilson_low"], row["wilson_high"]) == ranking.wilson(12.5, 20)


def test_a_group_too_small_for_an_interval_keeps_its_rate():
    row = ranking.rates(matches([1, 0.5], people=2), few="blank", **OPTIONS).iloc[0]
    assert row["rate"] == 0.75
    assert np.isnan(row["low"])
    with pytest.raises(stats.TooFewPeople):
        ranking.rates(matches([1, 0.5], people=2), **OPTIONS)


def test_without_matches_there_are_no_rates_and_no_ranking():
    nothing = ranking.decide(judged())
    assert ranking.rates(nothing, **OPTIONS).empty
    assert ranking.strengths(nothing, **OPTIONS).empty


def test_layout_is_that_of_table_3():
    rows = [("x", "y", 0.625, 0.5, 0.75), ("y", "x", 0.375, 0.25, 0.5), ("x", "z", 1, 1, 1), ("z", "x", 0, 0, 0)]
    rates = pd.DataFrame(rows, columns=["system", "against", "rate", "low", "high"])
    table = ranking.layout(rates, {"x": "MT T", "y": "base F"})
    assert table.to_numpy().tolist() == [["MT T", "–", "62 [50, 75]", "62"], ["base F", "38 [25, 50]", "–", "38"]]
    assert list(table.columns) == ["row beats column", "MT T", "base F", "average"]
    plain = ranking.layout(rates.drop(columns=["low", "high"]), {"x": "X", "z": "Z"})
    assert plain.to_numpy().tolist() == [["X", "–", "100", "100"], ["Z", "0", "–", "0"]]


def test_the_average_counts_every_opponent_once():
    # against y 1 of 1; against z 0 + .5 of 2 = .25: average .625 (over the three matches it would be .5)
    both = pd.concat([matches([1], people=5), matches([0, 0.5], b="z", people=5)])
    assert ranking.average(both, "x", **OPTIONS).estimate == 0.625
    assert ranking.average(both, "x", ["z"], **OPTIONS).estimate == 0.25
    assert ranking.average(both, "z", **OPTIONS) == stats.Estimate(0.75, 0.75, 0.75, 5)
    with pytest.raises(stats.NoEstimate, match="w has met nobody"):
        ranking.average(both, "w", **OPTIONS)


def test_the_average_is_that_of_the_papers_table_3():
    """Its last column is the mean of a row: 64, 58 and 68 give 63 (63.3), 55, 53 and 36 give 48."""
    table = paper("Table 3")
    cells, printed = table[table.against_model != "average"], table[table.against_model == "average"]
    means = cells.groupby(["model", "prefix"]).value.mean()
    for row in printed.itertuples():
        assert round(means[row.model, row.prefix]) == row.value


@pytest.mark.parametrize(("wins", "n", "confidence"), [(60, 100, 0.95), (0, 7, 0.95), (7, 7, 0.8)])
def test_wilson_is_scipys(wins, n, confidence):
    expected = binomtest(wins, n).proportion_ci(confidence, method="wilson")
    assert ranking.wilson(wins, n, confidence) == pytest.approx((expected.low, expected.high))


def test_half_a_win_lies_between():
    low = [ranking.wilson(wins, 10)[0] for wins in (4, 4.5, 5)]
    assert low == sorted(low)
    # by hand, z = 1.96, p = .45: (.45 + .19208 - 1.96 sqrt(.02475 + .009604)) / 1.38416 = .2014
    assert low[1] == pytest.approx(0.2014, abs=1e-4)


def test_two_systems_by_hand():
    # x wins 3 of 4: odds 3 : 1, so strengths +- log(3) / 2; with 2 wins and a tie of 4, odds 2.5 : 1.5
    found = ranking.bradley_terry(np.array([[0, 3.0], [1, 0]]), draws=0)
    np.testing.assert_allclose(found, [np.log(3) / 2, -np.log(3) / 2], atol=1e-9)
    found = ranking.bradley_terry(np.array([[0, 2.5], [1.5, 0]]), draws=0)
    np.testing.assert_allclose(found[0] - found[1], np.log(2.5 / 1.5), atol=1e-9)


def test_three_systems_by_hand():
    """2 : 1, 2 : 1 and 4 : 1 are the odds of strengths log 4, log 2, 0: with the mean taken off log 2, 0, -log 2."""
    wins = np.array([[0, 2.0, 4], [1, 0, 2], [1, 1, 0]])
    expected = [np.log(2), 0, -np.log(2)]
    np.testing.assert_allclose(ranking.bradley_terry(wins, draws=0), expected, atol=1e-8)
    many = np.stack([wins, wins[::-1, ::-1]])
    np.testing.assert_allclose(ranking.bradley_terry(many, draws=0), [expected, expected[::-1]], atol=1e-8)


def test_who_always_won_needs_the_added_draw():
    # 2 : 0 and one draw: 2.5 : 0.5
    always = np.array([[0, 2.0], [0, 0]])
    found = ranking.bradley_terry(always)
    assert found[0] - found[1] == pytest.approx(np.log(5))
    with pytest.raises(stats.NoEstimate, match="always won or never"):
        ranking.bradley_terry(always, draws=0)


def test_who_never_met_gets_no_draw():
    """x meets y (3 : 1) and y meets z (1 : 3); x and z never met: x - z is 0 through y, with or without draws."""
    wins = np.array([[0, 3.0, 0], [1, 0, 1], [0, 3, 0]])
    for draws in (0, 1):
        found = ranking.bradley_terry(wins, draws)
        assert found[0] == pytest.approx(found[2])
        assert found[0] > found[1]


def test_the_ranking_is_sorted_and_its_intervals_come_from_people():
    same = matches([1, 1, 1, 0], people=6)
    table = ranking.strengths(same, draws=0, **OPTIONS)
    assert table["system"].tolist() == ["x", "y"]
    np.testing.assert_allclose(table.loc[0, ["estimate", "low", "high"]].astype(float), np.log(3) / 2, atol=1e-5)
    mixed = pd.concat([same, matches([0, 0, 0, 1], people=3)])  # three of the six also say the opposite
    wide = ranking.strengths(mixed, draws=0, **OPTIONS)
    assert wide.loc[0, "low"] < wide.loc[0, "estimate"] < wide.loc[0, "high"]


def tournament(order: list[str], people: int = 6) -> pd.DataFrame:
    """Who stands earlier in the order beats everybody after."""
    pairs = [(a, b) for i, a in enumerate(order) for b in order[i + 1:]]
    return pd.concat([matches([1.0], a, b, people) for a, b in pairs], ignore_index=True)


def accuracies(rights: dict[str, int], people: int = 6) -> pd.DataFrame:
    """So many of four pairs right for each system, the same for everybody."""
    rows = [(system, f"p{p}", i < right) for system, right in rights.items() for p in range(people) for i in range(4)]
    return pd.DataFrame(rows, columns=["system", "persona_id", "correct"])


def test_rank_correlation_by_hand():
    scores = accuracies({"a": 4, "b": 3, "c": 2, "d": 1})
    found, points = ranking.rank_correlation(scores, tournament(["a", "b", "c", "d"]), **OPTIONS)
    assert found == stats.Estimate(pytest.approx(1), pytest.approx(1), pytest.approx(1), 6)
    # of three opponents d beats none, c one, b two, a three
    np.testing.assert_allclose(points["win_rate"], [0, 1 / 3, 2 / 3, 1])
    assert points["accuracy"].tolist() == [0.25, 0.5, 0.75, 1]
    found, _ = ranking.rank_correlation(scores, tournament(["d", "c", "b", "a"]), **OPTIONS)
    assert found.estimate == pytest.approx(-1)
    # ranks 1 2 3 4 against 1 2 4 3: rho = 1 - 6 x (0 + 0 + 1 + 1) / (4 x 15) = .8
    found, _ = ranking.rank_correlation(scores, tournament(["b", "a", "c", "d"]), **OPTIONS)
    assert found.estimate == pytest.approx(0.8)


def test_rank_correlation_needs_systems_and_takes_only_those_that_both_have():
    scores = accuracies({"a": 4, "b": 3, "c": 2, "e": 1})
    with pytest.raises(stats.NoEstimate, match="3 systems have both"):
        ranking.rank_correlation(scores, tournament(["a", "b", "c", "d"]), **OPTIONS)
    found, points = ranking.rank_correlation(scores, tournament(["a", "b", "c", "d"]), few="blank", **OPTIONS)
    assert np.isnan(found.estimate)
    assert (found.n_people, sorted(points["system"])) == (6, ["a", "b", "c"])
