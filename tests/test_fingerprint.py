"""A stage is stale when something it depends on has changed, and only then."""

import json

import pandas as pd
import pytest

from helpers import fingerprint as module
from helpers.artifacts import open_run
from helpers.fingerprint import digest, fingerprint, modules, notebook_code

STAGE = "06_prompting"
CODE = "from helpers import scoring\nimport helpers.world.facts as facts\nscoring.score()"
HELPERS = {"scoring.py": "def score():\n    from helpers.dpo import rows", "dpo.py": "rows = 1",
           "judging.py": "ask = 1", "show.py": "ink = 0", "world/__init__.py": "", "world/facts.py": "x = 1"}


def write_notebook(root, code, parameters="seed = 17"):
    cells = [{"cell_type": "markdown", "source": ["# Why?"]}, {"cell_type": "code", "source": [parameters]},
             {"cell_type": "code", "source": code.splitlines(keepends=True)}]
    (root / "notebooks" / f"{STAGE}.ipynb").write_text(json.dumps({"cells": cells}))


@pytest.fixture
def repo(tmp_path, monkeypatch):
    """A repository with one notebook, a few helper modules, a world and prompts; fingerprints look there."""
    files = {f"helpers/{name}": text for name, text in HELPERS.items()}
    files |= {"data/world/little/axes.yaml": "diet", "data/prompts/short/cot.txt": "Axis", "notebooks/x": ""}
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    write_notebook(tmp_path, CODE)
    monkeypatch.setattr(module, "ROOT", tmp_path)
    return tmp_path


def test_helpers_are_found_through_other_helpers(repo):
    assert set(modules(CODE)) == {"helpers.scoring", "helpers.dpo", "helpers.world.facts"}


@pytest.mark.parametrize(("path", "stale"), [
    ("helpers/scoring.py", True),
    ("helpers/dpo.py", True),  # imported by scoring, inside a function
    ("helpers/world/facts.py", True),
    ("helpers/judging.py", False),  # imported by nobody here
    ("data/world/little/axes.yaml", True),
    ("data/prompts/short/cot.txt", True),
    ("data/prices.yaml", False),
])
def test_a_changed_file_makes_stale_what_depends_on_it(repo, store, path, stale):
    before = fingerprint(store, STAGE)
    (repo / path).write_text("changed = 2")
    assert (fingerprint(store, STAGE) != before) is stale


@pytest.mark.parametrize(("code", "stale"), [(CODE, False), ("from helpers import tax", True)])
def test_a_changed_task_makes_stale_what_asks_tasks(repo, store, code, stale):
    (repo / "helpers/tax.py").write_text("ask = 1")
    write_notebook(repo, code)
    before = fingerprint(store, STAGE)
    (repo / "data/tasks").mkdir()
    (repo / "data/tasks/little_facts.yaml").write_text("task: little_facts")
    assert (fingerprint(store, STAGE) != before) is stale


@pytest.mark.parametrize(("override", "stale"), [
    ("training.beta=0.5", True), ("seed=18", True), ("training.workers=7", False),
    ("teacher.budget_usd=9", False)])
def test_a_setting_counts_unless_it_only_says_how_to_execute(repo, store, tmp_path, override, stale):
    other = open_run("smoke", "other", sets=[override], runs=tmp_path)
    assert (fingerprint(other, STAGE) != fingerprint(store, STAGE)) is stale


def test_tables_that_are_read_count_and_others_do_not(repo, store):
    before = fingerprint(store, STAGE)  # 06 reads preferences and prefixes
    store.write("folds", pd.DataFrame({"scheme": ["stratified"], "fold": [0], "persona_id": ["p01"]}))
    assert fingerprint(store, STAGE) == before
    row = {"persona_id": "p01", "prefix": "tag", "variant": "main", "text": "t", "model": "", "n_tokens": 1}
    store.write("prefixes", pd.DataFrame([row | {"shots": []}]))
    assert fingerprint(store, STAGE) != before


def test_code_counts_but_prose_and_the_run_parameters_do_not(repo, store):
    before = fingerprint(store, STAGE)
    write_notebook(repo, CODE, parameters="seed = 99")  # the run gives it: the profile's seed counts instead
    assert fingerprint(store, STAGE) == before
    write_notebook(repo, CODE + "\nx = 1")
    assert fingerprint(store, STAGE) != before


def test_magics_do_not_break_it(repo):
    write_notebook(repo, "%matplotlib inline\nx = 1")
    assert notebook_code(repo / "notebooks" / f"{STAGE}.ipynb") == "x = 1"


def test_work_is_kept_until_its_stage_is_stale(repo, store):
    write_notebook(repo, CODE + "\nfrom helpers import show")
    (store.work(STAGE) / "done").touch()
    (repo / "helpers/show.py").write_text("ink = 1")  # a colour: nothing to compute again
    assert (store.work(STAGE) / "done").exists()
    (repo / "helpers/dpo.py").write_text("rows = 2")
    assert not (store.work(STAGE) / "done").exists()
    assert len(list(store.work(STAGE).parent.iterdir())) == 1  # what is stale is removed


def test_digest_of_a_folder_knows_names_and_contents(tmp_path):
    (tmp_path / "a").write_text("1")
    first = digest(tmp_path)
    (tmp_path / "a").rename(tmp_path / "b")
    second = digest(tmp_path)
    (tmp_path / "b").write_text("22")
    assert len({first, second, digest(tmp_path), digest(tmp_path / "absent")}) == 4
