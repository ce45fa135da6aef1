"""How far do labels agree? Match rate, Cohen's kappa, Krippendorff's alpha, and people per chosen answer.

Labels are nominal codes in float arrays, NaN where somebody gave none. A number that the labels do not determine, such
as kappa where everybody always says the same, is NaN and never 0 or 1.
"""

from itertools import combinations

import numpy as np
import pandas as pd

from helpers import stats


def match_rate(a: np.ndarray, b: np.ndarray) -> float:
    """Share of the items labelled by both that got the same label. a, b: (items,)."""
    a, b = _both(a, b)
    return float(np.mean(a == b)) if len(a) else float("nan")


def cohen_kappa(a: np.ndarray, b: np.ndarray) -> float:
    """Agreement of two raters beyond chance, (p - e) / (1 - e), over the items that both labelled.

    e is the agreement of two who draw from their own label frequencies. 1: the same labels, 0: chance.
    """
    a, b = _both(a, b)
    if not len(a):
        return float("nan")
    codes = np.unique([a, b])
    expected = float(np.sum(np.mean(a[:, None] == codes, axis=0) * np.mean(b[:, None] == codes, axis=0)))
    return float("nan") if expected == 1 else (match_rate(a, b) - expected) / (1 - expected)


def mean_kappa(raters: np.ndarray) -> float:
    """Mean of Cohen's kappa over all pairs of raters that have one. raters: (raters, items)."""
    found = [cohen_kappa(a, b) for a, b in combinations(raters, 2)]
    defined = [kappa for kappa in found if not np.isnan(kappa)]
    return float(np.mean(defined)) if defined else float("nan")


def krippendorff_alpha(raters: np.ndarray) -> float:
    """Nominal alpha of any number of raters, missing labels allowed. raters: (raters, items).

    1 - observed / expected disagreement over the values that can be paired within an item: an item with m labels
    counts each of its m (m - 1) ordered pairs 1 / (m - 1) times. (Krippendorff 2011.)
    """
    raters = np.asarray(raters, dtype=float)
    codes = np.unique(raters[~np.isnan(raters)])
    counts = (raters[:, :, None] == codes).sum(axis=0)  # (items, codes)
    counts = counts[counts.sum(axis=1) >= 2]
    if (counts.sum(axis=0) > 0).sum() < 2:
        return float("nan")
    m, per_code, n = counts.sum(axis=1), counts.sum(axis=0), counts.sum()
    agreeing = np.sum((counts * (counts - 1)).sum(axis=1) / (m - 1)) / n
    by_chance = np.sum(per_code * (per_code - 1)) / (n * (n - 1))
    return float(1 - (1 - agreeing) / (1 - by_chance))


def blind_choice(n: float, k: int = 4) -> float:
    """People per *chosen* answer if n people pick one of k answers uniformly: n / (k (1 - (1 - 1/k)^n)).

    1.64 for five people and four answers. Averaged over all k answers it would be n / k, the 1.25 of the paper's
    E.6, but Table 9 averages over the answers that somebody chose.
    """
    return n / (k * (1 - (1 - 1 / k) ** n))


def per_axis(finals: pd.DataFrame, k: int = 4, **options) -> pd.DataFrame:
    """People per chosen answer of divergent questions, a row per axis (the paper's Table 9).

    finals: a row per person and question that has a winner; columns axis, question_id, persona_id, winner.
    Returns axis, estimate, low, high, n_questions, std (over chosen answers), n_people, blind (`blind_choice` of
    the people who answered). Questions are resampled: a person drawn twice would agree with themselves.
    options: n_boot, seed, confidence of stats.resample.
    """
    fans = finals.groupby(["axis", "question_id", "winner"]).size().rename("n").reset_index()
    votes = fans.groupby(["axis", "question_id"])["n"].agg(["sum", "size"])
    rows = []
    for axis, of_axis in votes.groupby("axis"):
        found = stats.resample(of_axis.to_numpy(float), _ratio, min_people=2, few="blank", **options)
        distinct = sum(n / blind_choice(n, k) for n in of_axis["sum"])
        std, people = fans.loc[fans["axis"] == axis, "n"].std(ddof=0), finals.loc[finals["axis"] == axis, "persona_id"]
        rows.append((axis, *found, std, people.nunique(), of_axis["sum"].sum() / distinct))
    return pd.DataFrame(rows, columns=["axis", "estimate", "low", "high", "n_questions", "std", "n_people", "blind"])


def _ratio(drawn: np.ndarray) -> np.ndarray:
    """(..., questions, [people, chosen answers]) to people per chosen answer."""
    return drawn[..., 0].sum(-1) / drawn[..., 1].sum(-1)


def _both(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The items that both labelled."""
    a, b = np.asarray(a, dtype=float), np.asarray(b, dtype=float)
    there = ~np.isnan(a) & ~np.isnan(b)
    return a[there], b[there]
