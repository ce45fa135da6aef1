"""Who wins? Win rates, a Bradley-Terry ranking and its agreement with accuracy, from judged pairs of answers."""

from collections.abc import Mapping, Sequence
from statistics import NormalDist

import numpy as np
import pandas as pd
from scipy.stats import rankdata

from helpers import stats

MIN_SYSTEMS = 4  # a rank correlation over fewer takes one of a handful of values


def decide(winrates: pd.DataFrame) -> pd.DataFrame:
    """One row per pair of answers, from its two judgements: a win counts if it stands in both orders.

    Returns persona_id, question_id, kind, system_a, system_b, score (what system_a gets: 1, 0.5 or 0) and how:
    agreed; tie (called one at least once); disagreed (the one shown first, or the one shown second, won twice).
    Both of these are half a win each. A pair with an unparsable judgement has no row.
    """
    rows, keys = [], ["persona_id", "question_id", "kind", "system_a", "system_b"]
    for key, both in winrates.groupby(keys):
        if len(both) != 2 or (both["outcome"] == "unparsable").any():
            continue
        winners = set(both["winner"])
        how = "tie" if "" in winners else "agreed" if len(winners) == 1 else "disagreed"
        rows.append((*key, float(winners == {key[3]}) if how == "agreed" else 0.5, how))
    return pd.DataFrame(rows, columns=[*keys, "score", "how"])


def sides(matches: pd.DataFrame) -> pd.DataFrame:
    """Every match seen from both sides: system, against, and its share of the win as `correct` (see stats)."""
    a = matches.rename(columns={"system_a": "system", "system_b": "against", "score": "correct"})
    b = matches.rename(columns={"system_b": "system", "system_a": "against"}).assign(correct=1 - matches["score"])
    return pd.concat([a, b[a.columns]], ignore_index=True)


def rates(matches: pd.DataFrame, **options) -> pd.DataFrame:
    """Win rate of each system against each other, as Table 3: a row beats its column in `rate` of the matches.

    Returns system, against, rate (fraction; ties are half), low, high (people drawn), n_people, n_pairs,
    wilson_low, wilson_high (as if all pairs were independent), ties, disagreed (fractions).
    options: those of stats.cluster_bootstrap.
    """
    both = sides(matches).assign(ties=lambda m: m["how"] == "tie", disagreed=lambda m: m["how"] == "disagreed")
    found = stats.cluster_bootstrap(both, ["system", "against"], **options).rename(columns={"accuracy": "rate"})
    shares = both.groupby(["system", "against"])[["ties", "disagreed"]].mean().reset_index()
    totals = both.groupby(["system", "against"])["correct"].sum().rename("won").reset_index()
    found = found.merge(shares).merge(totals)
    counts, confidence = zip(found["won"], found["n_pairs"], strict=True), options.get("confidence", 0.95)
    bounds = np.array([wilson(won, n, confidence) for won, n in counts]).reshape(-1, 2)
    found = found.assign(rate=found["won"] / found["n_pairs"], wilson_low=bounds[:, 0], wilson_high=bounds[:, 1])
    return found.drop(columns="won")


def layout(rates: pd.DataFrame, labels: Mapping[str, str]) -> pd.DataFrame:
    """Win rates as the paper prints them, in percent: a row for each system, a column for each opponent.

    rates: system, against, rate; optional low and high, which follow in brackets. labels: system -> heading, in
    their order. The last column is the plain mean of the row.
    """
    cells = rates.set_index(["system", "against"])
    table = []
    for a, heading in labels.items():
        met = [cells.loc[(a, b)] if (a, b) in cells.index else None for b in labels]
        mean = np.mean([cell["rate"] for cell in met if cell is not None])
        table.append([heading, *(map(_percent, met)), f"{100 * mean:.0f}"])
    return pd.DataFrame(table, columns=["row beats column", *labels.values(), "average"])


def average(matches: pd.DataFrame, system: str, rivals: Sequence[str] = (), **options) -> stats.Estimate:
    """A system's win rate averaged over its opponents, each counting the same (Table 3, last column).

    rivals: the opponents that count; empty: all. Everybody's matches are drawn together, by person.
    """
    own = sides(matches).query("system == @system")
    cells = [rows for name, rows in own.groupby("against") if not rivals or name in rivals]
    if not cells:
        raise stats.NoEstimate(f"{system} has met nobody in these matches")
    return stats.contrast(cells, lambda rates: rates.mean(axis=-1), **options)


