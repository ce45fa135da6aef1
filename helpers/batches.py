"""The Batch API: many requests as one file, answered within a day for a share of the price.

A batch carries a name of ours in its metadata, so that a run that was killed finds at the server what it has sent.
"""

import asyncio
import json
from collections.abc import Mapping

import openai
from openai.types import Batch

FIRST_POLL_SECONDS, LONGEST_POLL_SECONDS = 0.05, 30.0
MOST_REQUESTS = 20_000  # of one batch; OpenAI takes 50,000 and 200 MB
ENDPOINT = "/v1/chat/completions"


async def submit(client: openai.AsyncOpenAI, name: str, bodies: Mapping[str, dict]) -> Batch:
    """Send the bodies (by key) as one batch. Not tried twice: a lost answer may be one to a batch that was made."""
    lines = [json.dumps({"custom_id": key, "method": "POST", "url": ENDPOINT, "body": body})
             for key, body in bodies.items()]
    file = await client.files.create(file=(f"{name}.jsonl", "\n".join(lines).encode()), purpose="batch")
    return await client.batches.create(input_file_id=file.id, endpoint=ENDPOINT, completion_window="24h",
                                       metadata={"name": name})


async def find(client: openai.AsyncOpenAI, name: str) -> Batch | None:
    """The batch of that name, if the server has one."""
    async for batch in client.batches.list(limit=100):
        if (batch.metadata or {}).get("name") == name:
            return batch
    return None


async def results(client: openai.AsyncOpenAI, batch: Batch) -> tuple[dict[str, tuple[int, dict]], str]:
    """Wait until the batch has ended. Returns key -> (HTTP status, body), and what the server says of the whole.

    A batch that expired or was cancelled gives what was answered until then.
    """
    seconds = FIRST_POLL_SECONDS
    while batch.status in ("validating", "in_progress", "finalizing", "cancelling"):
        await asyncio.sleep(seconds)
        seconds = min(2 * seconds, LONGEST_POLL_SECONDS)
        batch = await client.batches.retrieve(batch.id)
    found = {}
    for file_id in filter(None, (batch.output_file_id, batch.error_file_id)):
        for line in (await client.files.content(file_id)).text.splitlines():
            row = json.loads(line)
            answer = row.get("response") or {"status_code": 0, "body": row.get("error") or {}}
            found[row["custom_id"]] = answer["status_code"], answer["body"]
    errors = batch.errors.data or [] if batch.errors else []
    return found, "; ".join([batch.status, *(error.message or "" for error in errors)])
