"""The paper's findings as rules over the scores: stated in data/paper/claims.yaml before any run, applied here.

A claim has a measure, whose interval comes from resampling people, and a side: the range in which the finding is true.
A claim whose inputs a run does not have is left out of the table and listed with the reason.
"""

import json
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import pandas as pd
import yaml

from helpers import DATA, stats
from helpers.config import Profile

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
        rows.append((claim.claim_id, claim.statement, claim.source, *found, reached, paper_value(claim), rule(claim)))
    columns = "claim_id statement source estimate low high n_people verdict paper_value rule".split()
    return pd.DataFrame(rows, columns=columns), pd.DataFrame(absent, columns=["claim_id", "statement", "reason"])


def verdict(found: stats.Estimate, claim: Claim, p_holm: float = 0.0) -> str:
    """Interval wholly on the side: reproduced (if p_holm < .05); wholly off: not reproduced; else inconclusive."""
    lowest, highest = claim.side
    above, below = (np.greater, np.less) if claim.strict else (np.greater_equal, np.less_equal)
    if above(found.low, lowest) and below(found.high, highest):
        return "reproduced" if p_holm < ALPHA else "inconclusive"
    off = not above(found.high, lowest) or not below(found.low, highest)
    return "not reproduced" if off else "inconclusive"


def end_tests(scores: pd.DataFrame, personas: pd.DataFrame, cfg: Profile) -> pd.DataFrame:
    """Paired permutation tests of the order's ends: claim_id, n_people, p, p_holm (Holm over those at hand)."""
    bench, rows = Bench(scores, personas, cfg), []
    for claim in (claim for claim in CLAIMS if claim.tested):
        try:
            a, b = map(stats.person_means, bench.pair(*claim.cells))
            rows.append((claim.claim_id, len(a.index.intersection(b.index)), stats.paired_permutation(a, b)))
        except (Missing, stats.NoEstimate):
            continue  # `evaluate` lists it with the reason
    tests = pd.DataFrame(rows, columns=["claim_id", "n_people", "p"])
    return tests.assign(p_holm=stats.holm(tests.p))


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
    """The paper's numbers of one table or figure: a column per part of the cell, then value, spread, n, key."""
    table = pd.read_csv(DATA / "paper" / "results.csv")
    rows = table[table.source == source]
    if rows.empty:
        raise Missing(f"no {source} in data/paper/results.csv; it has {', '.join(table.source.unique())}")
    parts = pd.DataFrame([dict(part.split("=", 1) for part in cell.split("; ")) for cell in rows.cell], rows.index)
    return parts.replace({"True": True, "False": False}).join(rows[["value", "spread", "n", "key"]])


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
    """One row per person, attribute and value ("a/b" counts as both): persona_id, attribute, value."""
    rows = [
        (person.persona_id, attribute, value.strip())
        for person in personas.itertuples()
        for attribute, values in json.loads(person.demographics or "{}").items()
        for value in str(values).split("/")
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
    """The largest absolute distance of a prompted prefix from none (a largest-of-many errs upwards)."""
    names = [name for name in bench.cell("prompting * divergent").prefix.unique() if name != "none"]
    if not names:
        raise Missing("no prompting scores with a prefix")
    cells = [bench.cell(f"prompting {name} divergent") for name in ["none", *names]]
    return stats.contrast(cells, lambda a: np.abs(a[..., 1:] - a[..., :1]).max(-1), **bench.options)


def _fall_of_r(bench: Bench, _: Claim) -> stats.Estimate:
    """r(untrained, trained without prefix) minus r(untrained, trained with gold) over people, all questions."""
    words = ["prompting none *", "mt none *", "mt persona_gold *"]
    points = pd.concat([stats.person_means(bench.cell(each)) for each in words], axis=1, join="inner").to_numpy()
    return stats.resample(points, lambda p: _r(p, 0, 1) - _r(p, 0, 2), **bench.options)


def _r(points: np.ndarray, i: int, j: int) -> np.ndarray:
    return stats.correlate(points[..., i], points[..., j])


def _demographic_gap(bench: Bench, _: Claim) -> stats.Estimate:
    """The largest distance between two groups of one attribute, groups under `min_people` left out."""
    scored, groups = bench.cell("mt persona_gpt4 divergent"), demographics(bench.personas)
    ids = groups[groups.persona_id.isin(scored.persona_id)].groupby(["attribute", "value"]).persona_id.agg(list)
    ids = ids[ids.map(len) >= bench.options["min_people"]]
    sizes = ids.groupby("attribute").size()
    if not (sizes > 1).any():
        raise Missing(f"no attribute has two groups of {bench.options['min_people']} people")
    spans = list(pairwise(np.cumsum([0, *sizes])))
    cells = [scored[scored.persona_id.isin(each)] for each in ids]
    return stats.contrast(
        cells, lambda a: np.max([np.ptp(a[..., i:j], axis=-1) for i, j in spans], axis=0), paired=False, **bench.options
    )


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
    return stats.contrast(
        cells, lambda a: a[..., 0] - a[..., 1] - a[..., 2] + a[..., 3], paired=False, **bench.options
    )


MEASURES = {
    "level": _level,
    "gap": _gap,
    "largest_move": _largest_move,
    "fall_of_r": _fall_of_r,
    "demographic_gap": _demographic_gap,
    "planted_gap": _planted_gap,
}
CLAIMS = tuple(Claim(**entry) for entry in yaml.safe_load((DATA / "paper" / "claims.yaml").read_text()))
