"""The Batch API switch, against the files and batches of the simulated teacher."""

import httpx2
import pytest
from starlette.applications import Starlette

from helpers import artifacts, judging, llm, prompts
from helpers.config import load_profile
from helpers.world.batches import Batches
from helpers.world.facts import load_world
from helpers.world.teacher import SimulatedTeacher

CFG = load_profile("smoke")


class Seller:
    """The simulated teacher behind the Batch API, with its books: every line that was put to it."""

    def __init__(self, reply=None, **knobs):
        knobs = CFG.world_knobs.model_copy(update=knobs)
        self.reply = reply or SimulatedTeacher(load_world("little"), knobs, 1).reply
        self.lines, self.batches = [], Batches(self.note)

    def note(self, body, attempt):
        status, answer = self.reply(body, attempt)
        self.lines.append((attempt, body["messages"][-1]["content"], status))
        return status, answer

    def client(self, folder, **changes):
        settings = CFG.teacher.model_copy(update={"model": "gpt-4.1", "batch_api": True, "max_retries": 3, **changes})
        transport = httpx2.ASGITransport(app=Starlette(routes=self.batches.routes("/v1")))
        return llm.Teacher(settings, "http://seller.invalid/v1", "a key", folder / "c.sqlite", "r", transport)


def requests(n):
    match = judging.Match("p", "Nobody", "q", "What now?", 1, "a", "b", "a")
    return [judging.request([match], {"a": f"answer {i}", "b": "another"}, 0) for i in range(n)]


def test_the_judge_is_asked_in_one_batch_for_half_the_price(tmp_path):
    seller = Seller()
    teacher = seller.client(tmp_path)
    answers = teacher.map(requests(12))
    assert [answer.outcome for answer in answers] == ["ok"] * 12
    assert {attempt for attempt, *_ in seller.lines} == {"batch-2"}  # file-1, batch-2
    for answer in answers:  # gpt-4.1 costs $2 and $8 a million
        assert answer.cost_usd == pytest.approx(0.5 * (answer.prompt_tokens * 2e-6 + answer.completion_tokens * 8e-6))
    assert all(answer.cached for answer in teacher.map(requests(12)))
    assert len(seller.lines) == 12


def test_the_switch_works_in_a_run_of_the_little_world(tmp_path):
    store = artifacts.open_run("smoke", runs=tmp_path, sets=["teacher.batch_api=true"])
    gold = llm.Request([{"role": "user", "content": prompts.render("teacher", "gold_persona", NAME="Nobody")}])
    answers = llm.connect(store).map([*requests(3), gold])
    assert [answer.outcome for answer in answers] == ["ok"] * 4


def test_other_questions_do_not_wait_for_a_batch(tmp_path):
    prompt = prompts.render("teacher", "gold_persona", NAME="Nobody")
    with pytest.raises(llm.TeacherError, match="NotFoundError"):  # this seller sells batches alone
        Seller().client(tmp_path).map([llm.Request([{"role": "user", "content": prompt}], tag="personas")])


def test_lines_that_fail_go_into_the_next_batch_and_no_answered_one_does(tmp_path):
    seller = Seller(rate_limited=0.3, errors_500=0.2)
    teacher = seller.client(tmp_path, max_retries=20)
    assert len(teacher.map(requests(30))) == 30
    paid = [prompt for _, prompt, status in seller.lines if status == 200]
    assert len(paid) == len(set(paid)) == 30
    assert len({attempt for attempt, *_ in seller.lines}) > 1
    assert teacher.ledger()["requests"] == 30


def test_a_lasting_failure_ends_with_the_complaint(tmp_path):
    seller = Seller(rate_limited=1.0)
    with pytest.raises(llm.TeacherError, match="(?s)4 batches without an answer: 429.*simulated teacher's limit"):
        seller.client(tmp_path).map(requests(2))
    assert len(seller.lines) == 2 * 4  # the first and three retries


