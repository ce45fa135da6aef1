import asyncio
import json
import signal
import sqlite3
import subprocess
import sys
import time

import pytest
from endpoint import KEY, Colour, Endpoint, ask
from starlette.responses import HTMLResponse, JSONResponse, Response

from helpers import ROOT, artifacts, ledger, llm, prompts
from helpers.config import load_profile


def test_answers_come_in_the_order_of_the_requests(tmp_path):
    endpoint = Endpoint(lambda body: body["messages"][0]["content"].upper())
    answers = endpoint.teacher(tmp_path).map([ask(f"q{i}") for i in range(40)])
    assert [a.text for a in answers] == [f"Q{i}" for i in range(40)]


def test_a_second_map_sends_nothing_and_says_so(tmp_path):
    endpoint = Endpoint()
    requests = [ask("one"), ask("two"), ask("one")]
    first = endpoint.teacher(tmp_path).map(requests)
    assert len(endpoint.bodies) == 2  # the same request twice is one call
    again = endpoint.teacher(tmp_path).map(requests)
    assert len(endpoint.bodies) == 2
    assert [a.cached for a in first + again] == [False] * 3 + [True] * 3
    assert [a.cost_usd for a in again] == [a.cost_usd for a in first]


@pytest.mark.parametrize("other", [{"seed": 1}, {"schema": Colour}])
def test_another_seed_or_schema_is_another_request(tmp_path, other):
    endpoint = Endpoint('{"colour": "red"}')
    endpoint.teacher(tmp_path).map([ask("one"), ask("one", **other)])
    assert len(endpoint.bodies) == 2


def test_cost_is_tokens_times_price_and_the_ledger_adds_up_by_tag_and_run(tmp_path):
    notes = []
    endpoint = Endpoint(usage=(1000, 100))
    endpoint.teacher(tmp_path, run="other").map([ask("z")])
    teacher = endpoint.teacher(tmp_path, record=lambda stage, **facts: notes.append((stage, facts)))
    answers = teacher.map([ask("x", tag="judge"), ask("y", tag="judge"), ask("w", tag="personas"), ask("z")])
    # gpt-4.1 costs $2 and $8 a million: 1000 x 2e-6 + 100 x 8e-6 = 0.0028
    assert [a.cost_usd for a in answers] == pytest.approx([0.0028] * 4)
    ledger = teacher.ledger()
    assert ledger["cost_usd"] == pytest.approx(3 * 0.0028)  # z was paid for by the other run
    assert ledger["by_tag"]["judge"] == pytest.approx(
        {"requests": 2, "prompt_tokens": 2000, "completion_tokens": 200, "cost_usd": 0.0056})
    assert notes == [("teacher", ledger)]


def test_the_budget_stops_before_the_call_and_keeps_what_was_paid(tmp_path):
    endpoint = Endpoint(usage=(1000, 100))
    # worst case of a call: 2048 tokens x $8e-6 = 0.0164, and under 200 bytes x $2e-6 = 0.0004 to read; it really
    # costs 0.0028, so one at a time four fit into 0.0260 (0.0084 + 0.0168 = 0.0252), and the fifth does not (0.0280)
    teacher = endpoint.teacher(tmp_path, budget_usd=0.0260, concurrency=1)
    with pytest.raises(llm.BudgetExceeded, match="was not sent(?s:.)*5 of 9 requests"):
        teacher.map([ask(str(i)) for i in range(9)])
    assert len(endpoint.bodies) == 4
    assert teacher.ledger()["cost_usd"] == pytest.approx(4 * 0.0028)
    # a raised budget goes on with what is missing, and with nothing else
    endpoint.teacher(tmp_path, budget_usd=1.0).map([ask(str(i)) for i in range(9)])
    assert sorted(body["messages"][0]["content"] for body in endpoint.bodies) == [str(i) for i in range(9)]


