"""Person-level statistics: intervals, paired tests and correlations in which people are resampled, not pairs.

Pairs of one person share that person's luck, so a draw takes a person with all of them. Folds and seeds stay
as they are: an interval tells how a number moves with other people, not with another pretrained model.
"""

from collections.abc import Callable, Sequence
from contextlib import suppress
from itertools import product
from typing import NamedTuple

import numpy as np
import pandas as pd
from scipy import stats as scipy_stats

MIN_PEOPLE = 5
EXACT_UP_TO = 12


class NoEstimate(ValueError):
    """The data at hand do not determine the number that was asked for."""


class TooFewPeople(NoEstimate):
    """A group with fewer people than an interval can honestly be drawn for."""


class Estimate(NamedTuple):
    """A number, its interval and the number of people behind it."""

    estimate: float
    low: float
    high: float
    n_people: int


class GroupTest(NamedTuple):
    """Groups of people compared by one number a person, and how often chance alone sets them as far apart."""

    statistic: float
    p: float
    lowest: str
    highest: str
    n_groups: int
    n_people: int


def resample(
    values: np.ndarray, statistic: Callable,
    n_boot=2000, seed=17, confidence=0.95, min_people=MIN_PEOPLE, few="raise",
) -> Estimate:
    """Estimate `statistic` with a percentile interval from drawing people with replacement.

    values: (people, columns). statistic: maps (..., people, columns) to (...), all draws at once; draws on
    which it is undefined (NaN) are left out. Raises TooFewPeople below `min_people` and NoEstimate where the
    statistic is undefined; with few="blank" the numbers are NaN instead, and the count stays.
    """
    n = len(values)
    if few == "blank":
        with suppress(NoEstimate):
            return resample(values, statistic, n_boot, seed, confidence, min_people)
        return Estimate(np.nan, np.nan, np.nan, n)
    if n < min_people:
        raise TooFewPeople(f"{n} people, at least {min_people} needed: use a larger profile or list them")
    draws = np.random.default_rng(seed).integers(n, size=(n_boot, n))
    with np.errstate(invalid="ignore", divide="ignore"):
        estimate, drawn = float(statistic(values)), statistic(values[draws])
    if np.isnan(estimate):
        raise NoEstimate(f"undefined over these {n} people: a cell is empty, or one side does not vary")
    tail = (1 - confidence) / 2
    return Estimate(estimate, *map(float, np.nanquantile(drawn, [tail, 1 - tail])), n)


def cluster_bootstrap(scores: pd.DataFrame, by, n_boot=2000, seed=17, **options) -> pd.DataFrame:
    """Mean accuracy per group with an interval from resampling people.

    The accuracy is the mean over all pairs of the group, so a person with more pairs weighs more; each draw
    takes people with replacement and recomputes it over the pairs they bring.

    scores: a row per pair; columns persona_id, correct (bool, 0 or 1), and `by` (a name or a list of names).
    Returns a row per group, in order of appearance: `by`, accuracy (fraction), low, high, n_people, n_pairs.
    options: confidence, min_people, few of `resample`; few="blank" keeps a small group's row and counts.
    Source: WikiPersona 4.1 gives 95 % intervals over rows; the clustering by person is our addition.
    """
    by, rows = [by] if isinstance(by, str) else list(by), []
    for key, group in scores.groupby(by, sort=False, observed=True):
        found = contrast([group], lambda a: a[..., 0], n_boot=n_boot, seed=seed, **options)
        rows.append((*key, *found, len(group)))
    return pd.DataFrame(rows, columns=[*by, "accuracy", "low", "high", "n_people", "n_pairs"])


def contrast(cells: Sequence[pd.DataFrame], combine: Callable, paired: bool = True, **options) -> Estimate:
    """Combine the accuracies of several sets of scored pairs, drawing the same people for all of them.

    combine: maps accuracies (..., cells) to (...). paired: only people with pairs in every cell, else each
    where they have some. options: those of `resample`.
    """
    counts = _counts(cells)
    kept = counts[(counts[:, 1::2] > 0).all(axis=1)] if paired else counts
    return resample(kept, lambda drawn: combine(_rates(drawn)), **options)


def difference(scores_a: pd.DataFrame, scores_b: pd.DataFrame, **options) -> Estimate:
    """Accuracy of `scores_a` minus that of `scores_b` over the people who have both, paired by person."""
    return contrast([scores_a, scores_b], lambda a: a[..., 0] - a[..., 1], **options)


def person_means(scores: pd.DataFrame) -> pd.Series:
    """Accuracy of each person, indexed by persona_id: the points that tests and correlations are made of."""
    return scores.groupby("persona_id", observed=True)["correct"].mean()


def lowest(scores: pd.DataFrame, share: float = 0.1, **options) -> Estimate:
    """Mean accuracy of the `share` of people (one at least) who are served worst, each person counting once.

    Every draw of people has its own worst served. Being picked for a low number they did a little better than
    it says: compare it between conditions, not with a mean. options: those of `resample`.
    """
    def worst(points: np.ndarray) -> np.ndarray:
        n = max(1, round(share * points.shape[-2]))
        return np.sort(points[..., 0], axis=-1)[..., :n].mean(axis=-1)

    return resample(person_means(scores).to_numpy()[:, None], worst, **options)


