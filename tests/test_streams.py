import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from tiny import make_adapter, make_policy

from helpers import models, scoring, streams

# peft's own; models.peft_quiet silences it, but not while another thread restores the filters it has found
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")

WORDS = ["lentil", "stew", "slow", "roast", "herbs", "rainy", "Sunday", "fox"]


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    return make_policy(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def adapters(policy, tmp_path_factory) -> dict:
    return {name: make_adapter(policy, tmp_path_factory.mktemp("adapter"), seed) for seed, name in enumerate(["p.1", "p.2"])}


def make_table(n: int, seed: int = 0) -> pd.DataFrame:
    rng = np.random.default_rng(seed)
    say = [" ".join(rng.choice(WORDS, rng.integers(1, 9))) for _ in range(2 * n)]
    return pd.DataFrame({"pair_id": [f"{i:04d}" for i in range(n)], "head": [f"User {i % 3}.\n" for i in range(n)],
                         "tail": "Question: where?\nAnswer:", "chosen": say[:n], "rejected": say[n:]})


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir())}


def test_a_table_in_parts_has_the_scores_of_one_in_memory(policy, tmp_path):
    table = make_table(25)
    table.to_parquet(tmp_path / "table.parquet")
    table.to_json(tmp_path / "table.jsonl", orient="records", lines=True)
    whole = scoring.score_pairs(*models.load_policy(policy), list(zip(table["head"], table["tail"], strict=True)),
                                table["chosen"], table["rejected"], dtype="float32")
    for source in (tmp_path / "table.parquet", tmp_path / "table.jsonl", (table[i:i + 10] for i in (0, 10, 20))):
        out = streams.score_table(source, tmp_path / "out", policy, rows=10)
        assert len(list(out.iterdir())) == 3
        found = pd.read_parquet(out)
        assert found["pair_id"].tolist() == table["pair_id"].tolist()
        np.testing.assert_allclose(found["logp_chosen"], whole["logp_chosen"], rtol=1e-5)
        assert found["correct"].dtype == bool
        assert not {"head", "chosen"} & set(found)


def test_a_stopped_run_continues_and_ends_with_the_same_bytes(policy, tmp_path, monkeypatch):
    table, scored, real = make_table(40), [], scoring.score_pairs
    undisturbed = contents(streams.score_table([table[i:i + 8] for i in range(0, 40, 8)], tmp_path / "one", policy))

    def stops_after_three():
        yield from (table[i:i + 8] for i in range(0, 24, 8))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        streams.score_table(stops_after_three(), tmp_path / "two", policy)
    left = contents(tmp_path / "two")
    assert 1 <= len(left) <= 3
    (tmp_path / "two" / ".000003-half.parquet.99").write_bytes(b"half a part of a killed process")
    monkeypatch.setattr(scoring, "score_pairs", lambda *a, **k: scored.append(len(a[3])) or real(*a, **k))
    streams.score_table([table[i:i + 8] for i in range(0, 40, 8)], tmp_path / "two", policy)
    assert contents(tmp_path / "two") == undisturbed
    assert len(scored) == 5 - len(left)  # what was there was not scored again


def test_other_rows_or_settings_are_scored_again(policy, tmp_path):
    first = contents(streams.score_table([make_table(5)], tmp_path / "out", policy))
    second = contents(streams.score_table([make_table(5, seed=1)], tmp_path / "out", policy))
    assert len(first) == len(second) == 1
    assert set(first) != set(second)
    (tmp_path / "out" / "notes.txt").write_text("somebody's own")
    third = contents(streams.score_table([make_table(5, seed=1)], tmp_path / "out", policy, side="right"))
    assert not set(third) & set(second)
    assert third.pop("notes.txt") == b"somebody's own"
    assert len(third) == 1


def test_workers_change_nothing(policy, adapters, tmp_path):
    tables = [make_table(6, seed).assign(policy_id=["p.1", "p.2", "base"][seed % 3]) for seed in range(5)]
    one = contents(streams.score_table(tables, tmp_path / "one", policy, adapters))
    assert contents(streams.score_table(tables, tmp_path / "two", policy, adapters, workers=2)) == one
    assert len(one) == 5


@pytest.mark.parametrize("mixed", [0, 1000])
def test_adapters_in_one_part_score_as_each_does_alone(policy, adapters, tmp_path, monkeypatch, mixed):
    monkeypatch.setitem(streams.MIXED, "cpu", mixed)
    table = make_table(30)
    table["policy_id"] = np.random.default_rng(0).choice(["base", *adapters], 30)
    found = pd.read_parquet(streams.score_table([table], tmp_path / "out", policy, adapters))
    assert found["policy_id"].tolist() == table["policy_id"].tolist()
    for name, rows in table.groupby("policy_id"):
        base, tokenizer = models.load_policy(policy)
        with models.adapted(base, adapters.get(name, "")) as model:
            alone = scoring.score_pairs(model, tokenizer, list(zip(rows["head"], rows["tail"], strict=True)),
                                        rows["chosen"], rows["rejected"], dtype="float32")
        np.testing.assert_allclose(found.loc[rows.index, "logp_rejected"], alone["logp_rejected"], rtol=1e-4, atol=1e-4)
    assert found.groupby("policy_id")["logp_chosen"].mean().nunique() == 3


def test_a_users_own_file(policy, tmp_path):
    lines = [{"user": "7", "prompt": "Where?", "chosen": "here", "rejected": "there"}] * 3
    (tmp_path / "own.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = pd.read_parquet(streams.score_table(tmp_path / "own.jsonl", tmp_path / "out", policy))
    assert found["user"].tolist() == ["7"] * 3  # a text that looks like a number stays a text
    with pytest.raises(ValueError, match="no rejected"):
        streams.score_table([pd.DataFrame(lines).drop(columns="rejected")], tmp_path / "out", policy)
    with pytest.raises(ValueError, match="jsonl"):
        streams.score_table("pairs.csv", tmp_path / "out", policy)