def wilson(wins: float, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval of wins / n; half wins may occur, for which it is rather too wide than too narrow."""
    z, p = NormalDist().inv_cdf((1 + confidence) / 2), wins / n
    middle, half = p + z * z / (2 * n), z * np.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return float((middle - half) / (1 + z * z / n)), float((middle + half) / (1 + z * z / n))


def bradley_terry(wins: np.ndarray, draws: float = 1.0, tolerance: float = 1e-10) -> np.ndarray:
    """Strengths (..., systems) in log-odds, mean 0: i beats j with probability 1 / (1 + exp(s_j - s_i)).

    wins: (..., systems, systems), [i, j] how often i beat j, a tie half a win to both. draws: ties added to
    every pair that met, so that who always won has a finite strength; 0 gives the plain maximum of the
    likelihood. Source: Bradley and Terry (1952), maximised as Zermelo (1929) did, see Hunter (2004).
    """
    wins = wins + draws / 2 * (wins + np.swapaxes(wins, -1, -2) > 0)
    games, won = wins + np.swapaxes(wins, -1, -2), wins.sum(axis=-1)
    logs, steps = np.zeros(won.shape), 10_000 if (won > 0).all() else 0
    for _ in range(steps):
        odds = np.exp(logs)
        new = np.log(won / (games / (odds[..., :, None] + odds[..., None, :])).sum(axis=-1))
        new -= new.mean(axis=-1, keepdims=True)
        if np.abs(new - logs).max() < tolerance:
            return new
        logs = new
    raise stats.NoEstimate("no finite strengths: a system always won or never; draws > 0 keeps them finite")


def strengths(matches: pd.DataFrame, draws: float = 1.0, **options) -> pd.DataFrame:
    """The ranking, best first: system, estimate (log-odds, mean 0), low, high, n_people; people are drawn."""
    names, table = _by_person(matches)
    size, rows = len(names), []
    flat = table.reshape(len(table), size * size)
    for i, name in enumerate(names):
        found = stats.resample(
            flat, lambda v, i=i: bradley_terry(v.sum(axis=-2).reshape(*v.shape[:-2], size, size), draws, 1e-6)[..., i],
            **options)
        rows.append((name, *found))
    columns = ["system", "estimate", "low", "high", "n_people"]
    return pd.DataFrame(rows, columns=columns).sort_values("estimate", ascending=False, ignore_index=True)


def rank_correlation(scores: pd.DataFrame, matches: pd.DataFrame, **options) -> tuple[stats.Estimate, pd.DataFrame]:
    """Spearman's rho over systems between accuracy on given pairs and win rate of own answers; people drawn.

    scores: system, persona_id, correct. Only people and systems that both have count. Also returns the points:
    system, accuracy, win_rate. Raises NoEstimate for fewer than MIN_SYSTEMS systems; with few="blank" (see
    stats.resample) rho is NaN there instead.
    """
    both = [frame.groupby(["persona_id", "system"])["correct"].agg(["sum", "count"]).unstack()
            for frame in (scores, sides(matches))]
    names = sorted(set(both[0]["sum"]) & set(both[1]["sum"]))
    enough = len(names) >= MIN_SYSTEMS
    if not enough and options.get("few") != "blank":
        raise stats.NoEstimate(f"{len(names)} systems have both accuracy and win rate; {MIN_SYSTEMS} are needed")
    parts = [frame[column][names] for frame in both for column in ("sum", "count")]
    values = pd.concat(parts, axis=1, join="inner").dropna().to_numpy(dtype=float)
    rates = _two_rates(values, len(names))
    points = pd.DataFrame({"system": names, "accuracy": rates[0], "win_rate": rates[1]})
    found = (stats.resample(values, lambda drawn: _spearman(*_two_rates(drawn, len(names))), **options)
             if enough else stats.Estimate(np.nan, np.nan, np.nan, len(values)))
    return found, points.sort_values("accuracy", ignore_index=True)


def _percent(cell: pd.Series | None) -> str:
    if cell is None:
        return "–"
    found = f"{100 * cell['rate']:.0f}"
    if np.isnan(cell.get("low", np.nan)):
        return found
    return f"{found} [{100 * cell['low']:.0f}, {100 * cell['high']:.0f}]"


def _by_person(matches: pd.DataFrame) -> tuple[list[str], np.ndarray]:
    """Systems, and wins (people, systems, systems)."""
    both = sides(matches)
    names, people = sorted(both["system"].unique()), sorted(both["persona_id"].unique())
    table = np.zeros((len(people), len(names), len(names)))
    at = [pd.Categorical(both[column], order).codes for column, order in
          (("persona_id", people), ("system", names), ("against", names))]
    np.add.at(table, tuple(at), both["correct"].to_numpy())
    return names, table


def _two_rates(values: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """(..., people, 4 x systems) of right, pairs, won, matches to (..., systems) accuracies and win rates."""
    right, pairs, won, games = np.split(values.sum(axis=-2), [size, 2 * size, 3 * size], axis=-1)
    return right / pairs, won / games


def _spearman(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return stats.correlate(rankdata(x, axis=-1), rankdata(y, axis=-1))
