"""Folds by person, and the pairs that a fold trains on."""

from collections.abc import Collection, Iterable
from random import Random
from typing import Any

import numpy as np
import pandas as pd

COLUMNS = ["scheme", "fold", "persona_id"]
FIRST = 10  # people of the small set where no axis is known


def all_folds(personas: pd.DataFrame, cfg: Any, seed: int) -> pd.DataFrame:
    """The whole table of folds: scheme "stratified", and those that the profile names (schemes.names).

    personas: one row per person; columns persona_id and axes. cfg: the profile. A scheme that these people do
    not allow (one axis, fewer than two people) has no rows.
    """
    parts = [stratified_folds(personas, cfg.training.folds, seed)]
    if "small" in cfg.schemes.names:
        parts.append(small_folds(personas, cfg.people.small, cfg.training.folds, seed))
    if "leave_axis_out" in cfg.schemes.names:
        parts.append(axis_folds(personas, cfg.schemes.axis_folds))
    return pd.concat([part for part in parts if len(part)], ignore_index=True)


def stratified_folds(personas: pd.DataFrame, n_folds: int, seed: int) -> pd.DataFrame:
    """Spread the people of every axis over the folds; each person is held out exactly once.

    personas: one row per person; columns persona_id and axes (list of str; who is on two counts for both).
    Returns one row per person: scheme ("stratified"), fold (0 ... n_folds - 1), persona_id.
    Raises ValueError with fewer people than folds.
    Source: WikiPersona 3.4, five folds stratified across axes. The paper's were typed, these are drawn.
    """
    if not 2 <= n_folds <= len(personas):
        raise ValueError(f"{n_folds} folds of {len(personas)} people: set training.folds from 2 to the "
                         "number of people, or ask for more people (people.axes, people.per_axis)")
    axes_of = dict(zip(personas["persona_id"], map(list, personas["axes"]), strict=True))
    crowd, size, fold_of = {}, [0] * n_folds, {}
    for persona_id in _in_order(axes_of, np.random.default_rng([seed, 1])):
        axes = axes_of[persona_id]
        load = [(max((crowd.get((a, f), 0) for a in axes), default=0), size[f], f) for f in range(n_folds)]
        fold = fold_of[persona_id] = min(load)[2]
        size[fold] += 1
        for axis in axes:
            crowd[axis, fold] = crowd.get((axis, fold), 0) + 1
    rows = [("stratified", fold_of[p], p) for p in sorted(fold_of)]
    return pd.DataFrame(rows, columns=COLUMNS)


def small_people(personas: pd.DataFrame, axes: Iterable[str]) -> list[str]:
    """Sorted persona_ids of the small set: everybody on one of these axes (people.small).

    Where nobody is on them, as with imported pairs, of which no axis is known: the first ten people.
    """
    wanted = set(axes)
    on = [p for p, has in zip(personas["persona_id"], personas["axes"], strict=True) if wanted & set(has)]
    return sorted(on) or sorted(personas["persona_id"])[:FIRST]


def small_folds(personas: pd.DataFrame, axes: Iterable[str], n_folds: int, seed: int) -> pd.DataFrame:
    """Scheme "small": folds over the small set alone, stratified as the others; nobody else is in them.

    At most as many folds as people; no rows with a single person. Source: the paper's ten people (Figure 14).
    """
    few = personas[personas["persona_id"].isin(small_people(personas, axes))]
    if len(few) < 2:
        return pd.DataFrame(columns=COLUMNS)
    return stratified_folds(few, min(n_folds, len(few)), seed).assign(scheme="small")


def axis_folds(personas: pd.DataFrame, n_folds: int = 0) -> pd.DataFrame:
    """Scheme "leave_axis_out": fold i holds out everybody on the i-th axes of `left_out_axes`.

    Who is on axes of two folds is held out in both. No rows where there is one axis or none.
    """
    rows = [("leave_axis_out", fold, persona_id) for fold, axes in enumerate(left_out_axes(personas, n_folds))
            for persona_id in sorted(personas.loc[_on(personas, axes), "persona_id"])]
    return pd.DataFrame(rows, columns=COLUMNS)


def left_out_axes(personas: pd.DataFrame, n_folds: int = 0) -> list[list[str]]:
    """The axes that each fold leaves out: of those that somebody is not on, sorted, every n_folds-th; 0: one a fold.

    Somebody is always left to train: where several at a time would leave nobody, it is one a fold too.
    """
    alone = [axis for axis in sorted({axis for on in personas["axes"] for axis in on}) if not _on(personas, [axis]).all()]
    groups = [alone[i::n_folds] for i in range(min(n_folds, len(alone)))]
    fine = groups and not any(_on(personas, axes).all() for axes in groups)
    return groups if fine else [[axis] for axis in alone]


