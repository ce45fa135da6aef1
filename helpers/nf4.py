"""Four bits a weight: what QLoRA's number format, NF4, makes of a policy and of its verdicts."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from scipy.stats import norm
from torch import Tensor
from tqdm.auto import tqdm

from helpers import models, scoring

BLOCK = 64  # weights that share a scale
TAIL = 0.9677083  # the outermost quantile: with it the 16 levels are about equally often used


def levels() -> Tensor:
    """The 16 values of NF4, float32, -1 to 1: quantiles of a normal distribution, eight of them positive and one 0.

    Source: QLoRA (Dettmers et al., 2023), section 3 and Appendix E.
    """
    above, below = norm.ppf(torch.linspace(TAIL, 0.5, 9)[:-1]), norm.ppf(torch.linspace(TAIL, 0.5, 8)[:-1])
    values = torch.tensor([*-below, 0.0, *above[::-1]])
    return (values / values.max()).float()


def rounded(weight: Tensor, block: int = BLOCK) -> Tensor:
    """The weight after a trip through NF4: each run of `block` values is scaled by its largest, then rounded.

    bitsandbytes rounds the scales too ("double quantisation", 0.4 bits a weight less); that is left out here, for it
    adds next to nothing to the error.
    """
    flat = torch.nn.functional.pad(weight.float().flatten(), (0, -weight.numel() % block)).view(-1, block)
    scale = flat.abs().amax(1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
    of = levels().to(weight.device)
    nearest = torch.bucketize(flat / scale, (of[1:] + of[:-1]) / 2)
    return (of[nearest] * scale).flatten()[:weight.numel()].view_as(weight).to(weight.dtype)


def margins(pairs: pd.DataFrame, adapters: Mapping[str, Path], policy: Any, side: str = "left") -> pd.DataFrame:
    """The pairs with `margin`, and `precision`: the same weights as loaded, computing in bfloat16, kept in NF4.

    pairs: policy_id, head, tail, chosen, rejected. adapters: policy_id -> folder, on top of the base and exact.
    margin: mean log-probability of chosen's tokens minus rejected's, nats; above 0 the verdict is right. A row per
    pair and precision. NF4 is bitsandbytes', with double quantisation, as the policy is loaded for QLoRA.
    """
    parts, groups = [], list(pairs.groupby("policy_id"))
    with tqdm(total=3 * len(groups), desc="scoring in three precisions", unit="policy") as bar, models.one_thread():
        for precision, dtype in (("as loaded", "float32"), ("bfloat16", "bfloat16"), ("NF4", "bfloat16")):
            base, tokenizer = models.load_policy(policy.model_copy(update={"load_in_4bit": precision == "NF4"}))
            for policy_id, rows in groups:
                with models.adapted(base, adapters.get(policy_id, "")) as model:
                    found = _margins(model, tokenizer, rows, policy, dtype, side)
                parts.append(rows.assign(precision=precision, margin=found))
                bar.update()
    return pd.concat(parts, ignore_index=True)


def _margins(model, tokenizer, rows: pd.DataFrame, policy: Any, dtype: str, side: str) -> list[float]:
    prompts = list(zip(rows["head"], rows["tail"], strict=True))
    found = scoring.score_pairs(model, tokenizer, prompts, rows["chosen"].tolist(), rows["rejected"].tolist(), dtype=dtype,
                                max_length=policy.max_length, max_prompt=policy.max_prompt, side=side)
    return (found["logp_chosen"] / found["n_chosen"] - found["logp_rejected"] / found["n_rejected"]).tolist()
