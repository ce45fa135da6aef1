"""Shots picked for a question: the person's own train pairs that are most, and least, similar to it."""

from collections.abc import Sequence
from zlib import crc32

import numpy as np
import pandas as pd
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.metrics.pairwise import linear_kernel

from helpers import models
from helpers.config import Profile
from helpers.prefixes import available_prefixes, few_shot_text, shot_pool

COLUMNS = ["pair_id", "persona_id", "variant", "text", "shots"]
DECIMALS = 6  # of a similarity: differences beyond them are the machine's


def retrieve(preferences: pd.DataFrame, tokenizer, cfg: Profile) -> pd.DataFrame:
    """A few_shot prefix for every test pair, made for its question out of the person's own train pairs.

    Variants near_<measure> and far_<measure> for each of prefixes.retrieval: the most and the least similar
    questions, as many as few_shot has shots. The first choice stands last, next to the question; among equally
    similar ones, as those are that share no word, a drawn order decides.
    Returns rows pair_id, persona_id, variant, text, shots (pair_ids) and n_tokens, by pair and variant; none
    where few_shot is no prefix of this run.
    Source: not in the paper; its later release retrieves by BM25 and by embedding, and saw no difference.
    """
    pool, rows = shot_pool(preferences), []
    test = preferences[preferences["split"] == "test"].sort_values("pair_id")
    for measure in cfg.prefixes.retrieval if "few_shot" in available_prefixes(cfg) else ():
        vector = vectors(measure, pool["prompt"], test["prompt"], cfg)
        for persona_id, asked in test.groupby("persona_id"):
            own = pool[pool["persona_id"] == persona_id].sort_values("pair_id")
            own = own.iloc[np.random.default_rng([cfg.seed, crc32(persona_id.encode())]).permutation(len(own))]
            likeness = linear_kernel(*(np.array([vector[x] for x in t["prompt"]]) for t in (asked, own)))
            for pair_id, row in zip(asked["pair_id"], likeness, strict=True):
                picked = nearest_and_farthest(row, cfg.prefixes.few_shot_shots)
                rows += [(pair_id, persona_id, f"{end}_{measure}", few_shot_text(shots, cfg.policy.templates),
                          shots["pair_id"].tolist())
                         for end, shots in zip(("near", "far"), (own.iloc[at] for at in picked), strict=True)]
    made = pd.DataFrame(rows, columns=COLUMNS).sort_values(["pair_id", "variant"], ignore_index=True)
    count = {text: len(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in set(made["text"])}
    return made.assign(n_tokens=made["text"].map(count).astype(int))


def nearest_and_farthest(likeness: np.ndarray, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Where the n highest and the n lowest values stand, the extreme one last; of equal ones the earlier first."""
    rounded = likeness.round(DECIMALS)
    return np.argsort(-rounded, kind="stable")[:n][::-1], np.argsort(rounded, kind="stable")[:n][::-1]


def vectors(measure: str, train: Sequence[str], test: Sequence[str], cfg: Profile) -> dict[str, np.ndarray]:
    """Question -> a vector of length 1: words weighted by rarity ("tfidf", learned from train) or "embedding"."""
    known, every = sorted(set(train)), sorted({*train, *test})
    if measure == "tfidf":
        return dict(zip(every, TfidfVectorizer().fit(known).transform(every).toarray(), strict=True))
    found = models.load_embedder(cfg.embedder.path, cfg.embedder.revision).encode(every, normalize_embeddings=True)
    return dict(zip(every, found, strict=True))
