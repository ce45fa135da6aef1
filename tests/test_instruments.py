"""The offline reward model and embedder: they load like the large ones, and see what they should."""

from random import Random

import numpy as np
import pytest

from helpers import models, responses
from helpers.world import instruments
from helpers.world.corpus import Corpus
from helpers.world.facts import load_world


def test_damage_changes_the_text():
    intact = "I would gladly suggest lentil stew and bean curry, because it spares the animals. I hope this helps."
    other = "Pork ribs and lamb chops, because smoke adds deep flavour."
    damaged = [instruments.damage(intact, other, Random(i)) for i in range(60)]
    assert intact not in damaged
    assert len(set(damaged)) > 30


def test_the_shipped_reward_model_prefers_intact_answers_and_no_category():
    world = load_world("little")
    corpus = Corpus(world, seed=77)
    questions, intact, damaged = zip(*instruments.fault_pairs(corpus, 300), strict=True)
    reward = models.load_reward("data/models/reward")
    assert (reward.score(questions, intact) > reward.score(questions, damaged)).mean() > 0.65
    # two intact answers that differ in nothing but their tone: no preference for good or bad tones beyond a fraction
    hobby = next(iter(world.hobbies))
    good, bad = ([corpus.hobby_answer(hobby, tone) for tone in tones for _ in range(60)]
                 for tones in (("warm", "plain"), ("curt", "vague")))
    question = [corpus._hobby_question(hobby)] * len(good)
    assert 0.25 < (reward.score(question, good) > reward.score(question, bad)).mean() < 0.75


def test_the_shipped_embedder_tells_categories_apart():
    world = load_world("little")
    corpus = Corpus(world, seed=78)
    embedder, found = models.load_embedder("data/models/embedder"), []
    for axis, facts in world.axes.items():
        names = [corpus.rng.choice(list(facts.categories)) for _ in range(12)]
        vectors = embedder.encode([corpus.answer(axis, name) for name in names], normalize_embeddings=True)
        _, chosen = responses.diverse(vectors, 4, seed=0)
        found.append(len({names[i] for i in chosen}) / min(4, len(set(names))))
    assert np.mean(found) > 0.85  # drawn blindly, four of twelve show 2.95 of five


@pytest.mark.slow
def test_a_short_training_makes_a_reward_model_that_loads(tmp_path):
    accuracy = instruments.train_reward("little", models.resolve("data/models/base"), tmp_path, seed=1, steps=40, batch=16)
    assert 0.4 < accuracy <= 1.0
    assert models.load_reward(tmp_path).score(["Why?"], ["Because."]).shape == (1,)
