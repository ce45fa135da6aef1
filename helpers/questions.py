"""What a table of questions amounts to: pairs to come, how it spreads, and how new its test half is."""

from collections import Counter
from functools import cache

import numpy as np
import pandas as pd
from rouge_score.rouge_scorer import RougeScorer
from rouge_score.tokenizers import DefaultTokenizer
from sklearn.manifold import TSNE

PERPLEXITY = 30.0  # scikit-learn's default; a small set of points gets less


def planned_pairs(personas: pd.DataFrame, questions: pd.DataFrame) -> pd.DataFrame:
    """How many pairs these people and questions make if no tournament stays open, counted in both ways.

    Returns a row per kind and split: by_memberships (who is on two axes answers the questions of both),
    by_people (everybody as if on one axis, the one with most questions) and kept, what a run uses: of the
    divergent train pairs as many as by people (splits.cap_train), of all others every one.
    Source: Appendix E.1. The paper's text counts its test pairs by people, its code by memberships.
    """
    members = personas[["persona_id", "axes"]].explode("axes").rename(columns={"axes": "axis"})
    shared = questions[questions["kind"] == "divergent"].drop(columns="persona_id").merge(members, on="axis")
    own = questions[questions["persona_id"].isin(personas["persona_id"])]
    asked = pd.concat([own, shared])[["kind", "split", "persona_id", "axis"]]
    sizes = asked.groupby(["kind", "split", "persona_id", "axis"]).size()
    people = sizes.groupby(["kind", "split", "persona_id"]).max().groupby(["kind", "split"]).sum()
    counts = sizes.groupby(["kind", "split"]).sum().rename("by_memberships").reset_index()
    counts["by_people"] = people.to_numpy()
    return counts.assign(kept=counts["by_people"].where(counts["split"] == "train", counts["by_memberships"]))


def project(embeddings: np.ndarray, seed: int) -> np.ndarray:
    """t-SNE to the plane: embeddings [n, d] -> [n, 2]; the same seed gives the same picture.

    Distances between far groups mean nothing in such a picture. Raises ValueError for fewer than 4 points.
    Source: Appendix E.4, Figure 9.
    """
    n = len(embeddings)
    if n < 4:
        raise ValueError(f"{n} questions cannot be spread over a plane; at least 4 are needed")
    tsne = TSNE(perplexity=min(PERPLEXITY, (n - 1) / 3), random_state=seed, n_jobs=1)
    return tsne.fit_transform(np.asarray(embeddings, dtype=np.float32))


def train_test_rouge(questions: pd.DataFrame) -> pd.DataFrame:
    """For each test question the most similar train question of the same person or axis, by ROUGE-L (F1).

    Returns question_id, kind, source (persona_id or axis), text, nearest (a train question's text), rouge.
    A source without train questions has no rows. The scores are rouge_score's; a pair is scored only if
    the words that it shares could beat the best one so far.
    Source: Appendix E.4, Figure 10; the paper does not say which ROUGE.
    """
    tokenizer = _Once()
    scorer, rows = RougeScorer(["rougeL"], tokenizer=tokenizer), []
    bags = {text: Counter(tokenizer.tokenize(text)) for text in questions["text"].unique()}
    whose = questions["persona_id"].where(questions["kind"] == "personal", questions["axis"])
    for source, part in questions.groupby(whose, sort=False):
        train = part.loc[part["split"] == "train", "text"].unique()
        for test in part[part["split"] == "test"].itertuples() if len(train) else ():
            nearest, rouge = _most_similar(test.text, train, bags, scorer)
            rows.append((test.question_id, test.kind, source, test.text, nearest, rouge))
    return pd.DataFrame(rows, columns=["question_id", "kind", "source", "text", "nearest", "rouge"])


def _most_similar(text: str, others: np.ndarray, bags: dict[str, Counter],
                  scorer: RougeScorer) -> tuple[str, float]:
    """The text among `others` of highest ROUGE-L and that score; of equal ones the first by the bound."""
    bounds = [_bound(bags[text], bags[other]) for other in others]
    best, score = "", -1.0
    for i in sorted(range(len(others)), key=lambda i: -bounds[i]):
        if bounds[i] <= score:
            break
        if (found := scorer.score(others[i], text)["rougeL"].fmeasure) > score:
            best, score = others[i], found
    return best, score


def _bound(a: Counter, b: Counter) -> float:
    """No ROUGE-L is above it: a common subsequence holds common words only."""
    return 2 * sum((a & b).values()) / max(a.total() + b.total(), 1)


class _Once:
    """rouge_score's own tokenizer, reading each text once."""

    def __init__(self) -> None:
        self.tokenize = cache(DefaultTokenizer(use_stemmer=False).tokenize)
