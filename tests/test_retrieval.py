"""Shots picked for a question: on four pairs worked by hand, and as laws on the little world."""

import numpy as np
import pandas as pd
import pytest
from test_prefixes import cast, only
from tiny import make_tokenizer

from helpers import prefixes, retrieval, schemas
from helpers.config import load_profile

TOKENIZER = make_tokenizer()


@pytest.fixture(scope="module")
def cfg():
    smoke = load_profile("smoke", ["prefixes.retrieval=[tfidf, embedding]"])
    return only(smoke, "none", "few_shot")


def ask_pairs(train, test):
    rows = [(f"t{i}", "train", x) for i, x in enumerate(train)] + [(f"q{i}", "test", x) for i, x in enumerate(test)]
    pairs = pd.DataFrame(rows, columns=["pair_id", "split", "prompt"])
    return pairs.assign(persona_id="p1", chosen="yes " + pairs["pair_id"], rejected="no")


def test_the_first_choice_stands_last_and_equal_ones_keep_their_order():
    near, far = retrieval.nearest_and_farthest(np.array([0.2, 0.9, 0.2, 0.5]), 2)
    # highest .9 (1), then .5 (3); lowest .2 twice: 0 before 2
    assert near.tolist() == [3, 1]
    assert far.tolist() == [2, 0]
    noisy = np.array([0.3, 0.3 + 1e-9, 0.1])  # a difference that small is the machine's
    assert retrieval.nearest_and_farthest(noisy, 1)[0].tolist() == [0]


def test_near_and_far_by_hand(cfg):
    # the test question shares two words with t0, one with t1, none with t2 and t3
    pairs = ask_pairs(["cook lentil stew", "cook rice", "sail boats", "knit socks"], ["lentil stew tonight"])
    pairs.loc[0, "prompt"] = "lentil stew recipes"
    pairs.loc[1, "prompt"] = "stew recipes"
    made = retrieval.retrieve(pairs, TOKENIZER, cfg).set_index("variant")
    assert made.loc["near_tfidf", "shots"] == ["t1", "t0"]
    assert set(made.loc["far_tfidf", "shots"]) == {"t2", "t3"}
    assert made.loc["near_tfidf", "text"] == (
        "Question: stew recipes\nPreferred: yes t1\nQuestion: lentil stew recipes\nPreferred: yes t0")
    assert made.loc["near_tfidf", "n_tokens"] == len(TOKENIZER(made.loc["near_tfidf", "text"])["input_ids"])


def test_law_every_test_pair_has_own_train_shots_and_no_test_answer(cfg):
    _, preferences = cast(6)
    made = retrieval.retrieve(preferences, TOKENIZER, cfg)
    pair, test = preferences.set_index("pair_id"), preferences[preferences["split"] == "test"]
    assert len(made) == 4 * len(test)
    assert (made.groupby("pair_id").size() == 4).all()
    for row in made.itertuples():
        assert pair.loc[row.pair_id, "split"] == "test"
        assert len(row.shots) == len(set(row.shots)) == cfg.prefixes.few_shot_shots
        assert (pair.loc[row.shots, "split"] == "train").all()
        assert set(pair.loc[row.shots, "persona_id"]) == {row.persona_id}
    assert prefixes.leaks(made, preferences).empty
    schemas.check("retrieved", made)


def test_near_shots_are_on_the_questions_topic_more_often_than_far_ones(cfg):
    _, preferences = cast(6)
    # question_id of a personal question begins with the person's id, of a divergent one with the question
    personal = preferences.set_index("pair_id")["question_id"].str.startswith("p")
    made = retrieval.retrieve(preferences, TOKENIZER, cfg)
    same = [np.mean(personal[row.shots].to_numpy() == personal[row.pair_id]) for row in made.itertuples()]
    by = made.assign(same=same).groupby("variant")["same"].mean()
    assert by["near_tfidf"] > by["far_tfidf"] + 0.2
    assert by["near_embedding"] > by["far_embedding"] + 0.2


def test_the_same_seed_gives_the_same_table_whatever_the_order_of_rows(cfg):
    _, preferences = cast(4)
    made = retrieval.retrieve(preferences, TOKENIZER, cfg)
    pd.testing.assert_frame_equal(made, retrieval.retrieve(preferences.iloc[::-1], TOKENIZER, cfg))


def test_without_few_shot_nothing_is_retrieved(cfg):
    made = retrieval.retrieve(cast(2)[1], TOKENIZER, only(cfg, "none", "tag"))
    assert made.empty
    assert schemas.check("retrieved", made).empty