def test_requests_under_way_together_cannot_break_the_budget_either(tmp_path):
    endpoint = Endpoint(usage=(0, 2048))  # every answer as dear as can be: 0.0164
    teacher = endpoint.teacher(tmp_path, budget_usd=0.05, concurrency=16)
    with pytest.raises(llm.BudgetExceeded):
        teacher.map([ask(str(i)) for i in range(16)])
    assert len(endpoint.bodies) == 3  # 2 x 0.0164 + 0.0168 = 0.0496 fit; 3 x 0.0164 + 0.0168 = 0.066 do not
    assert teacher.ledger()["cost_usd"] <= 0.05


def test_what_is_set_aside_and_not_used_is_there_for_the_next(tmp_path):
    """16 answers cost 0.045, but could cost 0.27: they are asked four at a time, and all of them fit."""
    endpoint = Endpoint(usage=(1000, 100))
    assert len(endpoint.teacher(tmp_path, budget_usd=0.07, concurrency=16).map([ask(str(i)) for i in range(16)])) == 16


def test_a_stalled_answer_is_given_up_asked_again_and_in_doubt(tmp_path):
    class Stalling(Endpoint):
        async def answer(self, request):
            if len(self.bodies) < 1:
                self.bodies.append(await request.json())
                await asyncio.sleep(60)
            return await super().answer(request)

    endpoint = Stalling()
    teacher = endpoint.teacher(tmp_path, timeout_seconds=0.1)
    assert teacher.map([ask("?")])[0].text == "fine"
    assert len(endpoint.bodies) == 2
    doubt = teacher.ledger()["in_doubt"]
    # at most 2048 tokens x $8e-6 = 0.016384 to write, and under 200 bytes x $2e-6 to read
    assert doubt["requests"] == 1
    assert 0.016384 < doubt["at_most_usd"] < 0.0168


def test_what_is_in_doubt_counts_against_the_budget(tmp_path):
    class Stalling(Endpoint):
        async def answer(self, request):
            self.bodies.append(await request.json())
            await asyncio.sleep(60)

    endpoint = Stalling()
    with pytest.raises(llm.BudgetExceeded, match="in doubt"):  # 0.0168 each: two fit, a third does not
        endpoint.teacher(tmp_path, timeout_seconds=0.05, budget_usd=0.04).map([ask("?")])
    assert len(endpoint.bodies) == 2


def test_the_worst_case_is_never_below_what_a_tokenizer_of_bytes_would_cost(tmp_path):
    teacher, request = Endpoint().teacher(tmp_path), ask("ä€🙂" * 50, schema=Colour)
    # every character of the text is 2, 3 and 4 bytes: 450; $2 a million in, 2048 x $8 a million out
    assert teacher._worst_usd(request) >= 450 * 2e-6 + 2048 * 8e-6


def test_an_answer_without_usage_costs_the_worst_case(tmp_path):
    class Silent(Endpoint):
        async def answer(self, request):
            made = json.loads((await super().answer(request)).body)
            return JSONResponse(made | {"usage": None})

    (answer,) = Silent().teacher(tmp_path).map([ask("?")])
    assert answer.cost_usd > 2048 * 8e-6
    assert answer.prompt_tokens == 0


def test_tokens_that_the_server_had_cached_are_cheaper(tmp_path):
    class Caching(Endpoint):
        async def answer(self, request):
            made = json.loads((await super().answer(request)).body)
            made["usage"]["prompt_tokens_details"] = {"cached_tokens": 800}
            return JSONResponse(made)

    (answer,) = Caching().teacher(tmp_path).map([ask("?")])
    # 200 x $2 + 800 x $0.50 + 100 x $8, a million
    assert answer.cost_usd == pytest.approx((200 * 2 + 800 * 0.5 + 100 * 8) / 1e6)


def test_a_page_that_is_no_completion_is_a_clear_error(tmp_path):
    class Page(Endpoint):
        async def answer(self, request):
            return HTMLResponse("<html>welcome</html>")

    with pytest.raises(llm.TeacherError, match="(?s)no chat completion.*welcome.*end in /v1"):
        Page().teacher(tmp_path).map([ask("?")])