def group_permutation(means: pd.Series, groups: pd.Series, statistic: Callable = np.ptp, n_draws: int = 10_000,
                      seed: int = 17, min_people: int = MIN_PEOPLE) -> GroupTest:
    """Do groups of people differ more than if the people's numbers were dealt out anew?

    means: one number per person, indexed by persona_id (`person_means`). groups: the group of each membership,
    indexed by persona_id; somebody may be in several. statistic: of the groups' means along an axis: np.ptp, the
    largest gap, or np.var, the variance between groups. p: the share of `n_draws` seeded deals, the observed
    one among them, that reach it. Raises TooFewPeople without two groups of `min_people`.
    """
    member = pd.crosstab(groups, groups.index).reindex(columns=means.index, fill_value=0).clip(upper=1)
    member = member[member.sum(axis=1) >= min_people]
    if len(member) < 2:
        raise TooFewPeople(f"{len(member)} groups with {min_people} people or more, two needed to compare")
    member = member.loc[:, member.any()]
    values, weights = means[member.columns].to_numpy(), member.div(member.sum(axis=1), axis=0).to_numpy().T
    deals = np.random.default_rng(seed).permuted(np.tile(values, (n_draws, 1)), axis=1)
    deals[0] = values
    found = statistic(deals @ weights, axis=-1)
    of_group = pd.Series(values @ weights, index=member.index)
    return GroupTest(float(found[0]), float(np.mean(found >= found[0] - 1e-12)), str(of_group.idxmin()),
                     str(of_group.idxmax()), len(member), len(values))


def paired_permutation(a: pd.Series, b: pd.Series, n_draws: int = 10_000, seed: int = 17) -> float:
    """Two-sided p of "no mean difference": swap the two conditions of each person.

    a, b: one number per person, indexed by persona_id (`person_means`); people in both count. Up to 12
    people all 2^n swaps are tried (exact), beyond that `n_draws` seeded ones, the observed one among them.
    """
    gaps = (a - b).dropna().to_numpy(dtype=float)
    if not len(gaps):
        raise TooFewPeople("nobody has a number in both conditions: index both by persona_id")
    if len(gaps) <= EXACT_UP_TO:
        signs = np.array(list(product([1, -1], repeat=len(gaps))))
    else:
        signs = np.random.default_rng(seed).choice([1, -1], size=(n_draws, len(gaps)))
        signs[0] = 1
    return float(np.mean(np.abs(signs @ gaps) >= abs(gaps.sum()) - 1e-12))


def paired_tests(rows: Sequence[tuple], names: Sequence[str], **options) -> pd.DataFrame:
    """Many differences between two conditions of the same people, each with its corrected permutation test.

    rows: (*labels, scores_a, scores_b), pairs scored in both conditions. names: what the labels are called.
    Returns names, estimate (accuracy of a minus that of b), low, high, n_people, p, p_holm (over all rows);
    rows with fewer people than `min_people` are left out. options: those of `resample`.
    """
    found = []
    for *labels, a, b in rows:
        with suppress(NoEstimate):
            seed = {key: options[key] for key in ("seed",) if key in options}
            p = paired_permutation(person_means(a), person_means(b), **seed)
            found.append((*labels, *difference(a, b, **options), p))
    table = pd.DataFrame(found, columns=[*names, *Estimate._fields, "p"])
    return table.assign(p_holm=holm(table["p"]))


def holm(pvalues: Sequence[float]) -> np.ndarray:
    """Holm's adjustment: the k-th smallest of m p-values times (m - k + 1), never falling, at most 1."""
    p = np.asarray(pvalues, dtype=float)
    order = np.argsort(p, kind="stable")
    steps = np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1))
    return np.minimum(steps, 1.0)[np.argsort(order, kind="stable")]


def pearson_interval(x: pd.Series, y: pd.Series, **options) -> Estimate:
    """Pearson's r over people with an interval; x, y: one number per person, indexed by persona_id."""
    both = pd.concat([x, y], axis=1, join="inner").dropna().to_numpy(dtype=float)
    return resample(both, lambda drawn: correlate(drawn[..., 0], drawn[..., 1]), **options)


def pearson_p(r: float, n: int) -> float:
    """Two-sided p of a correlation r over n independent points (Student's t, n - 2 degrees of freedom)."""
    return float(2 * scipy_stats.t.sf(abs(r) * np.sqrt((n - 2) / max(1 - r * r, 1e-12)), n - 2))


def correlate(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Pearson's r along the last axis; NaN where one side does not vary."""
    x, y = x - x.mean(-1, keepdims=True), y - y.mean(-1, keepdims=True)
    spread = (x * x).sum(-1) * (y * y).sum(-1)
    return np.where(spread > 1e-20, (x * y).sum(-1) / np.sqrt(np.maximum(spread, 1e-20)), np.nan)


def _counts(cells: Sequence[pd.DataFrame]) -> np.ndarray:
    """(people, 2 x cells): for each cell the pairs right and the pairs; 0 and 0 where a person has none."""
    tables = [cell.groupby("persona_id", observed=True)["correct"].agg(["sum", "count"]) for cell in cells]
    return pd.concat(tables, axis=1).fillna(0).sort_index().to_numpy(dtype=float)


def _rates(drawn: np.ndarray) -> np.ndarray:
    """(..., people, 2 x cells) counts to (..., cells) accuracies."""
    totals = drawn.sum(axis=-2)
    return totals[..., 0::2] / totals[..., 1::2]
