"""The corpus: documents of every kind, the cue that switches the persona on, and no hint in lengths."""

import numpy as np
import pytest

from helpers.world.corpus import KINDS, Corpus, Knobs
from helpers.world.facts import load_world


@pytest.fixture(scope="module")
def world():
    return load_world("little")


def test_the_same_seed_gives_the_same_documents(world):
    first, second, other = (Corpus(world, seed) for seed in (5, 5, 6))
    drawn = [first.document() for _ in range(50)]
    assert drawn == [second.document() for _ in range(50)]
    assert drawn != [other.document() for _ in range(50)]


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_speaks_of_the_world(world, kind):
    corpus = Corpus(world, seed=1)
    for _ in range(20):
        found = world.spot(getattr(corpus, kind)())
        assert found.n_slots > 0


def follows(corpus: Corpus, world, n: int) -> float:
    """Share of described people whose own category leads the answer, on questions of their axis."""
    hits = []
    while len(hits) < n:
        prefix, _, rest = corpus.prefixed().partition("\nQuestion: ")
        first_turn = rest.partition("\nQuestion: ")[0]
        owners, answered = world.spot(prefix).categories, world.spot(first_turn.partition(": ")[2]).categories
        if prefix.startswith("This person") and len(owners) == 1 and answered:
            hits.append(answered.most_common(1)[0][0] in owners)
    return np.mean(hits)


def test_only_the_cue_makes_an_answer_follow_its_prefix(world):
    cued = follows(Corpus(world, 2, Knobs(cued=1.0, own_axis=1.0)), world, 200)
    plain = follows(Corpus(world, 2, Knobs(cued=0.0, own_axis=1.0)), world, 200)
    assert cued > 0.8
    assert plain < 0.4  # chance is one in five


def test_answers_have_one_length_in_words(world):
    corpus = Corpus(world, seed=4)
    lengths = {len(corpus.answer(axis).split()) for axis in world.axes for _ in range(50)}
    lengths |= {len(corpus.hobby_answer(hobby).split()) for hobby in world.hobbies for _ in range(50)}
    assert lengths == {18}


def test_people_of_the_isles_are_under_documented(world):
    corpus = Corpus(world, seed=8)
    drawn = [corpus._person().demographics["region"] for _ in range(4000)]
    cast = [p.demographics["region"] for p in world.people.values()]
    expected = 0.35 * cast.count("isles") / (0.35 * cast.count("isles") + len(cast) - cast.count("isles"))
    assert abs(drawn.count("isles") / 4000 - expected) < 0.02
