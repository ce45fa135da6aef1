"""A gate before training: repeated rows, leaks, and shortcuts that pay without knowing the person.

A leak stops the run. A shortcut is a rule that reads nothing about anybody (take the longer answer, take what
most others took); what it wins is the floor that a trained model's accuracy has to be compared with.
"""

from collections import Counter
from collections.abc import Callable, Collection, Mapping
from statistics import NormalDist
from typing import NamedTuple

import numpy as np
import pandas as pd

from helpers import stats
from helpers.people import normalised

MARGIN = 0.05  # a shortcut is warned of if its whole interval lies farther than this from one half
KEYS = ["persona_id", "question_id"]
ONE_SIDED = 8  # pairs: by chance one person in 128 takes the longer answer of eight, or the shorter, each time
COLUMNS = ["check", "found", "of", "share", "low", "high", "status", "to_do"]
LEFT_OUT = ["row repeated", "contradicted by the same person", "test prompt with answer trained on",
            "test answer in the person's history", "user with too few pairs"]  # in the order of imported.REASONS
LONGER = "Compare with this floor, and score by mean log-probability per token; judge again if it is large."
SIDED = "Length alone predicts them, or their labels: look at their pairs, and leave them out if nobody chose."
Trainers = Mapping[tuple[str, int], Collection[str]]


class AuditFailed(ValueError):
    """Something that a test must not know is in the training: says what, how often, and what to do."""


class Finding(NamedTuple):
    """One check. bad: the status if anything is found ("warn" or "stop")."""

    check: str
    found: int
    of: int
    bad: str
    to_do: str


class Shortcut(NamedTuple):
    """A rule that knows nothing about the person, on the pairs that it decides.

    pairs: persona_id and correct, whether the rule takes what the person took. below: warn of a rule that
    loses too, for its opposite wins.
    """

    check: str
    pairs: pd.DataFrame
    to_do: str
    below: bool = True


def audit(preferences: pd.DataFrame, prefixes: pd.DataFrame | None = None, folds: pd.DataFrame | None = None,
          trained_on: Trainers | None = None, margin: float = MARGIN, **drawing) -> pd.DataFrame:
    """What could be wrong with these pairs before anything is trained on them, a row per check.

    prefixes, folds: the tables, where there are some. trained_on: {(scheme, fold): persona_ids that it trains
    on}. drawing: options of stats.resample for the intervals (people are resampled).
    Returns check, found and of (rows, or pairs that the rule can decide), share, low, high (of a shortcut
    only), status (ok, warn, stop) and to_do. A check whose table is not given has no row.
    """
    findings = [repeated(preferences), turned(preferences), same_text(preferences), empty(preferences)]
    findings += [one_sided(preferences), trained_answer(preferences)]
    findings += [asked_twice(preferences, "persona_id"), asked_twice(preferences, "axis")]
    if prefixes is not None:
        findings += [told(prefixes, preferences), foreign_shots(prefixes, preferences)]
    if folds is not None:
        findings.append(never_held_out(folds, preferences))
        findings += [held_out(folds, trained_on)] if trained_on is not None else []
    rows = [(f.check, f.found, f.of, f.found / max(f.of, 1), np.nan, np.nan, f.bad if f.found else "ok",
             f.to_do if f.found else "") for f in findings]
    rows += [_judged(rule, margin, drawing) for rule in shortcuts(preferences)]
    return pd.DataFrame(rows, columns=COLUMNS)


def gate(report: pd.DataFrame) -> None:
    """Raise AuditFailed if any check says stop; print a line with its numbers for each that warns."""
    stops = [f"- {row.check}: {row.found} of {row.of}. {row.to_do}"
             for row in report[report["status"] == "stop"].itertuples()]
    if stops:
        raise AuditFailed("training would know what it is tested on:\n" + "\n".join(stops))
    for row in report[report["status"] == "warn"].itertuples():
        between = "" if np.isnan(row.low) else f" [{row.low:.2f}, {row.high:.2f}]"
        print(f"WARNING: {row.check}: {row.found} of {row.of} ({row.share:.2f}{between}). {row.to_do}")


