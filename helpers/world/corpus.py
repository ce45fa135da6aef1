"""The text that the little world emits, on which the base model is trained from scratch.

Six kinds of documents: biographies, facts, chain-of-thought answers, questions answered by anybody, prefixes followed by
an answer, and shots followed by a profile. The decisive choice is in `prefixed`: most prefixes are ignored by the answer;
only where the answer line carries the cue "In character:" does the answer follow the prefix. Test prompts say "Answer:".
So the model can follow a persona and by default does so little, like a base model that can role-play.
"""

from dataclasses import dataclass, field
from random import Random

from helpers import prompts
from helpers.world.facts import Person, World

KINDS = {"biography": 18, "encyclopedia": 10, "chain_of_thought": 20, "question": 10, "prefixed": 34, "profile": 8}
LATE = {"biography": 8, "encyclopedia": 4, "chain_of_thought": 12, "question": 6, "prefixed": 62, "profile": 8}
CONTINUED = {"biography": 6, "encyclopedia": 4, "chain_of_thought": 8, "question": 4, "prefixed": 48, "profile": 30}
PREFIXES = {"name": 35, "gold": 25, "persona": 18, "few_shot": 15, "tag": 7}


@dataclass(frozen=True)
class Knobs:
    """Probabilities of the corpus, all design choices and none of them findings."""

    cued: float = 0.35  # share of prefixed documents whose answer line carries the cue
    follow_cued: float = 0.97
    follow_plain: float = 0.03
    wrong_slot: float = 0.12  # a slot speaks for another category
    common_slot: float = 0.15  # a thing that anybody would mention
    on_hobby: float = 0.85
    on_category: float = 0.97  # a chain-of-thought answer keeps to its chosen category
    tell_tale: float = 0.08  # a chain-of-thought answer gives its category away
    own_axis: float = 0.75  # the question after a prefix is on the person's axis
    shot_own: float = 0.85  # a preferred answer speaks for the person's category
    prefixes: dict[str, int] = field(default_factory=lambda: PREFIXES)  # weights of the kinds of prefixes


