"""The simulated teacher under uvicorn, with books of its own: python teacher_server.py PORT LOG '{"cut": 0.05, …}'

Every attempt is a line of the log: what was asked, HTTP status (0: never answered), tokens, from when until when, and
how many others were under way; `replayed` where an earlier answer was given again, which nobody is billed for; with the
knob `forgetful` none is, as at most sellers. The port (0: any that is free) is printed when it listens.
"""

import hashlib
import json
import socket
import sys
import time
from pathlib import Path

import uvicorn
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.routing import Route

from helpers.config import load_profile
from helpers.world.facts import load_world
from helpers.world.teacher import SimulatedTeacher


class Books:
    """The teacher's endpoint; `log` is written before the answer leaves, as a seller's bill would be."""

    def __init__(self, log: Path, knobs: dict[str, float]):
        self.forgetful = knobs.pop("forgetful", False)
        knobs = load_profile("smoke").world_knobs.model_copy(update=knobs)
        self.teacher, self.log, self.open = SimulatedTeacher(load_world("little"), knobs, 1), log.open("a"), 0
        self.reply, self.teacher.reply = self.teacher.reply, self.note

    async def complete(self, request):
        started, self.open = time.monotonic(), self.open + 1
        try:
            if self.forgetful:
                self.teacher.given.clear()
            response = await self.teacher.complete(request)
            again = "idempotent-replayed" in response.headers
            line = {"status": 0} if response.status_code == 408 else {"status": 200, "replayed": True} if again else self.last
        except ClientDisconnect:  # it gave up before the question was read
            line, response = {"status": 0}, Response()
        finally:
            self.open -= 1
        self.write(line | {"seconds": time.monotonic() - started, "at": time.monotonic(), "open": self.open + 1})
        return response

    def note(self, body, attempt):
        status, answer = self.reply(body, attempt)
        asked = json.dumps([body["messages"], body.get("seed")], sort_keys=True)
        usage = answer.get("usage", {})
        self.last = {"asked": hashlib.sha256(asked.encode()).hexdigest(), "status": status, "attempt": int(attempt),
                     "read": usage.get("prompt_tokens", 0), "written": usage.get("completion_tokens", 0)}
        return status, answer

    def write(self, line):
        print(json.dumps(line), file=self.log, flush=True)


def main(port, log, knobs):
    books = Books(Path(log), json.loads(knobs))
    app = Starlette(routes=[Route("/v1/chat/completions", books.complete, methods=["POST"])])
    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind(("127.0.0.1", int(port)))
    print(listener.getsockname()[1], flush=True)
    uvicorn.Server(uvicorn.Config(app, log_level="warning")).run(sockets=[listener])


if __name__ == "__main__":
    main(*sys.argv[1:])
