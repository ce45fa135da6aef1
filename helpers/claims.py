"""Which findings did a run reproduce? Applies the rules that data/paper/claims.yaml states before any run.

A claim has a measure, with an interval from resampling people, and a side: where the finding is true. A claim
whose inputs a run does not have is left out of the table and listed with the reason.
"""

import json
from dataclasses import dataclass
from itertools import combinations

import numpy as np
import pandas as pd
import yaml

from helpers import DATA, stats
from helpers.config import Profile
from helpers.schemas import TABLES

ALPHA = 0.05
PLANTED = ("region", "isles")  # the base has read less about these people: data/world/little/cast.yaml


class Missing(LookupError):
    """A claim needs rows that this run does not have."""


@dataclass(frozen=True)
class Claim:
    """A rule: the finding is true where side[0] <= measure <= side[1]; `strict` excludes the bounds."""

    claim_id: str
    statement: str
    source: str
    measure: str
    side: tuple[float, float]
    cells: tuple[str, ...] = ()
    strict: bool = False
    tested: bool = False
    paper: str = ""


def evaluate(scores: pd.DataFrame, personas: pd.DataFrame, cfg: Profile) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Apply every claim: the claims table, and the claims this run cannot speak to, each with its reason."""
    bench, rows, absent = Bench(scores, personas, cfg), [], []
    p_holm = end_tests(scores, personas, cfg).set_index("claim_id").p_holm.to_dict()
    for claim in CLAIMS:
        try:
            found = MEASURES[claim.measure](bench, claim)
        except (Missing, stats.NoEstimate) as reason:
            absent.append((claim.claim_id, claim.statement, str(reason)))
            continue
        reached = verdict(found, claim, p_holm.get(claim.claim_id, 0.0))
        about = (claim.claim_id, claim.statement, claim.source)
        rows.append((*about, *found, reached, paper_value(claim), rule(claim)))
    table = pd.DataFrame(rows, columns=list(TABLES["claims"].columns))
    return table, pd.DataFrame(absent, columns=["claim_id", "statement", "reason"])


def verdict(found: stats.Estimate, claim: Claim, p_holm: float = 0.0) -> str:
    """Interval on the side: reproduced (if p_holm < .05); wholly off: not reproduced; else inconclusive."""
    lowest, highest = claim.side
    above, below = (np.greater, np.less) if claim.strict else (np.greater_equal, np.less_equal)
    if above(found.low, lowest) and below(found.high, highest):
        return "reproduced" if p_holm < ALPHA else "inconclusive"
    off = not above(found.high, lowest) or not below(found.low, highest)
    return "not reproduced" if off else "inconclusive"


def end_tests(scores: pd.DataFrame, personas: pd.DataFrame, cfg: Profile) -> pd.DataFrame:
    """Paired permutation tests of the tested claims: claim_id, n_people, p, p_holm (over those at hand)."""
    bench, rows = Bench(scores, personas, cfg), []
    for claim in (claim for claim in CLAIMS if claim.tested):
        try:
            a, b = map(stats.person_means, bench.pair(*claim.cells))
            rows.append((claim.claim_id, len(a.index.intersection(b.index)), stats.paired_permutation(a, b)))
        except (Missing, stats.NoEstimate):
            continue  # `evaluate` lists it with the reason
    tests = pd.DataFrame(rows, columns=["claim_id", "n_people", "p"])
    return tests.assign(p_holm=stats.holm(tests.p))


def sentence(claim_id: str, table: pd.DataFrame, absent: pd.DataFrame) -> str:
    """What `evaluate` found about one claim, in words, beside the paper's number."""
    for row in table[table.claim_id == claim_id].itertuples():
        given = "no number" if np.isnan(row.paper_value) else f"{row.paper_value:.3f}"
        found = f"{row.estimate:.3f} [{row.low:.3f}, {row.high:.3f}], n = {row.n_people} people"
        return f"{row.verdict.upper()}: {row.statement}\n  {found}; the paper: {given}. Rule: {row.rule}."
    return f"NOT IN THIS RUN: {claim_id}, {absent.set_index('claim_id').reason[claim_id]}."


