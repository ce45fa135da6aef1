"""When a request is sent again, and when no more."""

import time

import httpx2
import pytest
from endpoint import Endpoint, ask
from starlette.responses import JSONResponse

from helpers import llm, pacing


def test_a_rate_limit_is_waited_out(tmp_path):
    endpoint = Endpoint(429, 429, "fine")
    (answer,) = endpoint.teacher(tmp_path).map([ask("?")])
    assert answer.text == "fine"
    assert len(endpoint.bodies) == 3


@pytest.mark.parametrize(("headers", "seconds"), [
    ({"retry-after": "7"}, 7), ({"retry-after": "0"}, 0), ({"retry-after-ms": "1500"}, 1.5), ({}, None),
    ({"retry-after": "soon"}, None), ({"retry-after": "Fri, 01 Jan 2038 00:00:10 GMT"}, 10)])
def test_retry_after_is_read_as_seconds_milliseconds_or_a_date(headers, seconds, monkeypatch):
    monkeypatch.setattr(pacing.time, "time", lambda: 2145916800.0)  # 2038-01-01 00:00:00 GMT
    assert pacing.retry_after(httpx2.Headers(headers)) == seconds


def test_the_pause_is_the_servers_and_not_ours(tmp_path):
    """Ours would be half a second at least; the server says 0.01."""
    began = time.monotonic()
    Endpoint(429, 500, 429, "fine").teacher(tmp_path).map([ask("?")])
    assert time.monotonic() - began < 0.75


def test_an_account_without_credit_is_not_asked_again(tmp_path):
    class Empty(Endpoint):
        async def answer(self, request):
            self.bodies.append(await request.json())
            return JSONResponse({"error": {"message": "quota", "code": "insufficient_quota"}}, 429)

    endpoint = Empty()
    with pytest.raises(llm.TeacherError, match="(?s)RateLimitError.*out of credit"):
        endpoint.teacher(tmp_path).map([ask("?")])
    assert len(endpoint.bodies) == 1
