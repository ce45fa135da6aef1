"""Folds and training pairs: worked examples, and laws over random casts."""

from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

from helpers.schemas import check
from helpers.splits import (
    all_folds,
    axis_folds,
    cap_train,
    left_out_axes,
    small_folds,
    small_people,
    stratified_folds,
    swap_labels,
    training_pairs,
)

COLUMNS = ["pair_id", "persona_id", "question_id", "kind", "split", "chosen_id", "rejected_id"]


def cast(seed):
    """A random cast: 5 to 40 people, 1 to 8 axes, some people on two."""
    rng = np.random.default_rng(seed)
    axes = [f"axis{i}" for i in range(rng.integers(1, 9))]
    people = [f"p{i:02d}" for i in range(rng.integers(5, 41))]
    on = [
        list(rng.choice(axes, size=min(len(axes), 1 + (rng.random() < 0.15)), replace=False)) for _ in people
    ]
    return pd.DataFrame({"persona_id": people, "axes": on})


def labels(seed):
    """Every person of a random cast labels shared and own questions with four candidate answers each."""
    rng, personas = np.random.default_rng(seed), cast(seed)
    rows = []
    for person in personas["persona_id"]:
        shared = [(f"d{i}", "divergent") for i in range(12)]
        for question, kind in shared + [(f"{person}q{i}", "personal") for i in range(8)]:
            chosen, rejected = rng.choice(4, size=2, replace=False)
            split = "train" if int(question[-1]) % 2 else "test"
            rows.append(
                (
                    f"{person}-{question}",
                    person,
                    question,
                    kind,
                    split,
                    f"{question}r{chosen}",
                    f"{question}r{rejected}",
                )
            )
    return personas, pd.DataFrame(rows, columns=COLUMNS)


def test_five_people_of_an_axis_go_to_five_folds():
    personas = pd.DataFrame({"persona_id": list("abcdefghij"), "axes": [["diet"]] * 5 + [["music"]] * 5})
    folds = stratified_folds(personas, 5, seed=17).merge(personas)
    # ten people, two axes of five: every fold holds out one person of each axis
    assert (
        folds.groupby("fold")["axes"].apply(lambda on: sorted(a for axes in on for a in axes)).tolist()
        == [["diet", "music"]] * 5
    )
    assert (folds["scheme"] == "stratified").all()


@pytest.mark.parametrize("seed", range(40))
def test_law_every_person_is_held_out_once_and_axes_are_spread(seed):
    personas = cast(seed)
    folds = stratified_folds(personas, 5, seed)
    assert sorted(folds["persona_id"]) == sorted(personas["persona_id"])
    assert set(folds["fold"]) == set(range(5))
    by_axis = personas.explode("axes").merge(folds)
    counts = (
        by_axis.groupby(["axes", "fold"]).size().unstack(fill_value=0).reindex(columns=range(5), fill_value=0)
    )
    single = personas["axes"].map(len).max() == 1
    assert (counts.max(axis=1) - counts.min(axis=1)).max() <= (1 if single else 2)


@pytest.mark.parametrize("seed", range(10))
def test_each_axis_of_five_is_in_every_fold_once_though_some_people_are_on_two(seed):
    # eleven axes of five; on axes 0 and 1, 2 and 3, ... 8 and 9 one person is the same: 50 people, 10 a fold
    axes = [[f"axis{i}"] for i in range(11) for _ in range(4 if i < 10 else 5)] + [
        [f"axis{i}", f"axis{i + 1}"] for i in range(0, 10, 2)
    ]
    personas = pd.DataFrame({"persona_id": [f"p{i:02d}" for i in range(50)], "axes": axes})
    folds = stratified_folds(personas, 5, seed)
    assert (folds["fold"].value_counts() == 10).all()
    assert (personas.explode("axes").merge(folds).groupby(["axes", "fold"]).size() == 1).all()


def test_folds_follow_from_the_seed_and_not_from_the_order_of_rows():
    personas = cast(3)
    folds = stratified_folds(personas, 5, seed=1)
    pd.testing.assert_frame_equal(folds, stratified_folds(personas.iloc[::-1], 5, seed=1))
    assert any(not folds.equals(stratified_folds(personas, 5, seed=s)) for s in range(2, 6))


