"""The teacher's client against real HTTP servers on this machine: bad weather, kills, company, a lost server."""

import contextlib
import json
import os
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import time
from collections import Counter
from random import Random

import httpx2
import pytest
from pydantic import BaseModel

from helpers import ROOT, judging, llm
from helpers.config import load_profile
from helpers.world.corpus import Corpus
from helpers.world.facts import load_world

KEY = "sk-planted-0123456789abcdef"
WEATHER = {"rate_limited": 0.05, "errors_500": 0.05, "stalled": 0.05, "malformed": 0.05, "wrong_schema": 0.05,
           "refused": 0.05, "cut": 0.05}


def is_billed(line):
    return line["status"] == 200 and "replayed" not in line


class Server:
    """tests/teacher_server.py in a process of its own."""

    def __init__(self, folder, **knobs):
        self.log, self.knobs, self.port = folder / "server.jsonl", knobs, 0
        self.start()

    def start(self):
        words = [str(self.port), str(self.log), json.dumps(self.knobs)]
        self.process = subprocess.Popen([sys.executable, "tests/teacher_server.py", *words], cwd=ROOT, text=True,
                                        env={"PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE)
        self.port = int(self.process.stdout.readline())

    def stop(self):
        self.process.kill()
        self.process.wait()
        self.process.stdout.close()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.port}/v1"

    def books(self):
        """One dict an attempt."""
        return [json.loads(line) for line in self.log.read_text().splitlines()] if self.log.exists() else []

    def billed(self, since=0):
        """How often each request was answered, and so billed, from that line of the books on."""
        return Counter(line["asked"] for line in self.books()[since:] if is_billed(line))


@pytest.fixture
def serve(tmp_path):
    """Start a server with these knobs."""
    servers = []

    def start(**knobs):
        servers.append(Server(tmp_path, **knobs))
        return servers[-1]

    yield start
    for server in servers:
        server.stop()


def profile(**changes):
    cfg = load_profile("smoke")
    teacher = cfg.teacher.model_copy(update={"model": "gpt-4.1", "budget_usd": 1e3, "max_retries": 9, **changes})
    judge = cfg.judge.model_copy(update={"pairs_per_request": 1})
    return cfg.model_copy(update={"teacher": teacher, "judge": judge})


def client(cfg, url, folder, name="r"):
    return llm.Teacher(cfg.teacher, url, KEY, folder / "cache.sqlite", name)


def comparisons(n):
    """n matches of answers to divergent questions, each its own; texts: response id -> text."""
    world, matches, texts = load_world("little"), [], {}
    corpus, people = Corpus(world, 7), list(world.people.values())
    for i in range(n):
        person = people[i % len(people)]
        axis = person.memberships[0][0]
        questions = world.divergent_questions(axis)
        a, b = f"{i}a", f"{i}b"
        texts |= {a: f"{corpus.answer(axis)} ({i})", b: corpus.answer(axis)}
        matches.append(judging.Match(f"p{i}", person.name, f"q{i}", questions[i % len(questions)], 1, a, b, a))
    return matches, texts


def weathered(serve, folder, n, concurrency, late, timeout):
    """n comparisons in all kinds of weather: (matches, ledger, the server's books)."""
    server = serve(late_seconds=late, **WEATHER)
    cfg, (matches, texts) = profile(concurrency=concurrency, timeout_seconds=timeout), comparisons(n)
    teacher = client(cfg, server.url, folder)
    judging.compare(teacher, matches, texts, cfg, 1, "judging")
    return matches, teacher.ledger(), settled(server)


def settled(server):
    """The books, once the server has noticed that a stalled request's client has gone."""
    time.sleep(0.5)
    return server.books()


def check_books(matches, ledger, books, max_retries):
    """Nothing is unaccounted for, and nothing was billed twice. On a machine so busy that the client's patience ends first,
    an answer is in the server's books alone and given again (late), or a request never got there (unseen)."""
    bills = {line["asked"]: line for line in books if is_billed(line)}
    status = Counter(line["status"] for line in books)
    assert all(status[code] > 0 for code in (200, 429, 500, 0))
    # every comparison is accounted for once: as many answers as askings, and each asking ended as something
    assert {match.outcome for match in matches} <= {"clear", "tie", "unparsable"}
    assert sum(match.asks for match in matches) == ledger["requests"] == sum(ledger["outcomes"].values())
    # no request was answered, and billed, a second time
    assert len(bills) == sum(map(is_billed, books))
    # what was asked again had met trouble, and only as often as that
    late = status[200] - len(bills)
    unseen = ledger["in_doubt"]["requests"] - status[0]  # less what a request that came late too had in doubt
    assert -late <= unseen <= len(books) // 100
    assert len(books) == ledger["requests"] + late + status[429] + status[500] + status[0]
    assert max(line["attempt"] for line in books if line.get("attempt")) <= max_retries
    # the ledger is the server's own bill
    assert ledger["requests"] == len(bills)
    assert ledger["prompt_tokens"] == sum(line["read"] for line in bills.values())
    assert ledger["completion_tokens"] == sum(line["written"] for line in bills.values())
    dollars = sum(line["read"] * 2e-6 + line["written"] * 8e-6 for line in bills.values())  # gpt-4.1: $2 and $8 a million
    assert ledger["cost_usd"] == pytest.approx(dollars)
    # each kind of bad answer is counted as what it is
    assert ledger["outcomes"]["refused"] > 0
    assert ledger["outcomes"]["unparsable"] > ledger["outcomes"]["refused"]  # malformed, and of a wrong shape
    return {"late": late, "unseen": unseen}


def test_300_comparisons_in_bad_weather(serve, tmp_path):
    matches, ledger, books = weathered(serve, tmp_path, 300, 16, 0.02, 2.0)
    check_books(matches, ledger, books, 9)
    assert max(line["open"] for line in books) <= 16 + ledger["in_doubt"]["requests"]


@pytest.mark.slow
def test_10000_comparisons_in_bad_weather_at_the_speed_of_the_server(serve, tmp_path):
    """The server can do as much as `concurrency` requests held for as long as it held each: 80 % of that."""
    matches, ledger, books = weathered(serve, tmp_path, 10_000, 32, 1.0, 6.0)
    late = check_books(matches, ledger, books, 9)
    wall = max(line["at"] for line in books) - min(line["at"] - line["seconds"] for line in books)
    used = sum(line["seconds"] for line in books) / 32 / wall
    status = Counter(line["status"] for line in books)
    print(f"{len(books)} attempts {dict(status)} in {wall:.0f} s; the slots were in use {used:.0%} of the time; {late}; "
          f"ledger: {ledger}")
    assert used >= 0.8


def test_the_bill_never_passes_the_budget_and_a_raised_one_goes_on(serve, tmp_path):
    server, (matches, texts) = serve(late_seconds=0.01, **WEATHER | {"stalled": 0.0}), comparisons(80)
    requests = [judging.request([match], texts, 0) for match in matches]
    bills = []
    for budget in (0.05, 0.1, 5.0):
        teacher = client(profile(budget_usd=budget), server.url, tmp_path)
        if budget < 1:
            with pytest.raises(llm.BudgetExceeded, match=r"\d+ of \d+ requests .asking. are still to be asked"):
                teacher.map(requests)
        else:
            teacher.map(requests)
        bills.append(sum(line["read"] * 2e-6 + line["written"] * 8e-6 for line in server.books() if is_billed(line)))
        assert 0.5 * min(budget, 0.15) < bills[-1] <= budget
    paid = server.billed()
    assert (len(paid), set(paid.values())) == (80, {1})


CHILD = """
import sys
from pathlib import Path
sys.path[:0] = ["tests"]
import test_llm_server as here
from helpers import judging
url, folder, n, name = sys.argv[1:]
cfg, (matches, texts) = here.profile(concurrency=8), here.comparisons(int(n))
teacher = here.client(cfg, url, Path(folder), name)
judging.compare(teacher, matches, texts, cfg, 1, "judging")
"""


def child(server, folder, n, name="r"):
    words = [sys.executable, "-c", CHILD, server.url, str(folder), str(n), name]
    return subprocess.Popen(words, cwd=ROOT, env={"PYTHONPATH": str(ROOT)}, stderr=subprocess.DEVNULL)


def rows(folder, sql):
    try:
        with sqlite3.connect(f"file:{folder / 'cache.sqlite'}?mode=ro", uri=True) as db:
            return db.execute(sql).fetchall()
    except sqlite3.OperationalError:
        return []


def answered(folder):
    return sum(n for (n,) in rows(folder, "SELECT COUNT(*) FROM answers"))


@pytest.mark.parametrize("forgetful", [False, True])
@pytest.mark.parametrize("kills", [1, pytest.param(8, marks=pytest.mark.slow)])
def test_after_kills_only_what_was_on_the_wire_is_asked_again(serve, tmp_path, kills, forgetful):
    """kill -9. A server that knows idempotency keys bills nothing twice; one that does not, what was under way at a kill."""
    server, random = serve(late_seconds=0.1, forgetful=forgetful), Random(17)
    for kill in range(kills):
        process, before = child(server, tmp_path, 150), answered(tmp_path)
        while answered(tmp_path) < before + 10 and process.poll() is None:
            time.sleep(0.02)
        time.sleep(random.uniform(0.0, 0.2))
        assert process.poll() is None, f"it ended before kill {kill}"
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert child(server, tmp_path, 150).wait() == 0
    time.sleep(0.3)  # the server answers those whose client is gone, too
    paid, doubt = server.billed(), rows(tmp_path, "SELECT key FROM promised WHERE owner = ''")
    twice, again = sum(paid.values()) - len(paid), sum("replayed" in line for line in server.books())
    assert answered(tmp_path) == len(paid)
    assert rows(tmp_path, "SELECT * FROM promised WHERE owner <> ''") == []
    if forgetful:  # the ledger knows what may have been billed twice
        assert again == 0
        assert 0 < twice <= len(doubt) <= kills * 8  # kills x concurrency
    else:  # what was given again is in doubt no more; what is, never got there
        assert twice == 0
        assert 0 < again <= kills * 8
        assert len(doubt) <= kills * 8 - again
    sent = {key: json.loads(body) for key, body in rows(tmp_path, "SELECT key, request FROM answers")}
    assert {key for (key,) in doubt} <= set(sent)


def test_two_processes_that_share_the_cache_pay_once(serve, tmp_path):
    server = serve(late_seconds=0.05)
    both = [child(server, tmp_path, 120, name) for name in ("one", "two")]
    assert [process.wait() for process in both] == [0, 0]
    paid = server.billed()
    assert set(paid.values()) == {1}
    assert answered(tmp_path) == len(paid) == len(server.books())


def test_a_lost_server_is_one_clear_message_and_the_run_goes_on_when_it_is_back(serve, tmp_path):
    server, (matches, texts) = serve(late_seconds=0.05), comparisons(60)
    cfg = profile(concurrency=4, max_retries=1)
    teacher = client(cfg, server.url, tmp_path)
    judging.compare(teacher, matches[:20], texts, cfg, 1, "judging")
    server.stop()
    with pytest.raises(llm.TeacherError, match="(?s)APIConnectionError.*Is there a server.*still to be asked") as caught:
        teacher.map([judging.request([match], texts, 0) for match in matches])
    assert KEY not in str(caught.getrepr(chain=True))
    assert teacher.ledger()["in_doubt"]["requests"] == 0  # nothing was sent: nobody listened
    bought = teacher.ledger()["requests"]
    server.start()
    answers = teacher.map([judging.request([match], texts, 0) for match in matches])
    assert sum(answer.cached for answer in answers) >= 20
    paid = server.billed()
    assert set(paid.values()) == {1}
    assert teacher.ledger()["requests"] == sum(paid.values()) > bought


LITELLM = """
model_list:
  - {model_name: gpt-4.1, litellm_params: {model: openai/m, api_key: none, mock_response: '{"colour": "red"}'}}
  - {model_name: gpt-4.1-mini, litellm_params: {model: openai/m, api_key: none, mock_response: 'Red, I think.'}}
  - {model_name: gpt-4.1-nano, litellm_params: {model: openai/m, api_key: none, mock_response: litellm.RateLimitError}}
general_settings: {master_key: sk-planted-0123456789abcdef}
"""


class Colour(BaseModel):
    colour: str


@pytest.fixture
def litellm(tmp_path):
    """The address of litellm's proxy, whose models are mocks: an OpenAI-compatible server that none of us wrote."""
    command = shutil.which("litellm")
    if not command:
        pytest.skip("no litellm on the PATH: pip install 'litellm[proxy]' into an environment of its own")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    (tmp_path / "litellm.yaml").write_text(LITELLM)
    env = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), "LITELLM_LOCAL_MODEL_COST_MAP": "True"}
    with (tmp_path / "litellm.log").open("w") as log:
        process = subprocess.Popen([command, "--config", "litellm.yaml", "--port", str(port), "--host", "127.0.0.1"],
                                   cwd=tmp_path, env=env, stdout=log, stderr=log)
    for _ in range(600):
        with contextlib.suppress(httpx2.TransportError):
            if httpx2.get(f"http://127.0.0.1:{port}/health/liveliness").status_code == 200:
                break
        assert process.poll() is None, (tmp_path / "litellm.log").read_text()[-2000:]
        time.sleep(0.5)
    yield f"http://127.0.0.1:{port}/v1"
    process.terminate()
    process.wait()


