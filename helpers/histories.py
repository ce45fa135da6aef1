"""Raw histories as texts before a question: what somebody wrote, chose and is, as it is (in-context alignment).

Source: AlignX (arXiv 2503.15463); what its text does not say is ours: the mixture of items.
"""

from random import Random

import pandas as pd

from helpers import prefixes, prompts
from helpers.config import Profile
from helpers.reading import Evidence, history

NAMES = ("ugc", "pair", "demographics", "all")


def texts(evidence: Evidence, name: str, n: int, cfg: Profile) -> dict[str, str]:
    """persona_id -> the text of a raw representation of n items: ugc, pair, demographics (no items) or all.

    all: the description, and half of the items of each kind. Whoever has no description has none.
    """
    found, about = {}, evidence.personas.set_index("persona_id")["description"]
    for person in about.index:
        items = history(evidence, person, 0 if name == "demographics" else n, cfg.seed)
        first = {"ugc": n, "pair": 0, "demographics": 0, "all": n // 2}[name]
        found[person] = text(items.iloc[:first], items.iloc[first:],
                             about[person] if name in ("demographics", "all") else "", cfg.policy.templates)
    return found


def mixed(pairs: pd.DataFrame, evidence: Evidence, cfg: Profile) -> list[str]:
    """For each train pair another mixture of its person's items, never the pair itself.

    None to alignx.most items of each kind, and the description half of the time, all drawn by a seed of the pair.
    The released code carries items over from the previous user where a draw is empty; here it stays empty.
    """
    own, found = dict(list(evidence.pool.groupby("persona_id"))), []
    about = evidence.personas.set_index("persona_id")["description"]
    for person, pair_id in zip(pairs["persona_id"], pairs["pair_id"], strict=True):
        random = Random(f"{cfg.seed} mixture {pair_id}")
        n_ugc, n_pairs, told = random.randint(0, cfg.alignx.most), random.randint(0, cfg.alignx.most), random.random() < 0.5
        others = own[person][own[person]["pair_id"] != pair_id]
        items = others.iloc[random.sample(range(len(others)), min(n_ugc + n_pairs, len(others)))]
        found.append(text(items.iloc[:n_ugc], items.iloc[n_ugc:], about[person] if told else "", cfg.policy.templates))
    return found


def text(ugc: pd.DataFrame, pairs: pd.DataFrame, about: str, templates: str) -> str:
    """A history as it is: who somebody is, what they wrote (here: preferred), and what they chose over what."""
    parts = [prompts.render(templates, "demographics", ABOUT=about)] if about else []
    parts += [prefixes.few_shot_text(ugc, templates)] if len(ugc) else []
    parts += [prefixes.few_shot_text(pairs, templates, rejected=True)] if len(pairs) else []
    return prefixes.SHOT_BREAK[templates].join(parts)
