"""The simulated teacher: an OpenAI-compatible application that knows the little world's hidden truth.

It is reached by the real client over real requests and reads the same prompts that a real model would get
(data/prompts/teacher, taken apart by `prompts.parse`). It answers honestly within what the prompt tells it:
from a name it knows everything, from shots only what they show. Its knobs (profile section `world_knobs`)
make it noisy, biased, late, rate-limited or malformed. An answer depends on the request and the seed alone.
"""

import asyncio
import hashlib
import json
import math
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache, cached_property
from pathlib import Path
from random import Random

import numpy as np
import pandas as pd
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from helpers import directions, prompts
from helpers.world.batches import Batches
from helpers.world.facts import World

OWN_CATEGORY, QUALITY_DIVERGENT = 3.0, 0.6  # latent utility of an answer to a divergent question
QUALITY_PERSONAL, ON_HOBBY = 1.8, 0.8  # and to a personal one
SLOT_OWN, SLOT_COMMON, SLOT_WRONG = 0.73, 0.15, 0.12  # how the teacher believes that answers are worded
WINNER_IS_OWN = 0.8  # and how often it believes that the preferred answer speaks for the person's category
LOSER_IS_OWN = 0.05  # and the rejected one, where it is shown: among four candidates few are of one category
SURE_ENOUGH = 0.4  # a category is written into a persona from this posterior on
RETRY_AFTER_SECONDS = 0.05


def build_app(world: World, knobs, seed: int) -> Starlette:
    """The ASGI application: POST /v1/chat/completions, files and batches, also below any one path segment.

    knobs: the profile's `world_knobs`. Serve it in process through an ASGI transport, or under uvicorn.
    """
    teacher, routes = SimulatedTeacher(world, knobs, seed), []
    batches = Batches(teacher.reply)
    for root in ("/v1", "/{identity}/v1"):
        routes += [Route(f"{root}/chat/completions", teacher.complete, methods=["POST"]), *batches.routes(root)]
    return Starlette(routes=routes)


def identity(world: World, knobs, seed: int) -> str:
    """12 hex digits that change with the world, the knobs, the seed and this file: whose answers are they?"""
    facts = (world.fingerprint(), sorted(knobs.model_dump().items()), seed, Path(__file__).read_text("utf-8"),
             directions.fingerprint())
    return hashlib.sha256(repr(facts).encode()).hexdigest()[:12]


def truth(
    world: World, personas: pd.DataFrame, questions: pd.DataFrame, responses: pd.DataFrame
) -> pd.DataFrame:
    """What no real run can know: the latent utility of each selected response for everybody who judges it.

    Returns persona_id, question_id, response_id, kind, utility (without noise and biases).
    """
    judge = SimulatedTeacher(world, None, 0)
    asked = responses[responses["selected"]].merge(
        questions[["question_id", "kind", "axis", "persona_id", "text"]].rename(columns={"text": "question"}))
    rows = []
    for person in personas.itertuples():
        mine = asked[(asked["persona_id"] == person.persona_id) | asked["axis"].isin(person.axes)]
        for row in mine.itertuples():
            utility = judge.utility(person.name, row.question, row.text)
            rows.append((person.persona_id, row.question_id, row.response_id, row.kind, utility))
    return pd.DataFrame(rows, columns=["persona_id", "question_id", "response_id", "kind", "utility"])


