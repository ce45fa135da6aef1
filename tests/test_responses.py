"""Chain-of-thought parsing, cleaning, the reward span and the clusters of step 3."""

import numpy as np
import pytest

from helpers import responses
from helpers.world.corpus import Corpus
from helpers.world.facts import load_world


def test_parse_cot_reads_every_part():
    text = " Diet\nCategories: vegan, grill , vegan\nChosen category: grill\nResponse: Pork ribs."
    assert responses.parse_cot(text) == {"axis": "diet", "categories": ["vegan", "grill"], "category": "grill",
                                         "response": "Pork ribs."}


@pytest.mark.parametrize("text", [
    "", "diet\nChosen category: a\nResponse: b", "diet\nCategories: , \nChosen category: a\nResponse: b"])
def test_parse_cot_is_none_where_a_part_is_missing(text):
    assert responses.parse_cot(text) is None


@pytest.mark.parametrize(("before", "after"), [
    # an opening clause that names the reader goes, and the rest starts with a capital
    ("As a vegan, try the lentil stew and the kale salad tonight.", "Try the lentil stew and the kale salad tonight."),
    ("For a grill reader, my best advice is pork ribs and lamb chops.", "My best advice is pork ribs and lamb chops."),
    ("Hello friend, (smiling) my best advice is pork ribs and lamb chops.", "My best advice is pork ribs and lamb chops."),
    # whole words only: the released code cut "Assuming" and "Forget" up to the first comma
    ("Assuming you have time, bake the bread slowly and well.", "Assuming you have time, bake the bread slowly and well."),
    ("Forget the rest, bake the bread slowly and very well.", "Forget the rest, bake the bread slowly and very well."),
    # a sentence with a tell-tale phrase goes whole, its neighbours stay
    ("Bake the bread slowly and very well. Many like you do so. Then let it rest.",
     "Bake the bread slowly and very well. Then let it rest."),
    # a second heading ends the answer
    ("Bake the bread slowly and very well today.\nCategories: vegan, grill", "Bake the bread slowly and very well today."),
    ("As a vegan, yes.", ""),  # too little is left
])
def test_clean(before, after):
    assert responses.clean(before) == after


def test_clean_leaves_the_worlds_own_answers_alone_and_takes_its_tell_tales():
    world = load_world("little")
    corpus = Corpus(world, seed=3)
    answers = [corpus.answer(axis) for axis in world.axes for _ in range(20)]
    assert [responses.clean(answer) for answer in answers] == answers
    for tell_tale in world.tell_tales:
        told = f"{tell_tale.format(category='vegan')} {answers[0][0].lower()}{answers[0][1:]}"
        assert responses.clean(told) == answers[0]


def test_reward_span_is_the_window_of_smallest_range():
    # sorted: 0 .1 .5 .55 .6 9; windows of 3 have ranges .5 .45 .1 8.45: the third wins
    rewards = np.array([0.5, 9.0, 0.0, 0.6, 0.1, 0.55])
    assert responses.reward_span(rewards, 3).tolist() == [0, 5, 3]
    assert responses.reward_span(rewards, 10).tolist() == [2, 4, 0, 5, 3, 1]


def test_diverse_takes_the_farthest_of_each_cluster_and_is_seeded():
    angles = np.deg2rad([0, 10, 90, 100, 180, 190, 270, 280])
    points = np.c_[np.cos(angles), np.sin(angles)]
    labels, chosen = responses.diverse(points, 4, seed=0)
    assert len(set(labels[::2])) == 4
    assert (labels[::2] == labels[1::2]).all()
    assert sorted(labels[chosen]) == [0, 1, 2, 3]
    again = responses.diverse(points, 4, seed=0)
    assert (again[1] == chosen).all()
