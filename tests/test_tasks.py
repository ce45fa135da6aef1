"""The little tasks follow from the world's facts and a seed; the right answer is the right one."""

import json
from dataclasses import replace
from random import Random

import pytest

from helpers.world import tasks
from helpers.world.facts import load_world


@pytest.fixture(scope="module")
def world():
    return load_world("little")


def right(item: tasks.Item) -> str:
    return item.choices[item.answer]


def test_same_seed_same_bytes(world, tmp_path):
    once, again, other = (tasks.write(world, tmp_path / name, seed) for name, seed in (("a", 1), ("b", 1), ("c", 2)))
    assert set(once) == {"little_facts", "little_reasoning", "little_refusals"}
    for task in once:
        assert once[task].read_bytes() == again[task].read_bytes() != other[task].read_bytes()
        rows = [json.loads(line) for line in once[task].read_text().splitlines()]
        assert len(rows) >= 60
        assert all(len(set(row["choices"])) == len(row["choices"]) for row in rows)
        assert {row["answer"] for row in rows} == set(range(len(rows[0]["choices"])))  # in every place


def test_counts_by_hand(world):
    # 50 people, five of them with two memberships: 55, each told and asked. 14 hobbies, 55 categories
    # twice. 14 hobbies x 5 whens x 2 wordings.
    counts = [len(make(world, Random(0))) for make in (tasks.facts, tasks.reasoning, tasks.refusals)]
    assert counts == [110, 14 + 2 * 55, 140]


def test_facts_are_those_of_the_cast(world):
    for item in tasks.facts(world, Random(3)):
        name = item.question.removeprefix("Question: Who is ").removesuffix("?\nAnswer:")
        own = {world.axes[axis].categories[category].label for axis, category in world.people[name].memberships}
        assert right(item) in own
        assert (item.kind == "asked") == item.question.startswith("Question:")
        assert len(item.choices) == 1 + tasks.DISTRACTORS


def test_reasoning_follows_from_what_was_said(world):
    kinds = {item.kind: item for item in tasks.reasoning(world, Random(3))}
    hobby = next(name for name in world.hobbies if f" {name} " in kinds["topic"].question)
    assert set(world.spot(right(kinds["topic"])).hobbies) == {hobby}
    (owner,) = set(world.spot(kinds["example"].question).categories)
    assert right(kinds["example"]) == owner[1]
    chosen = kinds["decision"].question.split("Chosen category: ")[1].split("\n")[0]
    assert [category for _, category in world.spot(right(kinds["decision"])).categories] == [chosen]


def test_a_refusal_is_right(world):
    for item in tasks.refusals(world, Random(3)):
        refusals, _ = tasks.WORDINGS[item.kind]
        assert right(item) in refusals
        assert len(set(item.choices) - set(refusals)) == 1


def test_a_category_more_is_an_item_more(world):
    wider, new = load_world("little"), next(iter(world.axes["diet"].categories.values()))
    wider.axes["diet"].categories["pickles"] = replace(new, name="pickles", label="pickles all things")
    items = tasks.reasoning(wider, Random(0))
    assert len(items) == len(tasks.reasoning(world, Random(0))) + 2
    assert "pickles" in [right(item) for item in items if item.kind == "example"]
