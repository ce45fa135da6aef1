"""The teacher's client: many requests at once, each paid for once, never beyond the budget.

`Teacher.map` sends requests to any OpenAI-compatible endpoint, or in process to the simulated teacher,
through the real client with its retries. Every answer is kept in a sqlite file the moment it arrives, so that
no answered request is sent again, whatever is killed. The key comes from the environment, written nowhere.
"""

import asyncio
import hashlib
import json
import os
import sqlite3
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import wait
from dataclasses import dataclass
from pathlib import Path
from threading import Thread

import httpx2
import openai
import yaml
from pydantic import BaseModel, ValidationError
from tqdm.auto import tqdm

from helpers import DATA
from helpers.world import teacher as simulated
from helpers.world.facts import load_world

PRICES = DATA / "prices.yaml"
MAX_ANSWER_TOKENS = 2048
TIMEOUT_SECONDS = 180.0
OUTCOMES = {"refusal": "refused", "content_filter": "refused", "length": "truncated"}
TABLE = """CREATE TABLE IF NOT EXISTS answers (key TEXT PRIMARY KEY, run TEXT, tag TEXT, text TEXT,
           finish TEXT, prompt_tokens INTEGER, completion_tokens INTEGER, cost_usd REAL)"""


class TeacherError(RuntimeError):
    """The teacher cannot be asked, or did not answer; says what to do. What was answered so far is kept."""


class BudgetExceeded(TeacherError):
    """The next request could cost more than is left of teacher.budget_usd; it was not sent."""


@dataclass(frozen=True)
class Request:
    """One chat completion. To ask the same again, change the seed: the cache gives the first answer else."""

    messages: Sequence[dict[str, str]]
    schema: type[BaseModel] | None = None
    tag: str = ""
    seed: int = 0


@dataclass(frozen=True)
class Answer:
    """What came back. outcome: ok, unparsable (breaks the schema, or empty), refused, truncated.

    cost_usd is what was paid when the answer was bought; `cached` says that it was not paid for this time.
    """

    text: str
    parsed: BaseModel | None
    outcome: str
    prompt_tokens: int
    completion_tokens: int
    cost_usd: float
    cached: bool


def connect(store) -> "Teacher":
    """The teacher of a run (artifacts.open_run) as its profile says. TeacherError without key or price."""
    cfg, settings = store.profile, store.profile.teacher
    base_url, key, transport = settings.base_url, os.environ.get(settings.api_key_env, ""), None
    if base_url == "simulated":
        world = load_world(cfg.world)
        base_url = f"http://teacher.invalid/{simulated.identity(world, cfg.world_knobs, cfg.seed)}/v1"
        app = simulated.build_app(world, cfg.world_knobs, cfg.seed)
        key, transport = "simulated", httpx2.ASGITransport(app=app)
    if not key:
        raise TeacherError(f"no key in the environment variable {settings.api_key_env}: export it (any word "
                           "does for a server of your own), or use --set teacher.base_url=simulated")
    cache = Path(settings.cache).expanduser() if settings.cache else store.path / "teacher.sqlite"
    return Teacher(settings, base_url, key, cache, store.name, transport, store.record)


