"""Personalizing while decoding, without training: two prompts grow side by side and share every token.

Rules for helpers.sampling.decode over two branches, such as a question with a prefix and without it. Source:
Persona-judge (Zhang et al., Findings of ACL 2025) for the judged token; which branch judges is ours, see below.
"""

from collections.abc import Sequence

import numpy as np
import pandas as pd
from torch import Tensor, where

from helpers import generation, prompts
from helpers.config import Profile
from helpers.sampling import Choose, decode, pick, probabilities

PASSES = {"plain": 1, "self_judged": 2}  # forward passes of the policy for each token


def self_judged(temperature: float, top_p: float = 1.0) -> Choose:
    """One branch drafts a token, the other judges it: the rule of Persona-judge for the next token.

    A drafted token x stays with probability min(1, p_judge(x) / p_draft(x)); else one is drawn from what the judge
    likes more than the draft did. That is speculative sampling, so what comes out follows the *judge* alone. A coin
    therefore says for each token who judges (in the released code the roles change too), and the next token follows
    the mean of the two distributions. Branches that agree give exactly what plain sampling gives.
    """
    def choose(logits: Tensor, draws: Tensor, rows: Tensor) -> Tensor:
        first, second = (probabilities(logits[:, branch], temperature, top_p) for branch in (0, 1))
        swapped = (draws[:, 3] >= 0.5)[:, None]
        draft, judge = where(swapped, second, first), where(swapped, first, second)
        token = pick(draft, draws[:, 0])
        liked, drafted = (p.gather(-1, token[:, None])[:, 0] for p in (judge, draft))
        kept = draws[:, 1] * drafted < liked
        rest = pick((judge - draft).clamp(min=0), draws[:, 2]).clamp(max=logits.shape[-1] - 1)
        return where(kept, token, rest)
    return choose


def write(model, tokenizer, fronts: Sequence[pd.DataFrame], choose: Choose, cfg: Profile, seed: int) -> list[str]:
    """One answer to each question by a rule over several prompts: fronts has the same questions behind each of them."""
    branches = zip(*(generation.fitting(tokenizer, rows, cfg) for rows in fronts), strict=True)
    heading = prompts.load(cfg.policy.templates, "respond_none").literals[0]  # where a policy asks the next question itself
    said = decode(model, tokenizer, list(branches), choose, 1, cfg.generation.max_new_tokens, seed, cfg.responses.batch,
                  f"\n{heading}" if heading else None, cfg.policy.dtype)
    return [text.strip() for (text,) in said]


def passes(tokenizer, texts: Sequence[str], how: str) -> float:
    """Mean forward passes of the policy for an answer, the end token counted; the prompts' own not included."""
    counts = [len(tokenizer(text, add_special_tokens=False)["input_ids"]) + 1 for text in texts]
    return float(np.mean(counts)) * PASSES[how]
