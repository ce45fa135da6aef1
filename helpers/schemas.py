"""The tables of a run: their columns, their keys, and which notebook reads and makes them."""

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import pandas as pd
import pyarrow as pa


class SchemaError(ValueError):
    """A table that is not as promised: says which column, what was found and what was expected."""


class Stage(NamedTuple):
    """A notebook of the pipeline: the tables it reads and those it makes."""

    reads: tuple[str, ...]
    makes: tuple[str, ...]


class TableSpec(NamedTuple):
    """A table. keys are unique together; allowed lists the only values of some columns."""

    columns: dict[str, str]  # name -> dtype: str, int, float, bool or list[str]
    keys: tuple[str, ...]
    allowed: dict[str, tuple[str, ...]]

    @property
    def arrow(self) -> pa.Schema:
        """The same columns as Parquet stores them."""
        return pa.schema([(name, DTYPES[kind].arrow) for name, kind in self.columns.items()])


class Dtype(NamedTuple):
    """What a column's values may be in Python, and what they become in pandas and in Parquet."""

    python: tuple[type, ...]
    pandas: str
    arrow: pa.DataType


DTYPES = {
    "str": Dtype((str,), "str", pa.string()),
    "int": Dtype((int, np.integer), "int64", pa.int64()),
    "float": Dtype((float, int, np.floating, np.integer), "float64", pa.float64()),
    "bool": Dtype((bool, np.bool_), "bool", pa.bool_()),
    "list[str]": Dtype((list, tuple, np.ndarray), "object", pa.list_(pa.string())),
}
KINDS, SPLITS = ("personal", "divergent"), ("train", "test")
MOST_SHOTS = 16  # raw shots in one prefix (prefixes.shot_counts)


def _table(keys: str, columns: str, **allowed: tuple[str, ...]) -> TableSpec:
    """Columns as "name:dtype name …", a name alone is a string."""
    pairs = (word.partition(":") for word in columns.split())
    return TableSpec({name: kind or "str" for name, _, kind in pairs}, tuple(keys.split()), allowed)


TABLES: dict[str, TableSpec] = {
    "personas": _table(
        "persona_id",
        "persona_id name tag axes:list[str] categories:list[str] description demographics"),
    "questions": _table(
        "question_id",
        "question_id kind axis persona_id split text", kind=KINDS, split=SPLITS),
    "responses": _table(
        "response_id",
        "response_id question_id cot_axis cot_categories:list[str] cot_category text text_raw reward:float "
        "in_span:bool cluster:int selected:bool"),
    "comparisons": _table(
        "persona_id question_id round",
        "persona_id question_id round:int response_a response_b shown_first winner asks:int outcome "
        "explanation model cost_usd:float", outcome=("clear", "tie", "unparsable")),
    "retests": _table(
        "judge asking persona_id question_id response_a response_b",
        "judge asking persona_id question_id response_a response_b shown_first winner outcome model cost_usd:float",
        asking=("first", "again", "swapped", "every pair"), outcome=("clear", "tie", "unparsable")),
    "preferences": _table(
        "pair_id",
        "pair_id persona_id question_id kind axis split prompt chosen rejected chosen_id rejected_id",
        kind=KINDS, split=SPLITS),
    "prefixes": _table(
        "persona_id prefix variant",
        "persona_id prefix variant text shots:list[str] model n_tokens:int",
        variant=("main", "reseed", "shuffled", "with_rejected", *(f"shots{n}" for n in range(1, MOST_SHOTS + 1)))),
    "retrieved": _table(
        "pair_id variant",
        "pair_id persona_id variant text shots:list[str] n_tokens:int",
        variant=("near_tfidf", "far_tfidf", "near_embedding", "far_embedding")),
    "folds": _table(
        "scheme fold persona_id",
        "scheme fold:int persona_id"),
    "policies": _table(
        "policy_id",
        "policy_id method prefix scheme fold:int seed:int trained_on:list[str] path steps:int pairs:int "
        "validation_accuracy:float"),
    "scores": _table(
        "method setting prefix variant policy_id persona_id pair_id",
        "policy_id method prefix variant setting fold:int seed:int persona_id trained:bool pair_id kind axis "
        "logp_chosen:float logp_rejected:float n_chosen:int n_rejected:int correct:bool", kind=KINDS),
    "generations": _table(
        "system persona_id question_id",
        "system persona_id question_id kind policy_id prefix text reward:float", kind=KINDS),
    "winrates": _table(
        "persona_id question_id system_a system_b shown_first",
        "persona_id question_id kind system_a system_b shown_first winner outcome explanation "
        "model cost_usd:float", kind=KINDS, outcome=("clear", "tie", "unparsable")),
    "tax": _table(
        "task system trained_prefix prefix persona_id policy_id",
        "task group system trained_prefix prefix persona_id policy_id accuracy:float low:float high:float "
        "n_items:int", system=("base", "mt"), group=("safety", "reasoning", "factuality")),
    "directions": _table(
        "bridge items scheme fold persona_id",
        "bridge items:int scheme fold:int persona_id positive:list[str] negative:list[str] text",
        bridge=("averaged", "inferred", "head", "golden")),
    "alignx": _table(
        "policy_id method prefix variant setting persona_id pair_id",
        "policy_id method prefix variant setting fold:int seed:int persona_id trained:bool pair_id kind axis "
        "logp_chosen:float logp_rejected:float n_chosen:int n_rejected:int correct:bool ref_chosen:float "
        "ref_rejected:float", kind=KINDS),
    "claims": _table(
        "claim_id",
        "claim_id statement source estimate:float low:float high:float n_people:int verdict "
        "paper_value:float rule", verdict=("reproduced", "not reproduced", "inconclusive")),
}


