"""Person-level statistics against numbers worked by hand."""

import numpy as np
import pandas as pd
import pytest
import scipy.stats

from helpers import stats


def pairs(rights: dict[str, list[int]], **columns) -> pd.DataFrame:
    rows = [{"persona_id": who, "correct": bool(c)} for who, cs in rights.items() for c in cs]
    return pd.DataFrame(rows).assign(**columns)


def test_accuracy_is_the_mean_over_pairs_and_every_draw_of_equal_people_gives_it():
    # Five people, each 1 right of 2: any draw of people has accuracy 1/2, so the interval has no width.
    found = stats.cluster_bootstrap(pairs({f"p{i}": [1, 0] for i in range(5)}, prefix="none"), "prefix")
    assert found.to_dict("records") == [
        {"prefix": "none", "accuracy": 0.5, "low": 0.5, "high": 0.5, "n_people": 5, "n_pairs": 10}
    ]


def test_a_person_with_more_pairs_weighs_more():
    # 4 people with 1 pair, wrong; 1 person with 4 pairs, right: 4 of 8 pairs = .5 (the mean of means is .2).
    found = stats.cluster_bootstrap(pairs({"a": [0], "b": [0], "c": [0], "d": [0], "e": [1] * 4}, k=1), ["k"])
    assert found.accuracy.item() == 0.5
    assert found.low.item() == 0.0


def test_people_are_drawn_and_not_pairs():
    # Ten people, each all right or all wrong in 50 pairs. The sd of a draw's mean over 10 people is
    # sqrt(.25/10) = .158, so the 95 % interval is about .5 +- .31; over 500 pairs it would be .5 +- .044.
    rights = {f"p{i}": [i % 2] * 50 for i in range(10)}
    found = stats.cluster_bootstrap(pairs(rights, k=1), "k").iloc[0]
    assert 0.5 < found.high - found.low < 0.7


def test_too_few_people_raise_or_leave_a_blank_row_with_its_count():
    big, small = pairs({f"p{i}": [1] for i in range(5)}, g="big"), pairs({"q": [1], "r": [0]}, g="small")
    scores = pd.concat([big, small])
    with pytest.raises(stats.TooFewPeople, match="2 people, at least 5"):
        stats.cluster_bootstrap(scores, "g")
    small = stats.cluster_bootstrap(scores, "g", few="blank").set_index("g").loc["small"]
    assert small.n_people == 2
    assert np.isnan(small.accuracy)


def test_the_same_seed_gives_the_same_interval_and_another_seed_another():
    rng = np.random.default_rng(0)
    scores = pairs({f"p{i}": rng.integers(2, size=7 + i).tolist() for i in range(9)}, k=1)
    first, again, other = (stats.cluster_bootstrap(scores, "k", seed=s, n_boot=50) for s in (1, 1, 2))
    assert first.equals(again)
    assert not first.equals(other)


def test_intervals_cover_the_truth_about_as_often_as_they_say():
    # 30 people whose own accuracy is uniform on (.3, .9): truth .6. Percentile intervals of 30 clusters cover
    # a bit under 95 %; 200 worlds give a standard error of .015, so .90 to .99 is a fair window.
    rng, hits = np.random.default_rng(5), 0
    for world in range(200):
        ability = rng.uniform(0.3, 0.9, size=30)
        right = rng.random((30, 10)) < ability[:, None]
        values = np.stack([right.sum(1), np.full(30, 10)], axis=1).astype(float)
        found = stats.resample(values, lambda v: v[..., 0].sum(-1) / v[..., 1].sum(-1), 400, world)
        hits += found.low <= 0.6 <= found.high
    assert 0.90 <= hits / 200 <= 0.99


def test_a_difference_is_paired_by_person():
    # Everybody is one pair of two better in a: .5 in every draw, although people differ.
    a = pairs({"1": [1, 1], "2": [1, 0], "3": [1, 1], "4": [1, 0], "5": [1, 1]})
    b = pairs({"1": [1, 0], "2": [0, 0], "3": [1, 0], "4": [0, 0], "5": [0, 1]})
    assert stats.difference(a, b) == pytest.approx((0.5, 0.5, 0.5, 5))


def test_only_people_with_both_conditions_enter_a_difference():
    a = pairs({str(i): [1] for i in range(6)})
    b = pairs({str(i): [1] for i in range(5)} | {"other": [0]})
    assert stats.difference(a, b) == (0.0, 0.0, 0.0, 5)


