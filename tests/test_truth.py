"""The hidden truth cannot be read off anything but content: not off length, not off position."""

from random import Random

import numpy as np
import pytest

from helpers.world.corpus import Corpus
from helpers.world.facts import load_world
from helpers.world.teacher import SimulatedTeacher


@pytest.fixture(scope="module")
def judged():
    """(better, worse, better came first) of 3,000 pairs of answers by the noiseless utility of random people."""
    world, random = load_world("little"), Random(11)
    corpus, teacher, rows = Corpus(world, seed=11), SimulatedTeacher(world, None, 0), []
    while len(rows) < 3000:
        person = random.choice(list(world.people.values()))
        axis, _ = random.choice(person.memberships)
        if len(rows) % 2:
            question = random.choice(world.divergent_questions(axis))
            pair = [corpus.answer(axis), corpus.answer(axis)]
        else:
            question = random.choice(world.personal_questions(person))
            pair = [corpus.hobby_answer(random.choice(person.hobbies)) for _ in range(2)]
        first, second = (teacher.utility(person.name, question, text) for text in pair)
        if first != second:
            rows.append((*(pair if first > second else pair[::-1]), first > second))
    return rows


@pytest.mark.parametrize("length", [len, lambda text: len(text.split())], ids=["characters", "words"])
def test_the_better_answer_is_not_the_longer_one(judged, length):
    for kind in (judged[::2], judged[1::2]):
        differ = [length(better) > length(worse) for better, worse, _ in kind if length(better) != length(worse)]
        # 1,500 coins: standard error .013, so .05 is almost four of them
        assert not differ or abs(np.mean(differ) - 0.5) < 0.05


def test_the_better_answer_is_not_the_first_one(judged):
    assert abs(np.mean([first for _, _, first in judged]) - 0.5) < 0.035  # standard error .009
