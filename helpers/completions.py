"""One chat completion: the request as it is sent, and the answer as it is read."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace

from pydantic import BaseModel, ValidationError

from helpers.ledger import Paid

MAX_ANSWER_TOKENS = 2048
OUTCOMES = {"refusal": "refused", "content_filter": "refused", "length": "truncated"}
SHAPE = "Answer with one JSON object that fits this JSON schema, and with nothing else:\n"
REPAIR = "That does not fit the JSON schema ({error}). Give the same answer as JSON that fits, and nothing else."


@dataclass(frozen=True)
class Request:
    """One chat completion. To ask the same again, change the seed: the cache gives the first answer else.

    Put what is the same in all requests first: servers that cache prompts charge less for a beginning they know.
    """

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


def body(request: Request, how: str, model: str, temperature: float) -> dict:
    """The request as it is sent. how: "schema", or "prompt" for a server that knows no schemas."""
    made = {"model": model, "messages": list(request.messages), "temperature": temperature,
            "seed": request.seed, "max_completion_tokens": MAX_ANSWER_TOKENS}
    if request.schema and how == "schema":
        shape = {"name": request.schema.__name__, "schema": request.schema.model_json_schema()}
        made["response_format"] = {"type": "json_schema", "json_schema": shape | {"strict": True}}
    elif request.schema:
        made["messages"] = _told(request)
    return made


def prompt_tokens(request: Request) -> int:
    """About the tokens of the prompt: four characters each."""
    return sum(len(message["content"]) for message in request.messages) // 4 + 1


def key(canonical: str) -> str:
    """What the answer to a request is kept under."""
    return hashlib.sha256(canonical.encode()).hexdigest()


def answer(paid: Paid, schema: type[BaseModel] | None, cached: bool) -> Answer:
    """A bought answer, read."""
    parsed, outcome = parse(paid.text, paid.finish, schema)
    return Answer(paid.text, parsed, outcome, paid.prompt_tokens, paid.completion_tokens, paid.cost_usd, cached)


def parse(text: str, finish: str, schema: type[BaseModel] | None) -> tuple[BaseModel | None, str]:
    """A typed outcome: an answer that breaks its schema is an outcome, not an exception, and is not guessed at."""
    outcome = OUTCOMES.get(finish, "ok" if text.strip() else "unparsable")
    if outcome != "ok" or not schema:
        return None, outcome
    try:
        return schema.model_validate_json(text[text.find("{"):text.rfind("}") + 1]), "ok"
    except ValidationError:
        return None, "unparsable"


def repair(request: Request, answer: Answer) -> Request:
    """The request once more, with the answer that did not fit and what is wrong with it."""
    try:
        request.schema.model_validate_json(answer.text)
        error = "there is more than the JSON"
    except ValidationError as broken:
        error = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in broken.errors()[:3])
    turns = [{"role": "assistant", "content": answer.text},
             {"role": "user", "content": REPAIR.format(error=error)}]
    return replace(request, messages=[*request.messages, *turns], tag=f"{request.tag} repair")


def _told(request: Request) -> list[dict[str, str]]:
    """The messages with the schema in words, at the end of the system message: the constant part stays first."""
    shape = SHAPE + json.dumps(request.schema.model_json_schema(), sort_keys=True)
    first, *rest = request.messages
    if first["role"] == "system":
        return [{"role": "system", "content": f"{first['content']}\n\n{shape}"}, *rest]
    return [{"role": "system", "content": shape}, *request.messages]
