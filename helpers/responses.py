"""Step 3: answers that differ in content and not in quality (paper 3.3 and Appendix B).

Chain-of-thought sampling opens the space of answers, cleaning removes what gives their origin away, the reward span
keeps those a generic judge finds equally good, and one answer is taken from each cluster of meanings.
"""

import json
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
from sklearn.cluster import KMeans
from threadpoolctl import threadpool_limits

from helpers import grid, models, prompts, sampling

HEADINGS = r"(?:axis|categories|category|chosen category|response|question|answer)"
OPENING_CLAUSE = re.compile(
    r"^(?:as|for|from|given|based on|speaking to|in response|in line with|thus)\b[^,.!?]{0,80},\s*", re.I)
THOUGHT = re.compile(
    r"\s*(?:Axis:)?\s*(.+?)\s*\n\s*Categories:\s*(.+?)\s*\n\s*Chosen category:\s*(.+?)\s*\n\s*Response:\s*(.+)", re.S)
GREETING = re.compile(r"^(?:dear|hi|hello|greetings|fellow)\b[^,.!?:]{0,60}[,.!?:]\s*", re.I)
BRACKET = re.compile(r"^\([^)]*\)\s*")
TELL_TALE = re.compile(
    r"\b(?:chosen category|letting me know|like you|as someone|as an? |fellow|dear|preferences?|preferred|orientation"
    r"|identif\w+|cater\w*|previous|specified|selected|axis|geared|friend|sorry)\b", re.I)
SHARED = 2000  # responses, from which on workers select side by side
SENTENCE = re.compile(r"[^.!?]+[.!?]*\s*")


def parse_cot(text: str) -> dict | None:
    """Axis, categories, chosen category and response of one chain of thought, or None if a part is missing.

    text: what the model wrote after "Axis:" (prompt `cot`, paper G.3); some chat models repeat that word.
    """
    found = THOUGHT.match(text)
    if not found:
        return None
    axis, categories, category, response = found.groups()
    names = list(dict.fromkeys(name.strip() for name in categories.split(",") if name.strip()))
    return {"axis": axis.lower(), "categories": names, "category": category, "response": response} if names else None


def clean(text: str, min_chars: int = 40) -> str:
    """The response without what would tell for whom it was written; "" if too little is left.

    Cuts at a second heading, drops greetings, opening clauses ("As a vegan, ...") and brackets, then whole sentences with
    a tell-tale phrase among the first 400 characters. Whole words only: "Assuming" and "Forget" stay.
    Source: Appendix B.1; the rules are ours, after the released code's list and without its defects.
    """
    text = re.split(rf"\n\s*{HEADINGS}\s*:", text.strip().lstrip(":"), maxsplit=1, flags=re.I)[0].strip()
    for _ in range(2):
        for rule in (GREETING, BRACKET, OPENING_CLAUSE):
            text = rule.sub("", text)
    kept, position = [], 0
    for sentence in SENTENCE.findall(text):
        if position >= 400 or not TELL_TALE.search(sentence):
            kept.append(sentence)
        position += len(sentence)
    text = " ".join("".join(kept).split())
    return text[:1].upper() + text[1:] if len(text) >= min_chars else ""


def reward_span(rewards: np.ndarray, width: int) -> np.ndarray:
    """Positions of the `width` rewards of smallest range (max - min), in order of reward (Appendix B.2)."""
    order = np.argsort(rewards, kind="stable")
    if len(order) <= width:
        return order
    ranges = rewards[order[width - 1:]] - rewards[order[: len(order) - width + 1]]
    start = int(np.argmin(ranges))
    return order[start:start + width]


