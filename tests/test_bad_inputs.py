"""Bad inputs through the runner's own entry: one clear message with file and remedy, and nothing written anywhere."""

import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml

from helpers import DATA, artifacts, preflight, run
from helpers.artifacts import RunError, open_run
from helpers.schemas import SchemaError
from helpers.world import facts

OWN = "base: smoke\n"


@pytest.fixture
def runs(tmp_path, monkeypatch):
    """A folder of runs with one that was made before."""
    monkeypatch.setattr(artifacts, "RUNS", tmp_path / "runs")
    open_run("smoke", "before").note(commit="abc")
    return tmp_path / "runs"


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def refused(runs: Path, capsys, *command: str) -> str:
    """What the runner says to these words; it returned 2, showed no traceback and left every run as it was."""
    before = files(runs)
    assert run.main(list(command)) == 2
    said = capsys.readouterr()
    assert "Traceback" not in said.err
    assert files(runs) == before
    return said.err


@pytest.mark.parametrize(("words", "complaint"), [
    (["nothing"], "no profile nothing; expected gpu, laptop, paper, smoke or a path to a .yaml file"),
    (["smoke", "--set", "training.epoch=3"], "unknown key training.epoch; did you mean training.epochs?"),
    (["smoke", "--set", "training.epochs"], "expected key=value, for example training.epochs=1"),
    (["smoke", "--set", "people.axes=[diet"], "--set people.axes=[diet: the value is no YAML"),
    (["smoke", "--set", "training.epochs=0"], "training.epochs is 0"),
    (["smoke", "--set", "questions.personal=0"], "questions.personal is 0"),
    (["smoke", "--set", "responses.span=99"], "responses.span is 99; expected 4 (k) to 10"),
    (["smoke", "--set", "prefixes.names=[none, none]"], "prefixes.names repeats a name"),
    (["smoke", "--set", "people.axes=[diets]"], "people.axes: world little has no diets; expected some of diet, "),
    (["smoke", "--set", "world=atlantis"], "world 'atlantis' lacks"),
    (["smoke", "--set", "policy.path=data/models/none"], "policy.path: no model at data/models/none; expected a folder"),
    (["smoke", "--set", "reward.path=data/world"], "has no config.json: it is no model"),
    (["smoke", "--set", "policy.max_length=9999"], "policy.max_length is 9999, but"),
    (["smoke", "--set", "tax.tasks=[chess]"], "tax.tasks: chess in no group; add them to"),
    (["smoke", "--set", "data.preferences=none.jsonl"], "data.preferences: no none.jsonl; expected JSONL"),
    (["smoke", "--set", "teacher.base_url=http://x/v1", "--set", "teacher.model=gpt-9"], "no price for 'gpt-9' in"),
    (["smoke", "--only", "99"], "no notebook 99; expected one of 00"),
    (["smoke", "--run", "../elsewhere"], "cannot be a folder name"),
    (["laptop", "--run", "before"], "run before has profile smoke, not laptop; set profile = 'smoke', or another run"),
], ids=lambda value: value if isinstance(value, str) else "")
def test_a_bad_word_is_refused(runs, capsys, words, complaint):
    assert complaint in refused(runs, capsys, *words)


@pytest.mark.parametrize(("content", "complaint"), [
    (b"base: smoke\ntraining: {epochs: 1\n", "line"),
    (b"- smoke\n", "found a list, expected keys and values"),
    (b"base: smoke\nworld: caf\xe9\n", "no YAML: 'utf-8'"),
    (b"base: own.yaml\n", "leads back to itself"),
    (b"training: {epochs: 1}\n", "is missing; put `base: laptop` in the profile"),
])
def test_a_bad_profile_is_refused_by_its_name(runs, capsys, tmp_path, monkeypatch, content, complaint):
    monkeypatch.chdir(tmp_path)
    Path("own.yaml").write_bytes(content)
    said = refused(runs, capsys, "own.yaml")
    assert "own.yaml" in said
    assert complaint in said