def _stage(reads: str = "", makes: str = "") -> Stage:
    return Stage(tuple(reads.split()), tuple(makes.split()))


STAGES: dict[str, Stage] = {
    "00_start_here": _stage(),
    "01_personas": _stage("", "personas"),
    "02_questions": _stage("personas", "questions"),
    "03_responses": _stage("personas questions", "responses"),
    "04_preferences": _stage("personas questions responses", "comparisons retests preferences"),
    "05_prefixes": _stage("personas preferences", "prefixes retrieved folds"),
    "06_prompting": _stage("preferences prefixes retrieved", "scores"),
    "07_dpo_by_hand": _stage("preferences prefixes"),
    "08_personal_models": _stage("personas preferences prefixes", "policies scores"),
    "09_multitask": _stage("personas preferences prefixes folds", "policies scores"),
    "10_prefix_sensitivity": _stage("policies preferences prefixes retrieved folds", "scores"),
    "11_equity": _stage("personas scores"),
    "12_generation": _stage("personas preferences prefixes folds policies scores",
                            "generations winrates"),
    "13_alignment_tax": _stage("personas prefixes folds policies", "tax"),
    "14_alignx": _stage("personas preferences prefixes folds policies scores", "directions alignx"),
    "15_claims": _stage("personas questions responses comparisons preferences prefixes folds policies scores "
                        "winrates tax alignx", "claims"),
    "16_your_own": _stage("personas preferences prefixes folds policies"),
}


def made_by(table: str) -> tuple[str, ...]:
    """Stems of the notebooks that make a table, in order."""
    return tuple(stem for stem, stage in STAGES.items() if table in stage.makes)


def check(table: str, df: pd.DataFrame) -> pd.DataFrame:
    """The same rows with the table's columns in their order and dtypes.

    Raises SchemaError for an unknown table, a missing or unexpected column, a value of the wrong type or not
    allowed, or two rows with the same keys.
    """
    if table not in TABLES:
        raise SchemaError(f"no table {table}; expected one of {', '.join(TABLES)}")
    spec = TABLES[table]
    missing, extra = [c for c in spec.columns if c not in df], [c for c in df if c not in spec.columns]
    if missing or extra:
        raise SchemaError(f"{table}: missing {missing}, unexpected {extra}; expected {list(spec.columns)}")
    out = pd.DataFrame({name: _cast(table, df[name], kind) for name, kind in spec.columns.items()})
    for name, allowed in spec.allowed.items():
        _refuse(table, name, f"one of {', '.join(allowed)}", out.loc[~out[name].isin(allowed), name])
    repeated = out.loc[out.duplicated(list(spec.keys)), list(spec.keys)].to_dict("records")
    _refuse(table, "+".join(spec.keys), "unique", repeated)
    return out


def _cast(table: str, values: pd.Series, kind: str) -> pd.Series:
    """The column in the table's dtype; what is something else is refused, never converted silently."""
    dtype, listed = DTYPES[kind], kind == "list[str]"
    if values.dtype == dtype.pandas and not listed and not (kind == "str" and values.hasnans):
        return pd.Series(values.to_numpy(), dtype=dtype.pandas)  # there already: a second less for 100,000 scores
    _refuse(table, values.name, kind, (v for v in values if not _is(v, dtype, kind)))
    return pd.Series([list(v) for v in values] if listed else list(values), dtype=dtype.pandas)


def _is(value: object, dtype: Dtype, kind: str) -> bool:
    if isinstance(value, bool) and kind != "bool":  # to Python, True is an int
        return False
    return isinstance(value, dtype.python) and (kind != "list[str]" or all(isinstance(v, str) for v in value))


def _refuse(table: str, column: str, expected: str, bad: Iterable[object]) -> None:
    found = list(bad)
    if found:
        raise SchemaError(f"{table}.{column}: {len(found)} values are not {expected}, first {found[0]!r}")
