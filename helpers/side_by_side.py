"""Answers side by side, with the words marked that the persona explains (paper Appendix N, Tables 14 and 15)."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import jinja2
import numpy as np
import pandas as pd
import torch
from IPython.display import HTML

from helpers import DATA, chat, models, scoring, settings
from helpers.artifacts import Store, atomic
from helpers.config import Profile

END = "(end)"
FULL_SHADE_NATS = 4.0  # a word that moved so far is shaded most
UNDERLINE_NATS = 1.0  # and one from here on is underlined too, so that colour is not needed


def explain(generations: pd.DataFrame, asked: pd.DataFrame, prefix: str, prefixes: pd.DataFrame,
            adapters: Mapping[str, Path], cfg: Profile) -> pd.DataFrame:
    """The answers with `words`: what the prefix does to each word, by the policy that wrote it (word_deltas).

    Every answer is read twice, behind the prefix and without, whatever stood there when it was written.
    """
    told = generations.drop(columns="prefix").merge(asked[["persona_id", "question_id", "prompt"]])
    (base, tokenizer), parts = models.load_policy(cfg.policy), []
    for policy_id, rows in told.groupby("policy_id"):
        both = [settings.ask(rows, prefixes, name, cfg.policy.templates) for name in (prefix, "none")]
        prompts = [list(zip(part["head"], part["tail"], strict=True)) for part in both]
        with models.one_thread(), models.adapted(base, adapters.get(policy_id, "")) as model:
            words = [word_deltas(model, tokenizer, *pair, text, cfg.policy, cfg.prefixes.side)
                     for *pair, text in zip(*prompts, rows["text"], strict=True)]
        parts.append(rows.assign(words=words))
    return pd.concat(parts).sort_index()


def word_deltas(model, tokenizer, with_prefix: tuple[str, str], without: tuple[str, str], text: str, policy,
                side: str = "left") -> list[tuple[str, float]]:
    """(word, nats): how much likelier each word of an answer is behind the prefix than without it.

    with_prefix, without: (head, tail). policy: max_length and dtype as in a profile. The last entry is the end
    of the answer. All entries add up to the difference of the answer's two log-probabilities as scored by
    scoring.score_pairs; a token that belongs to two words counts for the one that it ends in.
    """
    read = [token_logps(model, tokenizer, prompt, text, policy, side) for prompt in (with_prefix, without)]
    words, owner = _words(tokenizer, text)
    n, moved = min(len(owner), *map(len, read)), np.zeros(len(words))  # an answer too long to be scored is cut
    np.add.at(moved, owner[:n], read[0][:n] - read[1][:n])
    return [(word, float(nats)) for word, nats in zip(words, moved, strict=True)]


@torch.inference_mode()
def token_logps(model, tokenizer, prompt: tuple[str, str], text: str, policy, side: str = "left") -> np.ndarray:
    """Log-probability of every token of an answer and of its end token, nats; tokens as scoring has them."""
    (pair,) = scoring.encode_pairs(tokenizer, [prompt], [text], [text], policy.max_length, side)
    ids = torch.tensor([pair.prompt + pair.chosen], device=next(model.parameters()).device)
    with models.autocast(model, policy.dtype):
        logits = model(input_ids=ids).logits[0, len(pair.prompt) - 1:-1]
    logps = torch.log_softmax(logits.float(), dim=-1)
    return logps.gather(1, ids[0, len(pair.prompt):, None])[:, 0].double().cpu().numpy()


def entries(told: pd.DataFrame, prefix: str, prefixes: pd.DataFrame, personas: pd.DataFrame,
            labels: Mapping[str, str]) -> list[dict]:
    """What the page shows, a dict per person and question; labels: system -> heading, in their order."""
    main = prefixes[(prefixes["prefix"] == prefix) & (prefixes["variant"] == "main")]
    text_of, about = main.set_index("persona_id")["text"], personas.set_index("persona_id")
    return [{"name": about.loc[persona_id, "name"], "description": about.loc[persona_id, "description"],
             "prefix": text_of[persona_id], "kind": rows["kind"].iloc[0], "question": rows["prompt"].iloc[0],
             "answers": [(label, _marked(rows.loc[rows["system"] == name, "words"].item()))
                         for name, label in labels.items() if name in set(rows["system"])]}
            for (persona_id, _), rows in told.groupby(["persona_id", "question_id"], sort=False)]


def html(shown: Sequence[dict], store: Store, prefix: str, whole: bool = False) -> str:
    """The entries as HTML that needs no other file, every text escaped; whole: a page instead of a part of one."""
    loader = jinja2.FileSystemLoader(DATA / "templates")
    page = jinja2.Environment(loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    return page.get_template("side_by_side.html.j2").render(
        entries=shown, run=store.name, simulated=store.profile.simulated, prefix=prefix, whole=whole,
        full=FULL_SHADE_NATS, underline=UNDERLINE_NATS)


def inline(shown: Sequence[dict], store: Store, prefix: str) -> HTML:
    """The entries for the notebook."""
    return HTML(html(shown, store, prefix))


def write(shown: Sequence[dict], store: Store, prefix: str) -> Path:
    """The page side_by_side.html in the run folder."""
    path = store.path / "side_by_side.html"
    with atomic(path) as file:
        file.write_text(html(shown, store, prefix, whole=True), encoding="utf-8")
    return path


def _words(tokenizer, text: str) -> tuple[list[str], np.ndarray]:
    """The words of an answer and the end, and for each token, the end token last, which of them it belongs to."""
    offsets, text = chat.answer_offsets(tokenizer, text), chat.answer_text(tokenizer, text)
    spans = [found.span() for found in re.finditer(r"\s*\S+", text)]
    starts = [start for start, _ in spans]
    owner = [max(int(np.searchsorted(starts, stop - 1, side="right")) - 1, 0) for _, stop in offsets]
    words = [text[start:stop].strip() for start, stop in spans]
    return [*words, END], np.array([*owner, len(words)])


def _marked(words: Sequence[tuple[str, float]]) -> list[dict]:
    """What the template needs of each word: its text, nats, and the strength of its shade, 0 to 1."""
    return [{"text": word, "nats": nats, "shade": round(min(abs(nats) / FULL_SHADE_NATS, 1.0), 2)}
            for word, nats in words]