def test_fewer_people_than_folds_is_an_error():
    with pytest.raises(ValueError, match="5 folds of 3 people"):
        stratified_folds(pd.DataFrame({"persona_id": list("abc"), "axes": [["diet"]] * 3}), 5, seed=0)


FOUR = pd.DataFrame({"persona_id": ["p4", "p1", "p2", "p3"],
                     "axes": [["diet"], ["diet"], ["music", "diet"], ["music"]]})
IMPORTED = pd.DataFrame({"persona_id": [f"p{i:02d}" for i in range(12, 0, -1)], "axes": [["imported"]] * 12})


def profile(*names, folds=2, small=("diet",)):
    return SimpleNamespace(training=SimpleNamespace(folds=folds), people=SimpleNamespace(small=small),
                           schemes=SimpleNamespace(names=names, axis_folds=0))


def test_the_small_set_by_hand():
    assert small_people(FOUR, ["diet"]) == ["p1", "p2", "p4"]
    assert small_people(FOUR, ["music", "diet"]) == ["p1", "p2", "p3", "p4"]
    # nobody on the axis: the first ten of twelve
    assert small_people(IMPORTED, ["diet"]) == [f"p{i:02d}" for i in range(1, 11)]


def test_small_folds_hold_out_the_small_set_and_nobody_else():
    folds = small_folds(FOUR, ["diet"], 5, seed=17)  # three people: three folds of one, not five
    assert folds["persona_id"].tolist() == ["p1", "p2", "p4"]
    assert sorted(folds["fold"]) == [0, 1, 2]
    assert set(folds["scheme"]) == {"small"}
    assert small_folds(FOUR.head(1), ["diet"], 5, seed=17).empty


def test_an_axis_is_left_out_with_all_its_people():
    # p2 is on both axes and held out twice
    assert axis_folds(FOUR).values.tolist() == [
        ["leave_axis_out", 0, "p1"], ["leave_axis_out", 0, "p2"], ["leave_axis_out", 0, "p4"],
        ["leave_axis_out", 1, "p2"], ["leave_axis_out", 1, "p3"]]
    assert left_out_axes(FOUR) == [["diet"], ["music"]]


def test_several_axes_are_left_out_together():
    # every second of b d h s: b and h, whose three people are p1 p3 p4; d and s, p1 p2
    people = pd.DataFrame({"persona_id": ["p1", "p2", "p3", "p4"], "axes": [["d", "h"], ["s"], ["b"], ["h"]]})
    assert left_out_axes(people, 2) == [["b", "h"], ["d", "s"]]
    assert axis_folds(people, 2).values.tolist() == [["leave_axis_out", 0, p] for p in ("p1", "p3", "p4")] + [
        ["leave_axis_out", 1, p] for p in ("p1", "p2")]
    assert left_out_axes(people, 9) == [["b"], ["d"], ["h"], ["s"]]
    # b and h together would leave nobody to train
    assert left_out_axes(people.assign(axes=[["h"], ["b", "s"], ["b"], ["h", "d"]]), 2) == [["b"], ["d"], ["h"], ["s"]]


def test_an_axis_that_everybody_is_on_cannot_be_left_out():
    everybody = FOUR.assign(axes=[["diet"], ["diet"], ["music", "diet"], ["diet"]])
    assert left_out_axes(everybody) == [["music"]]
    assert axis_folds(everybody).values.tolist() == [["leave_axis_out", 0, "p2"]]
    assert axis_folds(IMPORTED).empty


def test_all_folds_are_those_that_the_profile_names():
    table = check("folds", all_folds(FOUR, profile("small", "leave_axis_out"), 17))
    assert table["scheme"].value_counts().to_dict() == {"stratified": 4, "small": 3, "leave_axis_out": 5}
    stratified = stratified_folds(FOUR, 2, 17)
    pd.testing.assert_frame_equal(all_folds(FOUR, profile(), 17), stratified)
    pd.testing.assert_frame_equal(table[table["scheme"] == "stratified"], stratified, check_dtype=False)
    imported = check("folds", all_folds(IMPORTED, profile("small", "leave_axis_out"), 17))
    assert imported["scheme"].value_counts().to_dict() == {"stratified": 12, "small": 10}