@pytest.mark.slow
def test_another_server_that_speaks_the_same_protocol(litellm, tmp_path):
    def teacher(key=KEY, **changes):
        settings = profile(max_retries=1, **changes).teacher
        return llm.Teacher(settings, litellm, key, tmp_path / "cache.sqlite", "r")

    asked = [llm.Request([{"role": "user", "content": f"Which colour? {i}"}], Colour, "judge") for i in range(200)]
    good = teacher()
    answers = good.map(asked)
    assert {(answer.outcome, answer.parsed.colour) for answer in answers} == {("ok", "red")}
    assert good.ledger()["requests"] == 200
    assert good.ledger()["prompt_tokens"] == sum(answer.prompt_tokens for answer in answers) > 0
    vague = teacher(model="gpt-4.1-mini", structured="prompt").map(asked[:3])
    assert [answer.outcome for answer in vague] == ["unparsable"] * 3
    for changes, said in [({"model": "gpt-4.1-nano"}, "RateLimitError"), ({"model": "gpt-5.4"}, "BadRequest|NotFound"),
                          ({"key": "sk-planted-somebody-elses-key"}, "No connected db")]:  # how it says 401 without a database
        with pytest.raises(llm.TeacherError, match=f"(?s)({said}).*still to be asked") as caught:
            teacher(**changes).map([llm.Request([{"role": "user", "content": "?"}])])
        assert "sk-planted" not in str(caught.value)


def test_the_limit_of_requests_per_minute_is_kept(serve, tmp_path):
    """1200 a minute are one each 50 ms: 40 requests take 39 x 0.05 = 1.95 s, and never two within 30 ms."""
    server, (matches, texts) = serve(), comparisons(40)
    cfg = profile(concurrency=8, requests_per_minute=1200)
    client(cfg, server.url, tmp_path).map([judging.request([match], texts, 0) for match in matches])
    began = sorted(line["at"] - line["seconds"] for line in server.books())
    assert 1.9 <= began[-1] - began[0] <= 1.95 * 1.25
