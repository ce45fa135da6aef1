"""Who is scored behind whose prefix: prompts, the people of a fold, the settings of notebooks 09 and 10."""

from collections.abc import Iterable, Mapping
from typing import NamedTuple

import numpy as np
import pandas as pd

from helpers.prefixes import prompt


class People(NamedTuple):
    """The people of one fold, as sorted persona_ids."""

    train: list[str]  # everybody who is not held out
    unseen: list[str]  # held out
    seen: list[str]  # those of `train` who are scored: the people held out in the next fold


def people(folds: pd.DataFrame, fold: int, scheme: str = "stratified") -> People:
    """The people of a fold of this scheme; folds: the whole table.

    Over all folds each person is scored once as seen and once as unseen. When an axis is left out, who is on
    two axes is unseen twice, and seen are those of the next fold who are not held out.
    Raises KeyError for a fold that the scheme does not have.
    """
    held = folds[folds["scheme"] == scheme].groupby("fold")["persona_id"].agg(sorted)
    if fold not in held.index:
        raise KeyError(f"no fold {fold} of scheme {scheme}, only {held.index.tolist()}; 05 makes them")
    out = set(held[fold])
    train = sorted({p for ids in held for p in ids} - out)
    return People(train, held[fold], [p for p in held[(fold + 1) % len(held)] if p not in out])


def ask(pairs: pd.DataFrame, prefixes: pd.DataFrame, prefix: str, templates: str, variant: str = "main",
        owner: Mapping[str, str] | None = None) -> pd.DataFrame:
    """The pairs, with prefix, variant and the prompt of each as head and tail (see prefixes.prompt).

    owner: persona_id -> whose prefix stands there; without it everybody's own.
    Raises KeyError for somebody without such a prefix.
    """
    named = prefixes[(prefixes["prefix"] == prefix) & (prefixes["variant"] == variant)]
    text_of = named.set_index("persona_id")["text"].to_dict()
    whose = pairs["persona_id"] if owner is None else pairs["persona_id"].map(owner)
    if prefix != "none" and (without := sorted(set(whose) - set(text_of))):
        raise KeyError(f"{', '.join(without[:3])}: no prefix {prefix}, variant {variant}; 05 makes them")
    texts = [text_of.get(persona_id, "") for persona_id in whose]
    asked = [prompt(templates, prefix, text, x) for text, x in zip(texts, pairs["prompt"], strict=True)]
    heads, tails = zip(*asked, strict=True) if asked else ((), ())
    return pairs.assign(prefix=prefix, variant=variant, head=list(heads), tail=list(tails))


def main(asked: pd.DataFrame, folds: pd.DataFrame, fold: int, scheme: str = "stratified") -> pd.DataFrame:
    """The test pairs of a fold's unseen and seen people behind their own prefix.

    asked: what `ask` returned. Adds trained, and setting: `main`, or the scheme's name if it is another than
    the stratified one. Leaves out what no score needs.
    """
    who, test = people(folds, fold, scheme), asked[asked["split"] == "test"]
    setting = "main" if scheme == "stratified" else scheme
    return pd.concat([_setting(test[test["persona_id"].isin(who.seen)], setting, True),
                      _setting(test[test["persona_id"].isin(who.unseen)], setting, False)], ignore_index=True)


def sensitivity(pairs: pd.DataFrame, prefixes: pd.DataFrame, prefix: str, folds: pd.DataFrame, fold: int,
                templates: str, seed: int, scheme: str = "stratified") -> pd.DataFrame:
    """The test pairs under the six settings that change the prefix; seen_reseed only where there is a reseed.

    seen_reseed: another draw of the own prefix; unseen_wrong: somebody else's; seen_wrong_seen and
    seen_wrong_unseen: that of another training person, and of a held-out one; removed: none. The wrong owner
    is the same under every prefix. Source: Appendix L, Figure 15.
    """
    who, test = people(folds, fold, scheme), pairs[pairs["split"] == "test"]
    seen, unseen = (test[test["persona_id"].isin(ids)] for ids in (who.seen, who.unseen))
    own = prefixes[prefixes["variant"] == "main"].pivot(index="persona_id", columns="prefix", values="text")
    plan = [("unseen_wrong", unseen, prefix, "shuffled", None),
            ("seen_wrong_seen", seen, prefix, "main", wrong_owners(who.seen, who.train, own, seed)),
            ("seen_wrong_unseen", seen, prefix, "main", wrong_owners(who.seen, who.unseen, own, seed)),
            ("seen_removed", seen, "none", "removed", None),
            ("unseen_removed", unseen, "none", "removed", None)]
    if ((prefixes["prefix"] == prefix) & (prefixes["variant"] == "reseed")).any():
        plan.append(("seen_reseed", seen, prefix, "reseed", None))
    return pd.concat([_setting(ask(rows, prefixes, name, templates, variant, owner), setting, rows is seen)
                      for setting, rows, name, variant, owner in plan], ignore_index=True)


def wrong_owners(ids: Iterable[str], givers: Iterable[str], texts: pd.DataFrame, seed: int) -> dict[str, str]:
    """A drawn giver for each person, never the person and never one with an equal text under any prefix.

    texts: a row per persona_id, a column per prefix. Raises ValueError where no giver is left.
    """
    rng, owner = np.random.default_rng([seed, 6]), {}
    for persona_id in sorted(ids):
        other = [g for g in sorted(givers) if not (texts.loc[g] == texts.loc[persona_id]).any()]
        if not other:
            raise ValueError(f"nobody's prefixes all differ from those of {persona_id}: add people")
        owner[persona_id] = str(rng.choice(other))
    return owner


def _setting(rows: pd.DataFrame, setting: str, trained: bool) -> pd.DataFrame:
    kept = ["persona_id", "pair_id", "kind", "axis", "variant", "head", "tail", "chosen", "rejected"]
    return rows[kept].assign(setting=setting, trained=trained)
