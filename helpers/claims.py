"""Which findings did a run reproduce? Applies the rules that data/paper/claims.yaml states before any run.

A claim has a measure, with an interval from resampling people, and a side: where the finding is true. A claim
whose inputs a run does not have is left out of the table and listed with the reason.
"""

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import yaml

from helpers import DATA, stats
from helpers.artifacts import RUNS, Store
from helpers.config import ConfigError, Profile, flatten, load_profile
from helpers.fingerprint import EXECUTION_ONLY
from helpers.measures import MEASURES, PLANTED, Bench, Missing, demographics
from helpers.printed import paper, value
from helpers.schemas import TABLES

__all__ = ["CLAIMS", "MEASURES", "PLANTED", "Bench", "Claim", "Missing", "across_runs", "demographics", "end_tests",
           "evaluate", "in_order", "paper", "rule", "rules", "sentence", "verdict"]
ALPHA = 0.05
REFERENCE = DATA / "reference" / "claims.csv"


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
    topic: str = ""


def evaluate(scores: pd.DataFrame, personas: pd.DataFrame, cfg: Profile,
             **tables: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Apply every claim: the claims table, and the claims this run cannot speak to, each with its reason.

    tables: what else measures read (winrates, tax, prefixes, …), by name.
    """
    bench, rows, absent = Bench(scores, personas, cfg, **tables), [], []
    p_holm = end_tests(scores, personas, cfg).set_index("claim_id").p_holm.to_dict()
    for claim in CLAIMS:
        try:
            found = MEASURES[claim.measure](bench, claim.cells)
        except (Missing, stats.NoEstimate) as reason:
            absent.append((claim.claim_id, claim.statement, str(reason)))
            continue
        reached = verdict(found, claim, p_holm.get(claim.claim_id, 0.0))
        about = (claim.claim_id, claim.statement, claim.source)
        rows.append((*about, *found, reached, value(claim.paper, claim.measure, claim.cells), rule(claim)))
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
    """The claims before any data: topic, claim_id, statement, rule in words, source, paper_value."""
    rows = [(c.topic, c.claim_id, c.statement, rule(c), c.source, value(c.paper, c.measure, c.cells)) for c in CLAIMS]
    return pd.DataFrame(rows, columns=["topic", "claim_id", "statement", "rule", "source", "paper_value"])


def in_order(claims: pd.DataFrame) -> pd.DataFrame:
    """The claims as data/paper/claims.yaml lists them, each with its topic; those it no longer has are left out."""
    order = pd.DataFrame([(c.claim_id, c.topic) for c in CLAIMS], columns=["claim_id", "topic"])
    return order.merge(claims, on="claim_id")


def rule(claim: Claim) -> str:
    """The side in words, from the same numbers that decide."""
    lowest, highest = claim.side
    what = " minus ".join(claim.cells)
    if claim.measure not in ("level", "gap"):
        what = claim.measure.replace("_", " ") + (f" of {', '.join(claim.cells)}" if claim.cells else "")
    if np.isinf(highest):
        side = f"{'above' if claim.strict else 'at least'} {lowest:.2f}"
    elif np.isinf(lowest):
        side = f"{'below' if claim.strict else 'at most'} {highest:.2f}"
    else:
        side = f"from {lowest:.2f} to {highest:.2f}"
    return f"{what}: interval {side}" + (" and p < .05 after Holm" if claim.tested else "")


def across_runs(store: Store, runs: Path = RUNS, reference: Path = REFERENCE) -> pd.DataFrame:
    """This run's claims beside those of runs that differ in the seed alone, and beside the shipped records.

    The records are the little world's; imported pairs, which are other people's, do not stand beside them.

    runs: a folder of run folders. reference: a CSV of claims with columns run and seed. Returns the columns of
    the claims table, and run: what to call the run, in the order this, others by seed, shipped.
    """
    others = [Store(folder, cfg) for folder, cfg in _profiles(runs) if folder.resolve() != store.path.resolve()]
    alike = [other for other in others if _settings(other.profile) == _settings(store.profile)]
    stores = {f"this run, seed {store.profile.seed}": store}
    stores |= {f"{o.name}, seed {o.profile.seed}": o for o in sorted(alike, key=lambda o: o.profile.seed)}
    tables = [one.read("claims").assign(run=name) for name, one in stores.items() if one.has("claims")]
    if reference.exists() and not store.profile.data.preferences:
        shipped = pd.read_csv(reference).astype({"seed": str})
        tables.append(shipped.assign(run="shipped " + shipped.run + ", seed " + shipped.seed).drop(columns="seed"))
    return in_order(pd.concat(tables, ignore_index=True))


def _profiles(runs: Path) -> Iterator[tuple[Path, Profile]]:
    """The run folders and their profiles; a run of another version, whose settings are not today's, is no match."""
    for stored in sorted(runs.glob("*/profile.yaml")):
        with suppress(ConfigError):
            yield stored.parent, load_profile(stored)


def _settings(profile: Profile) -> dict:
    """All that decides a result, but the seed."""
    return {key: value for key, value in flatten(profile.dump()).items() if key not in EXECUTION_ONLY | {"seed"}}


_TOPICS = yaml.safe_load((DATA / "paper" / "claims.yaml").read_text())
CLAIMS = tuple(Claim(topic=topic, **entry) for topic, entries in _TOPICS.items() for entry in entries)
