"""The teacher's client: many requests at once, each paid for once, never beyond the budget.

`Teacher.map` sends requests to any OpenAI-compatible endpoint, or in process to the simulated teacher, through the real
client with its retries. Every answer is kept in a sqlite file the moment it arrives: whatever is killed, no answered
request is sent again. The key is read from the environment and written nowhere.
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
TABLE = """CREATE TABLE IF NOT EXISTS answers (key TEXT PRIMARY KEY, run TEXT, tag TEXT, text TEXT, finish TEXT,
           prompt_tokens INTEGER, completion_tokens INTEGER, cost_usd REAL)"""


class TeacherError(RuntimeError):
    """The teacher cannot be asked, or did not answer; says what to do. What was answered so far is kept."""


class BudgetExceeded(TeacherError):
    """The next request could cost more than what is left of teacher.budget_usd; it was not sent."""


@dataclass(frozen=True)
class Request:
    """One chat completion. A repeated ask differs by its seed, else the cache would give the first answer again."""

    messages: Sequence[dict[str, str]]
    schema: type[BaseModel] | None = None
    tag: str = ""
    seed: int = 0


@dataclass(frozen=True)
class Answer:
    """What came back. outcome: ok, unparsable (not what the schema says, or empty), refused, truncated.

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
    """The teacher of a run (artifacts.open_run), as its profile says. Raises TeacherError without key or price."""
    cfg, settings = store.profile, store.profile.teacher
    base_url, transport, key = settings.base_url, None, os.environ.get(settings.api_key_env, "")
    if base_url == "simulated":
        world = load_world(cfg.world)
        base_url = f"http://teacher.invalid/{simulated.identity(world, cfg.world_knobs, cfg.seed)}/v1"
        app = simulated.build_app(world, cfg.world_knobs, cfg.seed)
        transport, key = httpx2.ASGITransport(app=app), "simulated"
    if not key:
        raise TeacherError(f"no key in the environment variable {settings.api_key_env}: export it (any word does for a "
                           "server of your own), or use --set teacher.base_url=simulated")
    cache = Path(settings.cache).expanduser() if settings.cache else store.path / "teacher.sqlite"
    return Teacher(settings, base_url, key, cache, store.name, transport, store.record)


class Teacher:
    """An endpoint, its cache and its budget."""

    def __init__(self, settings, base_url: str, api_key: str, cache: Path, run: str,
                 transport: httpx2.AsyncBaseTransport | None = None, record: Callable | None = None):
        self.settings, self.model, self.base_url, self.run = settings, settings.model, base_url, run
        self._key, self._transport, self._record, self._price = api_key, transport, record, _price(settings.model)
        cache.parent.mkdir(parents=True, exist_ok=True)
        self._db = sqlite3.connect(cache, check_same_thread=False, isolation_level=None)  # commits each statement
        self._db.execute("PRAGMA journal_mode=WAL")
        self._db.execute(TABLE)

    def map(self, requests: Sequence[Request], desc: str = "asking") -> list[Answer]:
        """The answers in the order of the requests. Raises TeacherError, after the requests under way are kept."""
        keys = [self._fingerprint(request) for request in requests]
        before = {key: self._load(key) for key in keys}
        pending = {key: r for key, r in zip(keys, requests, strict=True) if before[key] is None}
        if pending:
            self._run(pending, desc)
        if self._record:
            self._record("teacher", **self.ledger())
        return [_answer(self._load(key), request.schema, key not in pending)
                for key, request in zip(keys, requests, strict=True)]

    def ledger(self) -> dict:
        """What this run has paid for: requests, tokens and dollars, in all and by tag."""
        rows = self._db.execute("""SELECT tag, COUNT(*), SUM(prompt_tokens), SUM(completion_tokens), SUM(cost_usd)
                                   FROM answers WHERE run = ? GROUP BY tag ORDER BY tag""", (self.run,)).fetchall()
        names = ("requests", "prompt_tokens", "completion_tokens", "cost_usd")
        totals = {name: sum(row[i] for row in rows) for i, name in enumerate(names, 1)}
        return {"model": self.model, **totals, "by_tag": {row[0]: dict(zip(names, row[1:], strict=True)) for row in rows}}

    def _run(self, pending: dict[str, Request], desc: str) -> None:
        """Ask in a thread with an event loop of its own, because a notebook's is taken; show progress from here."""
        loop, job = asyncio.new_event_loop(), _Job(self.ledger()["cost_usd"], iter(pending.items()))
        thread = Thread(target=loop.run_forever, daemon=True)
        thread.start()
        future = asyncio.run_coroutine_threadsafe(self._ask_all(job), loop)
        try:
            with tqdm(total=len(pending), desc=desc, unit="request", delay=5) as bar:
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
        """`concurrency` workers share one queue; after a failure the others finish what they have under way."""
        http = httpx2.AsyncClient(transport=self._transport) if self._transport else None
        async with openai.AsyncOpenAI(api_key=self._key, base_url=self.base_url, http_client=http,
                                      timeout=TIMEOUT_SECONDS, max_retries=self.settings.max_retries) as client:
            workers = [self._work(client, job) for _ in range(self.settings.concurrency)]
            await asyncio.gather(*workers)
        if job.failure:
            raise job.failure

    async def _work(self, client: openai.AsyncOpenAI, job: "_Job") -> None:
        for key, request in job.queue:
            try:
                worst = await self._reserve(job, request)
                if job.failure:
                    return
                row = await self._ask(client, request)
            except (openai.OpenAIError, TeacherError) as error:
                job.failure = job.failure or self._explain(error)
                worst, row = 0.0, None
            async with job.settled:
                if row:
                    self._db.execute("INSERT OR REPLACE INTO answers VALUES (?,?,?,?,?,?,?,?)", (key, self.run, request.tag, *row))
                    job.spent, job.done = job.spent + row[-1], job.done + 1
                job.reserved -= worst
                job.settled.notify_all()
            if job.failure:
                return
