"""The preference space after AlignX: 90 named dimensions, and a person's directions in it as numbers and as words.

A direction is 1 (the positive pole), 0.5 (neutral) or 0 (the negative pole) on each dimension. Source: AlignX
(arXiv 2503.15463) for the dimensions, the values and `average`; names and wording are ours (data/alignx).
"""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from random import Random

import numpy as np
import pandas as pd
import yaml
from pydantic import BaseModel, ConfigDict

from helpers import DATA
from helpers.world.facts import Person, World

FOLDER = DATA / "alignx"
NEUTRAL = 0.5
UPPER, LOWER = 0.6, 0.4  # from and up to which a mean of labels counts as a pole, as released


@dataclass(frozen=True)
class Dimension:
    """One dimension of the space, and what its poles stand for."""

    name: str
    group: str
    positive: str
    negative: str


class Directions(BaseModel):
    """A teacher's answer: names of the dimensions that lean to each pole."""

    model_config = ConfigDict(extra="forbid")
    positive: list[str]
    negative: list[str]


class Labels(BaseModel):
    """A teacher's answer about several pairs, one entry a pair."""

    model_config = ConfigDict(extra="forbid")
    labels: list[Directions]


@cache
def space() -> tuple[Dimension, ...]:
    """All dimensions, in the order of data/alignx/space.yaml."""
    groups = yaml.safe_load((FOLDER / "space.yaml").read_text())
    return tuple(Dimension(name, group, *poles) for group, named in groups.items() for name, poles in named.items())


@cache
def index() -> dict[str, int]:
    """Name -> place in a vector."""
    return {dimension.name: i for i, dimension in enumerate(space())}


def listing() -> str:
    """The space as a teacher reads it, a line per dimension."""
    return "\n".join(f"{d.name}: {d.positive} / {d.negative}" for d in space())


def vector(positive: Iterable[str] = (), negative: Iterable[str] = ()) -> np.ndarray:
    """Values [90] from names of dimensions; a name that is not in the space, or in both lists, is neutral."""
    values, up, down = np.full(len(space()), NEUTRAL), set(positive), set(negative)
    for names, value in ((up - down, 1.0), (down - up, 0.0)):
        values[[index()[name] for name in names if name in index()]] = value
    return values


def poles(values: np.ndarray) -> tuple[list[str], list[str]]:
    """Names of the dimensions at the positive and at the negative pole; the inverse of `vector`."""
    names = [dimension.name for dimension in space()]
    return ([name for name, value in zip(names, values, strict=True) if value == 1],
            [name for name, value in zip(names, values, strict=True) if value == 0])


def average(labels: np.ndarray) -> np.ndarray:
    """One direction [90] out of the labels [n, 90] of a history, by the rule of the released code.

    The mean over the items is a pole from UPPER on, or up to LOWER. If that leaves none, the dimensions farthest
    from neutral are taken, if any has moved at all. No items: neutral.
    """
    mean = np.round(np.mean(labels, axis=0), 6) if len(labels) else np.full(len(space()), NEUTRAL)
    values = np.where(mean >= UPPER, 1.0, np.where(mean <= LOWER, 0.0, NEUTRAL))
    far = np.abs(mean - NEUTRAL)
    if (values == NEUTRAL).all() and far.max() > 0:
        values = np.where(far == far.max(), (mean > NEUTRAL).astype(float), NEUTRAL)
    return values


def flip(values: np.ndarray, names: Sequence[str] | None = None) -> np.ndarray:
    """The same directions with the poles of these dimensions swapped (None: of all)."""
    chosen = np.isin([d.name for d in space()], [d.name for d in space()] if names is None else list(names))
    return np.where(chosen, 1.0 - values, values)


def plain_text(values: np.ndarray) -> str:
    """The poles in the space's own wording, as a chat model reads them; "" if all is neutral."""
    told = [d.positive if value == 1 else d.negative for d, value in zip(space(), values, strict=True) if value != NEUTRAL]
    return f"What this person prefers: {'; '.join(told)}." if told else ""


class Wording:
    """A world's words for the space: which category is which pole (data/alignx/<world>.yaml).

    A policy trained on that world has read sentences about its categories and none about food or order in general.
    """

    def __init__(self, world: World) -> None:
        file = FOLDER / f"{world.name}.yaml"
        if not file.exists():
            raise FileNotFoundError(f"no {file}: it says which category of the world {world.name!r} is which pole of "
                                    f"the space; see {FOLDER / 'little.yaml'} for a model")
        found = yaml.safe_load(file.read_text())
        self.world, self.interest = world, found["hobbies"]
        self.pole = {(axis, category): tuple(pole) for axis, of in found["categories"].items()
                     for category, pole in of.items()}
        self.category = {pole: category for category, pole in self.pole.items()}
        self.hobby = {name: hobby for hobby, name in self.interest.items()}
        if unknown := {name for name, _ in self.category if name not in index()} | set(self.hobby) - set(index()):
            raise ValueError(f"{file.name} names dimensions that the space lacks: {', '.join(sorted(unknown))}")

    def of_person(self, person: Person) -> np.ndarray:
        """The golden directions [90]: the person's categories, and the pastimes as interests."""
        return self.of(person.memberships, person.hobbies)

    def of(self, memberships: Iterable[tuple[str, str]], hobbies: Iterable[str] = ()) -> np.ndarray:
        """The directions [90] of categories and pastimes."""
        at = [self.pole[membership] for membership in memberships]
        likes = [self.interest[hobby] for hobby in hobbies]
        return vector([name for name, value in at if value] + likes, [name for name, value in at if not value])

    def memberships(self, values: np.ndarray) -> tuple[tuple[str, str], ...]:
        """The categories that the poles stand for; a pole that nobody in the world stands for is left out."""
        up, down = poles(values)
        both = [(name, 1) for name in up] + [(name, 0) for name in down]
        return tuple(self.category[pole] for pole in both if pole in self.category)

    def text(self, values: np.ndarray, random: Random) -> str:
        """Two short paragraphs in the form that the base has read of people; what is likeable is drawn by `random`."""
        hobbies = [self.hobby[name] for name in poles(values)[0] if name in self.hobby]
        hobby = random.choice(hobbies) if hobbies else "other things"
        return self.world.describe(random, "This person", self.memberships(values), hobby)


def turned(result: pd.DataFrame) -> pd.DataFrame:
    """Whether a ranking behind golden directions turns when they are flipped, or reworded: `correct` says that it does.

    result: the table `alignx`. Returns policy_id, persona_id, pair_id, kind, axis, trained, setting, correct.
    """
    golden, same = result[(result["method"] == "pba") & (result["prefix"] == "golden")], ["policy_id", "persona_id", "pair_id"]
    before = golden.loc[golden["setting"] == "main", [*same, "correct"]].rename(columns={"correct": "was"})
    after = golden[golden["setting"].isin(["flipped", "reworded"])].merge(before, on=same)
    return after.assign(correct=after["correct"] != after["was"])[
        [*same, "kind", "axis", "trained", "setting", "correct"]]


def fingerprint() -> str:
    """sha256 over the files of the space: the simulated teacher's answers depend on them."""
    return hashlib.sha256(b"".join(file.read_bytes() for file in sorted(FOLDER.glob("*.yaml")))).hexdigest()