def test_an_unpaired_contrast_uses_everybody():
    a, b = pairs({str(i): [1] for i in range(5)}), pairs({str(i): [0, 1] for i in range(5, 12)})
    found = stats.contrast([a, b], lambda rates: rates[..., 0] - rates[..., 1], paired=False)
    assert (found.estimate, found.n_people) == (0.5, 12)


def test_permutation_of_three_people_by_hand():
    # Gaps .3, .2, .1, sum .6. Of the 8 sign patterns only +++ and --- reach |.6|: p = 2/8.
    a = pd.Series({"x": 0.8, "y": 0.7, "z": 0.6})
    assert stats.paired_permutation(a, a - pd.Series({"x": 0.3, "y": 0.2, "z": 0.1})) == 0.25
    # Gaps .3, .2, -.1, sum .4: +++ (.6), ++- (.4), their mirrors: p = 4/8.
    assert stats.paired_permutation(a, a - pd.Series({"x": 0.3, "y": 0.2, "z": -0.1})) == 0.5


def test_drawn_permutations_agree_with_the_exact_ones():
    # One person more than the exact limit, gaps all .1: exact p = 2/2^13 = .00024.
    people = [f"p{i}" for i in range(stats.EXACT_UP_TO + 1)]
    a, b = pd.Series(0.6, index=people), pd.Series(0.5, index=people)
    assert stats.paired_permutation(a, b) <= 0.001
    mixed = b.copy()
    mixed.iloc[::2] = 0.7  # seven gaps of -.1 and six of +.1: any pattern has at least |.1|, so p = 1
    assert stats.paired_permutation(a, mixed) == 1.0


def test_permutation_needs_people_in_common():
    with pytest.raises(stats.TooFewPeople, match="persona_id"):
        stats.paired_permutation(pd.Series({"x": 1.0}), pd.Series({"y": 1.0}))


def test_many_differences_by_hand():
    # Six people. x: everybody right against everybody wrong, difference 1, p = 2/64. y: the same scores twice,
    # difference 0, p = 1. z: four people only, left out. Holm over two tests: 2/64 times 2, and 1.
    right, wrong = pairs({f"p{i}": [1] for i in range(6)}), pairs({f"p{i}": [0] for i in range(6)})
    few = pairs({f"p{i}": [1] for i in range(4)})
    found = stats.paired_tests([("x", 1, right, wrong), ("y", 2, right, right), ("z", 3, few, few)], ["a", "b"])
    assert found.columns.tolist() == ["a", "b", "estimate", "low", "high", "n_people", "p", "p_holm"]
    assert found.values.tolist() == [["x", 1, 1.0, 1.0, 1.0, 6, 1 / 32, 1 / 16], ["y", 2, 0.0, 0.0, 0.0, 6, 1.0, 1.0]]
    assert stats.paired_tests([], ["a"]).empty


def test_holm_by_hand():
    # Sorted .01 .03 .04 times 3 2 1 = .03 .06 .04; never falling: .03 .06 .06.
    assert stats.holm([0.04, 0.01, 0.03]) == pytest.approx([0.06, 0.03, 0.06])
    assert stats.holm([0.9, 0.8]) == pytest.approx([1.0, 1.0])


def test_pearson_and_its_p_against_worked_values():
    people = list("abcde")
    x = pd.Series([1.0, 2, 3, 4, 5], index=people)
    y = pd.Series([2.0, 1, 4, 3, 5], index=people)
    # Deviations -2 -1 0 1 2 and -1 -2 1 0 2: products 2 + 2 + 0 + 0 + 4 = 8, both sums of squares 10: r = .8.
    found = stats.pearson_interval(x, y.sample(frac=1, random_state=0), min_people=5)
    assert found.estimate == pytest.approx(0.8)
    assert found.low <= 0.8 <= found.high
    # t = .8 * sqrt(3 / .36) = 2.309 with 3 degrees of freedom: two-sided p = .104.
    assert stats.pearson_p(0.8, 5) == pytest.approx(0.104, abs=5e-4)


def test_the_papers_correlations_need_their_inflated_n():
    # paper: gold r = .16 looks significant at n = 200 (p = .02) and is not at its 50 people (p = .27).
    assert stats.pearson_p(0.16, 200) == pytest.approx(0.024, abs=0.001)
    assert stats.pearson_p(0.16, 50) == pytest.approx(0.27, abs=0.005)


