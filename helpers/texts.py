"""Texts in numbers: how long the answers are, and which words set one axis's explanations apart (paper E.5)."""

import re
from collections.abc import Iterable

import numpy as np
import pandas as pd
from sklearn.feature_extraction.text import ENGLISH_STOP_WORDS, TfidfVectorizer

PARTS, WORD = ("chosen", "rejected"), r"(?u)\b[^\W\d_]{2,}\b"


def pair_lengths(preferences: pd.DataFrame) -> pd.DataFrame:
    """Words (white-space delimited) of both answers of each pair, and by how many the chosen one is longer.

    Returns persona_id, pair_id, kind, axis, chosen, rejected, difference. Figures 11 and 12 of the paper.
    """
    counts = {part: preferences[part].str.split().str.len() for part in PARTS}
    rows = preferences[["persona_id", "pair_id", "kind", "axis"]].assign(**counts)
    return rows.assign(difference=rows["chosen"] - rows["rejected"])


def lengths(texts: pd.Series) -> pd.Series:
    """Words of each text, such as those of prefixes."""
    return texts.str.split().str.len()


def differing_lengths(lengths: pd.DataFrame) -> pd.DataFrame:
    """The pairs of unequal length with `correct`: the chosen answer is the longer one (for stats.cluster_bootstrap)."""
    return lengths.assign(correct=lengths["difference"] > 0)[lengths["difference"] != 0]


def distinctive_words(explanations: pd.Series, by: pd.Series, drop: Iterable[str] = (), top: int = 6,
                      min_share: float = 0.02) -> pd.DataFrame:
    """Words that one group's explanations use more than the other groups': by TF-IDF, `top` a group.

    A word's weight is its mean TF-IDF over the group's explanations minus that over all others, so a word that
    everybody uses alike weighs nothing, however often it comes. drop: texts whose words are left out, such as names.
    min_share: of all explanations that a word must occur in, lest a word said once decides.
    Returns group, word, weight, share (of the group's explanations with the word), elsewhere (of the others), n.
    Raises ValueError with fewer than two groups: there is nothing to set apart.
    """
    groups = by.to_numpy()
    if len(set(groups)) < 2:
        raise ValueError(f"distinctive_words compares groups: found {sorted(set(groups))}, expected two or more")
    names = {word for text in drop for word in re.findall(WORD, text.lower())}
    vectors = TfidfVectorizer(stop_words=sorted(ENGLISH_STOP_WORDS | names), token_pattern=WORD, min_df=min_share)
    weights = vectors.fit_transform(explanations)
    words, rows = vectors.get_feature_names_out(), []
    for group in sorted(set(groups)):
        inside = groups == group
        here, there = weights[inside], weights[~inside]
        gap = np.asarray(here.mean(axis=0) - there.mean(axis=0)).ravel()
        best = [i for i in np.argsort(-gap, kind="stable") if gap[i] > 1e-12][:top]
        share, elsewhere = ((part[:, best] > 0).mean(axis=0) for part in (here, there))
        rows += [(group, words[i], gap[i], s, e, int(inside.sum()))
                 for i, s, e in zip(best, np.ravel(share), np.ravel(elsewhere), strict=True)]
    return pd.DataFrame(rows, columns=["group", "word", "weight", "share", "elsewhere", "n"])