def rules() -> pd.DataFrame:
    """The claims before any data: claim_id, statement, rule in words, source, paper_value."""
    rows = [(c.claim_id, c.statement, rule(c), c.source, paper_value(c)) for c in CLAIMS]
    return pd.DataFrame(rows, columns=["claim_id", "statement", "rule", "source", "paper_value"])


def rule(claim: Claim) -> str:
    """The side in words, from the same numbers that decide."""
    lowest, highest = claim.side
    what = " minus ".join(claim.cells) or claim.measure.replace("_", " ")
    if np.isinf(highest):
        side = f"{'above' if claim.strict else 'at least'} {lowest:.2f}"
    elif np.isinf(lowest):
        side = f"{'below' if claim.strict else 'at most'} {highest:.2f}"
    else:
        side = f"from {lowest:.2f} to {highest:.2f}"
    return f"{what}: interval {side}" + (" and p < .05 after Holm" if claim.tested else "")


def paper(source: str) -> pd.DataFrame:
    """The paper's numbers of one table or figure: a column per part of the cell; value, spread, n, key."""
    table = pd.read_csv(DATA / "paper" / "results.csv")
    rows = table[table.source == source]
    if rows.empty:
        raise Missing(f"no {source} in data/paper/results.csv; it has {', '.join(table.source.unique())}")
    parts = [dict(part.split("=", 1) for part in cell.split("; ")) for cell in rows.cell]
    cells = pd.DataFrame(parts, index=rows.index)
    return cells.replace({"True": True, "False": False}).join(rows[["value", "spread", "n", "key"]])


def paper_value(claim: Claim) -> float:
    """What the paper's numbers give for the same measure; NaN where it printed none."""
    if not claim.paper:
        return float("nan")
    table = paper(claim.paper)
    if claim.measure == "fall_of_r":
        r = table[table.trained == False].set_index("prefix").value  # noqa: E712  (a column of True, False and NaN)
        return round(float(r["none"] - r["persona_gold"]), 4)
    values = []
    for method, prefix, kind in (cell.split() for cell in claim.cells):
        unseen = table.method == method if method == "prompting" else table.trained == False  # noqa: E712
        values.append(table[unseen & (table.prefix == prefix) & (table.kind == kind)].value.item())
    return round(float(values[0] - sum(values[1:])), 4)


def demographics(personas: pd.DataFrame) -> pd.DataFrame:
    """A row per person, attribute and known value ("a/b" counts as both): persona_id, attribute, value."""
    rows = [
        (person.persona_id, attribute, value.strip())
        for person in personas.itertuples()
        for attribute, values in json.loads(person.demographics or "{}").items()
        for value in str(values).split("/")
        if value.strip() != "unknown"
    ]
    return pd.DataFrame(rows, columns=["persona_id", "attribute", "value"])


class Bench:
    """The tables that measures read, and the options of their bootstrap."""

    def __init__(self, scores: pd.DataFrame, personas: pd.DataFrame, cfg: Profile):
        self.scores, self.personas, self.simulated = scores, personas, cfg.simulated
        self.options = cfg.stats.model_dump() | {"seed": cfg.seed}

    def cell(self, words: str) -> pd.DataFrame:
        """The scored pairs of "method prefix kind[ setting]" ("*": any), of unseen people when trained."""
        method, prefix, kind, setting = f"{words} main".split()[:4]
        where = {"method": method, "prefix": prefix, "kind": kind, "setting": setting}
        if method != "prompting":
            where["trained"] = False
        kept = [self.scores[column] == value for column, value in where.items() if value != "*"]
        rows = self.scores[np.logical_and.reduce(kept)]
        if rows.empty:
            raise Missing(f"no scores of {words}")
        return rows

    def pair(self, first: str, second: str) -> tuple[pd.DataFrame, pd.DataFrame]:
        """Two cells; of two trained ones only the folds and seeds (with "*": and prefixes) that both have."""
        a, b = self.cell(first), self.cell(second)
        if "prompting" in first + second:
            return a, b
        on = ["fold", "seed", "prefix"][: 3 if "*" in first else 2]
        of_a, of_b = pd.MultiIndex.from_frame(a[on]), pd.MultiIndex.from_frame(b[on])
        if not of_a.isin(of_b).any():
            raise Missing(f"{first} and {second} share no {', '.join(on)}")
        return a[of_a.isin(of_b)], b[of_b.isin(of_a)]