def test_a_body_that_breaks_off_is_asked_again_and_in_doubt(tmp_path):
    class Broken(Endpoint):
        async def answer(self, request):
            whole = await super().answer(request)
            return whole if len(self.bodies) > 1 else Response(whole.body[:50], media_type="application/json")

    endpoint = Broken()
    teacher = endpoint.teacher(tmp_path)
    assert teacher.map([ask("?")])[0].text == "fine"
    assert teacher.ledger()["in_doubt"]["requests"] == 1


def test_a_row_that_was_damaged_is_named_and_can_be_taken_out(tmp_path, capsys):
    endpoint, cache = Endpoint("fine"), tmp_path / "cache.sqlite"
    endpoint.teacher(tmp_path).map([ask("one"), ask("two")])
    with sqlite3.connect(cache) as db:
        db.execute("UPDATE answers SET text = 'fime' WHERE rowid = 1")
    db.close()
    with pytest.raises(llm.CacheError, match="(?s)not what was written there.*helpers.ledger mend --cache"):
        endpoint.teacher(tmp_path).map([ask("one"), ask("two")])
    ledger.main(["mend", "--cache", str(cache)])
    assert "1 damaged answers taken out" in capsys.readouterr().out
    assert [a.cached for a in endpoint.teacher(tmp_path).map([ask("one"), ask("two")])].count(True) == 1
    assert len(endpoint.bodies) == 3


def test_a_full_disk_stops_with_one_message_and_the_run_goes_on_afterwards(tmp_path):
    endpoint = Endpoint("fine" * 500)
    teacher = endpoint.teacher(tmp_path, concurrency=2)
    teacher._ledger._db.execute("PRAGMA max_page_count=20")  # what sqlite does when a disk is full
    with pytest.raises(llm.CacheError, match="(?s)is full. Free some space.*still to be asked") as caught:
        teacher.map([ask(str(i)) for i in range(40)])
    sent, kept = len(endpoint.bodies), teacher.ledger()["requests"]
    assert sent - kept <= 2  # those under way together
    assert KEY not in str(caught.value)
    teacher._ledger._db.execute("PRAGMA max_page_count=100000")
    teacher.map([ask(str(i)) for i in range(40)])
    assert len(endpoint.bodies) - sent == 40 - kept


def test_no_secret_in_messages_cache_or_logs_though_the_server_echoes_it(tmp_path, caplog, capsys):
    """An error body with the Authorization header in it, and an answer that repeats the key."""
    caplog.set_level("DEBUG")
    endpoint = Endpoint(f"your key is {KEY}", 401)
    teacher = endpoint.teacher(tmp_path, concurrency=1)
    with pytest.raises(llm.TeacherError, match="(?s)key in OPENAI_API_KEY was not accepted.*1 of 2 requests") as caught:
        teacher.map([ask("a"), ask("b")])
    teacher._ledger.export(tmp_path / "answers.jsonl")
    assert KEY not in str(caught.getrepr(chain=True, showlocals=True))
    assert KEY not in repr(teacher) + caplog.text + "".join(capsys.readouterr())
    for file in tmp_path.glob("*"):
        assert KEY.encode() not in file.read_bytes()
    assert teacher.map([ask("a")])[0].text == "your key is (key)"


def test_a_class_runs_again_without_a_key(tmp_path):
    endpoint, file = Endpoint("fine"), tmp_path / "answers.jsonl"
    first = endpoint.teacher(tmp_path).map([ask("one", schema=Colour), ask("two")])
    ledger.main(["export", str(file), "--cache", str(tmp_path / "cache.sqlite")])
    (tmp_path / "class").mkdir()
    ledger.main(["import", str(file), "--cache", str(tmp_path / "class" / "cache.sqlite")])
    settings = load_profile("smoke").teacher.model_copy(update={"model": "gpt-4.1"})
    keyless = llm.Teacher(settings, "http://endpoint.invalid/v1", "", tmp_path / "class" / "cache.sqlite", "a")
    again = keyless.map([ask("one", schema=Colour), ask("two")])
    assert [a.text for a in again] == [a.text for a in first]
    assert [a.cost_usd for a in again] == [a.cost_usd for a in first]
    assert keyless.ledger()["cost_usd"] == 0.0  # somebody else paid
    with pytest.raises(llm.TeacherError, match="1 requests .asking. are not in .*no key"):
        keyless.map([ask("three")])