def test_no_key_in_the_environment_is_said_before_anything_is_made(runs, capsys, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    said = refused(runs, capsys, "gpu", "--set", "teacher.model=gpt-4.1-mini")
    assert "no key in the environment variable OPENAI_API_KEY: export it" in said


PAIR = {"user": "ann", "prompt": "What?", "chosen": "Tea.", "rejected": "Coffee."}
LINES = {
    "not UTF-8: byte 11": b'{"user": "\xff"}', "chosen equals rejected": json.dumps(PAIR | {"rejected": "Tea."}).encode(),
    "missing field: prompt": b'{"user": "ann"}', "empty field: prompt": json.dumps(PAIR | {"prompt": " "}).encode(),
    "over-long text: prompt has 20001": json.dumps(PAIR | {"prompt": "x" * 20001}).encode(),
    "user with too few pairs: 'ann' has 1": json.dumps(PAIR).encode(),
}


@pytest.mark.parametrize("reason", LINES)
def test_bad_pairs_are_refused_with_file_line_and_remedy(runs, capsys, tmp_path, reason):
    file = tmp_path / "my.jsonl"
    file.write_bytes(LINES[reason] + b"\n")
    said = refused(runs, capsys, "smoke", "--set", f"data.preferences={file}")
    assert f"{file}: 0 users with 20 good pairs or more" in said
    assert f"line 1: {reason}" in said
    assert "add pairs or users" in said


@pytest.fixture
def world(tmp_path, monkeypatch):
    """A copy of the little world that a test may spoil."""
    shutil.copytree(DATA / "world", tmp_path / "data" / "world")
    for module in (facts, preflight):
        monkeypatch.setattr(module, "DATA", tmp_path / "data")
    return tmp_path / "data" / "world" / "little"


def spoil(file: Path, change) -> None:
    tree = yaml.safe_load(file.read_text())
    change(tree)
    file.write_text(yaml.safe_dump(tree, allow_unicode=True))


def test_a_bad_world_is_refused_by_file_and_line(runs, capsys, world):
    with (world / "axes.yaml").open("a") as file:
        file.write("\naxes: [diet\n")
    said = refused(runs, capsys, "smoke", "--set", "seed=18")
    assert f"{world / 'axes.yaml'}" in said
    assert "line" in said


@pytest.mark.parametrize(("file", "change", "complaint"), [
    ("cast.yaml", lambda t: t["people"].append(t["people"][0]), "Mara Venn stands there twice; a name is one person's"),
    ("cast.yaml", lambda t: t["people"][0].update(memberships=[{"diet": "stones"}]), "Mara Venn refers to [('diet', 'ston"),
    ("axes.yaml", lambda t: t["axes"]["diet"].pop("stems"), "KeyError 'stems': a key is missing"),
    ("hobbies.yaml", lambda t: t.pop("hobbies"), "KeyError 'hobbies': a key is missing"),
])
def test_a_wrong_world_names_what_is_wrong(runs, capsys, world, file, change, complaint):
    spoil(world / file, change)
    assert complaint in refused(runs, capsys, "smoke", "--set", "seed=18")


def test_a_truncated_table_says_which_and_who_makes_it_anew(store):
    store.write("folds", pd.DataFrame({"scheme": ["stratified"], "fold": [0], "persona_id": ["p01"]}))
    whole = store.file("folds").read_bytes()
    store.file("folds").write_bytes(whole[:len(whole) // 2])
    with pytest.raises(SchemaError, match=r"folds\.parquet cannot be read .* delete it .* notebook 05_prefixes"):
        store.read("folds")


def test_a_broken_run_json_says_what_to_do(store):
    (store.path / "run.json").write_text('{"stages": ')
    with pytest.raises(RunError, match=r"run\.json: .*: delete it; the stages are then run again"):
        store.log()


def test_a_duplicate_persona_and_a_value_of_another_kind_are_not_written(store):
    row = {"scheme": "stratified", "fold": 0, "persona_id": "p01"}
    with pytest.raises(SchemaError, match="folds.scheme.fold.persona_id: 1 values are not unique"):
        store.write("folds", pd.DataFrame([row, row]))
    with pytest.raises(SchemaError, match="folds.fold: 1 values are not int, first nan"):
        store.write("folds", pd.DataFrame([row | {"fold": np.nan}]))
    assert not store.has("folds")
