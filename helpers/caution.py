"""When not to personalise: check a prefix before it is used, abstain where it cannot be trusted, turn it down.

Rows are scored pairs (helpers.scoring) of the same people behind two prompts, with a prefix and without it.
"""

from collections.abc import Sequence

import numpy as np
import pandas as pd

from helpers import stats

KEY = ["persona_id", "pair_id"]


def margins(scores: pd.DataFrame) -> pd.Series:
    """How much likelier chosen is than rejected: difference of mean token log-probabilities, nats."""
    return scores["logp_chosen"] / scores["n_chosen"] - scores["logp_rejected"] / scores["n_rejected"]


def side_by_side(with_prefix: pd.DataFrame, without: pd.DataFrame) -> pd.DataFrame:
    """A row for each pair that was scored both ways: persona_id, pair_id, margins `told` and `plain`."""
    both = [rows[KEY].assign(**{name: margins(rows)}) for name, rows in (("told", with_prefix), ("plain", without))]
    return both[0].merge(both[1], on=KEY)


def verified(trial: pd.DataFrame, least: int = 1) -> pd.Series:
    """Whom the prefix has proved itself for: index persona_id, True where it ranks more of the trial pairs right.

    trial: rows of `side_by_side` of pairs that the prefix was not made from. Ties, and fewer than `least` pairs,
    go against the prefix: without evidence nobody is personalised.
    """
    right = trial.assign(won=(trial["told"] > 0).astype(int) - (trial["plain"] > 0).astype(int))
    found = right.groupby("persona_id")["won"].agg(["sum", "size"])
    return (found["sum"] > 0) & (found["size"] >= least)


def fall_back(test: pd.DataFrame, proved: pd.Series) -> pd.DataFrame:
    """The test pairs with `correct` by the prefix where it has proved itself, and without it elsewhere."""
    use = test["persona_id"].map(proved).fillna(False).astype(bool)
    return test.assign(used=use, correct=np.where(use, test["told"], test["plain"]) > 0)


def agreement(both: pd.DataFrame) -> pd.Series:
    """How sure the two margins are together: the smaller of them where they agree, below zero where they do not."""
    smaller = np.minimum(both["told"].abs(), both["plain"].abs())
    return smaller.where(np.sign(both["told"]) == np.sign(both["plain"]), -smaller)


def risk_coverage(correct: pd.Series, confidence: pd.Series, persona_id: pd.Series, steps: int = 20) -> pd.DataFrame:
    """Error rate among the most confident share of the pairs, for shares 1/steps ... 1.

    Equal confidence is broken by the order of rows. Returns coverage (fraction answered), risk (fraction wrong of
    those), threshold (confidence of the last one answered) and n_people among those answered.
    """
    order = np.argsort(-confidence.to_numpy(), kind="stable")
    wrong, people = ~correct.to_numpy(dtype=bool)[order], persona_id.to_numpy()[order]
    rows = []
    for k in range(1, steps + 1):
        n = max(1, round(len(order) * k / steps))
        rows.append((n / len(order), wrong[:n].mean(), confidence.to_numpy()[order[n - 1]], len(set(people[:n]))))
    return pd.DataFrame(rows, columns=["coverage", "risk", "threshold", "n_people"])


def area(curve: pd.DataFrame) -> float:
    """Mean risk over all shares of `risk_coverage`: the lower, the better the confidence orders the pairs."""
    return float(curve["risk"].mean())


def area_gap(both: pd.DataFrame, first: pd.Series, second: pd.Series, **options) -> stats.Estimate:
    """Area under the risk by the first confidence minus that by the second, with people drawn.

    both: rows of `side_by_side`; right is where the prefix's margin is above zero. options: those of stats.resample.
    """
    people, codes = pd.factorize(both["persona_id"], sort=True)[::-1]
    rows = [np.flatnonzero(codes == i) for i in range(len(people))]
    wrong, sure = both["told"].to_numpy() <= 0, (first.to_numpy(), second.to_numpy())

    def gap(drawn: np.ndarray) -> np.ndarray:
        picked = [np.concatenate([rows[i] for i in who]) for who in drawn[..., 0].reshape(-1, drawn.shape[-2])]
        gaps = [_mean_risk(wrong[at], sure[0][at]) - _mean_risk(wrong[at], sure[1][at]) for at in picked]
        return np.array(gaps).reshape(drawn.shape[:-2])

    return stats.resample(np.arange(len(people))[:, None], gap, **options)


def dial(both: pd.DataFrame, strengths: Sequence[float]) -> pd.DataFrame:
    """The pairs at each strength of the prefix: 0 without it, 1 with it, log-probabilities mixed in between.

    Returns the rows once for each strength, with `strength`, `margin` (nats) and `correct`.
    """
    parts = [both.assign(strength=s, margin=s * both["told"] + (1 - s) * both["plain"]) for s in strengths]
    return pd.concat(parts, ignore_index=True).assign(correct=lambda rows: rows["margin"] > 0)


def costs(units: pd.DataFrame, users: Sequence[int]) -> pd.DataFrame:
    """What so many users cost: method, users, storage_bytes and compute_flops of making all of them known.

    units: a row per method; bytes_each and flops_each for every user, bytes_shared and flops_shared once.
    """
    grid = units.merge(pd.DataFrame({"users": list(users)}), how="cross")
    return grid.assign(storage_bytes=grid["bytes_shared"] + grid["users"] * grid["bytes_each"],
                       compute_flops=grid["flops_shared"] + grid["users"] * grid["flops_each"])[
        ["method", "users", "storage_bytes", "compute_flops"]]


def _mean_risk(wrong: np.ndarray, confidence: np.ndarray) -> float:
    """Mean over all n of the error rate among the n most confident."""
    ranked = wrong[np.argsort(-confidence, kind="stable")]
    return float((np.cumsum(ranked) / np.arange(1, len(ranked) + 1)).mean())
