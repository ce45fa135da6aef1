"""The preference space: its dimensions, the released averaging by hand, flips, and the little world's words for it."""

from random import Random

import numpy as np
import pandas as pd
import pytest

from helpers import directions
from helpers.world.facts import load_world


@pytest.fixture(scope="module")
def wording():
    return directions.Wording(load_world("little"))


def test_ninety_dimensions_with_a_name_and_two_poles_each():
    space = directions.space()
    assert len(space) == 90
    assert len({d.name for d in space}) == 90
    assert all(d.positive != d.negative for d in space)
    sizes = {group: sum(d.group == group for d in space) for group in dict.fromkeys(d.group for d in space)}
    assert sizes == {"person": 7, "needs": 16, "murray": 17, "answers": 7, "interests": 43}


def test_poles_are_the_inverse_of_vector_and_what_is_unknown_or_both_is_neutral():
    values = directions.vector(["food", "order", "nonsense"], ["saving", "order"])
    assert directions.poles(values) == (["food"], ["saving"])  # order is in both lists
    assert values[directions.index()["order"]] == 0.5


def labels(*rows):
    """Of the first three dimensions; the others stay neutral."""
    made = np.full((len(rows), 90), 0.5)
    made[:, :3] = rows
    return made


def test_average_by_hand():
    # means: (1 + 1 + .5) / 3 = .83 -> 1; (.5 + .5 + 0) / 3 = .33 -> 0; (1 + .5 + 0) / 3 = .5 -> .5
    found = directions.average(labels([1, 0.5, 1], [1, 0.5, 0.5], [0.5, 0, 0]))
    assert found[:4].tolist() == [1, 0, 0.5, 0.5]


def test_the_thresholds_belong_to_the_poles():
    # one of five is positive: (1 + 4 x .5) / 5 = .6, a pole; one is negative: .4, a pole
    rows = [[1, 0, 0.5]] + [[0.5, 0.5, 0.5]] * 4
    assert directions.average(labels(*rows))[:3].tolist() == [1, 0, 0.5]


def test_where_all_is_near_neutral_the_farthest_counts():
    # one of six: .583 and .417, both within the thresholds, and equally far
    rows = [[1, 0, 0.5]] + [[0.5, 0.5, 0.5]] * 5
    assert directions.average(labels(*rows))[:3].tolist() == [1, 0, 0.5]
    # two of twelve against one of twelve: .583 is farther than .458
    rows = [[1, 0, 0.5], [1, 0.5, 0.5]] + [[0.5, 0.5, 0.5]] * 10
    assert directions.average(labels(*rows))[:3].tolist() == [1, 0.5, 0.5]


def test_no_items_and_neutral_items_are_neutral():
    assert (directions.average(np.empty((0, 90))) == 0.5).all()
    assert (directions.average(labels([0.5, 0.5, 0.5])) == 0.5).all()


def test_flip_swaps_the_named_poles_alone():
    values = directions.vector(["food"], ["order"])
    assert directions.poles(directions.flip(values)) == (["order"], ["food"])
    assert directions.poles(directions.flip(values, ["food"])) == ([], ["food", "order"])


def test_every_category_of_the_world_is_one_pole_and_no_pole_is_two_categories(wording):
    world = wording.world
    assert set(wording.pole) == {(axis, c) for axis, facts in world.axes.items() for c in facts.categories}
    assert len(set(wording.pole.values())) == len(wording.pole) == 55
    assert set(wording.interest) == set(world.hobbies)


def test_a_person_survives_the_way_into_the_space_and_back(wording):
    for person in wording.world.people.values():
        values = wording.of_person(person)
        assert set(wording.memberships(values)) == set(person.memberships)


def test_text_says_the_labels_and_one_pastime(wording):
    text = wording.text(wording.of([("diet", "vegan")], ["weaving"]), Random(1))
    assert text.startswith("This person eats only plants and spends free time on weaving.\nLikes ")
    assert "not clear yet" in wording.text(directions.vector(), Random(1))


def test_plain_text_names_the_poles_and_nothing_is_said_of_nothing():
    text = directions.plain_text(directions.vector(["food"], ["order"]))
    assert text == "What this person prefers: rich and sweet meals; soft and crowded rooms."
    assert directions.plain_text(directions.vector()) == ""
    assert len(directions.listing().splitlines()) == 90


def test_a_world_without_words_for_the_space_is_told_so(wording, monkeypatch):
    monkeypatch.setattr(wording.world, "name", "elsewhere")
    with pytest.raises(FileNotFoundError, match=r"elsewhere.yaml.*little.yaml"):
        directions.Wording(wording.world)


def test_turned_compares_with_the_same_pair_under_golden():
    def row(setting, pair, correct, prefix="golden"):
        return {"policy_id": "x", "method": "pba", "prefix": prefix, "setting": setting, "persona_id": "a", "pair_id": pair,
                "kind": "divergent", "axis": "diet", "trained": False, "correct": correct}
    table = pd.DataFrame([row("main", "1", True), row("main", "2", False), row("main", "1", False, "head"),
                          row("flipped", "1", False), row("flipped", "2", False), row("reworded", "1", True)])
    found = directions.turned(table).set_index(["setting", "pair_id"])["correct"].to_dict()
    assert found == {("flipped", "1"): True, ("flipped", "2"): False, ("reworded", "1"): False}
