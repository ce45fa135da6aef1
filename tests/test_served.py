"""A server of the tiny policy, over HTTP: the same protocol as vLLM's, the answers really sampled."""

import threading
import time
from functools import partial

import pytest
import uvicorn
from starlette.applications import Starlette
from starlette.responses import JSONResponse
from starlette.routing import Route

from helpers import responses, sampling, served

SETTINGS = {"temperature": 1.0, "top_p": 0.9, "max_new_tokens": 12, "batch": 8}


class Server:
    """GET /v1/models and POST /v1/completions on a free port of this machine."""

    def __init__(self, loaded, names=("tiny",)) -> None:
        self.loaded, self.names, self.asked = loaded, names, []
        app = Starlette(routes=[Route("/v1/models", self.models), Route("/v1/completions", self.complete, methods=["POST"])])
        self.server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="critical", lifespan="off", ws="none"))

    def __enter__(self) -> "Server":
        self.thread = threading.Thread(target=self.server.run)
        self.thread.start()
        while not self.server.started:
            time.sleep(0.01)
        self.url = f"http://127.0.0.1:{self.server.servers[0].sockets[0].getsockname()[1]}/v1"
        return self

    def __exit__(self, *_) -> None:
        self.server.should_exit = True
        self.thread.join()

    async def models(self, request):
        return JSONResponse({"object": "list", "data": [{"id": n, "object": "model", "created": 0, "owned_by": "me"}
                                                        for n in self.names]})

    async def complete(self, request):
        body = await request.json()
        self.asked.append(body | {"key": request.headers["authorization"]})
        (texts,) = sampling.generate(*self.loaded, [body["prompt"]], body["n"], body["temperature"], body["top_p"],
                                     body["max_tokens"], body["seed"], 8, body.get("stop"), "float32")
        choices = [{"index": i, "text": text, "finish_reason": "stop", "logprobs": None} for i, text in enumerate(texts)]
        return JSONResponse({"id": "1", "object": "text_completion", "created": 0, "model": body["model"],
                             "choices": choices[::-1]})


@pytest.fixture
def server(loaded):
    with Server(loaded) as running:
        yield running


def test_samples_come_back_in_the_order_of_the_prompts(server, loaded, monkeypatch):
    monkeypatch.delenv("POLICY_API_KEY", raising=False)
    monkeypatch.setenv("OPENAI_API_KEY", "secret")  # somebody else's
    prompts = ["The", "Question: a fox?\nAnswer:", "The"]
    texts = served.generate(server.url, "tiny", prompts, n=2, seed=3, **SETTINGS)
    assert sorted((body["prompt"], body["n"]) for body in server.asked) == [("Question: a fox?\nAnswer:", 2), ("The", 4)]
    assert {body["key"] for body in server.asked} == {"Bearer none"}
    (four,) = sampling.generate(*loaded, ["The"], 4, 1.0, 0.9, 12, served._seed(3, "The"), 8, None, "float32")
    assert texts[0] + texts[2] == four
    assert served.generate(server.url, "tiny", prompts, n=2, seed=3, **SETTINGS) == texts
    assert served.generate(server.url, "tiny", prompts, n=2, seed=4, **SETTINGS) != texts
    cut = served.generate(server.url, "tiny", prompts, n=2, seed=3, stop="e", **SETTINGS)
    assert cut == [[text.split("e")[0] for text in own] for own in texts]


def test_one_model_may_have_any_name_of_several_one_must_fit(loaded):
    with Server(loaded) as one:
        assert served.generate(one.url, "data/models/base", ["The"], n=1, seed=1, **SETTINGS)
        assert one.asked[0]["model"] == "tiny"
    with (Server(loaded, ("a", "b")) as two, pytest.raises(served.ServerError, match="serves a, b, and none is c")):
        served.generate(two.url, "c", ["The"], n=1, seed=1, **SETTINGS)


def test_no_server_says_what_to_do(monkeypatch):
    monkeypatch.setattr(served, "RETRIES", 0)
    with pytest.raises(served.ServerError, match="vllm serve owner/model"):
        served.generate("http://127.0.0.1:9/v1", "owner/model", ["The"], n=1, seed=1, **SETTINGS)


def test_one_setting_sends_the_responses_to_the_server(server, profile, policy, monkeypatch):
    """The policy is then not loaded here at all."""
    monkeypatch.setattr("helpers.models.load_policy", lambda *_: pytest.fail("loaded"))
    cfg = profile.model_copy(update={"responses": profile.responses.model_copy(update={"base_url": server.url})})
    say = responses.speaker(cfg)
    assert isinstance(say, partial)
    ((text,),) = say(["The"], n=1, seed=1, **SETTINGS)
    assert isinstance(text, str)
    assert len(server.asked) == 1