def test_uncontested_divergent_pairs_are_dropped():
    rows = [
        ("1", "a", "d1", "divergent", "train", "A", "B"),  # b trains and chose B: kept
        ("2", "b", "d1", "divergent", "train", "B", "C"),  # only the held-out c chose C: dropped
        ("3", "c", "d1", "divergent", "train", "C", "A"),  # c is held out
        ("4", "a", "x1", "personal", "train", "X", "Y"),  # personal: nobody else could choose Y, kept
        ("5", "a", "d2", "divergent", "test", "A", "B"),  # test pair
        ("6", "a", "d3", "divergent", "train", "A", "B"),  # B was chosen on d1, but not on d3: dropped
    ]
    preferences = pd.DataFrame(rows, columns=COLUMNS)
    train, held = training_pairs(preferences, ["a", "b"], True, validation=0, seed=0)
    assert train["pair_id"].tolist() == ["1", "4"]
    assert held.empty
    every, _ = training_pairs(preferences, ["a", "b"], False, validation=0, seed=0)
    assert every["pair_id"].tolist() == ["1", "2", "4", "6"]


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("drop", [True, False])
def test_law_nobody_is_in_train_and_test_of_one_fold(seed, drop):
    personas, preferences = labels(seed)
    folds = stratified_folds(personas, 5, seed)
    for fold in range(5):
        held_out = set(folds.loc[folds["fold"] == fold, "persona_id"])
        people = set(personas["persona_id"]) - held_out
        train, validation = training_pairs(preferences, people, drop, 0.1, seed)
        both = pd.concat([train, validation])
        assert not set(both["persona_id"]) & held_out
        assert (both["split"] == "train").all()
        assert not set(train["question_id"]) & set(validation["question_id"])
        assert set(validation["kind"]) == {"personal", "divergent"} == set(train["kind"])


def test_validation_is_a_tenth_of_the_questions_of_each_kind_and_seeded():
    # 20 personal questions of one person, 10 shared ones of two people: 2 and 1 set aside, so 2 + 1 x 2 pairs
    rows = [(f"x{i}", "a", f"x{i}", "personal", "train", "A", "B") for i in range(20)]
    rows += [(f"{p}{i}", p, f"d{i}", "divergent", "train", "A", "B") for p in "ab" for i in range(10)]
    preferences = pd.DataFrame(rows, columns=COLUMNS)
    train, held = training_pairs(preferences, ["a", "b"], False, 0.1, seed=5)
    assert held["kind"].value_counts().to_dict() == {"personal": 2, "divergent": 2}
    assert len(train) == 36
    pd.testing.assert_frame_equal(held, training_pairs(preferences, ["a", "b"], False, 0.1, seed=5)[1])
    others = [training_pairs(preferences, ["a", "b"], False, 0.1, seed=s)[1] for s in range(6, 9)]
    assert any(not held.equals(other) for other in others)


def test_fewer_pairs_a_person_leave_the_validation_pairs_alone():
    # a trains on 18 personal and 9 shared pairs, b on 9 shared: at most 10 of each leaves 10 + 9
    rows = [(f"x{i}", "a", f"x{i}", "personal", "train", "A", "B") for i in range(20)]
    rows += [(f"{p}{i}", p, f"d{i}", "divergent", "train", "A", "B") for p in "ab" for i in range(10)]
    preferences = pd.DataFrame(rows, columns=COLUMNS)
    every, held = training_pairs(preferences, ["a", "b"], False, 0.1, seed=5)
    fewer, same = training_pairs(preferences, ["a", "b"], False, 0.1, seed=5, pairs_per_person=10)
    assert every["persona_id"].value_counts().to_dict() == {"a": 27, "b": 9}
    assert fewer["persona_id"].value_counts().to_dict() == {"a": 10, "b": 9}
    assert set(fewer["pair_id"]) < set(every["pair_id"])
    pd.testing.assert_frame_equal(held, same)


