"""Experiments with the judge: is it the same judge when asked again, in the other order, about every pair?

A drawn sample of comparisons is put to the judge twice in the same order and once with the answers swapped; and for
some people and questions all six pairs of the four candidates are judged. In the simulated world a second judge with a
planted fault shows that the laboratory sees what is there.
"""

from collections.abc import Sequence
from dataclasses import replace
from itertools import combinations
from random import Random

import numpy as np
import pandas as pd
from scipy.stats import norm

from helpers import judging, llm
from helpers.judging import Match

PAIRS, QUARTETS = 120, 30  # comparisons asked three times; people's questions of which all six pairs are asked
ASKINGS = ("first", "again", "swapped", "every pair")
FIRST_SEED = 1000  # of the laboratory's requests: no tournament asks so often, so none is answered from the cache
MEASURES = {  # what each of them is for a judge who tosses a coin
    "same winner, asked again": 0.5, "same winner, order swapped": 0.5, "shown first wins": 0.5, "longer answer wins": 0.5,
    "circles among three": 0.25, "better answer wins": 0.5,
}


def n_requests(cfg, pairs: int = PAIRS, quartets: int = QUARTETS) -> int:
    """The most requests that `retest` sends for one judge: what it costs before it is started."""
    size = cfg.judge.pairs_per_request
    return 3 * -(-pairs // size) + -(-6 * quartets // size)


def sample(comparisons: pd.DataFrame, seed: int, n: int) -> pd.DataFrame:
    """n rows drawn by the seed, from as many people as can be: nobody a second time before all had a first."""
    drawn = comparisons.sample(frac=1, random_state=seed)
    turn = drawn.groupby("persona_id").cumcount()
    return drawn.iloc[np.argsort(turn.to_numpy(), kind="stable")].head(n)


def retest(teacher: llm.Teacher, judge: str, comparisons: pd.DataFrame, personas: pd.DataFrame, questions: pd.DataFrame,
           responses: pd.DataFrame, cfg, seed: int, pairs: int = PAIRS, quartets: int = QUARTETS) -> pd.DataFrame:
    """The `retests` table of one judge: a row per pair and asking, each asked once (a tie stays a tie).

    first, again, swapped: `pairs` comparisons in the order they were shown in, once more, and in the other one.
    Up to half of them have answers of unequal length in words, which are rare in the little world. every pair: the
    six pairs of the candidates of `quartets` people's questions, the order drawn. Each asking has a seed of its own,
    so nothing comes from the cache. judge: its name in the table.
    """
    texts = dict(zip(responses["response_id"], responses["text"], strict=True))
    unequal = sample(comparisons[_words(comparisons, texts).nunique(axis=1) > 1], seed, pairs // 2)
    drawn = pd.concat([unequal, sample(comparisons.drop(unequal.index), seed, pairs - len(unequal))])
    first = _matches(drawn, personas, questions)
    swapped = [replace(match, shown_first=match.shown_second) for match in first]
    sets = sample(comparisons[comparisons["round"] == 1], seed + 1, quartets)[["persona_id", "question_id"]]
    six = _matches(_every_pair(sets.merge(comparisons), seed), personas, questions)
    askings = zip(ASKINGS, (first, first, swapped, six), strict=True)
    rows = [row for i, (asking, matches) in enumerate(askings)
            for row in _ask(teacher, asking, matches, texts, cfg, FIRST_SEED + i)]
    return pd.DataFrame(rows).assign(judge=judge, model=teacher.model)


def planted(store, **knobs: float) -> llm.Teacher:
    """A second simulated teacher, with these `world_knobs` set (position_bias, length_bias, noise, …)."""
    changed = store.profile.world_knobs.model_copy(update=knobs)
    return llm.connect(replace(store, profile=store.profile.model_copy(update={"world_knobs": changed})))


def observations(retests: pd.DataFrame, texts: dict[str, str], utility: pd.DataFrame | None = None) -> pd.DataFrame:
    """What the askings show, for stats.cluster_bootstrap: judge, measure, persona_id, correct (bool).

    Only clear verdicts count. "first" and "swapped" show every pair in both orders, so a judge without a lean lets
    the one shown first win half of the time, however good it is. utility: `world.teacher.truth`, where it is known.
    """
    clear = retests[retests["winner"] != ""]
    first, again, swapped, six = (clear[clear["asking"] == asking] for asking in ASKINGS)
    both = pd.concat([first, swapped])
    parts = {
        "same winner, asked again": _same(first, again),
        "same winner, order swapped": _same(first, swapped),
        "shown first wins": both.assign(correct=both["winner"] == both["shown_first"]),
        "longer answer wins": longer_wins(both, texts),
        "circles among three": circles(six),
    }
    if utility is not None:
        parts["better answer wins"] = against_truth(both, utility)
    rows = [part.assign(measure=measure) for measure, part in parts.items()]
    return pd.concat(rows)[["judge", "measure", "persona_id", "correct"]].reset_index(drop=True)


def longer_wins(decided: pd.DataFrame, texts: dict[str, str]) -> pd.DataFrame:
    """The rows whose answers differ in words, with `correct`: the longer one won."""
    words = _words(decided, texts)
    longer = decided["response_a"].where(words["a"] > words["b"], decided["response_b"])
    return decided.assign(correct=decided["winner"] == longer)[words["a"] != words["b"]]


def circles(decided: pd.DataFrame) -> pd.DataFrame:
    """A row per three candidates of a person and question with `correct`: a beats b, b beats c, c beats a.

    decided: verdicts on all pairs of four candidates; threes with an open pair are left out. A coin makes a
    circle of 2 in 8 = 1/4 of them. (A judge with a utility for each answer and no noise makes none.)
    """
    rows = []
    for (judge, person, question), games in decided.groupby(["judge", "persona_id", "question_id"]):
        won = {frozenset((g.response_a, g.response_b)): g.winner for g in games.itertuples()}
        for three in combinations(sorted(set().union(*won)), 3):
            winners = [won.get(frozenset(pair)) for pair in combinations(three, 2)]
            if None not in winners:
                rows.append((judge, person, question, len(set(winners)) == 3))
    return pd.DataFrame(rows, columns=["judge", "persona_id", "question_id", "correct"])


def against_truth(decided: pd.DataFrame, utility: pd.DataFrame) -> pd.DataFrame:
    """The rows whose answers differ in utility, with `correct` (the better one won) and `margin` (units of utility)."""
    keys = ["persona_id", "question_id"]
    rows = decided
    for side in ("response_a", "response_b"):
        known = utility[[*keys, "response_id", "utility"]].rename(columns={"response_id": side, "utility": f"u_{side}"})
        rows = rows.merge(known, on=[*keys, side])
    better = rows["response_a"].where(rows["u_response_a"] > rows["u_response_b"], rows["response_b"])
    margin = (rows["u_response_a"] - rows["u_response_b"]).abs()
    rows = rows.assign(correct=rows["winner"] == better, margin=margin)
    return rows[rows["margin"] > 1e-9].drop(columns=["u_response_a", "u_response_b"])


def expected_right(margin: pd.Series, noise: float, tie_below: float = 0.0) -> np.ndarray:
    """How often a judge with normal noise of this standard deviation picks the better of two answers, if it decides.

    Phi(margin / noise); with ties, which are asked again, the share of the right among both clear verdicts.
    """
    if not noise:
        return np.ones(len(margin))
    right, wrong = (norm.cdf((side * margin - tie_below) / noise) for side in (1, -1))
    return np.asarray(right / (right + wrong))


def margin_bins(margin: pd.Series, n: int = 8) -> pd.Series:
    """For each margin the mean margin of its bin: up to n bins with equally many comparisons."""
    bins = pd.qcut(margin, n, labels=False, duplicates="drop")
    return margin.groupby(bins).transform("mean")


def _matches(rows: pd.DataFrame, personas: pd.DataFrame, questions: pd.DataFrame) -> list[Match]:
    names = dict(zip(personas["persona_id"], personas["name"], strict=True))
    asked = dict(zip(questions["question_id"], questions["text"], strict=True))
    return [Match(r.persona_id, names[r.persona_id], r.question_id, asked[r.question_id], r.round, r.response_a,
                  r.response_b, r.shown_first) for r in rows.itertuples()]


def _words(comparisons: pd.DataFrame, texts: dict[str, str]) -> pd.DataFrame:
    """White-space delimited words of both answers: columns a, b."""
    count = {response: len(texts[response].split()) for response in {*comparisons["response_a"], *comparisons["response_b"]}}
    return pd.DataFrame({side: comparisons[f"response_{side}"].map(count) for side in "ab"})


def _every_pair(comparisons: pd.DataFrame, seed: int) -> pd.DataFrame:
    """The six pairs of the candidates that meet in the semi-finals, who is shown first drawn by the seed."""
    semis, rows = comparisons[comparisons["round"] < 3], []
    for (person, question), games in semis.groupby(["persona_id", "question_id"]):
        coin = Random(f"{seed} every pair {person} {question}")
        for a, b in combinations(sorted({*games["response_a"], *games["response_b"]}), 2):
            rows.append((person, question, 0, a, b, coin.choice((a, b))))
    return pd.DataFrame(rows, columns=["persona_id", "question_id", "round", "response_a", "response_b", "shown_first"])


def _ask(teacher: llm.Teacher, asking: str, matches: Sequence[Match], texts: dict[str, str], cfg, seed: int) -> list[dict]:
    """Put the matches to the judge once, `judge.pairs_per_request` at a time, under a name of their own in the ledger."""
    size = cfg.judge.pairs_per_request
    batches = [matches[i:i + size] for i in range(0, len(matches), size)]
    requests = [replace(judging.request(batch, texts, seed), tag="judge_lab") for batch in batches]
    rows = []
    for batch, answer in zip(batches, teacher.map(requests, f"judge laboratory, {asking}"), strict=True):
        for match, verdict in zip(batch, judging._verdicts(answer, len(batch)), strict=True):
            match = replace(match)
            match.take(verdict, answer.cost_usd / len(batch))
            rows.append({"asking": asking, "persona_id": match.persona_id, "question_id": match.question_id,
                         "response_a": match.response_a, "response_b": match.response_b,
                         "shown_first": match.shown_first, "winner": match.winner, "outcome": match.outcome,
                         "cost_usd": match.cost_usd})
    return rows


def _same(one: pd.DataFrame, other: pd.DataFrame) -> pd.DataFrame:
    """The pairs of which both askings have a winner, with `correct`: it is the same."""
    keys = ["judge", "persona_id", "question_id", "response_a", "response_b"]
    rows = one[[*keys, "winner"]].merge(other[[*keys, "winner"]], on=keys)
    return rows.assign(correct=rows["winner_x"] == rows["winner_y"])