def test_a_request_that_cannot_be_answered_ends_it_and_the_others_are_kept(tmp_path):
    bad = llm.Request([{"role": "user", "content": "Tell me a joke."}], tag="judge")
    teacher = Seller().client(tmp_path)
    with pytest.raises(llm.TeacherError, match="(?s)in a batch: 400.*simulated teacher knows.*1 of 4 requests"):
        teacher.map([*requests(3), bad])
    assert all(answer.cached for answer in teacher.map(requests(3)))


def test_a_batch_takes_only_as_many_as_the_budget_has_room_for(tmp_path):
    """Half of 2048 tokens x $8e-6 is 0.0082, and to read under 4,000 bytes at half of $2e-6 0.004: at most 0.0122,
    while an answer costs about 0.0011. Out of 0.03 two or three are asked at first, and in the end about fifteen."""
    seller = Seller()
    teacher = seller.client(tmp_path, budget_usd=0.03)
    with pytest.raises(llm.BudgetExceeded):
        teacher.map(requests(60))
    first = [line for line in seller.lines if line[0] == seller.lines[0][0]]
    assert 2 <= len(first) <= 3
    assert len(seller.lines) > 6
    assert 0.015 < teacher.ledger()["cost_usd"] <= 0.03
    seller.client(tmp_path, budget_usd=1.0).map(requests(60))
    assert len(seller.lines) == 60  # nothing twice


def test_a_batch_that_was_sent_before_a_kill_is_found_again_and_not_sent_twice(tmp_path, monkeypatch):
    seller = Seller()

    async def killed(client, batch):
        raise KeyboardInterrupt  # nothing after the batch was made is done, as at a kill

    with monkeypatch.context() as patched:
        patched.setattr(llm.batches, "results", killed)
        with pytest.raises(KeyboardInterrupt):
            seller.client(tmp_path).map(requests(5))
    assert len(seller.lines) == 5
    answers = seller.client(tmp_path).map(requests(5))
    assert [answer.outcome for answer in answers] == ["ok"] * 5
    assert len(seller.lines) == 5


def test_a_batch_that_was_sent_is_collected_even_if_batches_are_off_by_then(tmp_path, monkeypatch):
    seller = Seller()

    async def killed(client, batch):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(llm.batches, "results", killed)
        with pytest.raises(KeyboardInterrupt):
            seller.client(tmp_path).map(requests(5))
    assert len(seller.client(tmp_path, batch_api=False).map(requests(5))) == 5
    assert len(seller.lines) == 5


def test_a_batch_that_was_never_sent_is_let_go_of(tmp_path, monkeypatch):
    seller = Seller()

    async def killed(client, name, bodies):
        raise KeyboardInterrupt  # set aside, and then gone

    with monkeypatch.context() as patched:
        patched.setattr(llm.batches, "submit", killed)
        with pytest.raises(KeyboardInterrupt):
            seller.client(tmp_path).map(requests(5))
    teacher = seller.client(tmp_path)
    teacher.map(requests(5))
    assert len(seller.lines) == 5
    assert teacher.ledger()["in_doubt"]["requests"] == 0


def test_a_server_that_knows_no_schemas_is_told_in_words_in_the_next_batch(tmp_path):
    simulated = SimulatedTeacher(load_world("little"), CFG.world_knobs, 1)

    def reply(body, attempt):
        if "response_format" in body:
            return 400, {"error": {"message": "unknown field response_format"}}
        return simulated.reply(body, attempt)

    seller = Seller(reply)
    assert [answer.outcome for answer in seller.client(tmp_path).map(requests(4))] == ["ok"] * 4
    assert [status for *_, status in seller.lines] == [400] * 4 + [200] * 4


def test_lines_without_an_answer_in_time_are_sent_again(tmp_path):
    seller = Seller(stalled=0.5)
    assert len(seller.client(tmp_path, max_retries=20).map(requests(6))) == 6
    assert 0 in {status for *_, status in seller.lines}
