"""From a history to directions in the preference space, and from these to words: the four bridges.

averaged: the mean of the pairs' labels; inferred: what the teacher reads out of the pairs; head: the mean of what a
small trained model reads out of them; golden: the truth. Source: AlignX (arXiv 2503.15463); averaged and head are ours.
"""

from collections.abc import Mapping, Sequence
from random import Random

import numpy as np
import pandas as pd
from sklearn.linear_model import Ridge
from sklearn.model_selection import GroupKFold, cross_val_predict

from helpers import directions
from helpers.config import Profile
from helpers.directions import Wording
from helpers.llm import Teacher
from helpers.reading import Evidence, frame, history, infer, poles, possible
from helpers.schemas import TABLES

NAMES = ("averaged", "inferred", "head", "golden")
PARTS = 5  # of the head's cross-fitting


def table(evidence: Evidence, teacher: Teacher | None, counts: Sequence[int], heads: Mapping[tuple[str, int], Sequence[str]],
          cfg: Profile) -> pd.DataFrame:
    """The `directions` table: everybody's directions by each bridge, from so many items of the history.

    counts: numbers of items; one that somebody lacks is left out for all. heads: (scheme, fold) -> the people that
    the trained head learns from. Rows of the other bridges have scheme "" and fold -1, and golden has items 0,
    for it reads none.
    """
    rows, people = [], evidence.personas["persona_id"].sort_values().tolist()
    if teacher is None:
        return pd.DataFrame(columns=list(TABLES["directions"].columns))
    read = {key: head_labels(evidence, ids, cfg.alignx.ridge) for key, ids in heads.items()}
    for n in possible(evidence, counts):
        shots = {person: history(evidence, person, n, cfg.seed) for person in people}
        rows += _rows("averaged", n, "", -1, _averaged(evidence.labels, shots), evidence, cfg)
        rows += _rows("inferred", n, "", -1, infer(teacher, shots), evidence, cfg)
        for (scheme, fold), labels in read.items():
            rows += _rows("head", n, scheme, fold, _averaged(labels, shots), evidence, cfg)
    rows += _rows("golden", 0, "", -1, evidence.golden, evidence, cfg)
    return pd.DataFrame(rows, columns=list(TABLES["directions"].columns))


def head_labels(evidence: Evidence, train_people: Sequence[str], alpha: float) -> pd.DataFrame:
    """What a small trained head reads out of every pair of the pool: a ridge regression from features to labels.

    It is trained on the labelled pairs of `train_people`; of these people themselves each is read by a head that
    was trained without them (by parts). The features are differences, so there is no intercept: a pair the other
    way round has the opposite label. Returns values around 0.5, a row per pair_id, a column per dimension.
    """
    person = evidence.pool.set_index("pair_id")["persona_id"]
    known = person.isin(set(train_people)).to_numpy()
    x, y = evidence.features.to_numpy(), evidence.labels.to_numpy() - directions.NEUTRAL
    model, groups = Ridge(alpha=alpha, fit_intercept=False), person[known]
    told = np.zeros_like(y)
    parts = GroupKFold(min(PARTS, groups.nunique()))
    told[known] = cross_val_predict(model, x[known], y[known], groups=groups, cv=parts)
    told[~known] = model.fit(x[known], y[known]).predict(x[~known]) if (~known).any() else 0
    return pd.DataFrame(told + directions.NEUTRAL, index=evidence.labels.index, columns=evidence.labels.columns)


def texts(table: pd.DataFrame, name: str, n: int, key: tuple[str, int] = ("", -1)) -> dict[str, str]:
    """persona_id -> text of a bridge from n items; key: (scheme, fold) of the trained head."""
    scheme, fold = key if name == "head" else ("", -1)
    rows = table[(table["bridge"] == name) & (table["items"] == (0 if name == "golden" else n))
                 & (table["scheme"] == scheme) & (table["fold"] == fold)]
    return dict(zip(rows["persona_id"], rows["text"], strict=True))


def mixed(pairs: pd.DataFrame, table: pd.DataFrame, key: tuple[str, int], n: int, cfg: Profile) -> list[str]:
    """For each train pair the text of a bridge drawn by a seed of the pair: one adapter then serves all four."""
    said = {name: texts(table, name, n, key) for name in NAMES}
    drawn = [Random(f"{cfg.seed} bridge {pair_id}").choice(NAMES) for pair_id in pairs["pair_id"]]
    return [said[name][person] for name, person in zip(drawn, pairs["persona_id"], strict=True)]


def text(values: np.ndarray, wording: Wording | None, key: str) -> str:
    """Directions in words; what a world's words leave to chance is drawn by the key."""
    return wording.text(values, Random(key)) if wording else directions.plain_text(values)


def flipped(evidence: Evidence, cfg: Profile) -> dict[str, str]:
    """persona_id -> golden text with the poles swapped of all dimensions on which people of an axis differ.

    Left out is who has such a pole without an opposite that the world's words could name.
    """
    wording, found = evidence.wording, {}
    for person, values in evidence.golden.iterrows():
        own = np.array(values, dtype=float)
        leaning = {name for name, _ in poles(evidence, *directions.poles(own))}
        other = directions.flip(own, sorted(leaning))
        if leaning and (wording is None or len(wording.memberships(other)) == len(leaning)):
            found[str(person)] = text(other, wording, f"{cfg.seed} flipped {person}")
    return found


def reworded(evidence: Evidence, cfg: Profile) -> dict[str, str]:
    """persona_id -> golden text of the same directions with other examples drawn: what a mere change of words does."""
    return {str(person): text(np.array(values, dtype=float), evidence.wording, f"{cfg.seed} reworded {person}")
            for person, values in evidence.golden.iterrows()}


def recovered(told: pd.DataFrame, evidence: Evidence, heads: Mapping[tuple[str, int], Sequence[str]]) -> pd.DataFrame:
    """How much of the golden directions each bridge finds, interests aside: a row per person and pole, with `correct`.

    measure "found": of the golden poles, is it named? "true": of the poles named, is it golden? A head counts in the
    stratified folds only, for the people it was not trained on. Returns measure, bridge, items, persona_id, correct.
    """
    rows, truth = [], {p: poles(evidence, *directions.poles(v.to_numpy())) for p, v in evidence.golden.iterrows()}
    for r in told[(told["bridge"] != "golden") & (told["items"] > 0) & (told["scheme"] != "novel")].itertuples():
        if r.bridge != "head" or r.persona_id not in heads[r.scheme, r.fold]:
            named, true = poles(evidence, r.positive, r.negative), truth[r.persona_id]
            for measure, asked, answer in (("found", true, named), ("true", named, true)):
                rows += [(measure, r.bridge, r.items, r.persona_id, pole in answer) for pole in sorted(asked)]
    return pd.DataFrame(rows, columns=["measure", "bridge", "items", "persona_id", "correct"])


def _averaged(labels: pd.DataFrame, shots: Mapping[str, pd.DataFrame]) -> pd.DataFrame:
    rows = [directions.average(labels.loc[items["pair_id"]].to_numpy()) for items in shots.values()]
    return frame(rows, list(shots))


def _rows(bridge: str, n: int, scheme: str, fold: int, found: pd.DataFrame, evidence: Evidence,
          cfg: Profile) -> list[tuple]:
    """Rows of the table `directions`, in the order of its columns."""
    rows = []
    for person, values in found.iterrows():
        values = np.array(values, dtype=float)
        said = text(values, evidence.wording, f"{cfg.seed} {bridge} {n} {scheme} {fold} {person}")
        rows.append((bridge, n, scheme, fold, person, *directions.poles(values), said))
    return rows