def test_no_pair_left_is_an_error():
    preferences = pd.DataFrame([("1", "a", "d1", "divergent", "train", "A", "B")], columns=COLUMNS)
    with pytest.raises(ValueError, match="drop_uncontested=false"):
        training_pairs(preferences, ["a"], True, 0.1, seed=0)


def test_who_is_on_two_axes_trains_on_as_many_divergent_pairs_as_who_is_on_one():
    # a: 4 train pairs on diet and 3 on music, of which 4 stay, two of each axis; b: 4 on diet, all stay
    rows = [(f"a{axis}{i}", "a", f"{axis}{i}", axis, "divergent", split) for split in ("train", "test")
            for axis, n in (("diet", 4), ("music", 3)) for i in range(n)]
    rows += [(f"b{i}", "b", f"diet{i}", "diet", "divergent", "train") for i in range(4)]
    rows += [(f"ax{i}", "a", f"x{i}", "personal", "personal", "train") for i in range(9)]
    columns = ["pair_id", "persona_id", "question_id", "axis", "kind", "split"]
    every = pd.DataFrame(rows, columns=columns).assign(pair_id=lambda t: t["pair_id"] + t["split"])
    kept = cap_train(every, seed=3)
    counts = kept.groupby(["persona_id", "split", "axis"]).size()
    assert counts["a", "train"].to_dict() == {"diet": 2, "music": 2, "personal": 9}
    assert counts["a", "test"].to_dict() == {"diet": 4, "music": 3}
    assert counts["b", "train"].to_dict() == {"diet": 4}
    backwards = cap_train(every.iloc[::-1], seed=3)
    assert set(backwards["pair_id"]) == set(kept["pair_id"])
    assert any(set(cap_train(every, seed=s)["pair_id"]) != set(kept["pair_id"]) for s in range(4, 9))


def test_an_uneven_axis_gives_what_it_has_and_the_other_the_rest():
    # 5 pairs on diet, 1 on music: five stay, music's one and four of diet
    rows = [(f"a{axis}{i}", "a", axis, "divergent", "train") for axis, n in (("diet", 5), ("music", 1))
            for i in range(n)]
    kept = cap_train(pd.DataFrame(rows, columns=["pair_id", "persona_id", "axis", "kind", "split"]), seed=1)
    assert kept["axis"].value_counts().to_dict() == {"diet": 4, "music": 1}


def test_a_share_of_the_labels_is_swapped_in_every_column():
    pairs = pd.DataFrame({"pair_id": list("abcde"), "chosen": list("ABCDE"), "rejected": list("VWXYZ"),
                          "ref_chosen_logps": range(5), "ref_rejected_logps": range(10, 15)})
    half, most = swap_labels(pairs, 0.4, seed=1), swap_labels(pairs, 0.8, seed=1)
    swapped = half["chosen"] != pairs["chosen"]
    assert swapped.sum() == 2  # .4 of five
    assert half.loc[swapped, "chosen"].tolist() == pairs.loc[swapped, "rejected"].tolist()
    assert half.loc[swapped, "rejected"].tolist() == pairs.loc[swapped, "chosen"].tolist()
    assert half.loc[swapped, "ref_chosen_logps"].tolist() == pairs.loc[swapped, "ref_rejected_logps"].tolist()
    pd.testing.assert_frame_equal(half[~swapped], pairs[~swapped])
    assert half["pair_id"].tolist() == list("abcde")
    also = most["chosen"] != pairs["chosen"]
    assert also.sum() == 4
    assert also[swapped].all()
    pd.testing.assert_frame_equal(swap_labels(pairs, 0.0, seed=1), pairs)
    pd.testing.assert_frame_equal(half, swap_labels(pairs, 0.4, seed=1))
    assert any(not half.equals(swap_labels(pairs, 0.4, seed=s)) for s in range(2, 6))