class Teacher:
    """An endpoint, its cache and its budget. settings: the profile's section `teacher`."""

    def __init__(self, settings, base_url: str, api_key: str, cache: Path, run: str,
                 transport: httpx2.AsyncBaseTransport | None = None, record: Callable | None = None):
        self.settings, self.model, self.base_url, self.run = settings, settings.model, base_url, run
        self._key, self._transport, self._record = api_key, transport, record
        self._price = _price(settings.model)
        cache.parent.mkdir(parents=True, exist_ok=True)
        # isolation_level None: every statement is committed at once
        self._db = sqlite3.connect(cache, check_same_thread=False, isolation_level=None)
        self._db.execute("PRAGMA journal_mode=WAL")
        self._db.execute(TABLE)

    def map(self, requests: Sequence[Request], desc: str = "asking") -> list[Answer]:
        """The answers in the order of the requests. Raises TeacherError, with what was answered kept."""
        keys = [self._fingerprint(request) for request in requests]
        missing = {key: r for key, r in zip(keys, requests, strict=True) if self._load(key) is None}
        if missing:
            self._run(missing, desc)
        if self._record:
            self._record("teacher", **self.ledger())
        return [_answer(self._load(key), request.schema, key not in missing)
                for key, request in zip(keys, requests, strict=True)]

    def ledger(self) -> dict:
        """What this run has paid for: requests, tokens and dollars, in all and by tag."""
        rows = self._db.execute(
            """SELECT tag, COUNT(*), SUM(prompt_tokens), SUM(completion_tokens), SUM(cost_usd)
               FROM answers WHERE run = ? GROUP BY tag ORDER BY tag""", (self.run,)).fetchall()
        names = ("requests", "prompt_tokens", "completion_tokens", "cost_usd")
        by_tag = {tag: dict(zip(names, sums, strict=True)) for tag, *sums in rows}
        totals = {name: sum(sums[name] for sums in by_tag.values()) for name in names}
        return {"model": self.model, **totals, "by_tag": by_tag}

    def _run(self, missing: dict[str, Request], desc: str) -> None:
        """Ask in a thread with an event loop of its own, a notebook's is taken; show progress from here."""
        loop, job = asyncio.new_event_loop(), _Job(iter(missing.items()), self.ledger()["cost_usd"])
        thread = Thread(target=loop.run_forever, daemon=True)
        thread.start()
        future = asyncio.run_coroutine_threadsafe(self._ask_all(job), loop)
        try:
            with tqdm(total=len(missing), desc=desc, unit="request", delay=5) as bar:
                while not wait([future], timeout=0.2).done:
                    bar.update(job.done - bar.n)
                bar.update(job.done - bar.n)
            future.result()
        finally:
            future.cancel()
            loop.call_soon_threadsafe(loop.stop)
            thread.join()
            loop.close()

    async def _ask_all(self, job: "_Job") -> None:
        """`concurrency` workers share one queue; after a failure the others finish what is under way."""
        http = httpx2.AsyncClient(transport=self._transport) if self._transport else None
        limits = {"timeout": TIMEOUT_SECONDS, "max_retries": self.settings.max_retries}
        async with openai.AsyncOpenAI(
                api_key=self._key, base_url=self.base_url, http_client=http, **limits) as client:
            await asyncio.gather(*(self._work(client, job) for _ in range(self.settings.concurrency)))
        if job.failure:
            raise job.failure

    async def _work(self, client: openai.AsyncOpenAI, job: "_Job") -> None:
        for key, request in job.queue:
            read = sum(len(message["content"]) for message in request.messages) // 3
            worst_usd = self._cost(read, 0, MAX_ANSWER_TOKENS)
            if job.promised_usd + worst_usd > self.settings.budget_usd:
                job.failure = job.failure or BudgetExceeded(
                    f"the next request could cost ${worst_usd:.4f}, and ${job.promised_usd:.4f} of "
                    f"teacher.budget_usd = {self.settings.budget_usd} are spent, or may be by requests under "
                    "way: it was not sent. Raise the budget and run again; what was paid for is kept.")
            if job.failure:
                return
            job.promised_usd += worst_usd
            try:
                row = await self._ask(client, request)
            except openai.OpenAIError as error:
                job.failure = job.failure or self._explain(error)
                return
            values = (key, self.run, request.tag, *row)
            self._db.execute("INSERT INTO answers VALUES (?, ?, ?, ?, ?, ?, ?, ?)", values)
            job.promised_usd += row[-1] - worst_usd
            job.done += 1

    async def _ask(self, client: openai.AsyncOpenAI, request: Request) -> tuple:
        """One request: text, finish reason, prompt tokens, completion tokens, dollars."""
        made = await client.chat.completions.create(model=self.model, **self._body(request))
        choice, usage = made.choices[0], made.usage
        text, finish = choice.message.content or "", choice.finish_reason
        if choice.message.refusal:
            text, finish = choice.message.refusal, "refusal"
        read, written = (usage.prompt_tokens, usage.completion_tokens) if usage else (0, 0)
        again = getattr(getattr(usage, "prompt_tokens_details", None), "cached_tokens", None) or 0
        return text, finish, read, written, self._cost(read, again, written)

    def _body(self, request: Request) -> dict:
        body = {"messages": list(request.messages), "temperature": self.settings.temperature,
                "seed": request.seed, "max_completion_tokens": MAX_ANSWER_TOKENS}
        if request.schema:
            shape = {"name": request.schema.__name__, "schema": request.schema.model_json_schema()}
            body["response_format"] = {"type": "json_schema", "json_schema": shape | {"strict": True}}
        return body

    def _fingerprint(self, request: Request) -> str:
        asked = {"base_url": self.base_url, "model": self.model, **self._body(request)}
        return hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()

    def _load(self, key: str) -> tuple | None:
        return self._db.execute("""SELECT text, finish, prompt_tokens, completion_tokens, cost_usd
                                   FROM answers WHERE key = ?""", (key,)).fetchone()

    def _cost(self, read: int, read_again: int, written: int) -> float:
        """Dollars for tokens read, those of them that the endpoint had cached, and tokens written."""
        price = self._price
        dollars = (read - read_again) * price["input"] + read_again * price["cached_input"]
        return (dollars + written * price["output"]) / 1e6

    def _explain(self, error: openai.OpenAIError) -> TeacherError:
        said = str(error).replace(self._key, "(key)")
        return TeacherError(f"{self.model} at {self.base_url}: {type(error).__name__}: {said}\n"
                            "Every answer so far is kept: run the same command again to go on from here.")


@dataclass
class _Job:
    """What the workers of one `map` share. promised_usd: spent, plus the worst case of those under way."""

    queue: Iterator[tuple[str, Request]]
    promised_usd: float
    done: int = 0
    failure: TeacherError | None = None


def _answer(row: tuple, schema: type[BaseModel] | None, cached: bool) -> Answer:
    """The stored row as a typed outcome; an answer that breaks its schema is an outcome, not an exception."""
    text, finish, *numbers = row
    parsed, outcome = None, OUTCOMES.get(finish, "ok" if text.strip() else "unparsable")
    if outcome == "ok" and schema:
        try:
            parsed = schema.model_validate_json(text[text.find("{"):text.rfind("}") + 1])
        except ValidationError:
            outcome = "unparsable"
    return Answer(text, parsed, outcome, *numbers, cached)


def _price(model: str) -> dict[str, float]:
    prices = yaml.safe_load(PRICES.read_text())
    if model not in prices["models"]:
        raise TeacherError(f"no price for {model!r} in {PRICES} (as of {prices['as_of']}: "
                           f"{', '.join(prices['models'])}); add a line, all 0 for a server of your own")
    return prices["models"][model]
