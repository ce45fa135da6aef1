"""Sampling from a policy that an OpenAI-compatible server holds (vLLM, llama.cpp, …), in its completions protocol."""

import hashlib
import os
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import openai

TIMEOUT_SECONDS = 600.0
RETRIES = 5


class ServerError(RuntimeError):
    """The server does not answer, or not what was asked for; says what to do."""


def generate(base_url: str, policy: str, prompts: Sequence[str], n: int, temperature: float, top_p: float,
             max_new_tokens: int, seed: int, batch: int, stop: str | None = None) -> list[list[str]]:
    """n sampled continuations of each prompt, as `sampling.generate`; a prompt is sent once, however often it occurs.

    policy: the name of the model; a server that has only one may call it otherwise. batch: samples under way at a
    time. What a server does with a seed is its own affair. A key, if it wants one, is read from POLICY_API_KEY.
    """
    wanted, batch = Counter(prompts), max(1, batch // n)
    with openai.OpenAI(api_key=os.environ.get("POLICY_API_KEY") or "none", base_url=base_url, timeout=TIMEOUT_SECONDS,
                       max_retries=RETRIES) as client, ThreadPoolExecutor(min(batch, 64)) as pool:
        try:
            ask = partial(_ask, client, _name(client, policy), temperature=temperature, top_p=top_p,
                          max_tokens=max_new_tokens, stop=stop)
            said = list(pool.map(lambda prompt: ask(prompt, n * wanted[prompt], _seed(seed, prompt)), wanted))
        except openai.OpenAIError as error:
            raise ServerError(f"the policy's server at {base_url}: {type(error).__name__}: {error}\nStart one, such as "
                              f"`vllm serve {policy}`, or sample here: responses.base_url=\"\"") from error
    left = dict(zip(wanted, map(iter, said), strict=True))
    return [[next(left[prompt]) for _ in range(n)] for prompt in prompts]


def _ask(client: openai.OpenAI, model: str, prompt: str, n: int, seed: int, **settings) -> list[str]:
    found = client.completions.create(model=model, prompt=prompt, n=n, seed=seed, **settings)
    texts = [choice.text for choice in sorted(found.choices, key=lambda choice: choice.index)]
    if len(texts) != n:
        raise ServerError(f"{client.base_url} sent {len(texts)} texts where n = {n}; this needs a server that knows `n`")
    return texts


def _name(client: openai.OpenAI, policy: str) -> str:
    """What the server calls the policy."""
    served = [model.id for model in client.models.list()]
    if policy in served:
        return policy
    if len(served) != 1:
        raise ServerError(f"{client.base_url} serves {', '.join(served) or 'nothing'}, and none is {policy}: "
                          "put one of these names into policy.path")
    return served[0]


def _seed(seed: int, prompt: str) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed}\0{prompt}".encode()).digest()[:4], "big") >> 1