def training_pairs(
    preferences: pd.DataFrame, train_people: Collection[str], drop_uncontested: bool, validation: float,
    seed: int, pairs_per_person: int = 0,
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The training people's train pairs, parted into (train, validation).

    drop_uncontested drops a divergent pair whose rejected response no training person chose on that question.
    Without it a held-out person's category occurs in training only as the loser, and the policy avoids it.
    validation: fraction of the questions of each kind, set aside with all their pairs, so that the policy is
    never validated on a shared question that it was trained on; at least one question of each kind with two.
    pairs_per_person: of what is left, train on so many drawn pairs of each person at most; 0: on all.
    Raises ValueError when no pair is left.
    """
    rows = preferences[(preferences["split"] == "train") & preferences["persona_id"].isin(set(train_people))]
    if drop_uncontested:
        contested = set(zip(rows["question_id"], rows["chosen_id"], strict=True))
        answered = [pair in contested for pair in zip(rows["question_id"], rows["rejected_id"], strict=True)]
        rows = rows[(rows["kind"] != "divergent") | np.array(answered, dtype=bool)]
    if rows.empty:
        raise ValueError(f"no train pair is left for {len(set(train_people))} training people: ask for more "
                         "questions (questions.*) or set training.drop_uncontested=false")
    held = rows["question_id"].isin(_validation_questions(rows, validation, seed))
    train, lot = rows[~held], np.random.default_rng([seed, 5]).permutation(int((~held).sum()))
    if pairs_per_person:
        train = train.iloc[lot].groupby("persona_id").head(pairs_per_person).sort_index()
    return train.reset_index(drop=True), rows[held].reset_index(drop=True)


def cap_train(preferences: pd.DataFrame, seed: int) -> pd.DataFrame:
    """The same pairs, but of who is on several axes only as many divergent train pairs as one axis gives.

    So everybody has about as many pairs to train on. Kept are as many as the person's fullest axis has, drawn
    in turns from all of their axes; a pair's lot depends on its pair_id and the seed alone. Every other row
    stays, all test pairs among them. Source: Appendix E.1 (there drawn over the axes together).
    """
    rows = preferences[(preferences["kind"] == "divergent") & (preferences["split"] == "train")]
    lots = [Random(f"{seed} cap {pair_id}").random() for pair_id in rows["pair_id"]]
    rows = rows.assign(lot=lots).sort_values(["persona_id", "lot"])
    on_axis = rows.groupby(["persona_id", "axis"])
    rows = rows.assign(turn=on_axis.cumcount(), n_axis=on_axis["lot"].transform("size"))
    rows = rows.sort_values(["persona_id", "turn", "lot"])
    one = rows.groupby("persona_id")
    beyond = rows.index[one.cumcount() >= one["n_axis"].transform("max")]
    return preferences.drop(index=beyond).reset_index(drop=True)


def swap_labels(pairs: pd.DataFrame, share: float, seed: int) -> pd.DataFrame:
    """The pairs with chosen and rejected exchanged in a drawn share of them, in every column that names one.

    A larger share holds the swapped pairs of a smaller one. Rows and columns keep their order.
    """
    lot = np.random.default_rng([seed, 9]).permutation(len(pairs))
    swap = pd.Series(lot < round(share * len(pairs)), index=pairs.index)
    other = {name: name.replace("chosen", "rejected") for name in pairs if "chosen" in name}
    other |= {rejected: chosen for chosen, rejected in other.items()}
    swapped = pairs[swap].rename(columns=other)[list(pairs.columns)]
    return pd.concat([pairs[~swap], swapped]).loc[pairs.index]


def _on(personas: pd.DataFrame, axes: Iterable[str]) -> pd.Series:
    """Who is on one of these axes."""
    return personas["axes"].map(lambda on: not set(axes).isdisjoint(on))


def _in_order(axes_of: dict[str, list[str]], rng: np.random.Generator) -> list[str]:
    """People on most axes first, for they are hardest to place; then axis by axis, both in a drawn order."""
    axes, people = sorted({a for on in axes_of.values() for a in on}), sorted(axes_of)
    rank = dict(zip(axes, rng.permutation(len(axes)), strict=True))
    lot = dict(zip(people, rng.permutation(len(people)), strict=True))
    return sorted(people, key=lambda p: (-len(axes_of[p]), sorted(rank[a] for a in axes_of[p]), lot[p]))


def _validation_questions(rows: pd.DataFrame, validation: float, seed: int) -> set[str]:
    """A drawn fraction of the questions of each kind."""
    rng, held = np.random.default_rng([seed, 2]), set()
    for _, ids in sorted(rows.groupby("kind")["question_id"]):
        questions = sorted(set(ids))
        n = min(max(1, round(validation * len(questions))), len(questions) - 1) if validation else 0
        held.update(rng.permutation(questions)[:n].tolist())
    return held
