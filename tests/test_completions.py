"""What is sent, and what is made of an answer: typed outcomes, schemas in words, one repair."""

import pytest
from endpoint import Colour, Endpoint, ask
from starlette.responses import JSONResponse

from helpers import judging, prompts


def test_an_answer_is_parsed_by_its_schema_even_inside_a_fence(tmp_path):
    endpoint = Endpoint('```json\n{"colour": "red"}\n```')
    (answer,) = endpoint.teacher(tmp_path).map([ask("?", schema=Colour)])
    assert (answer.outcome, answer.parsed) == ("ok", Colour(colour="red"))
    assert endpoint.bodies[0]["response_format"]["json_schema"]["schema"]["additionalProperties"] is False


@pytest.mark.parametrize(("endpoint", "outcome"), [
    (Endpoint('{"colour": "re'), "unparsable"),
    (Endpoint('{"shade": "red"}'), "unparsable"),
    (Endpoint("red"), "unparsable"),
    (Endpoint(""), "unparsable"),
    (Endpoint('{"colour": "red"}', finish="length"), "truncated"),
    (Endpoint('{"colour": "red"}', finish="content_filter"), "refused"),
    (Endpoint(None, refusal="I would rather not."), "refused"),
])
def test_a_bad_answer_is_an_outcome_and_is_not_asked_for_again(tmp_path, endpoint, outcome):
    teacher = endpoint.teacher(tmp_path)
    for _ in range(2):
        (answer,) = teacher.map([ask("?", schema=Colour)])
        assert (answer.outcome, answer.parsed) == (outcome, None)
    assert len(endpoint.bodies) == 1


class NoSchemas(Endpoint):
    """A server that turns response_format down, as several do."""

    async def answer(self, request):
        if "response_format" in await request.json():
            self.turned_down = getattr(self, "turned_down", 0) + 1
            return JSONResponse({"error": {"message": "This response_format type is unavailable now"}}, 400)
        return await super().answer(request)


def test_a_server_without_schemas_is_told_in_words_and_repairs_once(tmp_path):
    endpoint = NoSchemas("It is red.", '{"colour": "red"}')
    teacher = endpoint.teacher(tmp_path, concurrency=1)
    (answer,) = teacher.map([ask("?", schema=Colour, tag="judge")])
    assert (answer.outcome, answer.parsed) == ("ok", Colour(colour="red"))
    assert answer.cost_usd == pytest.approx(2 * 0.0028)  # both were paid for
    first, repair = (body["messages"] for body in endpoint.bodies)
    assert first[0]["role"] == "system"
    assert '"colour"' in first[0]["content"]
    assert [m["role"] for m in repair] == ["system", "user", "assistant", "user"]
    assert repair[2]["content"] == "It is red."
    assert set(teacher.ledger()["by_tag"]) == {"judge", "judge repair"}
    # a rerun, even by a client that does not know of the fallback yet, gives the same and sends nothing
    again = endpoint.teacher(tmp_path)
    assert again.map([ask("?", schema=Colour, tag="judge")])[0].parsed == Colour(colour="red")
    assert (len(endpoint.bodies), endpoint.turned_down) == (2, 1)


def test_an_answer_that_does_not_fit_after_the_repair_stays_unparsable(tmp_path):
    endpoint = Endpoint("red", "still red")
    (answer,) = endpoint.teacher(tmp_path, structured="prompt").map([ask("?", schema=Colour)])
    assert (answer.outcome, answer.parsed, len(endpoint.bodies)) == ("unparsable", None, 2)


def test_refused_and_truncated_answers_are_not_repaired_and_are_counted(tmp_path):
    endpoint = Endpoint("no", refusal="I would rather not.")
    teacher = endpoint.teacher(tmp_path, structured="prompt")
    assert teacher.map([ask("?", schema=Colour)])[0].outcome == "refused"
    endpoint.refusal, endpoint.finish = None, "length"
    assert teacher.map([ask("??", schema=Colour)])[0].outcome == "truncated"
    assert len(endpoint.bodies) == 2
    assert teacher.ledger()["outcomes"] == {"refused": 1, "truncated": 1}


def test_the_constant_part_of_every_prompt_comes_first():
    """Servers that cache prompts charge less for a beginning that they know."""
    for name in ("personas", "demographics", "personal_questions", "divergent_questions", "infer_persona", "gold_persona"):
        literals = prompts.load("teacher", name).literals
        assert len(literals[0]) > 0.6 * sum(map(len, literals)), name
    one, two = (judging.request([judging.Match("p", who, "q", "?", 1, "a", "b", "a")], {"a": "x", "b": "y"}, 0).messages
                for who in ("Ann", "Bob"))
    assert one[:3] == two[:3]
    assert [message["role"] for message in one] == ["system", "user", "assistant", "user"]
