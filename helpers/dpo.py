"""DPO in plain torch: the loss, the implicit reward, and rows that hold a prompt once for all its answers.

A row is prompt[:-1] + (last prompt token + answer 1) + (last prompt token + answer 2) ... Every answer's positions restart
where the prompt ends and no answer sees another, so a row gives the same log-probabilities as one row per answer, and the
prompt is computed once.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import cross_entropy, logsigmoid

IGNORE = -100
PLAIN_ATTENTION = 512  # tokens of a row; above it the scores of every pair of tokens would fill the memory


def pack(prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[Sequence[int]]]) -> dict[str, Tensor]:
    """Rows of a batch, padded on the right.

    prompts: n lists of token ids, none empty; answers: for each prompt the token ids of its K answers, end token included.
    Returns, as int64: input_ids, position_ids, segments (0 prompt, 1 ... K answer, -1 padding) and targets (the token
    to predict, or IGNORE), each [n, L]; counts [n, K], the tokens of each answer.
    """
    length = max(row_length(p, a) for p, a in zip(prompts, answers, strict=True))
    batch = {name: np.full((len(prompts), length), fill, dtype=np.int64)
             for name, fill in (("input_ids", 0), ("position_ids", 0), ("segments", -1), ("targets", IGNORE))}
    for i, (prompt, row) in enumerate(zip(prompts, answers, strict=True)):
        end = len(prompt) - 1
        batch["input_ids"][i, :end], batch["segments"][i, :end] = prompt[:-1], 0
        batch["position_ids"][i, :end] = np.arange(end)
        for k, answer in enumerate(row, start=1):
            at = slice(end, end + len(answer))
            batch["input_ids"][i, at] = [prompt[-1], *answer[:-1]]
            batch["position_ids"][i, at] = len(prompt) - 1 + np.arange(len(answer))
            batch["segments"][i, at], batch["targets"][i, at] = k, answer
            end = at.stop
    batch["counts"] = np.array([[len(answer) for answer in row] for row in answers], dtype=np.int64)
    return {name: torch.from_numpy(values) for name, values in batch.items()}


def row_length(prompt: Sequence[int], answers: Sequence[Sequence[int]]) -> int:
    """Tokens of the row that holds a prompt and its answers."""
    return len(prompt) - 1 + sum(map(len, answers))


def budget_batches(lengths: Sequence[int], token_budget: int) -> list[np.ndarray]:
    """Positions of the rows of each batch, longest rows first; a padded batch has at most token_budget tokens.

    Neighbours in length share a batch, so that little is padding. A row longer than the budget is a batch of its own.
    """
    order, batches, start = np.argsort(-np.asarray(lengths), kind="stable"), [], 0
    while start < len(order):
        fits = max(1, token_budget // max(1, lengths[order[start]]))
        batches.append(order[start:start + fits])
        start += fits
    return batches


def answer_mask(segments: Tensor) -> Tensor:
    """Who may look at whom, bool [n, 1, L, L]: backwards only, at the prompt and at one's own answer."""
    mine, theirs = segments[:, :, None], segments[:, None, :]
    causal = torch.ones(segments.shape[1:] * 2, dtype=torch.bool, device=segments.device).tril()
    return (causal & ((theirs == 0) | (theirs == mine)))[:, None]


def answer_logps(model: torch.nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Sum of the log-probabilities of each answer's tokens, nats, float32 [n, K].

    batch: what `pack` returned. Only the answers' positions go through the head.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    with _attention(batch["input_ids"]):
        hidden = base.get_decoder()(input_ids=batch["input_ids"], position_ids=batch["position_ids"],
                                    attention_mask=answer_mask(batch["segments"]), use_cache=False).last_hidden_state
    at = batch["targets"] != IGNORE
    token_logps = -cross_entropy(base.get_output_embeddings()(hidden[at]).float(), batch["targets"][at], reduction="none")
    n, k = batch["counts"].shape
    owner = (batch["segments"] - 1 + k * torch.arange(n, device=at.device)[:, None])[at]
    return token_logps.new_zeros(n * k).index_add(0, owner, token_logps).view(n, k)


def pair_logps(model: torch.nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Sums of chosen and rejected, nats [n], and their token counts [n], of a batch with two answers a row."""
    (chosen, rejected), (n_chosen, n_rejected) = answer_logps(model, batch).unbind(1), batch["counts"].unbind(1)
    return chosen, rejected, n_chosen, n_rejected


def implicit_reward(logps: Tensor, ref_logps: Tensor, beta: float) -> Tensor:
    """Reward that a policy implies, up to a term of the prompt alone [n] (DPO, Eq. 5)."""
    return beta * (logps - ref_logps)


def dpo_loss(chosen: Tensor, rejected: Tensor, ref_chosen: Tensor, ref_rejected: Tensor, beta: float) -> Tensor:
    """Loss of each pair [n] from sums of log-probabilities [n]; its gradient raises chosen above rejected.

    It pursues WikiPersona's Eq. 1 (prompts without prefix) or Eq. 2 (the prefix stands for the person p), by Eq. 7 of
    Direct Preference Optimization (Rafailov et al., 2023).
    """
    margin = implicit_reward(chosen, ref_chosen, beta) - implicit_reward(rejected, ref_rejected, beta)
    return -logsigmoid(margin)  # DPO Eq. 7: -log sigma(beta log-ratio of y_w - beta log-ratio of y_l)


def check_model(model: torch.nn.Module) -> None:
    """Raises ValueError for a model whose answers these rows would get wrong."""
    config = model.config.get_text_config()
    attention = getattr(config, "_attn_implementation", None)
    if attention != "sdpa":
        raise ValueError(f"attn_implementation is {attention!r}; shared rows need 'sdpa' (boolean 4-D masks). "
                         "Load the model with helpers.models.load_policy.")
    for name in ("final_logit_softcapping", "logit_scale", "logits_scaling", "output_multiplier", "lm_head_multiplier"):
        if getattr(config, name, None) not in (None, 1.0):
            raise ValueError(f"{model.config.model_type} changes its logits after the head ({name}); "
                             "helpers.dpo reads the head alone. Choose another policy.path.")


def _attention(input_ids: Tensor) -> AbstractContextManager:
    """On a CPU, torch's fused attention is slow to differentiate: short rows train a third faster with the plain one."""
    plain = input_ids.device.type == "cpu" and torch.is_grad_enabled() and input_ids.shape[1] <= PLAIN_ATTENTION
    return sdpa_kernel(SDPBackend.MATH) if plain else nullcontext()
