"""When to send, and when to send again: limits per minute, and pauses after errors."""

import asyncio
import random
import time
from email.utils import parsedate_to_datetime

import httpx2
import openai

LONGEST_WAIT_SECONDS = 120.0  # a server that wants a longer one ends the run, which can be resumed
RETRIED = (408, 409, 429)  # and 500 or more


class Pace:
    """Spaces requests evenly, so that neither limit (per minute; 0: none) is passed."""

    def __init__(self, requests_per_minute: int, tokens_per_minute: int):
        self._per_request = 60 / requests_per_minute if requests_per_minute else 0.0
        self._per_token = 60 / tokens_per_minute if tokens_per_minute else 0.0
        self._free = [0.0, 0.0]  # when the next request, and the next token, may go
        self._surplus = 0.0  # running mean of tokens beyond those of the prompt, as estimated

    async def turn(self, tokens: int) -> None:
        """Wait until a request of so many prompt tokens may go."""
        now = time.monotonic()
        start = max(now, *self._free)
        self._free = [start + self._per_request, start + self._per_token * (tokens + self._surplus)]
        await asyncio.sleep(start - now)

    def learn(self, tokens: int, used: int) -> None:
        """A request of so many prompt tokens used so many in all: the next ones count on as many more."""
        self._free[1] += self._per_token * (used - tokens - self._surplus)
        self._surplus += 0.1 * (used - tokens - self._surplus)


def wait_seconds(error: Exception, failed: int) -> float | None:
    """As long as the server says, else 0.5, 1, 2 … 8 seconds less up to a quarter; None: do not try again."""
    if isinstance(error, openai.APIStatusError):
        if error.status_code not in RETRIED and error.status_code < 500 or error.code == "insufficient_quota":
            return None
        told = retry_after(error.response.headers)
        if told is not None:
            return told if told <= LONGEST_WAIT_SECONDS else None
    return min(0.5 * 2 ** failed, 8.0) * (1 - random.random() / 4)


def retry_after(headers: httpx2.Headers) -> float | None:
    """Seconds of retry-after-ms, or of retry-after as a number or a date; None without either."""
    try:
        if "retry-after-ms" in headers:
            return max(0.0, float(headers["retry-after-ms"]) / 1000)
        said = headers.get("retry-after", "")
        seconds = float(said) if said[:1].isdigit() else parsedate_to_datetime(said).timestamp() - time.time()
        return max(0.0, seconds)
    except ValueError:
        return None