def test_a_constant_side_has_no_correlation():
    x = pd.Series([0.1, 0.2, 0.3, 0.4, 0.5], index=list("abcde"))
    with pytest.raises(stats.NoEstimate, match="does not vary"):
        stats.pearson_interval(x, x * 0 + 0.95)


def test_r_and_p_are_scipys():
    rng = np.random.default_rng(3)
    x = pd.Series(rng.random(40), index=[f"p{i}" for i in range(40)])
    y = 0.3 * x + pd.Series(rng.random(40), index=x.index)
    ours, theirs = stats.pearson_interval(x, y), scipy.stats.pearsonr(x, y)
    assert ours.estimate == pytest.approx(theirs.statistic, abs=1e-12)
    assert stats.pearson_p(ours.estimate, ours.n_people) == pytest.approx(theirs.pvalue, rel=1e-9)
    # each person four times over: the same r, and scipy's p of four times as many points
    copied = scipy.stats.pearsonr(np.tile(x, 4), np.tile(y, 4))
    assert copied.statistic == pytest.approx(ours.estimate)
    assert stats.pearson_p(ours.estimate, 160) == pytest.approx(copied.pvalue, rel=1e-9)


def test_the_worst_served_by_hand():
    # Ten people right in 1, 2, ... 10 of ten pairs: the lowest tenth is one person (.1), the lowest fifth two (.15).
    scores = pairs({f"p{k}": [1] * k + [0] * (10 - k) for k in range(1, 11)})
    assert stats.lowest(scores).estimate == pytest.approx(0.1)
    found = stats.lowest(scores, share=0.2)
    assert (found.estimate, found.n_people) == (pytest.approx(0.15), 10)
    assert found.low == pytest.approx(0.1)  # a draw can have the worst person twice, and nobody is worse
    # A person with more pairs counts once: .0 and four times 1.0, the lowest fifth is .0.
    uneven = pairs({"a": [0] * 9, "b": [1], "c": [1], "d": [1], "e": [1]})
    assert stats.lowest(uneven, share=0.2).estimate == 0.0


def test_groups_dealt_anew_by_hand():
    # Two groups of two, means 1 and 0: the gap is 1. Of the 6 ways to deal two ones to four people 2 keep each
    # group whole (gap 1), 4 mix both (gap 0): p = 2/6. The variance between 1 and 0 is .25, with the same p.
    means = pd.Series({"a": 1.0, "b": 1.0, "c": 0.0, "d": 0.0})
    groups = pd.Series(["isles", "isles", "valley", "valley"], index=list("abcd"))
    found = stats.group_permutation(means, groups, min_people=2, n_draws=20_000)
    assert (found.statistic, found.lowest, found.highest) == (1.0, "valley", "isles")
    assert (found.n_groups, found.n_people) == (2, 4)
    assert found.p == pytest.approx(1 / 3, abs=0.015)
    spread = stats.group_permutation(means, groups, np.var, min_people=2, n_draws=20_000)
    assert (spread.statistic, spread.p) == (0.25, found.p)


def test_groups_that_are_alike_have_p_one_and_small_ones_do_not_count():
    means = pd.Series(0.6, index=list("abcdef"))
    groups = pd.Series(["x", "x", "x", "y", "y", "y"], index=list("abcdef"))
    assert stats.group_permutation(means, groups, min_people=3)[:2] == (0.0, 1.0)
    # A seventh person alone in a group is far off, and is neither compared nor dealt.
    lonely = pd.concat([groups, pd.Series({"g": "z"})])
    found = stats.group_permutation(pd.concat([means, pd.Series({"g": 0.0})]), lonely, min_people=3)
    assert (found.statistic, found.n_groups, found.n_people) == (0.0, 2, 6)
    with pytest.raises(stats.TooFewPeople, match="0 groups with 5 people"):
        stats.group_permutation(means, groups)


def test_somebody_in_two_groups_counts_in_both():
    # b is in both: x = (1 + 0)/2, y = (0 + 0)/2, so the gap is .5 over three people.
    means, groups = pd.Series({"a": 1.0, "b": 0.0, "c": 0.0}), pd.Series(list("xxyy"), index=list("abbc"))
    found = stats.group_permutation(means, groups, min_people=2)
    assert (found.statistic, found.n_people) == (0.5, 3)
    assert found.p == pytest.approx(2 / 3, abs=0.02)  # the one right answer falls on b, and both are .5, one time in three