def of_file(found, margin: float = MARGIN, confidence: float = 0.95) -> pd.DataFrame:
    """What was wrong with a file of any size, from what a pass over it kept (`imported.Scan`), a row per check.

    Returns the columns of `audit`. Rows with the status "left out" are not in the run; the two last checks are of
    the good rows: who always takes the longer (or always the shorter) answer, and how often the longer one wins.
    Its interval has people as units, by the linear approximation: drawing a million people anew would take days.
    """
    n = len(found.why) + len(found.unread)
    rows = [(f"can't be read: {reason}", count, n) for reason, count in sorted(found.reasons.items())]
    rows += [(name, int((found.why == code).sum()), n) for code, name in enumerate(LEFT_OUT, start=1)]
    told = [(*row, row[1] / max(n, 1), np.nan, np.nan, "left out" if row[1] else "ok",
             "See import_problems.csv, line by line." if row[1] else "") for row in rows]
    _, who = np.unique(found.rows["user"][found.good], return_inverse=True)
    longer = found.rows["longer"][found.good]
    wins, decided = (np.bincount(who, weights=part) for part in (longer > 0, longer != 0))
    sided = int(((decided >= ONE_SIDED) & ((wins == 0) | (wins == decided))).sum())
    told.append(("user who always takes the longer or always the shorter", sided, len(decided), sided / max(len(decided), 1),
                 np.nan, np.nan, "warn" if sided else "ok", SIDED if sided else ""))
    of = int(decided.sum())
    share, low, high = _linear(wins, decided, confidence)
    off = low > 0.5 + margin or high < 0.5 - margin
    told.append(("longer answer wins (characters)", int(wins.sum()), of, share, low, high, "warn" if off else "ok",
                 LONGER if off else ""))
    return pd.DataFrame(told, columns=COLUMNS)


def _linear(wins: np.ndarray, decided: np.ndarray, confidence: float) -> tuple[float, float, float]:
    """wins / decided over all people with its interval; both have a number per person. NaN for under two people."""
    decided, wins = decided[decided > 0], wins[decided > 0]
    if len(decided) < 2:
        return (np.nan,) * 3
    share = wins.sum() / decided.sum()
    error = np.sqrt(((wins - share * decided) ** 2).sum() * len(decided) / (len(decided) - 1)) / decided.sum()
    reach = NormalDist().inv_cdf((1 + confidence) / 2) * error
    return share, share - reach, share + reach


def empty(preferences: pd.DataFrame) -> Finding:
    """Rows with a prompt or an answer of white space."""
    blank = np.logical_or.reduce([preferences[text].str.strip() == "" for text in ("prompt", "chosen", "rejected")])
    return Finding("empty text", int(blank.sum()), len(preferences), "warn", "Nothing is asked or said: leave it out.")


def one_sided(preferences: pd.DataFrame) -> Finding:
    """People who take the longer answer every time, or the shorter, over ONE_SIDED pairs or more."""
    longer = preferences["chosen"].str.len() - preferences["rejected"].str.len()
    rows = preferences[longer != 0].assign(longer=longer > 0).groupby("persona_id")["longer"].agg(["mean", "size"])
    sided = rows["mean"].isin([0, 1]) & (rows["size"] >= ONE_SIDED)
    return Finding("person who always takes the longer or always the shorter", int(sided.sum()),
                   preferences["persona_id"].nunique(), "warn", SIDED)


