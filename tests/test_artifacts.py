"""The run folder keeps whole files only, equal bytes for equal rows, and one truth about its profile."""

import hashlib

import matplotlib.pyplot as plt
import pandas as pd
import pytest

from helpers.artifacts import MissingTable, RunError, atomic, open_run
from helpers.schemas import DTYPES, TABLES, SchemaError


def folds(*people, fold=0):
    return pd.DataFrame({"scheme": "stratified", "fold": fold, "persona_id": list(people)})


def scores(method, setting, correct, pairs=("q1",)):
    plain = {name: "x" for name, kind in TABLES["scores"].columns.items() if kind == "str"}
    numbers = {"fold": 0, "seed": 0, "n_chosen": 3, "n_rejected": 4, "logp_chosen": -1.5, "logp_rejected": -2}
    cell = {"method": method, "setting": setting, "kind": "personal", "trained": False, "correct": correct}
    return pd.DataFrame([plain | numbers | cell | {"pair_id": pair} for pair in pairs])


def sha256(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_a_table_comes_back_sorted_by_its_keys(store):
    store.write("folds", folds("p02", "p10", "p01"))
    assert store.read("folds").persona_id.tolist() == ["p01", "p02", "p10"]


def test_equal_rows_give_equal_bytes_whatever_their_order_and_index(store, tmp_path):
    first = sha256(store.write("folds", folds("p01", "p02")))
    other = open_run("smoke", "other", runs=tmp_path)
    again = other.write("folds", folds("p02", "p01").set_index(pd.Index([7, 3])))
    assert sha256(again) == first
    assert sha256(other.write("folds", folds("p01", "p03"))) != first


def test_lists_survive_the_file(store):
    row = {"persona_id": "p01", "prefix": "few_shot", "variant": "main", "text": "é", "shots": ["a", "b"],
           "model": "", "n_tokens": 3}
    store.write("prefixes", pd.DataFrame([row, row | {"prefix": "tag", "shots": []}]))
    assert store.read("prefixes").shots.tolist() == [["a", "b"], []]
    assert store.read("prefixes").text[0] == "é"


@pytest.mark.parametrize("table", TABLES)
def test_a_table_without_rows_keeps_its_schema(store, table):
    store.write(table, pd.DataFrame(columns=list(TABLES[table].columns)))
    found = store.read(table)
    assert found.empty
    expected = {name: DTYPES[kind].pandas for name, kind in TABLES[table].columns.items()}
    assert found.dtypes.astype(str).to_dict() == expected


def test_a_table_that_breaks_its_schema_is_not_written(store):
    with pytest.raises(SchemaError, match="folds.fold"):
        store.write("folds", folds("p01").assign(fold="0"))
    assert not store.has("folds")


def test_an_interrupted_write_leaves_the_old_file_and_no_scraps(tmp_path):
    path = tmp_path / "table"
    path.write_text("old")

    def interrupted():
        with atomic(path) as scratch:
            scratch.write_text("half of the n")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_merge_replaces_only_the_same_method_and_setting(store):
    store.merge("scores", scores("mt", "main", correct=True, pairs=("q1", "q2")))
    store.merge("scores", scores("prompting", "main", correct=True))
    store.merge("scores", scores("mt", "main", correct=False))  # q2 goes: the whole combination is replaced
    found = store.read("scores")[["method", "pair_id", "correct"]]
    assert found.values.tolist() == [["mt", "q1", False], ["prompting", "q1", True]]


def test_missing_table_names_the_notebook_and_the_command(store):
    with pytest.raises(MissingTable, match="04_preferences makes it: ./run_all.sh smoke --run test --only 0"):
        store.read("preferences")


def test_what_is_missing_is_traced_back_to_the_first_notebook(store):
    assert store.missing("questions") == ["01_personas", "02_questions"]
    assert [stem[:2] for stem in store.missing("folds")] == ["01", "02", "03", "04", "05"]
    store.write("folds", folds("p01"))
    assert store.missing("folds") == []


def test_require_leaves_alone_what_is_there(store, capsys):
    store.write("folds", folds("p01"))
    store.require("folds")
    assert capsys.readouterr().out == ""


def test_the_run_is_named_after_the_profile_and_what_was_changed(tmp_path):
    assert open_run("smoke", runs=tmp_path).name == "smoke"
    shuffled, fewer = ["judge.shuffle_labels=true"], ["people.axes=[diet, music]"]
    assert open_run("smoke", sets=shuffled, runs=tmp_path).name == "smoke-shuffle_labels-true"
    assert open_run("smoke", sets=fewer, runs=tmp_path).name == "smoke-axes-diet-music"


def test_the_stored_profile_is_the_truth(tmp_path):
    open_run("smoke", "mine", sets=["training.epochs=5"], runs=tmp_path)
    assert open_run("smoke", "mine", seed=17, runs=tmp_path).profile.training.epochs == 5
    by_path = open_run(str(tmp_path / "mine" / "profile.yaml"), "mine", runs=tmp_path)
    assert by_path.profile.training.epochs == 5


@pytest.mark.parametrize(("profile", "seed", "complaint"), [
    ("laptop", 17, "run test has profile smoke, not laptop; set profile = 'smoke', or another run"),
    ("smoke", 5, "run test has seed 17, not 5; set seed = 17, or another run, such as run = 'smoke-seed-5'"),
])
def test_another_profile_or_seed_needs_another_run(store, profile, seed, complaint):
    with pytest.raises(RunError, match=complaint):
        open_run(profile, "test", seed, runs=store.path.parent)


def test_a_seed_given_by_a_notebook_is_stored(tmp_path):
    assert open_run("smoke", "five", 5, runs=tmp_path).profile.seed == 5
    assert open_run("smoke", "five", runs=tmp_path).profile.seed == 5


def test_records_are_merged(store):
    store.record("04_preferences", requests=3)
    store.record("04_preferences", cost_usd=0.5)
    store.note(commit="abc")
    assert store.log() == {"run": "test", "stages": {"04_preferences": {"requests": 3, "cost_usd": 0.5}},
                           "commit": "abc"}


def test_a_figure_is_saved_with_the_same_bytes_each_time(store):
    fig, ax = plt.subplots()
    ax.plot([0, 1])
    first = sha256(store.figure(fig, "line"))
    assert sha256(store.figure(fig, "line")) == first
    plt.close(fig)
