"""Ask as somebody: base and personalised answers side by side, and which sentence of the prefix made the difference."""

import re
from collections.abc import Sequence
from functools import cached_property
from html import escape
from typing import NamedTuple

import numpy as np
import pandas as pd
from IPython.display import HTML
from tqdm.auto import tqdm

from helpers import models, prefixes, prompts, sampling, scoring, settings, stats
from helpers.artifacts import Store

ORDER = ("persona_gold", "name", "persona_gpt4", "persona", "few_shot", "tag")  # of the prefixes, by what they say
LEFT = ("nothing", "a random sentence", "the strongest sentence", "everything")


class Answers(NamedTuple):
    """What three systems say to one question: the base, the base with a prefix, the adapter with it."""

    person: str
    question: str
    text: str  # of the prefix
    base: str
    prompted: str
    personal: str


class Desk:
    """One base and the adapters of a run, to be asked as anybody; prefix: "" takes the one that says most."""

    def __init__(self, store: Store, prefix: str = ""):
        self.store, self.cfg = store, store.profile
        policies = store.read("policies").query("method == 'mt' and scheme == 'stratified' and prefix != 'none'")
        self.policies = policies[policies["seed"] == self.cfg.training.seeds[0]]
        there = [name for name in ORDER if name in set(self.policies["prefix"]) and prefix in ("", name)]
        if not there:
            raise ValueError(f"no adapter was trained with the prefix {prefix or 'of anybody'}: notebook 09 trains "
                             "one for each of prefixes.names")
        self.prefix, self.personas = there[0], store.read("personas")
        texts = store.read("prefixes").set_index("persona_id")
        self.texts = texts.loc[(texts["prefix"] == self.prefix) & (texts["variant"] == "main"), "text"]
        self.folds = _held_out_in(store.read("folds"))

    @cached_property
    def base(self) -> tuple:
        """(model, tokenizer), loaded once."""
        return models.load_policy(self.cfg.policy)

    def who(self, person: str) -> tuple[str, int]:
        """The prefix text of a person and a fold that holds them out; what is nobody's name or id is a description."""
        known = self.personas[(self.personas["name"] == person) | (self.personas["persona_id"] == person)]
        if known.empty:
            return person, 0
        persona_id = known["persona_id"].iloc[0]
        return self.texts[persona_id], self.folds[persona_id]

    def adapter(self, fold: int):
        """Its folder: the adapter of this desk's prefix that did not train on the people of the fold."""
        row = self.policies[(self.policies["prefix"] == self.prefix) & (self.policies["fold"] == fold)].iloc[0]
        return self.store.path / row["path"]

    def ask(self, person: str, question: str) -> Answers:
        """A sampled answer of each system, by the run's seed. person: a name, an id or a description."""
        text, fold = self.who(person)
        plain, told = ("".join(self._prompt(name, text, question)) for name in ("none", self.prefix))
        base, prompted = self._say(self.base[0], [plain, told])
        with models.adapted(self.base[0], self.adapter(fold)) as model:
            (personal,) = self._say(model, [told])
        return Answers(person, question, text, base, prompted, personal)

    def why(self, person: str, question: str, answer: str, other: str) -> pd.DataFrame:
        """How far the adapter prefers `answer` to `other`, and what each sentence of the prefix does to that.

        Returns left_out ("nothing", each sentence, "everything"), margin (mean log-probability per token of
        answer minus that of other, nats) and moves: the margin with the whole prefix minus this one.
        """
        text, fold = self.who(person)
        left, asked = zip(*[(what, self._prompt(name, rest, question)) for what, name, rest in
                            without_each(self.prefix, text)], strict=True)
        with models.adapted(self.base[0], self.adapter(fold)) as model:
            scores = scoring.score_pairs(model, self.base[1], asked, [answer] * len(asked), [other] * len(asked),
                                         max_length=self.cfg.policy.max_length, dtype=self.cfg.policy.dtype,
                                         side=self.cfg.prefixes.side, max_prompt=self.cfg.policy.max_prompt)
        margin = scores["logp_chosen"] / scores["n_chosen"] - scores["logp_rejected"] / scores["n_rejected"]
        return pd.DataFrame({"left_out": left, "margin": margin, "moves": margin.iloc[0] - margin})

    def show(self, person: str, question: str) -> HTML:
        """The three answers side by side, every text escaped."""
        said = self.ask(person, question)
        named = {"base, no prefix": said.base, f"base, {self.prefix}": said.prompted, f"adapter, {self.prefix}": said.personal}
        head, body = ("".join(f"<{tag} style='text-align:left;vertical-align:top'>{escape(text)}</{tag}>" for text in texts)
                      for tag, texts in (("th", named), ("td", named.values())))
        return HTML(f"<p><b>{escape(said.question)}</b><br><small>{escape(said.text)}</small></p>"
                    f"<table><tr>{head}</tr><tr>{body}</tr></table>")

    def _prompt(self, prefix: str, text: str, question: str) -> tuple[str, str]:
        return prefixes.prompt(self.cfg.policy.templates, prefix, text, question)

    def _say(self, model, asked: Sequence[str]) -> list[str]:
        """An answer ends where the policy goes on to ask the next question itself."""
        heading = prompts.load(self.cfg.policy.templates, "respond_none").literals[0]
        size = self.cfg.generation
        said = sampling.generate(model, self.base[1], asked, n=1, temperature=size.temperature, top_p=1.0,
                               seed=self.cfg.seed, max_new_tokens=size.max_new_tokens, batch=self.cfg.responses.batch,
                               stop=f"\n{heading}" if heading else None)
        return [text.strip() for (text,) in said]


