"""The little world's facts: what each category prefers, who lives there, and how people put it in words.

Everything comes from the YAML files of one folder under data/world; a teacher can write another. The facts are the
hidden truth of an offline run: the corpus and the simulated teacher read them, the policy only ever reads text.
"""

import hashlib
from collections import Counter
from dataclasses import dataclass, field
from functools import cached_property
from random import Random

import yaml

from helpers import DATA

FILES = ("axes.yaml", "cast.yaml", "hobbies.yaml", "style.yaml")


@dataclass(frozen=True)
class Category:
    """One way to see an axis: `things` are two words each, `reasons` four, so that length tells nothing."""

    axis: str
    name: str
    label: str
    things: tuple[str, ...]
    reasons: tuple[str, ...]


@dataclass(frozen=True)
class Axis:
    """A topic on which people differ, its question templates and what anybody would mention."""

    name: str
    stems: tuple[str, ...]
    whens: tuple[str, ...]
    common: tuple[str, ...]
    categories: dict[str, Category]


@dataclass(frozen=True)
class Hobby:
    """A pastime: the subject of personal questions."""

    name: str
    tips: tuple[str, ...]
    reasons: tuple[str, ...]


@dataclass(frozen=True)
class Tone:
    """A manner of answering that everybody likes (`good`) or dislikes: the preference all people share."""

    name: str
    good: bool
    openers: tuple[str, ...]
    closers: tuple[str, ...]


@dataclass(frozen=True)
class Person:
    """A fictional person; `memberships` are (axis, category) pairs."""

    name: str
    memberships: tuple[tuple[str, str], ...]
    hobbies: tuple[str, ...]
    demographics: dict[str, str]
    about: str
    documented: float


@dataclass
class Spotted:
    """The known phrases of one text. `n_slots` counts all of them but the tone."""

    categories: Counter = field(default_factory=Counter)
    hobbies: Counter = field(default_factory=Counter)
    common: int = 0
    tone: str | None = None

    @property
    def n_slots(self) -> int:
        return sum(self.categories.values()) + sum(self.hobbies.values()) + self.common


class World:
    """All facts of one world folder, and the few sentences made of them."""

    def __init__(self, name: str):
        self.name, self.folder = name, DATA / "world" / name
        missing = [file for file in FILES if not (self.folder / file).exists()]
        if missing:
            raise FileNotFoundError(f"world {name!r} lacks {missing} in {self.folder}; see data/world/little for a model")
        axes, cast, hobbies, style = (yaml.safe_load((self.folder / file).read_text()) for file in FILES)
        self.axes = {name: _axis(name, facts) for name, facts in axes["axes"].items()}
        self.tones = {name: Tone(name, t["good"], tuple(t["openers"]), tuple(t["closers"]))
                      for name, t in style["tones"].items()}
        self.tell_tales = tuple(style["tell_tales"])
        self.hobby_stems, self.hobby_whens = tuple(hobbies["stems"]), tuple(hobbies["whens"])
        self.hobbies = {name: Hobby(name, tuple(h["tips"]), tuple(h["reasons"]))
                        for name, h in hobbies["hobbies"].items()}
        names = [p["name"] for p in cast["people"]]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"{self.folder / 'cast.yaml'}: {', '.join(twice)} stands there twice; a name is one person's")
        self.people = {p["name"]: _person(p, cast["documented"]) for p in cast["people"]}
        self._check_people()

    def _check_people(self):
        for person in self.people.values():
            unknown = [m for m in person.memberships if m[0] not in self.axes or m[1] not in self.axes[m[0]].categories]
            unknown += [hobby for hobby in person.hobbies if hobby not in self.hobbies]
            if unknown:
                raise ValueError(f"cast.yaml: {person.name} refers to {unknown}, which axes.yaml or hobbies.yaml lacks")

    @cached_property
    def categories(self) -> tuple[Category, ...]:
        """Every category of every axis, in the order of the file."""
        return tuple(c for axis in self.axes.values() for c in axis.categories.values())

    @cached_property
    def phrases(self) -> dict[str, tuple[str, object]]:
        """phrase -> ("category", (axis, category)) | ("common", axis) | ("hobby", hobby) | ("tone", tone)."""
        owned = {p: ("category", (c.axis, c.name)) for c in self.categories for p in c.things + c.reasons}
        owned |= {p: ("common", axis.name) for axis in self.axes.values() for p in axis.common}
        owned |= {p: ("hobby", h.name) for h in self.hobbies.values() for p in h.tips + h.reasons}
        return owned | {p: ("tone", t.name) for t in self.tones.values() for p in t.openers + t.closers}

    def spot(self, text: str) -> Spotted:
        """The known phrases that occur in a text, each counted once."""
        found = Spotted()
        for phrase, (kind, owner) in self.phrases.items():
            if phrase in text:
                if kind == "category":
                    found.categories[owner] += 1
                elif kind == "hobby":
                    found.hobbies[owner] += 1
                elif kind == "common":
                    found.common += 1
                else:
                    found.tone = owner
        return found

    def divergent_questions(self, axis: str) -> list[str]:
        """Every question that people of an axis share."""
        facts = self.axes[axis]
        return [stem.format(when=when) for stem in facts.stems for when in facts.whens]

    def personal_questions(self, person: Person) -> list[str]:
        """Every question that only this person's pastimes prompt."""
        return [stem.format(hobby=hobby, when=when)
                for stem in self.hobby_stems for hobby in person.hobbies for when in self.hobby_whens]

    def describe(self, rng: Random, who: str, memberships, hobby: str) -> str:
        """Two short paragraphs on a person: who they are, then what they are likely to prefer.

        With no memberships the text is hedged: it is what an honest reader of uninformative answers would write.
        """
        pastime = f"spends free time on {hobby}"
        if not memberships:
            return f"{who} {pastime}.\nTastes beyond that are not clear yet."
        categories = [self.axes[axis].categories[name] for axis, name in memberships]
        labels = " and ".join(c.label for c in categories)
        likes = [t for c in categories for t in rng.sample(c.things, 3 if len(categories) == 1 else 2)]
        reason = rng.choice(rng.choice(categories).reasons)
        return f"{who} {labels} and {pastime}.\nLikes {', '.join(likes[:-1])} and {likes[-1]}, because {reason}."

    def fingerprint(self) -> str:
        """sha256 over the world's files: tells whether a model or a run was made in this very world."""
        return hashlib.sha256(b"".join((self.folder / file).read_bytes() for file in FILES)).hexdigest()


def load_world(name: str) -> World:
    """The world in data/world/<name>. Raises FileNotFoundError or ValueError that say what to mend."""
    return World(name)


def _axis(name: str, facts: dict) -> Axis:
    categories = {key: Category(name, key, c["label"], tuple(c["things"]), tuple(c["reasons"]))
                  for key, c in facts["categories"].items()}
    return Axis(name, tuple(facts["stems"]), tuple(facts["whens"]), tuple(facts["common"]), categories)


def _person(entry: dict, documented: dict[str, float]) -> Person:
    memberships = tuple((axis, category) for m in entry["memberships"] for axis, category in m.items())
    demographics = {key: str(value) for key, value in entry["demographics"].items()}
    weight = documented.get(demographics.get("region"), 1.0)
    return Person(entry["name"], memberships, tuple(entry["hobbies"]), demographics, entry["about"], weight)
