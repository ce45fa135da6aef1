"""An OpenAI-compatible endpoint at the edge of a test, and what it is asked."""

import httpx2
from pydantic import BaseModel, ConfigDict
from starlette.applications import Starlette
from starlette.responses import JSONResponse
from starlette.routing import Route

from helpers import llm
from helpers.config import load_profile

KEY = "sk-very-secret-0123456789"


class Colour(BaseModel):
    model_config = ConfigDict(extra="forbid")
    colour: str


class Endpoint:
    """Counts its calls, answers from a script."""

    def __init__(self, *script, finish="stop", refusal=None, usage=(1000, 100)):
        self.script, self.finish, self.refusal, self.usage, self.bodies = script, finish, refusal, usage, []

    async def answer(self, request):
        self.bodies.append(await request.json())
        step = self.script[min(len(self.bodies), len(self.script)) - 1] if self.script else "fine"
        if isinstance(step, int):
            return JSONResponse({"error": {"message": f"no, {request.headers['authorization']}"}}, step,
                                headers={"retry-after": "0.01"})
        text = step(self.bodies[-1]) if callable(step) else step
        message = {"role": "assistant", "content": text, "refusal": self.refusal}
        usage = {"prompt_tokens": self.usage[0], "completion_tokens": self.usage[1],
                 "total_tokens": sum(self.usage)}
        choice = {"index": 0, "finish_reason": self.finish, "message": message}
        return JSONResponse({"id": "x", "object": "chat.completion", "created": 0, "model": "m",
                             "choices": [choice], "usage": usage})

    def teacher(self, folder, model="gpt-4.1", run="a", record=None, **changes):
        app = Starlette(routes=[Route("/v1/chat/completions", self.answer, methods=["POST"])])
        settings = load_profile("smoke").teacher.model_copy(update={"model": model, **changes})
        return llm.Teacher(settings, "http://endpoint.invalid/v1", KEY, folder / "cache.sqlite", run,
                           httpx2.ASGITransport(app=app), record)


def ask(text, **changes):
    return llm.Request([{"role": "user", "content": text}], **changes)
