"""The little world's facts: counts, no hint in lengths, and what a text is spotted to say."""

from random import Random

import numpy as np
import pytest

from helpers.world.facts import load_world


@pytest.fixture(scope="module")
def world():
    return load_world("little")


def test_every_category_of_every_axis_has_somebody(world):
    members = {membership for person in world.people.values() for membership in person.memberships}
    assert members == {(c.axis, c.name) for c in world.categories}
    assert len(world.people) >= 30
    assert len(world.axes) >= 6


def test_phrases_are_unique_and_of_fixed_length(world):
    things = [t for c in world.categories for t in c.things] + [t for h in world.hobbies.values() for t in h.tips]
    reasons = [r for c in world.categories for r in c.reasons] + [r for h in world.hobbies.values() for r in h.reasons]
    assert {len(t.split()) for t in things} == {2}
    assert {len(r.split()) for r in reasons} == {4}
    assert len(set(things + reasons)) == len(things + reasons)


def test_no_category_is_told_by_its_length(world):
    for axis in world.axes.values():
        means = [np.mean([len(p) for p in c.things + c.reasons]) for c in axis.categories.values()]
        assert max(means) / min(means) < 1.3


def test_spot_counts_what_occurs(world):
    category = world.categories[0]
    hobby = next(iter(world.hobbies.values()))
    text = f"Try {category.things[0]} and {hobby.tips[0]}, because {category.reasons[1]}."
    found = world.spot(text)
    assert found.categories == {(category.axis, category.name): 2}
    assert found.hobbies == {hobby.name: 1}
    assert (found.n_slots, found.tone) == (3, None)


def test_describe_says_the_label_and_is_hedged_without_memberships(world):
    category = world.categories[7]
    text = world.describe(Random(0), "Ann Other", [(category.axis, category.name)], "chess")
    assert category.label in text
    assert set(world.spot(text).categories) == {(category.axis, category.name)}
    assert not world.spot(world.describe(Random(0), "Ann Other", [], "chess")).categories


def test_an_unknown_world_says_what_is_missing():
    with pytest.raises(FileNotFoundError, match=r"axes\.yaml"):
        load_world("nowhere")