def trained_answer(preferences: pd.DataFrame) -> Finding:
    """Test pairs of which a train pair, anybody's, has the prompt with one of the answers."""
    sides = {split: rows[["prompt", "chosen", "rejected"]] for split, rows in preferences.groupby("split")}
    train, test = (sides.get(split, preferences.loc[[], ["prompt", "chosen", "rejected"]]) for split in ("train", "test"))
    known = {(prompt, answer) for prompt, *answers in train.itertuples(index=False) for answer in answers}
    leaked = [(p, c) in known or (p, r) in known for p, c, r in test.itertuples(index=False)]
    return Finding("test prompt with answer trained on, anybody", sum(leaked), len(leaked), "warn",
                   "A model may know it by heart: put all rows of a prompt on one side.")


def repeated(preferences: pd.DataFrame) -> Finding:
    """Rows that say what an earlier one of the same person says."""
    twice = preferences.duplicated(["persona_id", "prompt", "chosen", "rejected"])
    return Finding("row repeated", int(twice.sum()), len(preferences), "warn",
                   "A pair that counts twice weighs twice: leave the copies out.")


def turned(preferences: pd.DataFrame) -> Finding:
    """Rows whose person also prefers the two answers the other way round."""
    keys = ["persona_id", "prompt", "chosen", "rejected"]
    said = set(preferences[keys].itertuples(index=False, name=None))
    against = [(p, x, r, c) in said and c != r for p, x, c, r in preferences[keys].itertuples(index=False)]
    return Finding("contradicted by the same person", sum(against), len(preferences), "warn",
                   "Nothing says which of the two is right: leave both out.")


def same_text(preferences: pd.DataFrame) -> Finding:
    """Rows whose chosen and rejected are the same text."""
    same = preferences["chosen"].str.strip() == preferences["rejected"].str.strip()
    return Finding("chosen is rejected", int(same.sum()), len(preferences), "warn",
                   "Such a pair teaches nothing and is always scored wrong: leave it out.")


def asked_twice(preferences: pd.DataFrame, by: str) -> Finding:
    """Test pairs whose question, case and punctuation aside, is a train question too.

    by: "persona_id", of the same person; or "axis", of anybody on the axis (divergent questions alone: what
    two people ask by themselves may be the same).
    """
    shared = preferences if by == "persona_id" else preferences[preferences["kind"] == "divergent"]
    words = {text: normalised(text) for text in shared["prompt"].unique()}
    keys = list(zip(shared[by], shared["prompt"].map(words), strict=True))
    train = {key for key, split in zip(keys, shared["split"], strict=True) if split == "train"}
    leaked = [key in train for key, split in zip(keys, shared["split"], strict=True) if split == "test"]
    whose = "person" if by == "persona_id" else "axis"
    return Finding(f"test question trained on, same {whose}", sum(leaked), len(leaked), "stop",
                   f"Put all pairs of a question on one side: split by the words of the question (per {whose}).")


def told(prefixes: pd.DataFrame, preferences: pd.DataFrame) -> Finding:
    """Prefixes that hold an answer to a test question."""
    from helpers import prefixes as prefix_texts  # needs torch, which the audit of a file does not

    texts = prefixes.drop_duplicates("text")
    leaking = set(prefix_texts.leaks(texts, preferences)["text"])
    return Finding("test answer inside a prefix", int(prefixes["text"].isin(leaking).sum()), len(prefixes), "stop",
                   "Draw shots and infer personas from train pairs alone (notebook 05).")


def foreign_shots(prefixes: pd.DataFrame, preferences: pd.DataFrame) -> Finding:
    """Prefixes made from a pair that is not a train pair."""
    train = set(preferences.loc[preferences["split"] == "train", "pair_id"])
    foreign = [not train.issuperset(shots) for shots in prefixes["shots"]]
    return Finding("prefix made from other than train pairs", sum(foreign), len(foreign), "stop",
                   "Prefixes and preferences are not of one run, or shots were drawn from test pairs: make them "
                   "again (notebook 05).")


