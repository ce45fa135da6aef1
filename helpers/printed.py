"""The paper's numbers, from data/paper/results.csv, and what they give for a claim's measure."""

from collections.abc import Sequence
from functools import cache

import pandas as pd

from helpers import DATA
from helpers.measures import Missing


def paper(source: str) -> pd.DataFrame:
    """The paper's numbers of one table or figure: a column per part of the cell; value, spread, n, key."""
    table = _results()
    rows = table[table.source == source]
    if rows.empty:
        raise Missing(f"no {source} in data/paper/results.csv; it has {', '.join(table.source.unique())}")
    parts = [dict(part.split("=", 1) for part in cell.split("; ")) for cell in rows.cell]
    cells = pd.DataFrame(parts, index=rows.index)
    return cells.replace({"True": True, "False": False}).join(rows[["value", "spread", "n", "key"]])


def value(source: str, measure: str, cells: Sequence[str]) -> float:
    """The measure (see helpers.measures) of these cells by the paper's numbers; NaN where it printed none."""
    if not source:
        return float("nan")
    return round(float(LOOKUPS[measure](paper(source), *cells)), 4)


@cache
def _results() -> pd.DataFrame:
    return pd.read_csv(DATA / "paper" / "results.csv")


def _gap(table: pd.DataFrame, *cells: str) -> float:
    """Figure 5: accuracy of the first cell, minus the others; of people not trained on."""
    found = []
    for method, prefix, kind in (cell.split()[:3] for cell in cells):
        unseen = table.method == method if method == "prompting" else table.trained == False  # noqa: E712 (and NaN)
        found.append(table[unseen & (table.prefix == prefix) & (table.kind == kind)].value.item())
    return found[0] - sum(found[1:])


def _fall_of_r(table: pd.DataFrame, first: str, second: str) -> float:
    """Figure 6."""
    r = table[table.trained == False].set_index("prefix").value  # noqa: E712
    return r[first.split()[1]] - r[second.split()[1]]


def _wins(table: pd.DataFrame, ours: str, other: str) -> float:
    """Table 3, per cent to fraction."""
    named = {"base_none": ("zephyr", "none"), "base_persona_gpt4": ("zephyr", "persona_gpt4"),
             "mt_persona_gpt4_removed": ("mt", "none"), "mt_persona_gpt4": ("mt", "persona_gpt4")}
    rows = table.set_index(["model", "prefix", "against_model", "against_prefix"]).value
    return rows[*named[ours], *named[other]] / 100


def _tax_gap(table: pd.DataFrame, first: str, _: str) -> float:
    """Figure 7: the mean over its fifteen personas minus the untrained model."""
    of_task = table[table.task == first.split()[-1]].set_index("person").value
    return of_task.drop(["baseline", "none"]).mean() - of_task["baseline"]


def _prefix_overlap(table: pd.DataFrame, first: str, second: str) -> float:
    """Table 2."""
    r1 = table[table.measure == "rouge1"].set_index("prefix").value
    return r1[first] - r1[second]


def _judge_truth(table: pd.DataFrame) -> float:
    """Appendix D: agreement of people with GPT-4's labels."""
    return table.set_index("measure").value["human_gpt4_agreement"]


LOOKUPS = {"level": _gap, "gap": _gap, "fall_of_r": _fall_of_r, "wins": _wins, "tax_gap": _tax_gap,
           "prefix_overlap": _prefix_overlap, "judge_truth": _judge_truth}