def _held_out_in(folds: pd.DataFrame) -> dict[str, int]:
    """persona_id -> the stratified fold that holds the person out."""
    numbers = folds.loc[folds["scheme"] == "stratified", "fold"].unique()
    return {person: int(fold) for fold in numbers for person in settings.people(folds, fold).unseen}


def sentences(text: str) -> list[str]:
    """The sentences of a text, and its lines: what could be left out of it."""
    return [part.strip() for part in re.split(r"(?<=[.!?])\s+|\n+", text) if part.strip()]


def without_each(prefix: str, text: str) -> list[tuple[str, str, str]]:
    """(what is left out, prefix, the text that remains): nothing, each sentence that has another beside it, everything."""
    parts = sentences(text)
    each = [(part, prefix, " ".join(parts[:k] + parts[k + 1:]) if "\n" not in text else
             "\n".join(parts[:k] + parts[k + 1:])) for k, part in enumerate(parts) if len(parts) > 1]
    return [("nothing", prefix, text), *each, ("everything", "none", "")]


def strongest(desk: Desk, pairs: pd.DataFrame, seed: int, **drawing) -> pd.DataFrame:
    """What is left of the margin between chosen and rejected without the strongest sentence of each prefix.

    pairs: a row per person, with persona_id, prompt, chosen and rejected. Returns left_out (of LEFT), accuracy
    (here the mean margin, nats per token), low, high (people resampled) and n_people. The strongest sentence is
    picked for the pair at hand: what it is worth on a new question is less. A person with a prefix of one
    sentence has no row.
    """
    rng, rows = np.random.default_rng([seed, 12]), []
    for pair in tqdm(list(pairs.itertuples()), desc="sentences left out", unit=" people", leave=False, delay=5):
        found = desk.why(pair.persona_id, pair.prompt, pair.chosen, pair.rejected)
        if len(found) > 3:
            each = found["margin"].iloc[1:-1].to_numpy()
            rows.append((found["margin"].iloc[0], rng.choice(each), each.min(), found["margin"].iloc[-1]))
    points = np.array(rows).reshape(-1, len(LEFT))
    found = [stats.resample(points[:, [k]], lambda p: p[..., 0].mean(-1), **{"few": "blank", "seed": seed, **drawing})
             for k in range(len(LEFT))] if len(points) else []
    table = pd.DataFrame(found, columns=["accuracy", "low", "high", "n_people"])
    return table.assign(left_out=LEFT[:len(table)])