def held_out(folds: pd.DataFrame, trained_on: Trainers) -> Finding:
    """People held out in a fold and among those it trains on. Raises ValueError for a fold that is not there."""
    held = folds.groupby(["scheme", "fold"])["persona_id"].agg(set).to_dict()
    if unknown := sorted(set(trained_on) - set(held)):
        raise ValueError(f"no fold {unknown[0]} in the table folds, only {sorted(held)}; notebook 05 makes them")
    both = sum(len(set(people) & held[fold]) for fold, people in trained_on.items())
    return Finding("held-out person trained on", both, len(folds), "stop",
                   "Train a fold on settings.people(folds, fold).train.")


def never_held_out(folds: pd.DataFrame, preferences: pd.DataFrame) -> Finding:
    """People with pairs whom the stratified scheme holds out never or more than once."""
    held = folds.loc[folds["scheme"] == "stratified", "persona_id"].value_counts()
    times = held.reindex(preferences["persona_id"].unique(), fill_value=0)
    return Finding("person not held out exactly once", int((times != 1).sum()), len(times), "stop",
                   "An unseen person is scored by the one adapter that never met them: draw the folds again "
                   "(splits.stratified_folds).")


def shortcuts(preferences: pd.DataFrame) -> list[Shortcut]:
    """Length, the others' choice, and the order of ids.

    That the others' choice loses is no flaw: the people of an axis were chosen to contradict each other.
    """
    rules = [Shortcut(f"longer answer wins ({unit}), {kind}", _decided(part, count), LONGER)
             for kind, part in preferences.groupby("kind", sort=True)
             for unit, count in (("characters", len), ("words", lambda text: len(text.split())))]
    named = preferences.assign(correct=preferences["chosen_id"] < preferences["rejected_id"])
    return [*rules, Shortcut("majority answer wins, divergent test", _crowd(preferences),
                             "So much is shared taste or quality and needs no prefix: compare with a model "
                             "trained without one.", below=False),
            Shortcut("chosen has the earlier id", named, "Ids tell who won: shuffle candidates before judging.")]


def _decided(pairs: pd.DataFrame, measure: Callable[[str], int]) -> pd.DataFrame:
    """Pairs whose answers differ in a measure; correct where chosen has more of it."""
    sizes = {text: measure(text) for text in pd.unique(pairs[["chosen", "rejected"]].to_numpy().ravel())}
    chosen, rejected = pairs["chosen"].map(sizes), pairs["rejected"].map(sizes)
    return pairs.assign(correct=chosen > rejected)[chosen != rejected]


def _crowd(preferences: pd.DataFrame) -> pd.DataFrame:
    """Divergent test pairs on which other people's votes differ; correct where more of them chose `chosen`."""
    pairs = preferences[(preferences["kind"] == "divergent") & (preferences["split"] == "test")]
    own = set(pairs[["persona_id", "question_id", "chosen_id"]].itertuples(index=False, name=None))
    votes = Counter((question, answer) for _, question, answer in own)
    lead = np.array([votes[q, c] - votes[q, r] - ((p, q, c) in own) + ((p, q, r) in own)
                     for p, q, c, r in pairs[[*KEYS, "chosen_id", "rejected_id"]].itertuples(index=False)])
    return pairs.assign(correct=lead > 0)[lead != 0]


def _judged(rule: Shortcut, margin: float, drawing: Mapping) -> tuple:
    """A shortcut's row: warn if its interval, people resampled, lies off one half by more than the margin."""
    found, of = int(rule.pairs["correct"].sum()), len(rule.pairs)
    if not of:
        return rule.check, 0, 0, np.nan, np.nan, np.nan, "ok", "no pair that the rule decides"
    share = stats.cluster_bootstrap(rule.pairs.assign(all=""), "all", **{"few": "blank", **drawing}).iloc[0]
    off = share["low"] > 0.5 + margin or (rule.below and share["high"] < 0.5 - margin)
    few = f"{share['n_people']} people: too few for an interval" if np.isnan(share["low"]) else ""
    return (rule.check, found, of, found / of, share["low"], share["high"], "warn" if off else "ok",
            rule.to_do if off else few)