class SimulatedTeacher:
    """One world, one set of knobs, one seed; `answer` maps a prompt to text, `complete` wraps it as HTTP."""

    def __init__(self, world: World, knobs, seed: int):
        self.world, self.knobs, self.seed = world, knobs, seed
        self.axis_of = {q: axis for axis in world.axes for q in world.divergent_questions(axis)}
        self.spot, self.hobby_of = cache(world.spot), cache(self._hobby_of)
        self.given: dict[str, dict] = {}  # Idempotency-Key -> the answer that was given
        self.under_way: set[str] = set()
        self.tasks = {
            "judge": self._judge,
            "personas": self._personas,
            "demographics": self._demographics,
            "personal_questions": self._personal_questions,
            "divergent_questions": self._divergent_questions,
            "infer_persona": self._infer_persona,
            "gold_persona": self._gold_persona,
            "directions_name": self._directions_name,
            "directions_shots": self._directions_shots,
            "directions_labels": self._directions_labels,
        }

    async def complete(self, request: Request) -> JSONResponse:
        """Answer one chat completion over HTTP; a stalled one waits until the client has gone.

        What comes again with the Idempotency-Key of an answered request is given that answer, and no second one.
        """
        body, key = await request.json(), request.headers.get("idempotency-key", "")
        while key in self.under_way:  # its client has gone and asks anew
            await asyncio.sleep(0.01)
        if key in self.given:
            return JSONResponse(self.given[key], headers={"idempotent-replayed": "true"})
        with self._working_on(key):
            await asyncio.sleep(self.knobs.late_seconds)
            status, answer = self.reply(body, request.headers.get("x-stainless-retry-count", "0"))
            if key and status == 200:
                self.given[key] = answer
        while not status and not await request.is_disconnected():
            await asyncio.sleep(0.05)
        headers = {"retry-after": str(RETRY_AFTER_SECONDS)} if status == 429 else None
        return JSONResponse(answer, status or 408, headers)

    @contextmanager
    def _working_on(self, key: str) -> Iterator[None]:
        self.under_way |= {key} - {""}
        try:
            yield
        finally:
            self.under_way -= {key}

    def reply(self, body: dict, attempt: str) -> tuple[int, dict]:
        """HTTP status and answer: the weather as the knobs say, 400 for an unknown prompt; 0: no answer at all.

        429, 500 and stalling are drawn for each attempt, broken answers for each request.
        """
        prompt, ask = body["messages"][-1]["content"], body.get("seed", 0)
        if self._random("rate", prompt, ask, attempt).random() < self.knobs.rate_limited:
            return 429, _error("the simulated teacher's limit")
        if self._random("errors", prompt, ask, attempt).random() < self.knobs.errors_500:
            return 500, _error("the simulated teacher stumbled")
        if self._random("stalled", prompt, ask, attempt).random() < self.knobs.stalled:
            return 0, {}
        try:
            text = self.answer(prompt, ask)
        except prompts.PromptError as error:
            return 400, _error(str(error))
        return 200, self._broken(body, text, prompt, ask)

    def _broken(self, body: dict, text: str, prompt: str, ask: int) -> dict:
        """The completion, refused, cut off or of a wrong shape as often as the knobs say."""
        hit = {knob: self._random(knob, prompt, ask).random() < getattr(self.knobs, knob)
               for knob in ("malformed", "refused", "cut", "wrong_schema")}
        if hit["refused"]:
            return _completion(body, None, refusal="I would rather not say.")
        if hit["cut"]:
            return _completion(body, text[: len(text) // 2], finish="length")
        if "response_format" in body and hit["malformed"]:
            text = text[: 2 * len(text) // 3]
        elif "response_format" in body and hit["wrong_schema"]:
            text = json.dumps({"answer": text})
        return _completion(body, text)

    def answer(self, prompt: str, ask: int) -> str:
        """The answer to a rendered teacher prompt; `ask` is the request's seed. Raises PromptError."""
        for name, task in self.tasks.items():
            if prompt.startswith(prompts.load("teacher", name).literals[0]):
                return task(prompts.parse("teacher", name, prompt), self._random(prompt, ask), ask)
        raise prompts.PromptError(f"the simulated teacher knows the prompts {list(self.tasks)} of "
                                  f"data/prompts/teacher, and this is none of them: {prompt[:80]!r}…")

    def utility(self, name: str, question: str, text: str) -> float:
        """How much the person likes a text as an answer, without noise.

        Divergent question: 3.0 x share of the spotted phrases that are of one's category + 0.6 x quality.
        Personal question: 1.8 x quality + 0.8 x share of the spotted phrases on the question's hobby.
        quality: +1 for a good tone, -1 for a bad one, 0 for none, times the person's weight in [0.6, 1.4].
        A person whom the world does not know cares about quality alone.
        """
        person, spotted = self.world.people.get(name), self.spot(text)
        tone = self.world.tones.get(spotted.tone)
        quality = (0 if tone is None else 1 if tone.good else -1) * _quality_weight(name)
        slots = max(spotted.n_slots, 1)
        axis = self.axis_of.get(question)
        if axis is None:
            share = spotted.hobbies[self.hobby_of(question)] / slots
            return QUALITY_PERSONAL * quality + (ON_HOBBY * share if person else 0.0)
        own = {m for m in person.memberships if m[0] == axis} if person else set()
        share = sum(spotted.categories[m] for m in own) / slots
        return OWN_CATEGORY * share + QUALITY_DIVERGENT * quality

    def posteriors(self, shots: list[dict[str, str]]) -> dict[str, dict[str, float]]:
        """axis -> category -> posterior probability given shots, for every axis that the shots speak about.

        The teacher's model of a preferred response that shows n_g phrases of category g of an axis with K
        categories, and m phrases common to all: the response r speaks for the person's category c with
        probability 0.8, else for any other one; each phrase is r's with 0.73, common with 0.15, and another
        category's with 0.12 / (K - 1). So, with a uniform prior and shots independent given c,
            p(c | shots) ~ prod over shots of [0.8 L(c) + 0.2 / (K - 1) x sum over r != c of L(r)],
            L(r) = 0.73^n_r x (0.12 / (K - 1))^(sum of n_g over g != r) x 0.15^m.
        0.15^m is the same for every c and cancels. A rejected answer that is shown is one more factor, with
        0.05 in place of 0.8: it speaks against the category that it speaks for.
        """
        spotted = [(self.spot(shot[slot]), is_own) for shot in shots
                   for slot, is_own in (("CHOSEN", WINNER_IS_OWN), ("REJECTED", LOSER_IS_OWN)) if slot in shot]
        logs = {}
        for axis, facts in self.world.axes.items():
            counts = [({c: s.categories[axis, c] for c in facts.categories}, is_own) for s, is_own in spotted]
            counts = [(n, is_own) for n, is_own in counts if any(n.values())]
            if counts and len(facts.categories) > 1:
                logs[axis] = {c: sum(_log_likelihood(n, c, p) for n, p in counts) for c in facts.categories}
        return {axis: _normalised(values) for axis, values in logs.items()}

    def _judge(self, slots: dict, random: Random, ask: int) -> str:
        pairs = prompts.parse_all("teacher", "judge_example", slots["EXAMPLES"])
        return json.dumps({"verdicts": [self._verdict(pair, ask) for pair in pairs]})

    def _verdict(self, pair: dict, ask: int) -> dict:
        """Compare a pair. Its noise belongs to person, question, unordered pair and ask, not to the batch."""
        name, question, a, b = pair["NAME"], pair["X"], pair["OUTPUT_A"], pair["OUTPUT_B"]
        noise = self._random(name, question, *sorted((a, b)), ask).gauss(0.0, self.knobs.noise)
        margin = self.utility(name, question, a) - self.utility(name, question, b)
        margin += noise if a < b else -noise
        margin += self.knobs.position_bias + self.knobs.length_bias * (len(a.split()) - len(b.split()))
        if a == b or abs(margin) < self.knobs.tie_below:
            better, why = None, f"{name} would not mind which"
        else:
            better, why = margin > 0, f"{name} would rather have Output ({'a' if margin > 0 else 'b'})"
        return {"Concise explanation": f"{why}: (a) {self._traits(a)}; (b) {self._traits(b)}.",
                "Output (a) is better than Output (b)": better}

    def _traits(self, text: str) -> str:
        """What was spotted in an answer, in words."""
        spotted = self.spot(text)
        topics = [f"{axis}/{category}" for axis, category in spotted.categories] + list(spotted.hobbies)
        return f"speaks for {' and '.join(topics) or 'nothing special'} in a {spotted.tone or 'neutral'} tone"

    def _personas(self, slots: dict, random: Random, ask: int) -> str:
        """People of the axis: one of each category first, then second ones, up to the number asked for."""
        axis, limit = slots["AXIS"], int(slots["N"])
        turn, listed = Counter(), []
        for person in self.world.people.values():
            for category in (c for a, c in person.memberships if a == axis):
                listed.append((turn[category], category, person))
                turn[category] += 1
        order = list(self.world.axes[axis].categories) if axis in self.world.axes else []
        listed.sort(key=lambda entry: (entry[0], order.index(entry[1])))
        return "\n".join(f"- {category}, {p.name}, {p.about}" for _, category, p in listed[:limit])

    def _demographics(self, slots: dict, random: Random, ask: int) -> str:
        person = self.world.people.get(slots["NAME"])
        fields = ("region", "age_group", "gender", "schooling")
        return json.dumps({f: person.demographics.get(f, "unknown") if person else "unknown" for f in fields})

    def _personal_questions(self, slots: dict, random: Random, ask: int) -> str:
        person = self.world.people.get(slots["NAME"])
        pool = self.world.personal_questions(person) if person else []
        return _numbered(random.sample(pool, min(int(slots["N"]), len(pool))))

    def _divergent_questions(self, slots: dict, random: Random, ask: int) -> str:
        pool = self.world.divergent_questions(slots["AXIS"]) if slots["AXIS"] in self.world.axes else []
        return _numbered(random.sample(pool, min(int(slots["N"]), len(pool))))

    def _gold_persona(self, slots: dict, random: Random, ask: int) -> str:
        person = self.world.people.get(slots["NAME"])
        if person is None:
            return f"Nothing is on record about {slots['NAME']}.\nWhat this person prefers is not clear."
        return self.world.describe(random, person.name, person.memberships, random.choice(person.hobbies))

    def _infer_persona(self, slots: dict, random: Random, ask: int) -> str:
        both = prompts.parse_all("teacher", "shot_rejected", slots["SHOTS"])
        shots = both or prompts.parse_all("teacher", "shot", slots["SHOTS"])
        best = [(axis, max(p, key=p.get), max(p.values())) for axis, p in self.posteriors(shots).items()]
        sure = tuple((axis, category) for axis, category, probability in best if probability >= SURE_ENOUGH)
        hobbies = sum((self.spot(f"{shot['X']} {shot['CHOSEN']}").hobbies for shot in shots), Counter())
        hobbies.update(self.hobby_of(shot["X"]) for shot in shots)
        hobbies.pop("", None)
        hobby = hobbies.most_common(1)[0][0] if hobbies else "other things"
        return self.world.describe(random, "This person", sure, hobby)

    def _directions_name(self, slots: dict, random: Random, ask: int) -> str:
        person = self.world.people.get(slots["NAME"])
        return json.dumps(_leaning(self.wording.of_person(person) if person else directions.vector()))

    def _directions_shots(self, slots: dict, random: Random, ask: int) -> str:
        shots = prompts.parse_all("teacher", "shot_rejected", slots["SHOTS"])
        best = [(axis, max(p, key=p.get), max(p.values())) for axis, p in self.posteriors(shots).items()]
        sure = [(axis, category) for axis, category, probability in best if probability >= SURE_ENOUGH]
        hobbies = {self.hobby_of(shot["X"]) for shot in shots} - {""}
        return json.dumps(_leaning(self.wording.of(sure, hobbies)))

    def _directions_labels(self, slots: dict, random: Random, ask: int) -> str:
        shots = prompts.parse_all("teacher", "shot_rejected", slots["SHOTS"])
        return json.dumps({"labels": [_leaning(self._label(shot)) for shot in shots]})

    def _label(self, shot: dict[str, str]) -> np.ndarray:
        """What the preferred answer speaks for, less what the rejected one speaks for; and the question's hobby."""
        hobby = self.hobby_of(shot["X"])
        sides = [self.wording.of(self._speaks_for(shot[slot])) for slot in ("CHOSEN", "REJECTED")]
        moved = np.sign(sides[0] - sides[1]) / 2 + directions.NEUTRAL
        return np.maximum(moved, self.wording.of((), [hobby])) if hobby else moved

    def _speaks_for(self, text: str) -> list[tuple[str, str]]:
        """The category with the most phrases in an answer; none if two share the lead."""
        ranked = self.spot(text).categories.most_common(2)
        alone = ranked and (len(ranked) == 1 or ranked[0][1] > ranked[1][1])
        return [ranked[0][0]] if alone else []

    @cached_property
    def wording(self) -> directions.Wording:
        """Where this world's categories stand in the preference space."""
        return directions.Wording(self.world)

    def _hobby_of(self, question: str) -> str:
        """The hobby that a question names, or ""."""
        return next((hobby for hobby in self.world.hobbies if f" {hobby} " in f" {question.strip('?')} "), "")

    def _random(self, *parts: object) -> Random:
        return Random(repr((self.seed, *parts)))


def _leaning(values: np.ndarray) -> dict[str, list[str]]:
    return dict(zip(("positive", "negative"), directions.poles(values), strict=True))


def _quality_weight(name: str) -> float:
    return Random(f"quality {name}").uniform(0.6, 1.4)


def _log_likelihood(counts: dict[str, int], own: str, is_own: float) -> float:
    """log p(one response | the person's category is `own`) as in `posteriors`, common phrases left out.

    is_own: how often a response in its place (preferred, rejected) speaks for the person's category.
    """
    others, total = len(counts) - 1, sum(counts.values())
    wording = {r: SLOT_OWN ** n * (SLOT_WRONG / others) ** (total - n) for r, n in counts.items()}
    elsewhere = (sum(wording.values()) - wording[own]) / others
    return math.log(is_own * wording[own] + (1 - is_own) * elsewhere)


def _normalised(logs: dict[str, float]) -> dict[str, float]:
    weights = {key: math.exp(value - max(logs.values())) for key, value in logs.items()}
    return {key: weight / sum(weights.values()) for key, weight in weights.items()}


def _numbered(lines: list[str]) -> str:
    return "\n".join(f"{i}. {line}" for i, line in enumerate(lines, 1))


def _completion(body: dict, text: str | None, refusal: str | None = None, finish: str = "stop") -> dict:
    """A chat completion as the API returns it; about four characters make a token."""
    read = sum(len(m["content"]) for m in body["messages"]) // 4 + 1
    written = len(text or refusal or "") // 4 + 1
    usage = {"prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written}
    message = {"role": "assistant", "content": text, "refusal": refusal}
    choice = {"index": 0, "finish_reason": finish, "logprobs": None, "message": message}
    return {"id": "simulated", "object": "chat.completion", "created": 0, "model": body["model"],
            "choices": [choice], "usage": usage}


def _error(message: str) -> dict:
    return {"error": {"message": message, "type": "simulated"}}
