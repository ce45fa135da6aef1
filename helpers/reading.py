"""What there is to read about everybody: labelled pairs, golden directions, embedded answers, and items of a history.

Source: AlignX (arXiv 2503.15463).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from helpers import directions, models, prefixes, prompts
from helpers.config import Profile
from helpers.directions import Directions, Labels, Wording
from helpers.llm import Request, Teacher
from helpers.world.facts import load_world

ATTEMPTS = 3  # for an answer of the teacher that cannot be read


@dataclass(frozen=True)
class Evidence:
    """What there is to read about everybody.

    pool: train pairs fit for shots, all columns of preferences. labels: what each of them says, by pair_id, and
    golden: what is true, by persona_id; both with a column for each dimension, empty without a teacher. features:
    embedding of chosen minus that of rejected, by pair_id. wording: the world's words, None where there is no world.
    """

    personas: pd.DataFrame
    pool: pd.DataFrame
    labels: pd.DataFrame
    golden: pd.DataFrame
    features: pd.DataFrame
    wording: Wording | None


def gather(teacher: Teacher | None, personas: pd.DataFrame, preferences: pd.DataFrame, cfg: Profile) -> Evidence:
    """Label every train pair and every person with the teacher, and embed the pairs' answers.

    teacher: None where nobody knows the people (imported pairs); then there are no directions, and no bridge.
    """
    pool, nobody = prefixes.shot_pool(preferences).sort_values("pair_id", ignore_index=True), frame([], [])
    labels = label(teacher, pool, cfg.judge.pairs_per_request) if teacher else nobody
    named = [prompts.render("teacher", "directions_name", DIMENSIONS=directions.listing(), NAME=n) for n in personas["name"]]
    golden = frame(_ask(teacher, named, Directions, _one), personas["persona_id"]) if teacher else nobody
    embedder = models.load_embedder(cfg.embedder.path)
    both = [embedder.encode(pool[side].tolist(), normalize_embeddings=True) for side in ("chosen", "rejected")]
    features = pd.DataFrame(both[0].astype(float) - both[1], index=pool["pair_id"])
    wording = Wording(load_world(cfg.world)) if cfg.world and cfg.policy.templates == "short" else None
    return Evidence(personas, pool, labels, golden, features, wording)


def label(teacher: Teacher, pairs: pd.DataFrame, per_request: int) -> pd.DataFrame:
    """The direction of each pair, as AlignX labels its data: which poles chosen leans to more than rejected.

    Returns a row per pair, indexed by pair_id, a column per dimension (1, 0.5 or 0).
    """
    parts = [pairs.iloc[i:i + per_request] for i in range(0, len(pairs), per_request)]
    asked = [prompts.render("teacher", "directions_labels", DIMENSIONS=directions.listing(), SHOTS=_shots(part))
             for part in parts]
    sizes = dict(zip(asked, map(len, parts), strict=True))
    found = _ask(teacher, asked, Labels, lambda said, prompt: _several(said, sizes[prompt]))
    return frame([values for part in found for values in part], pairs["pair_id"])


def infer(teacher: Teacher, shots: Mapping[str, pd.DataFrame]) -> pd.DataFrame:
    """The directions that the teacher reads out of each person's shots, chosen and rejected, in structured output.

    shots: persona_id -> train pairs. Without any shot everything is neutral. Returns a row per person.
    """
    some = {person: rows for person, rows in shots.items() if len(rows)}
    asked = [prompts.render("teacher", "directions_shots", DIMENSIONS=directions.listing(), SHOTS=_shots(rows))
             for rows in some.values()]
    found = dict(zip(some, _ask(teacher, asked, Directions, _one), strict=True))
    return frame([found.get(person, directions.vector()) for person in shots], list(shots))


def possible(evidence: Evidence, counts: Sequence[int]) -> list[int]:
    """Those of the numbers of items that everybody has, with one pair to spare (prefixes.draw_shots)."""
    fewest = int(evidence.pool["persona_id"].value_counts().min())
    return [n for n in sorted(set(counts)) if n < fewest]


def history(evidence: Evidence, persona_id: str, n: int, seed: int) -> pd.DataFrame:
    """n items of a person: the same pairs that few-shot prompts, inferred personas and VPL read."""
    return prefixes.draw_shots(evidence.pool, persona_id, n, seed, "main")


def poles(evidence: Evidence, positive: Sequence[str], negative: Sequence[str]) -> set[tuple[str, int]]:
    """(dimension, value) of the poles on which people of an axis may differ: a world's own, else all but interests."""
    named = {name for name, _ in evidence.wording.category} if evidence.wording else {
        d.name for d in directions.space() if d.group != "interests"}
    return {(name, 1) for name in positive if name in named} | {(name, 0) for name in negative if name in named}


def frame(rows: Sequence[np.ndarray], ids: Sequence[str]) -> pd.DataFrame:
    """Directions as a table: a row for each id, a column for each dimension."""
    names = [dimension.name for dimension in directions.space()]
    return pd.DataFrame(np.array(rows, dtype=float).reshape(-1, len(names)), index=list(ids), columns=names)


def _shots(rows: pd.DataFrame) -> str:
    return prefixes.few_shot_text(rows, "teacher", rejected=True)


def _one(said: Directions, _: str) -> np.ndarray:
    return directions.vector(said.positive, said.negative)


def _several(said: Labels, n: int) -> list[np.ndarray] | None:
    return [_one(each, "") for each in said.labels] if len(said.labels) == n else None


def _ask(teacher: Teacher, asked: Sequence[str], schema: type, take: Callable) -> list:
    """What `take` makes of each answer; one that cannot be read is asked for again, ATTEMPTS times in all."""
    found: dict[int, object] = {}
    for attempt in range(ATTEMPTS):
        todo = [i for i in range(len(asked)) if i not in found]
        requests = [Request([{"role": "user", "content": asked[i]}], schema, "directions", attempt) for i in todo]
        for i, answer in zip(todo, teacher.map(requests, "directions") if todo else [], strict=True):
            made = take(answer.parsed, asked[i]) if answer.outcome == "ok" else None
            if made is not None:
                found[i] = made
    if len(found) < len(asked):
        raise ValueError(f"{teacher.model} gave no usable directions for {len(asked) - len(found)} of {len(asked)} "
                         f"prompts, asked {ATTEMPTS} times: take another teacher.model")
    return [found[i] for i in range(len(asked))]
