"""Who is asked, and what changed: as worked by hand."""

import numpy as np
import pandas as pd
import pytest

from helpers import tax
from helpers.config import load_profile


def test_every_task_of_every_profile_has_a_group():
    for name in ("smoke", "laptop", "gpu", "paper"):
        cfg = load_profile(name)
        assert tax.available(cfg) == cfg.tax.tasks
        assert {tax.group_of()[task] for task in cfg.tax.tasks} == {"safety", "reasoning", "factuality"}
    with pytest.raises(ValueError, match="arc_hard in no group"):
        tax.available(load_profile("smoke", ["tax.tasks=[arc_hard]"]))
    assert tax.available(load_profile("laptop", ["simulated=false", "tax.tasks=[little_facts, piqa]"])) == ("piqa",)


def test_plan_by_hand():
    mt = [("mt", prefix, "stratified", fold, 0) for prefix in ("none", "name") for fold in (0, 1)]
    others = [("mt", "none", "small", 0, 0), ("mt", "none", "stratified", 0, 1), ("mt_loser", "none", "stratified", 0, 0)]
    policies = pd.DataFrame(mt + others, columns=["method", "prefix", "scheme", "fold", "seed"])
    policies["policy_id"] = policies["path"] = [f"{r.prefix}{r.fold}" for r in policies.itertuples()]
    folds = pd.DataFrame({"scheme": "stratified", "fold": [0, 1, 1], "persona_id": ["p1", "p2", "p3"]})
    rows = [(p, "name", variant, f"N-{p}") for p in ("p1", "p2", "p3") for variant in ("main", "shuffled")]
    prefixes = pd.DataFrame(rows, columns=["persona_id", "prefix", "variant", "text"])
    cfg = load_profile("smoke", ["tax.prefixes=[name, persona_gold]", "tax.people=2"])
    found = tax.plan(policies, prefixes, folds, cfg)
    assert found.iloc[:5].to_numpy().tolist() == [
        ["base", "", "none", "", "", "", ""], ["mt", "none", "none", "", "none0", "none0", ""],
        ["mt", "none", "none", "", "none1", "none1", ""], ["mt", "name", "none", "", "name0", "name0", ""],
        ["mt", "name", "none", "", "name1", "name1", ""]]
    of = found.iloc[5:]
    assert len(of) == 4
    assert of["persona_id"].nunique() == 2
    for row in of.itertuples():
        held_out = {"p1": "name0", "p2": "name1", "p3": "name1"}[row.persona_id]
        assert row.policy_id == row.path == ("" if row.system == "base" else held_out)
        assert row.head == f"The user is N-{row.persona_id}.\n"


def make_items(correct: dict[tuple, list[float]], task="little_facts") -> pd.DataFrame:
    rows = [(task, item, value, *key) for key, values in correct.items() for item, value in enumerate(values)]
    return pd.DataFrame(rows, columns=["task", "item", "correct", *tax.SYSTEM])


BASE = ("base", "", "none", "", "")


def mt(person: str, fold: int) -> tuple:
    return ("mt", "name", "name" if person else "none", person, f"name{fold}")


def test_changes_by_hand():
    # removed: folds .5 and 1 make .75, the base .5: + .25. With prefixes p1 0 (-.5), p2 1 (+.5), p3 .5 (0): mean 0.
    items = make_items({BASE: [1, 0], mt("", 0): [1, 0], mt("", 1): [1, 1], mt("p1", 0): [0, 0], mt("p2", 1): [1, 1],
                        mt("p3", 1): [0, 1]})
    table = tax.summary(items, n_boot=200)
    assert table["n_items"].tolist() == [2] * 6
    assert table["accuracy"].tolist() == [0.5, 0.5, 1.0, 0.0, 1.0, 0.5]
    assert table.loc[[0, 2, 3], ["low", "high"]].to_numpy().tolist() == [[0, 1], [1, 1], [0, 0]]
    changed = tax.changes(table)
    assert changed["change"].tolist() == [0.0, 0.25, -0.5, 0.5, 0.0]
    (mean,) = tax.over_people(changed, n_boot=200, min_people=3).to_dict("records")
    assert (mean["change"], mean["low"], mean["high"], mean["n_people"]) == (0.0, -0.5, 0.5, 3)
    assert np.isnan(tax.over_people(changed, n_boot=200)["change"].item())  # three people are too few
    assert set(changed["group"]) == {"factuality"}


def test_paired_items_by_hand():
    # item 0: base 1, folds 1 and 0: -.5; item 1: base 0, folds 1 and 1: +1. Mean .25; a draw has -.5, .25 or 1.
    items = make_items({BASE: [1, 0], mt("", 0): [1, 1], mt("", 1): [0, 1]})
    found = tax.over_items(items, n_boot=500).query("system == 'mt'").iloc[0]
    assert found[["change", "low", "high", "n_items"]].tolist() == [0.25, -0.5, 1.0, 2]
    # a second task of the same group with one item that got worse by 1: mean of .25 and -1; items drawn in each task
    both = pd.concat([items, make_items({BASE: [1], mt("", 0): [0], mt("", 1): [0]}, "truthfulqa_mc1")])
    found = tax.over_items(both, n_boot=500).query("system == 'mt'").iloc[0]
    assert found[["change", "low", "high", "n_items"]].tolist() == [-0.375, -0.75, 0.0, 3]


def test_equal_systems_change_nothing_and_nothing_is_no_rows():
    items = make_items({BASE: [1, 0, 1], mt("p1", 0): [1, 0, 1]})
    assert (tax.over_items(items, by=["persona_id"])[["change", "low", "high"]] == 0).all(axis=None)
    empty = items.head(0)
    table = tax.summary(empty)
    assert table.empty
    assert tax.over_people(tax.changes(table)).empty
    assert tax.over_items(empty).empty