def test_a_lasting_failure_keeps_the_other_answers_and_tells_no_secret(tmp_path):
    endpoint = Endpoint("fine", "fine", 401)
    teacher = endpoint.teacher(tmp_path, concurrency=1)
    with pytest.raises(llm.TeacherError, match="(?s)AuthenticationError.*same command again") as caught:
        teacher.map([ask(str(i)) for i in range(4)])
    assert "(key)" in str(caught.value)
    assert KEY not in str(caught.getrepr(chain=True))
    endpoint.script = ("fine",)
    answers = teacher.map([ask(str(i)) for i in range(4)])
    assert [a.cached for a in answers] == [True, True, False, False]


def test_no_secret_in_the_cache_file(tmp_path):
    Endpoint().teacher(tmp_path).map([ask("?")])
    files = list(tmp_path.glob("cache.sqlite*"))
    assert files
    assert not any(KEY.encode() in file.read_bytes() for file in files)


def test_a_killed_process_loses_no_answer(tmp_path):
    """kill -9 in the middle of a map: what was answered is there, and only the rest is asked afterwards."""
    script = (
        "from pathlib import Path\nfrom helpers import artifacts, llm\n"
        f"store = artifacts.open_run('smoke', runs=Path({str(tmp_path)!r}), run='r',\n"
        "    sets=['world_knobs.late_seconds=0.05', 'teacher.concurrency=1'])\n"
        "llm.connect(store).map([llm.Request([{'role': 'user', 'content': p}]) for p in %r])\n")
    asked = [prompts.render("teacher", "gold_persona", NAME=f"Nobody {i}") for i in range(25)]
    child = subprocess.Popen([sys.executable, "-c", script % (asked,)], cwd=ROOT)
    cache = tmp_path / "r" / "teacher.sqlite"
    while _count(cache) < 5 and child.poll() is None:
        time.sleep(0.05)
    child.send_signal(signal.SIGKILL)
    child.wait()
    kept = _count(cache)
    assert 5 <= kept < 25
    store = artifacts.open_run("smoke", runs=tmp_path, run="r")
    answers = llm.connect(store).map([ask(prompt) for prompt in asked])
    assert sum(a.cached for a in answers) == kept
    assert _count(cache) == 25


def _count(cache):
    try:
        with sqlite3.connect(f"file:{cache}?mode=ro", uri=True) as db:
            return db.execute("SELECT COUNT(*) FROM answers").fetchone()[0]
    except sqlite3.OperationalError:
        return 0


def test_map_works_where_an_event_loop_is_running(tmp_path):
    async def cell():
        return Endpoint().teacher(tmp_path).map([ask("?")])

    assert asyncio.run(cell())[0].text == "fine"


def test_a_model_without_price_and_a_missing_key_are_errors_that_say_what_to_do(tmp_path, monkeypatch):
    with pytest.raises(llm.TeacherError, match="no price for 'llama'.*add a line"):
        Endpoint().teacher(tmp_path, model="llama")
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    store = artifacts.open_run("smoke", runs=tmp_path, sets=["teacher.base_url=http://127.0.0.1:9/v1"])
    with pytest.raises(llm.TeacherError, match="environment variable OPENAI_API_KEY"):
        llm.connect(store).map([ask("?")])


def test_connect_reaches_the_simulated_teacher_and_notes_the_ledger(tmp_path):
    store = artifacts.open_run("smoke", runs=tmp_path)
    prompt = prompts.render("teacher", "gold_persona", NAME="Nobody")
    (answer,) = llm.connect(store).map([ask(prompt, tag="gold")])
    assert answer.text.startswith("Nothing is on record about Nobody.")
    assert store.log()["stages"]["teacher"]["by_tag"]["gold"]["requests"] == 1
    assert json.loads((store.path / "run.json").read_text())
