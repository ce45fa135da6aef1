"""Files and batches of the simulated teacher: the part of the OpenAI API that `teacher.batch_api` needs.

A batch is worked on right after it was made, line by line, and everything is held in memory: it ends with the
process. Its lines meet the same weather (429, 500) as other requests, and are then in the error file.
"""

import asyncio
import json
from collections.abc import Callable
from email.parser import BytesParser
from itertools import count

from starlette.background import BackgroundTask
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route


class Batches:
    """reply: (body of a request, attempt) -> (HTTP status, body of the answer); status 0 for none at all."""

    def __init__(self, reply: Callable[[dict, str], tuple[int, dict]]):
        self.reply, self.files, self.batches, self.numbers = reply, {}, {}, count(1)

    def routes(self, root: str) -> list[Route]:
        """Of files and batches below `root`, which ends in /v1."""
        return [Route(f"{root}/files", self.upload, methods=["POST"]),
                Route(f"{root}/files/{{id}}/content", self.content),
                Route(f"{root}/batches", self.create, methods=["POST"]),
                Route(f"{root}/batches", self.list),
                Route(f"{root}/batches/{{id}}", self.retrieve)]

    async def upload(self, request: Request) -> JSONResponse:
        """A multipart form with the fields purpose and file."""
        head = f"Content-Type: {request.headers['content-type']}\r\n\r\n".encode()
        form = BytesParser().parsebytes(head + await request.body())
        data = next(part.get_payload(decode=True) for part in form.get_payload() if part.get_filename())
        return JSONResponse(self._file(data))

    async def content(self, request: Request) -> Response:
        found = self.files.get(request.path_params["id"])
        return Response(found, media_type="application/jsonl") if found is not None else _missing(request)

    async def create(self, request: Request) -> JSONResponse:
        asked = await request.json()
        if asked["input_file_id"] not in self.files:
            return _missing(request)
        batch = {"id": f"batch-{next(self.numbers)}", "object": "batch", "status": "in_progress", "created_at": 0,
                 **{name: asked[name] for name in ("endpoint", "input_file_id", "completion_window", "metadata")}}
        self.batches[batch["id"]] = batch
        return JSONResponse(dict(batch), background=BackgroundTask(self._work, batch))

    async def list(self, request: Request) -> JSONResponse:
        return JSONResponse({"object": "list", "data": list(self.batches.values())[::-1], "has_more": False})

    async def retrieve(self, request: Request) -> JSONResponse:
        found = self.batches.get(request.path_params["id"])
        return JSONResponse(found) if found else _missing(request)

    async def _work(self, batch: dict) -> None:
        done, failed = [], []
        for line in self.files[batch["input_file_id"]].decode().splitlines():
            row = json.loads(line)
            status, body = self.reply(row["body"], batch["id"])
            answered = {"status_code": status, "request_id": "simulated", "body": body} if status else None
            error = None if status else {"code": "batch_expired", "message": "not answered in time"}
            row = {"id": "simulated", "custom_id": row["custom_id"], "response": answered, "error": error}
            (done if status == 200 else failed).append(json.dumps(row))
            await asyncio.sleep(0)  # other requests are answered meanwhile
        for name, rows in (("output_file_id", done), ("error_file_id", failed)):
            batch[name] = self._file("\n".join(rows).encode())["id"] if rows else None
        batch["status"] = "completed"

    def _file(self, data: bytes) -> dict:
        made = {"id": f"file-{next(self.numbers)}", "object": "file", "bytes": len(data), "created_at": 0,
                "filename": "lines.jsonl", "purpose": "batch", "status": "processed"}
        self.files[made["id"]] = data
        return made


def _missing(request: Request) -> JSONResponse:
    return JSONResponse({"error": {"message": f"nothing at {request.url.path}", "type": "simulated"}}, 404)
