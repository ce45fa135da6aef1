"""Tables are what data/README.md says, and what is not is refused by name."""

import numpy as np
import pandas as pd
import pytest

from helpers import DATA
from helpers.schemas import STAGES, TABLES, SchemaError, check, made_by

FOLDS = {"scheme": ["stratified", "stratified"], "fold": [0, 1], "persona_id": ["p01", "p02"]}
PREFIXES = {"persona_id": ["p01"], "prefix": ["few_shot"], "variant": ["main"], "text": ["Question: …"],
            "shots": [["a", "b"]], "model": [""], "n_tokens": [7]}


def test_columns_come_back_in_order_with_their_dtypes():
    shuffled = pd.DataFrame({key: PREFIXES[key] for key in reversed(PREFIXES)}).astype({"text": object})
    out = check("prefixes", shuffled.assign(shots=[np.array(["a", "b"], dtype=object)]))
    assert out.columns.tolist() == list(PREFIXES)
    assert out.dtypes.astype(str).to_dict() == {
        "persona_id": "str", "prefix": "str", "variant": "str", "text": "str", "shots": "object",
        "model": "str", "n_tokens": "int64"}
    assert out.shots[0] == ["a", "b"]


@pytest.mark.parametrize("table", TABLES)
def test_an_empty_table_keeps_its_schema(table):
    out = check(table, pd.DataFrame(columns=list(TABLES[table].columns)))
    assert (len(out), out.columns.tolist()) == (0, list(TABLES[table].columns))


@pytest.mark.parametrize(("change", "complaint"), [
    ({"n_tokens": [7.0]}, "prefixes.n_tokens: 1 values are not int, first 7.0"),
    ({"n_tokens": [True]}, "prefixes.n_tokens: 1 values are not int, first True"),
    ({"text": [None]}, "prefixes.text: 1 values are not str, first None"),
    ({"shots": ["a"]}, "prefixes.shots: 1 values are not list.str., first 'a'"),
    ({"shots": [["a", 1]]}, "prefixes.shots: 1 values are not list.str."),
    ({"variant": ["mian"]}, "prefixes.variant: 1 values are not one of main, reseed, shuffled, .*, first 'mian'"),
    ({"tokens": [1]}, r"prefixes: missing \[\], unexpected \['tokens'\]"),
])
def test_what_is_wrong_is_named(change, complaint):
    with pytest.raises(SchemaError, match=complaint):
        check("prefixes", pd.DataFrame(PREFIXES | change))


def test_a_missing_column_is_named():
    with pytest.raises(SchemaError, match=r"folds: missing \['fold'\]"):
        check("folds", pd.DataFrame(FOLDS).drop(columns="fold"))


def test_keys_are_unique():
    with pytest.raises(SchemaError, match="folds.scheme.fold.persona_id: 1 values are not unique, first"):
        check("folds", pd.DataFrame(FOLDS | {"fold": [0, 0], "persona_id": ["p01", "p01"]}))


def test_a_whole_number_is_a_float_but_a_truth_value_is_not():
    row = dict.fromkeys(TABLES["claims"].columns, "x") | {
        "estimate": 1, "low": np.float64(0), "high": float("nan"), "n_people": 5, "verdict": "inconclusive",
        "paper_value": 0.5}
    assert check("claims", pd.DataFrame([row])).estimate.dtype == "float64"
    with pytest.raises(SchemaError, match="claims.estimate: 1 values are not float, first True"):
        check("claims", pd.DataFrame([row | {"estimate": True}]))


def test_unknown_table():
    with pytest.raises(SchemaError, match="no table fold; expected one of personas"):
        check("fold", pd.DataFrame(FOLDS))


def test_every_table_is_made_before_it_is_read():
    made = set()
    for stage in STAGES.values():
        assert set(stage.reads) <= made
        made |= set(stage.makes)
    assert made == set(TABLES)
    assert made_by("scores") == ("06_prompting", "08_personal_models", "09_multitask", "10_prefix_sensitivity")


@pytest.mark.parametrize("table", TABLES)
def test_data_card_documents_every_column_and_nothing_else(table):
    card = (DATA / "README.md").read_text()
    section = card.split(f"### {table}\n")[1].split("\n### ")[0].split("\n## ")[0]
    rows = [line.split("|")[1:3] for line in section.splitlines() if line.startswith("| `")]
    documented = {name.strip(" `"): kind.strip() for name, kind in rows}
    assert documented == TABLES[table].columns
