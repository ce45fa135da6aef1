"""The teacher's client: many requests at once, each paid for once, never beyond the budget.

`Teacher.map` sends requests to any OpenAI-compatible endpoint, or in process to the simulated teacher, through the
real client. Answers and dollars are the ledger's: what was answered is not sent again, whatever is killed. Refused,
truncated and unparsable answers are outcomes, never guesses. The key comes from the environment, written nowhere.
"""

import asyncio
import json
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path

import httpx2
import openai
from openai.types import Batch
from openai.types.chat import ChatCompletion
from tqdm.auto import tqdm

from helpers import batches, completions
from helpers.completions import MAX_ANSWER_TOKENS, Answer, Request
from helpers.ledger import BudgetExceeded, CacheError, Ledger, Paid, TeacherError, new_owner, price, prices_file
from helpers.pacing import RETRIED, Pace, wait_seconds
from helpers.world import teacher as simulated
from helpers.world.facts import load_world

__all__ = ["Answer", "BudgetExceeded", "CacheError", "Request", "Teacher", "TeacherError", "connect"]
POLL_SECONDS = 0.2  # while another process has the same request under way
NOT_SENT = (httpx2.ConnectError, httpx2.ConnectTimeout, httpx2.PoolTimeout)
REPLAYED = "idempotent-replayed"  # header of an answer that was given before, as Stripe has made it common
BATCHED = ("judge", "judge_lab")  # tags of what goes through the Batch API, if teacher.batch_api
ADVICE = {
    openai.AuthenticationError: "The key in {key} was not accepted: it may be wrong or expired. Export a valid one.",
    openai.PermissionDeniedError: "The key in {key} may not use this model.",
    openai.BadRequestError: "The server does not take this: does it know the model, and is it meant for chats?",
    openai.NotFoundError: "Is teacher.model right, does teacher.base_url end in /v1, and if teacher.batch_api is on, "
                          "has the server a Batch API?",
    openai.RateLimitError: "Lower teacher.concurrency, or set teacher.requests_per_minute and tokens_per_minute to "
                           "your limits; if the account is out of credit, fill it up.",
    openai.APITimeoutError: "No answer within teacher.timeout_seconds.",
    openai.APIConnectionError: "Is there a server at teacher.base_url, and can it be reached from here?"}


def connect(store) -> "Teacher":
    """The teacher of a run (artifacts.open_run) as its profile says. TeacherError without a price."""
    cfg, settings = store.profile, store.profile.teacher
    base_url, key, transport = settings.base_url, os.environ.get(settings.api_key_env, ""), None
    if base_url == "simulated":
        world = load_world(cfg.world)
        base_url = f"http://teacher.invalid/{simulated.identity(world, cfg.world_knobs, cfg.seed)}/v1"
        app = simulated.build_app(world, cfg.world_knobs, cfg.seed)
        key, transport = "simulated", httpx2.ASGITransport(app=app)
    cache = Path(settings.cache).expanduser() if settings.cache else store.path / "teacher.sqlite"
    return Teacher(settings, base_url, key, cache, store.name, transport, store.record)