def diverse(embeddings: np.ndarray, k: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Cluster labels [n] and, for each of k clusters, the row farthest from the other centres (Appendix B.3).

    embeddings: [n, d], rows of length 1. Farthest: the smallest sum of cosines with the other centres.
    """
    means = KMeans(n_clusters=k, n_init=4, random_state=seed).fit(embeddings)
    closeness = embeddings @ means.cluster_centers_.T
    others = closeness.sum(1) - closeness[np.arange(len(embeddings)), means.labels_]
    chosen = [np.flatnonzero(means.labels_ == c)[np.argmin(others[means.labels_ == c])] for c in range(k)]
    return means.labels_, np.array(chosen)


def speaker(cfg) -> Callable[..., list[list[str]]]:
    """What samples from the policy: speaker(cfg)(prompts, n, temperature, …) as in `sampling.generate`.

    It runs here, or on the server that responses.base_url names.
    """
    if cfg.responses.base_url:
        from helpers import served  # by way of openai, slow to import

        return partial(served.generate, cfg.responses.base_url, cfg.policy.path)
    return partial(sampling.generate, *models.base(cfg.policy), dtype=cfg.policy.dtype)


def sample(questions: pd.DataFrame, categories: dict[str, list[str]], cfg, work: Path, shard: int = 30) -> pd.DataFrame:
    """Raw chain-of-thought responses: n_cot x per_cot a question, sampled by the policy in resumable shards.

    categories: axis -> its categories; divergent questions use them, personal ones what the model itself proposes.
    Returns rows of `responses` up to text_raw; a question whose every chain of thought was unparsable has none.
    """
    shards = [questions.iloc[i:i + shard] for i in range(0, len(questions), shard)]
    todo = [partial(_shard, part, categories, cfg, cfg.seed * 100_003 + i, work / f"shard-{i:04d}.json")
            for i, part in enumerate(shards)]
    done = grid.run_units(todo, cfg.training.workers, cfg.training.executor, "sampling", "shard")
    return pd.DataFrame([row for rows in done for row in rows])


def select(raw: pd.DataFrame, questions: pd.DataFrame, cfg, work: Path | None = None) -> pd.DataFrame:
    """The `responses` table: cleaned, rewarded, in the span or not, clustered, and the k selected of each question.

    Questions with fewer than k different clean responses keep their rows and select nothing. work: the folder in
    which rewards and embeddings are kept as they are computed.
    """
    table = raw.assign(text=[clean(text, cfg.responses.min_chars) for text in raw["text_raw"]])
    table = table.assign(reward=np.nan, in_span=False, cluster=-1, selected=False)
    usable = table[(table["text"] != "") & ~table.duplicated(["question_id", "text"])]
    usable = usable[["question_id", "text"]].assign(x=usable["question_id"].map(questions.set_index("question_id")["text"]),
                                                    number=pd.factorize(usable["question_id"])[0])
    several = cfg.training.workers if len(usable) > SHARED else 1
    parts = [part for _, part in usable.groupby(usable["number"] % (2 * several if several > 1 else 1))]
    units = [partial(_select, part, cfg, work and work / "texts.sqlite") for part in parts]
    found = grid.run_units(units, several, cfg.training.executor if several > 1 else "sequential", "selecting", "part")
    for column, values in pd.concat(found).items() if found else ():
        table.loc[values.index, column] = values
    return table


@models.one_thread()
@threadpool_limits.wrap(limits=1)  # k-means of a dozen points: threads would wait for each other four times as long
def _select(usable: pd.DataFrame, cfg, file: Path | None) -> pd.DataFrame:
    """Reward, span, cluster and choice of the responses to some questions: question_id, text, x (the question), number."""
    scorer = models.load_reward(cfg.reward.path, cfg.reward.revision, file)
    rewards = scorer.score(usable["x"].tolist(), usable["text"].tolist())
    embeddings = models.load_embedder(cfg.embedder.path, cfg.embedder.revision, file).encode(usable["text"].tolist())
    found = {"in_span": np.zeros(len(usable), dtype=bool), "cluster": np.full(len(usable), -1),
             "selected": np.zeros(len(usable), dtype=bool)}
    for number, at in usable.groupby("number", sort=False).indices.items():
        if len(at) < cfg.responses.k:
            continue
        span = at[reward_span(rewards[at], cfg.responses.span)]
        labels, chosen = diverse(embeddings[span], cfg.responses.k, cfg.seed + number)
        found["in_span"][span], found["cluster"][span], found["selected"][span[chosen]] = True, labels, True
    return pd.DataFrame({"reward": rewards.astype(float)} | found, index=usable.index)


def _shard(questions: pd.DataFrame, categories: dict[str, list[str]], cfg, seed: int, file: Path) -> list[dict]:
    """All responses to a few questions; kept in `file`, so that a killed run does not sample them again."""
    if file.exists():
        return json.loads(file.read_text())
    rng = np.random.default_rng(seed)
    say, size = speaker(cfg), cfg.responses
    settings = {key: getattr(size, key) for key in ("temperature", "top_p", "max_new_tokens", "batch")}
    with models.one_thread():
        thoughts = _think(questions, categories, say, cfg, settings, seed)
    heads = []
    for question, own in zip(questions.itertuples(), thoughts, strict=True):
        for thought in own:
            for category in rng.choice(thought["categories"], size.per_cot):
                heads.append({"question_id": question.question_id, "x": question.text, "cot_axis": thought["axis"],
                              "cot_categories": list(thought["categories"]), "cot_category": str(category)})
    asked = [prompts.render(cfg.policy.templates, "cot_given", X=h["x"], AXIS=h["cot_axis"],
                            CATEGORIES=", ".join(h["cot_categories"]), CATEGORY=h["cot_category"]) for h in heads]
    with models.one_thread():
        answers = say(asked, n=1, seed=seed + 1, **settings)
    rows, count = [], {}
    for head, (answer,) in zip(heads, answers, strict=True):
        number = count[head["question_id"]] = count.get(head["question_id"], -1) + 1
        row = {key: value for key, value in head.items() if key != "x"}
        rows.append({"response_id": f"{head['question_id']}-r{number:02d}", **row, "text_raw": answer})
    partial = file.with_suffix(".part")
    partial.write_text(json.dumps(rows))
    partial.replace(file)
    return rows


def _think(questions, categories, say, cfg, settings, seed) -> list[list[dict]]:
    """n_cot chains of thought a question: the axis' own categories if divergent, else what the model writes."""
    n = cfg.responses.n_cot
    personal = questions[questions["kind"] == "personal"]
    asked = [prompts.render(cfg.policy.templates, "cot", X=text) for text in personal["text"]]
    # half as many again are drawn, because some chains of thought do not keep the format
    drawn = say(asked, n=n + (n + 1) // 2, seed=seed, **settings) if asked else []
    parsed = {q: [t for t in map(parse_cot, texts) if t][:n]
              for q, texts in zip(personal["question_id"], drawn, strict=True)}
    given = {axis: [{"axis": axis, "categories": names}] * n for axis, names in categories.items()}
    return [parsed[q.question_id] if q.kind == "personal" else given[q.axis] for q in questions.itertuples()]