def _level(bench: Bench, claim: Claim) -> stats.Estimate:
    return stats.contrast([bench.cell(claim.cells[0])], lambda a: a[..., 0], **bench.options)


def _gap(bench: Bench, claim: Claim) -> stats.Estimate:
    return stats.difference(*bench.pair(*claim.cells), **bench.options)


def _largest_move(bench: Bench, _: Claim) -> stats.Estimate:
    """The largest distance of a prompted prefix from none: every prefix's interval has to lie on the side."""
    names = [name for name in bench.cell("prompting * divergent").prefix.unique() if name != "none"]
    none = bench.cell("prompting none divergent")
    cells = [bench.cell(f"prompting {name} divergent") for name in names]
    return _widest([stats.difference(cell, none, **bench.options) for cell in cells])


def _fall_of_r(bench: Bench, _: Claim) -> stats.Estimate:
    """r(untrained, trained without prefix) minus r(untrained, trained with gold), all of a person's pairs."""
    cells = map(bench.cell, ("prompting none *", "mt none *", "mt persona_gold *"))
    points = pd.concat(map(stats.person_means, cells), axis=1, join="inner").to_numpy()
    return stats.resample(points, lambda p: _r(p, 0, 1) - _r(p, 0, 2), **bench.options)


def _r(points: np.ndarray, i: int, j: int) -> np.ndarray:
    return stats.correlate(points[..., i], points[..., j])


def _demographic_gap(bench: Bench, _: Claim) -> stats.Estimate:
    """The largest distance between two groups of one attribute, groups under `min_people` left out."""
    scored = bench.cell("mt persona_gpt4 divergent").merge(demographics(bench.personas), on="persona_id")
    gaps = []
    for _, rows in scored.groupby("attribute"):
        groups = [group for _, group in rows.groupby("value")]
        large = [group for group in groups if group.persona_id.nunique() >= bench.options["min_people"]]
        for pair in combinations(large, 2):
            gaps.append(stats.contrast(pair, _minus, paired=False, **bench.options))
    return _widest(gaps)


def _minus(accuracies: np.ndarray) -> np.ndarray:
    return accuracies[..., 0] - accuracies[..., 1]


def _widest(gaps: list[stats.Estimate]) -> stats.Estimate:
    """Of several differences the largest size: estimate, low and high are each the largest of their kind."""
    if not gaps:
        raise Missing("nothing to compare: fewer than two groups or prefixes")
    sizes = [(abs(g.estimate), max(0.0, g.low, -g.high), max(-g.low, g.high), g.n_people) for g in gaps]
    return stats.Estimate(*(max(column) for column in zip(*sizes, strict=True)))


def _planted_gap(bench: Bench, _: Claim) -> stats.Estimate:
    """(name - gold) of the people the base has read less about, minus (name - gold) of everybody else."""
    if not bench.simulated:
        raise Missing("only the little world has a planted imbalance")
    groups, least = demographics(bench.personas), bench.options["min_people"]
    ids = set(groups[(groups.attribute == PLANTED[0]) & (groups.value == PLANTED[1])].persona_id)
    both = [bench.cell(f"mt {prefix} divergent") for prefix in ("name", "persona_gold")]
    cells = [rows[rows.persona_id.isin(ids) == inside] for inside in (True, False) for rows in both]
    fewest = min(cell.persona_id.nunique() for cell in cells)
    if fewest < least:
        raise Missing(f"{fewest} people on one side of {' '.join(PLANTED)}, at least {least} needed")
    return stats.contrast(cells, lambda a: a @ np.array([1, -1, -1, 1]), paired=False, **bench.options)


MEASURES = {each.__name__[1:]: each for each in
            (_level, _gap, _largest_move, _fall_of_r, _demographic_gap, _planted_gap)}
CLAIMS = tuple(Claim(**entry) for entry in yaml.safe_load((DATA / "paper" / "claims.yaml").read_text()))
