from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from tiny import make_policy

from helpers import models, references, scoring

TEXTS = ("head", "tail", "chosen", "rejected")


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    return make_policy(tmp_path_factory.mktemp("base"))


@pytest.fixture
def rows() -> pd.DataFrame:
    """Two people disagree about a question behind no prefix; behind their own ones the prompts differ."""
    asked = [("p0", "none", "", "stew", "roast"), ("p1", "none", "", "roast", "stew"), ("p2", "none", "", "fox", "stew"),
             ("p0", "tag", "The user is quick.\n", "stew", "roast"), ("p1", "tag", "The user is lazy.\n", "roast", "stew")]
    found = pd.DataFrame(asked, columns=["persona_id", "prefix", "head", "chosen", "rejected"])
    return found.assign(tail="Question: what should I cook?\nAnswer:", pair_id=[f"q{i}" for i in range(len(found))])


@pytest.fixture
def computed(monkeypatch) -> list[int]:
    """How many prompts each part computes, as they are computed."""
    compute, sizes = references._compute, []
    monkeypatch.setattr(references, "_compute", lambda p, part, f: sizes.append(len(part)) or compute(p, part, f))
    return sizes


def test_they_are_the_scores_of_the_untrained_policy(policy, rows, tmp_path):
    found = references.score(rows, policy, "left", tmp_path / "r", executor="sequential")
    prompts = list(zip(rows["head"], rows["tail"], strict=True))
    plain = scoring.score_pairs(*models.load_policy(policy), prompts, rows["chosen"], rows["rejected"],
                                dtype="float32")
    pd.testing.assert_frame_equal(found[plain.columns], plain, check_like=True, rtol=1e-5)
    assert set(found.columns) == {*rows.columns, *plain.columns} - set(TEXTS)
    assert found["logp_chosen"][0] == found["logp_rejected"][1]  # the same prompt and answer: one number
    assert found["logp_chosen"][0] != found["logp_chosen"][3]


def test_what_is_in_the_table_is_not_computed_again(policy, rows, tmp_path, computed):
    # without a prefix three answers follow one prompt; two more prompts with tags
    first = references.score(rows[rows["prefix"] == "none"], policy, "left", tmp_path / "r", executor="sequential")
    assert computed == [1]
    whole = references.score(rows, policy, "left", tmp_path / "r", executor="sequential")
    assert computed == [1, 2]
    pd.testing.assert_frame_equal(whole.iloc[:3], first, check_exact=True)
    references.score(rows, policy, "left", tmp_path / "r", executor="sequential")
    assert computed == [1, 2]


def test_another_model_or_precision_has_its_own_numbers(policy, rows, tmp_path, computed):
    references.score(rows, policy, "left", tmp_path / "r", executor="sequential")
    half = references.score(rows, replace(policy, dtype="bfloat16"), "left", tmp_path / "r", executor="sequential")
    assert computed == [3, 3]
    other = make_policy(tmp_path / "base", num_hidden_layers=1)
    there = references.score(rows, other, "left", tmp_path / "r", executor="sequential")
    assert computed == [3, 3, 3]
    assert not np.allclose(half["logp_chosen"], there["logp_chosen"], rtol=1e-2)


def test_a_killed_run_goes_on_and_ends_with_the_same_bytes(policy, rows, tmp_path, computed, monkeypatch):
    monkeypatch.setattr(references, "CHUNK", 1)

    def table(folder: str) -> dict[str, bytes]:
        return {file.name: file.read_bytes() for file in (tmp_path / folder).iterdir()}

    whole = references.score(rows, policy, "left", tmp_path / "one", executor="sequential")
    assert computed == [1, 1, 1]
    references.score(rows, policy, "left", tmp_path / "two", executor="sequential")
    sorted((tmp_path / "two").iterdir())[1].unlink()  # as if it had been killed before this part
    again = references.score(rows, policy, "left", tmp_path / "two", executor="sequential")
    assert len(computed) == 3 + 3 + 1
    pd.testing.assert_frame_equal(again, whole, check_exact=True)
    assert table("one") == table("two")