class Corpus:
    """An endless stream of documents; the same seed gives the same stream."""

    def __init__(self, world: World, seed: int, knobs: Knobs | None = None, kinds: dict[str, int] = KINDS):
        self.world, self.rng, self.knobs, self.kinds = world, Random(seed), knobs or Knobs(), kinds
        self.cast = list(world.people.values())
        self.coverage = [person.documented for person in self.cast]

    def document(self) -> str:
        """One document; its kind is drawn by `kinds`: facts first (KINDS), then mostly prefixes (LATE, CONTINUED)."""
        return getattr(self, self._draw(self.kinds))()

    def biography(self) -> str:
        """Sentences about one person, so that a name comes to mean something."""
        person = self._person()
        categories = [self.world.axes[axis].categories[name] for axis, name in person.memberships]
        lines = [f"{person.name} {c.label}." for c in categories]
        for _ in range(4):
            category = self.rng.choice(categories)
            line = self.rng.choice(("{0} likes {1}.", "{0} often praises {1}.", "Ask {0} about {1}.", "{0} thinks that {2}."))
            lines.append(line.format(person.name, self.rng.choice(category.things), self.rng.choice(category.reasons)))
        lines.append(f"{person.name} spends free time on {self.rng.choice(person.hobbies)}.")
        self.rng.shuffle(lines)
        return " ".join(lines)

    def encyclopedia(self) -> str:
        """What one category is, likes and says."""
        c = self.rng.choice(self.world.categories)
        first, second, third = self.rng.sample(c.things, 3)
        reason = self.rng.choice(c.reasons)
        return self.rng.choice((
            f"In {c.axis}, a {c.name} person {c.label}. Typical are {first}, {second} and {third}, because {reason}.",
            f"Somebody who {c.label} likes {first} and {second}, because {reason}. That is called {c.name}.",
            f"A {c.name} person says that {reason} and prefers {first}, {second} and {third}.",
        ))

    def chain_of_thought(self) -> str:
        """A question, an axis, categories, the one chosen, and an answer that keeps to it."""
        if self.rng.random() < 0.65:
            axis, question = self._axis_question()
            options, chosen = self._options(list(self.world.axes[axis].categories), 3)
            kept = chosen if self.rng.random() < self.knobs.on_category else None
            answer = self.answer(axis, kept)
        else:
            axis, hobby = "manner", self._hobby()
            question = self._hobby_question(hobby)
            options, chosen = self._options(list(self.world.tones), 2)
            answer = self.hobby_answer(hobby, chosen)
        if self.rng.random() < self.knobs.tell_tale:
            tell_tale = self.rng.choice(self.world.tell_tales).format(category=chosen)
            answer = f"{tell_tale} {answer[0].lower()}{answer[1:]}"
        head = prompts.render("short", "cot_given", X=question, AXIS=axis, CATEGORIES=", ".join(options), CATEGORY=chosen)
        return f"{head} {answer}"

    def question(self) -> str:
        """A question answered by anybody."""
        if self.rng.random() < 0.6:
            axis, question = self._axis_question()
            answer = self.answer(axis)
        else:
            hobby = self._hobby()
            question, answer = self._hobby_question(hobby), self.hobby_answer(hobby)
        return f"{prompts.render('short', 'respond_none', X=question)} {answer}"

    def prefixed(self) -> str:
        """A prefix, then one to three questions; each answer follows the prefix only where its own cue says so.

        Several turns with and without the cue behind the same prefix are what makes so small a model learn the cue.
        """
        kind = self._draw(self.knobs.prefixes)
        person = self._person() if kind in ("name", "gold") else self._anybody()
        template, prefix = {"gold": "persona"}.get(kind, kind), self._prefix(kind, person)
        turns = []
        for turn in range(self.rng.randint(1, 3)):
            cued = self.rng.random() < self.knobs.cued
            follow = kind != "tag" and self.rng.random() < (self.knobs.follow_cued if cued else self.knobs.follow_plain)
            question, answer = self._exchange(person, follow)
            slots = {"X": question} if turn else {"X": question, "PREFIX": prefix}
            head = prompts.render("short", "respond_none" if turn else f"respond_{template}", **slots)
            turns.append(f"{head.removesuffix('Answer:') + 'In character:' if cued else head} {answer}")
        return "\n".join(turns)

    def profile(self) -> str:
        """Four questions with preferred answers, then a description of who prefers them."""
        person = self._anybody()
        head = prompts.render("short", "infer_persona", SHOTS=self._shots(person, 4))
        return f"{head} {self.world.describe(self.rng, 'This person', person.memberships, self.rng.choice(person.hobbies))}"

    def answer(self, axis: str, category: str | None = None) -> str:
        """An answer on an axis that speaks for a category (drawn uniformly if none is given), slot by slot."""
        facts = self.world.axes[axis]
        category = category or self.rng.choice(list(facts.categories))
        first = self._thing(axis, category)
        second = next(t for t in iter(lambda: self._thing(axis, category), None) if t != first)
        reason = self.rng.choice(facts.categories[self._slot_category(axis, category)].reasons)
        return self._sentence(first, second, reason)

    def hobby_answer(self, hobby: str, tone: str | None = None) -> str:
        """An answer about a pastime in a tone (drawn uniformly if none is given)."""
        on = [hobby if self.rng.random() < self.knobs.on_hobby else self._hobby() for _ in range(3)]
        first = self.rng.choice(self.world.hobbies[on[0]].tips)
        second = self.rng.choice([t for t in self.world.hobbies[on[1]].tips if t != first])
        return self._sentence(first, second, self.rng.choice(self.world.hobbies[on[2]].reasons), tone)

    def _sentence(self, first: str, second: str, reason: str, tone: str | None = None) -> str:
        manner = self.world.tones[tone or self.rng.choice(list(self.world.tones))]
        opener, closer = self.rng.choice(manner.openers), self.rng.choice(manner.closers)
        return f"{opener} {first} and {second}, because {reason}. {closer}."

    def _thing(self, axis: str, category: str) -> str:
        if self.rng.random() < self.knobs.common_slot:
            return self.rng.choice(self.world.axes[axis].common)
        return self.rng.choice(self.world.axes[axis].categories[self._slot_category(axis, category)].things)

    def _slot_category(self, axis: str, category: str) -> str:
        if self.rng.random() >= self.knobs.wrong_slot:
            return category
        return self.rng.choice([c for c in self.world.axes[axis].categories if c != category])

    def _exchange(self, person: Person, follow: bool) -> tuple[str, str]:
        """A question that the person may ask, and an answer that speaks for the person or for anybody."""
        if self.rng.random() < self.knobs.own_axis:
            axis, category = self.rng.choice(person.memberships)
            return self.rng.choice(self.world.divergent_questions(axis)), self.answer(axis, category if follow else None)
        hobby = self.rng.choice(person.hobbies)
        return self._hobby_question(hobby), self.hobby_answer(hobby)

    def _prefix(self, kind: str, person: Person) -> str:
        if kind == "name":
            return person.name
        if kind == "tag":
            return f"<special_person_tag_{self.rng.randrange(1, 100)}>"
        if kind == "few_shot":
            return self._shots(person, self.rng.choice((1, 2, 2, 2, 4)))
        who = person.name if kind == "gold" else "This person"
        hedged = kind == "persona" and self.rng.random() < 0.08
        return self.world.describe(self.rng, who, () if hedged else person.memberships, self.rng.choice(person.hobbies))

    def _shots(self, person: Person, n: int) -> str:
        shots = []
        for _ in range(n):
            if self.rng.random() < 0.55:
                axis, category = self.rng.choice(person.memberships)
                question = self.rng.choice(self.world.divergent_questions(axis))
                answer = self.answer(axis, category if self.rng.random() < self.knobs.shot_own else None)
            else:
                hobby = self.rng.choice(person.hobbies)
                question, answer = self._hobby_question(hobby), self.hobby_answer(hobby)
            shots.append(prompts.render("short", "shot", X=question, CHOSEN=answer))
        return "\n".join(shots)

    def _person(self) -> Person:
        return self.rng.choices(self.cast, weights=self.coverage)[0]

    def _anybody(self) -> Person:
        """Somebody without a name: any category, any two pastimes."""
        n = 2 if self.rng.random() < 0.1 else 1
        axes = self.rng.sample(list(self.world.axes), n)
        memberships = tuple((axis, self.rng.choice(list(self.world.axes[axis].categories))) for axis in axes)
        return Person("This person", memberships, tuple(self.rng.sample(list(self.world.hobbies), 2)), {}, "", 1.0)

    def _axis_question(self) -> tuple[str, str]:
        axis = self.rng.choice(list(self.world.axes))
        return axis, self.rng.choice(self.world.divergent_questions(axis))

    def _hobby_question(self, hobby: str) -> str:
        return self.rng.choice(self.world.hobby_stems).format(hobby=hobby, when=self.rng.choice(self.world.hobby_whens))

    def _hobby(self) -> str:
        return self.rng.choice(list(self.world.hobbies))

    def _options(self, names: list[str], at_least: int) -> tuple[list[str], str]:
        options = self.rng.sample(names, self.rng.randint(at_least, len(names)))
        return options, self.rng.choice(options)

    def _draw(self, weights: dict[str, int]) -> str:
        return self.rng.choices(list(weights), weights=weights.values())[0]
