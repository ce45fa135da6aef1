"""Checking, abstaining and turning down, each by hand on a few pairs."""

import numpy as np
import pandas as pd
import pytest

from helpers import caution


def scores(margins: dict[str, list[float]]) -> pd.DataFrame:
    """Pairs with the given mean margins: chosen has 2 tokens, rejected 1."""
    rows = [(p, f"{p}:{i}", 2 * m, 0.0, 2, 1) for p, values in margins.items() for i, m in enumerate(values)]
    return pd.DataFrame(rows, columns=["persona_id", "pair_id", "logp_chosen", "logp_rejected", "n_chosen", "n_rejected"])


def both(told, plain):
    return caution.side_by_side(scores(told), scores(plain))


def test_margins_are_per_token():
    assert caution.margins(scores({"a": [1.5, -0.5]})).tolist() == [1.5, -0.5]


def test_verified_only_where_the_prefix_ranks_more_pairs_right():
    # a: 2 right with, 1 without; b: as many; c: fewer
    trial = both({"a": [1, 1], "b": [1, -1], "c": [-1, -1]}, {"a": [1, -1], "b": [-1, 1], "c": [1, 1]})
    assert caution.verified(trial).to_dict() == {"a": True, "b": False, "c": False}
    assert caution.verified(trial, least=3).to_dict() == {"a": False, "b": False, "c": False}


def test_who_is_not_verified_falls_back_to_no_prefix_also_without_any_trial():
    test = both({"a": [-1], "b": [-1], "c": [-1]}, {"a": [1], "b": [1], "c": [1]})
    found = caution.fall_back(test, pd.Series({"a": True, "b": False}))
    assert found["used"].tolist() == [True, False, False]
    assert found["correct"].tolist() == [False, True, True]


def test_agreement_is_the_smaller_margin_and_negative_where_they_disagree():
    found = caution.agreement(both({"a": [2, -1, 3]}, {"a": [1, -4, -0.5]}))
    assert found.tolist() == [1, 1, -0.5]


def test_risk_coverage_by_hand():
    # by confidence: wrong, right, right, wrong -> risks 1, 1/2, 1/3, 2/4
    correct, sure = pd.Series([True, False, True, False]), pd.Series([0.8, 0.9, 0.7, 0.1])
    curve = caution.risk_coverage(correct, sure, pd.Series(["a", "a", "b", "b"]), steps=4)
    assert curve["coverage"].tolist() == [0.25, 0.5, 0.75, 1]
    assert curve["risk"].tolist() == pytest.approx([1, 1 / 2, 1 / 3, 1 / 2])
    assert curve["threshold"].tolist() == [0.9, 0.8, 0.7, 0.1]
    assert curve["n_people"].tolist() == [1, 1, 2, 2]
    assert caution.area(curve) == pytest.approx((1 + 1 / 2 + 1 / 3 + 1 / 2) / 4)


def test_area_gap_by_hand():
    # one pair a person: told = 1, -1, 1, -1, ... the first confidence puts the right ones first, the second last
    told = {f"p{i}": [1.0 if i % 2 else -1.0] for i in range(8)}
    rows = both(told, told)
    good = rows["told"]
    found = caution.area_gap(rows, good, -good, n_boot=50)
    # right first: risks 0 0 0 0 1/5 2/6 3/7 4/8; wrong first: 1 1 1 1 4/5 4/6 4/7 4/8
    right, wrong = [0, 0, 0, 0, 1 / 5, 2 / 6, 3 / 7, 1 / 2], [1, 1, 1, 1, 4 / 5, 4 / 6, 4 / 7, 1 / 2]
    assert found.estimate == pytest.approx(np.mean(right) - np.mean(wrong))
    assert found.low <= found.estimate <= found.high
    assert found.n_people == 8


def test_dial_mixes_the_two_margins():
    found = caution.dial(both({"a": [2.0]}, {"a": [-1.0]}), [0, 0.5, 1, 2])
    assert found["margin"].tolist() == [-1, 0.5, 2, 5]
    assert found["correct"].tolist() == [False, True, True, True]


def test_costs_count_what_is_shared_once():
    units = pd.DataFrame([("prefix", 100, 10, 1000, 500)],
                         columns=["method", "bytes_each", "flops_each", "bytes_shared", "flops_shared"])
    found = caution.costs(units, [10, 1000])
    assert found["storage_bytes"].tolist() == [2000, 101_000]
    assert found["compute_flops"].tolist() == [600, 10_500]