class Teacher:
    """An endpoint, its cache and its budget. settings: the profile's section `teacher`."""

    def __init__(self, settings, base_url: str, api_key: str, cache: Path, run: str,
                 transport: httpx2.AsyncBaseTransport | None = None, record: Callable | None = None):
        self.settings, self.model, self.base_url = settings, settings.model, base_url
        self._key, self._transport, self._record = api_key, transport, record
        self._price, self._how = price(settings.model), settings.structured
        self._ledger = Ledger(cache, run)
        self._pace = Pace(settings.requests_per_minute, settings.tokens_per_minute)

    def map(self, requests: Sequence[Request], desc: str = "asking") -> list[Answer]:
        """The answers in the order of the requests. Raises TeacherError, with what was answered kept.

        Where the server knows no schemas, an answer that does not fit is sent back once, to be repaired.
        """
        answers, paid = self._answers(requests, desc)
        broken = [i for i, p in enumerate(paid) if p.how == "prompt" and answers[i].outcome == "unparsable"]
        mended, _ = self._answers([completions.repair(requests[i], answers[i]) for i in broken], f"{desc}, repairs")
        for i, new in zip(broken, mended, strict=True):
            old = answers[i]
            answers[i] = replace(
                new, prompt_tokens=old.prompt_tokens + new.prompt_tokens, cost_usd=old.cost_usd + new.cost_usd,
                completion_tokens=old.completion_tokens + new.completion_tokens, cached=old.cached and new.cached)
        if self._record:
            self._record("teacher", **self.ledger())
        return answers

    def ledger(self) -> dict:
        """What this run has paid for (see Ledger.totals), with the model."""
        return {"model": self.model, **self._ledger.totals()}

    def _answers(self, requests: Sequence[Request], desc: str) -> tuple[list[Answer], list[Paid]]:
        keys = [completions.key(self._canonical(request)) for request in requests]
        wanted = dict(zip(keys, requests, strict=True))
        job = _Job({key: request for key, request in wanted.items() if self._ledger.get(key) is None})
        if job.missing:
            self._buy(job, desc)
        paid = [self._ledger.get(key) for key in keys]
        return [completions.answer(p, request.schema, p.key not in job.bought)
                for p, request in zip(paid, requests, strict=True)], paid

    def _buy(self, job: "_Job", desc: str) -> None:
        """Ask in a thread with an event loop of its own, a notebook's is taken; show progress from here."""
        if not self._key:
            raise TeacherError(
                f"{len(job.missing)} requests ({desc}) are not in {self._ledger.path}, and there is no key in the "
                f"environment variable {self.settings.api_key_env}: export it (any word does for a server of your "
                "own), or use --set teacher.base_url=simulated")
        with ThreadPoolExecutor(1) as pool, tqdm(total=len(job.missing), desc=desc, unit="request", delay=5) as bar:
            future = pool.submit(asyncio.run, self._ask_all(job))
            try:
                while not wait([future], timeout=0.2).done:
                    bar.update(job.done - bar.n)
            except BaseException:  # Ctrl-C: what is under way is given up, and stays set aside
                job.stop()
                raise
            bar.update(job.done - bar.n)
            future.result()
        if job.failure:
            raise type(job.failure)(f"{job.failure}\n{len(job.missing) - job.done} of {len(job.missing)} requests "
                                    f"({desc}) are still to be asked; every answer so far is kept.")

    async def _ask_all(self, job: "_Job") -> None:
        """Batches first, if they are wanted; then workers share a queue. After a failure nothing new is sent."""
        job.loop, job.task = asyncio.get_running_loop(), asyncio.current_task()
        http = httpx2.AsyncClient(transport=self._transport) if self._transport else None
        job.slots = asyncio.Semaphore(self.settings.concurrency)
        try:
            async with openai.AsyncOpenAI(api_key=self._key, base_url=self.base_url, http_client=http,
                                          timeout=self.settings.timeout_seconds, max_retries=0) as client:
                await self._guarded(self._ask_batches(client, job), job)
                # twice as many workers as slots: while some wait before a retry, others use theirs
                await asyncio.gather(*(self._work(client, job) for _ in range(2 * self.settings.concurrency)))
            await asyncio.sleep(0)  # connections given up at their timeout close in the loop's next round
        finally:
            self._ledger.leave(job.owner)
            if job.batch:
                self._ledger.leave(job.batch)

    async def _work(self, client: openai.AsyncOpenAI, job: "_Job") -> None:
        for key, request in job.queue:
            if job.failure:
                return
            await self._guarded(self._settle(client, key, request, job), job)
            job.done += not job.failure and key not in job.bought  # somebody else has bought it

    async def _guarded(self, asking, job: "_Job") -> None:
        """Await it; an error of the endpoint, the budget or the cache becomes the failure of the job."""
        try:
            await asking
        except TeacherError as error:
            job.failure = job.failure or error
        except openai.OpenAIError as error:
            job.failure = job.failure or self._explain(error)

    async def _settle(self, client: openai.AsyncOpenAI, key: str, request: Request, job: "_Job") -> None:
        """Send one request until there is an answer, and keep it; raises the error of the last attempt."""
        failed = 0
        while not job.failure:
            async with job.slots:
                if not await self._promised(key, request, job):
                    return
                try:
                    made, replayed = await self._send(client, request, failed)
                    return self._keep(job, job.owner, key, made, replayed=replayed)
                except (openai.APIError, json.JSONDecodeError) as error:
                    seconds = self._after(error, key, request, job, failed)
                finally:
                    job.under_way -= 1
            failed += 1
            await asyncio.sleep(seconds)

    async def _promised(self, key: str, request: Request, job: "_Job") -> bool:
        """Set the worst case aside. False: the job has failed, or somebody else has bought the answer meanwhile."""
        while not job.failure and self._ledger.get(key) is None:
            try:
                if self._ledger.promise(job.owner, {key: self._worst_usd(request)}, self.settings.budget_usd):
                    job.under_way += 1
                    return True
            except BudgetExceeded:
                if not job.under_way:  # what is under way may turn out cheaper than set aside
                    raise
            await asyncio.sleep(POLL_SECONDS)
            self._ledger.sweep()
        return False

    async def _send(self, client: openai.AsyncOpenAI, request: Request, failed: int) -> tuple[ChatCompletion, bool]:
        """The answer, and whether the server says that it had given it before.

        A server that knows idempotency keys answers, and charges, once under each key, whatever was lost on the way.
        """
        await self._pace.turn(completions.prompt_tokens(request))
        headers = {"x-stainless-retry-count": str(failed),  # as the client says it for retries of its own
                   "idempotency-key": self._ledger.order(completions.key(self._canonical(request, self._how)))}
        try:
            async with asyncio.timeout(self.settings.timeout_seconds):  # for the whole; the client's is for each read
                body = self._body(request, self._how)
                got = await client.chat.completions.with_raw_response.create(**body, extra_headers=headers)
                made, replayed = got.parse(), got.headers.get(REPLAYED) == "true"
        except TimeoutError:
            raise openai.APITimeoutError(httpx2.Request("POST", self.base_url)) from None
        if not isinstance(made, ChatCompletion) or not made.choices:
            raise TeacherError(f"what came back from {self.base_url} is no chat completion: "
                               f"{self._redact(str(made))[:200]!r}. Does teacher.base_url end in /v1?")
        return made, replayed

    def _after(self, error: Exception, key: str, request: Request, job: "_Job", failed: int) -> float:
        """Seconds until the next attempt. Raises where another one is of no use, or `max_retries` have failed.

        A request that was turned down costs nothing; one without a readable answer may have been paid for.
        """
        turned_down = isinstance(error, openai.APIStatusError) or isinstance(error.__cause__, NOT_SENT)
        (self._ledger.release if turned_down else self._ledger.doubt)(job.owner, key)
        if failed < self.settings.max_retries and self._lacks_schema(request, str(error)):
            return 0.0
        seconds = wait_seconds(error, failed)
        if seconds is None or failed >= self.settings.max_retries:
            raise error if isinstance(error, openai.APIError) else TeacherError(
                f"{self.model} at {self.base_url}: answers that are no JSON, {failed + 1} times")
        return seconds

    def _lacks_schema(self, request: Request, complaint: str) -> bool:
        """True where a server turned a schema down; from then on it is described in the prompt instead."""
        words = ("response_format", "json_schema", "guided", "structured output")
        if not request.schema or not any(word in complaint.lower() for word in words):
            return False
        self._how = "prompt"
        return True

    async def _ask_batches(self, client: openai.AsyncOpenAI, job: "_Job") -> None:
        """What may wait a day, as batches that the budget has room for; those of a killed run are taken up first."""
        for owner, keys in self._ledger.orphans().items():
            await self._adopt(client, job, owner, keys)
        share, idle = prices_file()["batch"], 0
        while left := self._unanswered(job):
            job.batch = new_owner("batch")
            worst = {key: share * self._worst_usd(request) for key, request in left.items()}
            sent = self._ledger.promise(job.batch, worst, self.settings.budget_usd)
            if not sent:  # another process has them under way
                await asyncio.sleep(batches.LONGEST_POLL_SECONDS)
                continue
            bodies, before = {key: self._body(left[key], self._how) for key in sent}, len(job.bought)
            batch = await batches.submit(client, job.batch.split()[-1], bodies)
            complaint = await self._collect(client, batch, job, job.batch, sent)
            idle = idle + 1 if len(job.bought) == before else 0
            if idle > self.settings.max_retries:
                raise TeacherError(f"{self.model} at {self.base_url}: {idle} batches without an answer: {complaint}")

    async def _adopt(self, client: openai.AsyncOpenAI, job: "_Job", owner: str, keys: list[str]) -> None:
        """Take up a batch that was left behind, even if batches are off by now: it is being paid for."""
        if mine := [key for key in keys if key in job.missing]:
            batch = await batches.find(client, owner.split()[-1])
            if batch is None:  # killed before it was sent
                self._ledger.release(owner, *keys)
            else:
                await self._collect(client, batch, job, owner, mine)

    def _unanswered(self, job: "_Job") -> dict[str, Request]:
        tags = BATCHED if self.settings.batch_api else ()
        left = ((key, r) for key, r in job.missing.items() if r.tag in tags and self._ledger.get(key) is None)
        return dict(islice(left, batches.MOST_REQUESTS))

    async def _collect(self, client: openai.AsyncOpenAI, batch: Batch, job: "_Job", owner: str, keys: list[str]) -> str:
        """Keep what a batch has answered, and let go of the rest, to be sent again. Returns the last complaint."""
        patient = client.with_options(max_retries=self.settings.max_retries)
        found, complaint = await batches.results(patient, batch)
        hopeless = ""
        for key in keys:
            status, body = found.get(key, (0, {}))
            if status == 200:
                self._keep(job, owner, key, ChatCompletion.model_validate(body), prices_file()["batch"])
                continue
            self._ledger.release(owner, key)
            complaint = f"{status} {self._redact(json.dumps(body))[:500]}" if body else complaint
            if 400 <= status < 500 and status not in RETRIED and not self._lacks_schema(job.missing[key], complaint):
                hopeless = complaint
        if hopeless:
            raise TeacherError(f"{self.model} at {self.base_url}, in a batch: {hopeless}")
        return complaint

    def _keep(self, job: "_Job", owner: str, key: str, made: ChatCompletion, share: float = 1.0,
              replayed: bool = False) -> None:
        """Into the ledger with a completion. share: of the list price, 1 but for batches."""
        request = job.missing[key]
        choice, usage, canonical = made.choices[0], made.usage, self._canonical(request)
        text, finish = choice.message.content or "", choice.finish_reason or "stop"
        if choice.message.refusal:
            text, finish = choice.message.refusal, "refusal"
        text, how = self._redact(text), self._how if request.schema else "schema"
        read, written = (usage.prompt_tokens, usage.completion_tokens) if usage else (0, 0)
        again = getattr(getattr(usage, "prompt_tokens_details", None), "cached_tokens", None) or 0
        cost_usd = self._cost(read, again, written) if usage else self._worst_usd(request)
        outcome = completions.parse(text, finish, request.schema)[1]
        paid = Paid(key, request.tag, canonical, how, text, finish, outcome, read, written, float(share * cost_usd))
        self._pace.learn(completions.prompt_tokens(request), read + written)
        self._ledger.keep(owner, paid, replayed)
        job.bought.add(key)
        job.done += 1

    def _body(self, request: Request, how: str) -> dict:
        return completions.body(request, how, self.model, self.settings.temperature)

    def _canonical(self, request: Request, how: str = "schema") -> str:
        """The request as JSON. With a schema, however the server has to be asked, its sha256 is the key of the answer."""
        return json.dumps({"base_url": self.base_url, **self._body(request, how)}, sort_keys=True)

    def _worst_usd(self, request: Request) -> float:
        """Dollars that it can cost at most: no token is shorter than a byte, no answer longer than the limit."""
        return self._cost(len(json.dumps(self._body(request, "schema"), ensure_ascii=False).encode()), 0, MAX_ANSWER_TOKENS)

    def _cost(self, read: int, read_again: int, written: int) -> float:
        """Dollars for tokens read, those of them that the endpoint had cached, and tokens written."""
        of = self._price
        return ((read - read_again) * of["input"] + read_again * of["cached_input"] + written * of["output"]) / 1e6

    def _explain(self, error: openai.OpenAIError) -> TeacherError:
        advice = next((said for kind, said in ADVICE.items() if isinstance(error, kind)), "")
        said = f"{self.model} at {self.base_url}: {type(error).__name__}: {self._redact(str(error))}"
        advice = f"{advice.format(key=self.settings.api_key_env)} Run the same command again to go on."
        return TeacherError(f"{said}\n{advice.strip()}")

    def _redact(self, text: str) -> str:
        """Without the key, which a server may echo; a word of under 12 letters is no secret."""
        return text.replace(self._key, "(key)") if len(self._key) >= 12 else text


@dataclass
class _Job:
    """What the workers of one `map` share."""

    missing: dict[str, Request]
    owner: str = field(default_factory=new_owner)
    bought: set[str] = field(default_factory=set)
    batch: str = ""  # owner of the batch under way
    under_way: int = 0
    done: int = 0
    failure: TeacherError | None = None

    def __post_init__(self):
        self.queue: Iterator[tuple[str, Request]] = iter(self.missing.items())

    def stop(self) -> None:
        self.loop.call_soon_threadsafe(self.task.cancel)
