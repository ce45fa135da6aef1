"""The prefixes that describe a person to a model, their variants, and what they give away."""

import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING
from zlib import crc32

import numpy as np
import pandas as pd
from scipy.optimize import linear_sum_assignment

from helpers import prompts, sampling, scoring
from helpers.config import DESCRIBED, TEACHER_FREE, Profile

if TYPE_CHECKING:
    from helpers.llm import Teacher

FIXED = ("tag", "name")  # a person has one of each: no reseed
INFERRED = ("persona", "persona_gpt4")  # from shots
RESEED = 1  # added to the seed
SHOT_BREAK = {"short": "\n", "full": "\n\n", "teacher": "\n\n"}
PERSONA_TEMPERATURE = 0.3  # ours: nearly greedy, so that the persona says what the policy thinks likeliest
ATTEMPTS = 3  # for a persona that comes back empty
LEAK_WORDS = 8  # an answer of fewer words may occur anywhere by chance


def available_prefixes(cfg: Profile) -> tuple[str, ...]:
    """The profile's prefixes; for imported pairs without those that need somebody who knows the people."""
    known = cfg.data.preferences and TEACHER_FREE + DESCRIBED * bool(cfg.data.people)
    return tuple(name for name in cfg.prefixes.names if not known or name in known)


def prompt(templates: str, prefix: str, prefix_text: str, question: str) -> tuple[str, str]:
    """(head, tail): what stands before the question, the same for every question of a person, and the rest.

    head + tail is the template respond_<prefix> filled in; head is "" for the prefix none.
    Source: Appendix G.7 to G.10.
    """
    name = "respond_persona" if prefix.startswith("persona") else f"respond_{prefix}"
    if prefix == "none":
        return "", prompts.render(templates, name, X=question)
    text = prompts.render(templates, name, PREFIX=prefix_text, X=question)
    template = prompts.load(templates, name)
    at = template.slots.index("X")
    if "PREFIX" in template.slots[at:]:
        raise ValueError(f"prompt {templates}/{name}: found {{PREFIX}} after {{X}}; expected it in front")
    between = template.literals[at]
    cue = between.split("\n\n" if "\n\n" in between else "\n")[-1]  # the question's own heading: in the tail
    split = len(text) - len(cue) - len(question) - sum(map(len, template.literals[at + 1:]))
    return text[:split], text[split:]


def build_prefixes(personas: pd.DataFrame, preferences: pd.DataFrame, teacher: "Teacher | None",
                   policy: tuple, cfg: Profile, seed: int) -> pd.DataFrame:
    """Every available prefix of every person but none, in its variants (`plan`).

    policy: (model, tokenizer) as from models.load_policy; teacher may be None where no prefix needs one.
    Returns rows persona_id, prefix, variant, text, shots (pair_ids), model (the writer), n_tokens (policy's).
    Raises ValueError for a person with too few train pairs. Source: WikiPersona 3.4, App. G.5, G.6 and L.
    """
    people, pool, rows = personas.sort_values("persona_id", ignore_index=True), shot_pool(preferences), []
    ids = people["persona_id"].tolist()
    fewest = int(pool["persona_id"].value_counts().reindex(ids, fill_value=0).min())
    for prefix, variant, n in plan(cfg, fewest):
        shots = [draw_shots(pool, persona_id, n, seed, variant) for persona_id in ids]
        texts, writer = _write(prefix, variant, people, shots, teacher, policy, cfg, seed)
        rows += [(persona_id, prefix, variant, text, s["pair_id"].tolist(), writer)
                 for persona_id, text, s in zip(ids, texts, shots, strict=True)]
    made = pd.DataFrame(rows, columns=["persona_id", "prefix", "variant", "text", "shots", "model"])
    made = pd.concat([made, _shuffled(made[made["variant"] == "main"], people, seed)], ignore_index=True)
    count = {text: len(policy[1](text, add_special_tokens=False)["input_ids"]) for text in set(made["text"])}
    return made.assign(n_tokens=made["text"].map(count))


def plan(cfg: Profile, fewest: int) -> list[tuple[str, str, int]]:
    """(prefix, variant, number of shots) of all that is written.

    main; reseed: other shots, or asked again; with_rejected: the same shots, but the persona is inferred from
    their rejected answers too, as in the paper's code; shots<n>: raw shots, in another number than main has. The
    variant shuffled is copied afterwards: somebody else's main, the same person's for all prefixes.
    fewest: train pairs of whoever has fewest. A number of shots that somebody lacks is left out for all.
    """
    p, rows = cfg.prefixes, []
    shots = {"few_shot": p.few_shot_shots} | dict.fromkeys(INFERRED, p.persona_shots)
    fixed = FIXED + ("persona_gold",) * bool(cfg.data.preferences)  # there it is a given text
    for prefix in (name for name in available_prefixes(cfg) if name != "none"):
        n = shots.get(prefix, 0)
        rows += [(prefix, variant, n) for variant in (("main",) if prefix in fixed else ("main", "reseed"))]
        if prefix in INFERRED:
            rows.append((prefix, "with_rejected", n))
        if prefix == "few_shot":
            rows += [(prefix, f"shots{k}", k) for k in sorted(set(p.shot_counts) - {n}) if k < fewest]
    return rows


def draw_shots(pool: pd.DataFrame, persona_id: str, n: int, seed: int, variant: str) -> pd.DataFrame:
    """n of a person's train pairs, drawn by a seed of the person's own; reseed draws another set than main.

    Prefixes of as many shots get the same ones. The paper's code draws the same row numbers for everybody.
    """
    own = pool[pool["persona_id"] == persona_id].sort_values("pair_id")
    if n and len(own) <= n:
        raise ValueError(
            f"{persona_id} has {len(own)} train pairs fit for shots, {n + 1} are needed to draw {n} twice: "
            "ask for more questions (questions.personal, .divergent) or fewer shots (prefixes.*_shots)")
    rng = np.random.default_rng([seed, crc32(persona_id.encode()), n])
    drawn = main = rng.permutation(len(own))[:n]
    while n and variant == "reseed" and set(drawn) == set(main):
        drawn = rng.permutation(len(own))[:n]
    return own.iloc[drawn]


def few_shot_text(shots: pd.DataFrame, templates: str, rejected: bool = False) -> str:
    """Questions with the preferred answers, and the rejected ones if asked for; the paper (footnote 5) has none."""
    columns = {"X": "prompt", "CHOSEN": "chosen"} | ({"REJECTED": "rejected"} if rejected else {})
    rows = shots[list(columns.values())].set_axis(list(columns), axis=1).to_dict("records")
    name = "shot_rejected" if rejected else "shot"
    return SHOT_BREAK[templates].join(prompts.render(templates, name, **row) for row in rows)


def shot_pool(preferences: pd.DataFrame) -> pd.DataFrame:
    """Train pairs neither of whose answers happens to hold an answer to a test question: fit for shots."""
    train = preferences[preferences["split"] == "train"]
    told = leaks(train.assign(text=train["prompt"] + "\n" + train["chosen"] + "\n" + train["rejected"]), preferences)
    return train.drop(told.index)


def derange(ids: Sequence[str], seed: int, forbidden: np.ndarray | None = None,
            avoided: np.ndarray | None = None) -> dict[str, str]:
    """id -> somebody else's id, one to one, by a drawn assignment.

    forbidden: (n, n) bool; [i, j] must not be, as [i, i] never is. avoided: the same; [i, j] only if it must.
    Raises ValueError where no assignment exists. The paper's code lets one person keep the own prefix.
    """
    n = len(ids)
    never = np.eye(n, dtype=bool) | (False if forbidden is None else forbidden)
    cost = np.random.default_rng([seed, 4]).random((n, n))  # in all below n, which one avoided pair costs;
    cost += n * (0 if avoided is None else avoided) + n * (n + 1) * never  # one forbidden more than n avoided
    mine, others = linear_sum_assignment(cost)
    if never[mine, others].any():
        stuck = ids[int(np.argmax(never[mine, others]))]
        raise ValueError(f"no wrong prefix can be given to {stuck}: too many others have the same text; "
                         "add people or shots (prefixes.*_shots)")
    return {ids[i]: ids[j] for i, j in zip(mine, others, strict=True)}


def overlap(prefixes: pd.DataFrame, seed: int, variant: str = "main") -> pd.DataFrame:
    """What each prefix of a variant shares with a gold persona: ROUGE-1 F1 to the own one and a random other's.

    Returns persona_id, prefix, r1, r1_random (NaN where there is no gold) and words. Table 2 has their means.
    """
    from rouge_score.rouge_scorer import RougeScorer  # slow to import, by way of nltk and sklearn

    main, mine = (prefixes[prefixes["variant"] == wanted] for wanted in ("main", variant))
    gold = main[main["prefix"] == "persona_gold"].set_index("persona_id")["text"]
    others = gold.rename(derange(sorted(gold.index), seed)) if len(gold) > 1 else gold[:0]
    rows, score = mine[["persona_id", "prefix"]].reset_index(drop=True), RougeScorer(["rouge1"]).score
    for column, reference in (("r1", gold), ("r1_random", others)):
        rows[column] = [score(reference[p], text)["rouge1"].fmeasure if p in reference.index else np.nan
                        for p, text in zip(mine["persona_id"], mine["text"], strict=True)]
    return rows.assign(words=mine["text"].str.split().map(len).tolist())


def shared_words(prefixes: pd.DataFrame, templates: str) -> pd.DataFrame:
    """How alike a person's own prefix and the shuffled one are, with and without the template around them.

    Returns persona_id, prefix, text (prefix, prefix_and_prompt), words of the own one and rouge_lsum (F1).
    Table 13 has their means, and as "shared words" the product of the means.
    """
    from rouge_score.rouge_scorer import RougeScorer

    wide = prefixes.pivot(index=["persona_id", "prefix"], columns="variant", values="text")
    rows, score = [], RougeScorer(["rougeLsum"]).score
    for (persona_id, prefix), own, wrong in wide[["main", "shuffled"]].itertuples():
        asked = ["".join(prompt(templates, prefix, text, "")) for text in (own, wrong)]
        for text, (a, b) in {"prefix": (own, wrong), "prefix_and_prompt": asked}.items():
            rows.append((persona_id, prefix, text, len(a.split()), score(a, b)["rougeLsum"].fmeasure))
    return pd.DataFrame(rows, columns=["persona_id", "prefix", "text", "words", "rouge_lsum"])


def truncation(pairs: pd.DataFrame, made: pd.DataFrame, tokenizer, templates: str, limits: Sequence[int],
               max_prompt: int = 0) -> pd.DataFrame:
    """What a limit of length cuts off prefixes that stand before the questions of `pairs`.

    made: the rows of the table prefixes that are asked about. limits: values of policy.max_length, in tokens;
    max_prompt: as policy.max_prompt.
    Returns rows prefix, variant, max_length, side (the end that gives way), n_tokens (mean of what stands before
    a question), with_loss (share of pairs), lost (share of those tokens) and own_lost (share of the tokens
    that speak of the person; the template's own words are not among them). Source: Appendix H.
    """
    rows, answers = [], pairs[["chosen", "rejected"]].to_numpy().tolist()
    for (prefix, variant), of in made.groupby(["prefix", "variant"], sort=False):
        text = of.set_index("persona_id")["text"]
        own = {p: _own_tokens(tokenizer, prompt(templates, prefix, t, "")[0], t) for p, t in text.items()}
        asked = [prompt(templates, prefix, text[p], x) for p, x in zip(pairs["persona_id"], pairs["prompt"], strict=True)]
        marks = [own[p] for p in pairs["persona_id"]]
        size, mine = sum(map(len, marks)), sum(m.sum() for m in marks)
        spelt = scoring.spell(tokenizer, asked, answers)
        for limit in limits:
            lost = [scoring.cut(one, limit, max_prompt=max_prompt).lost for one in spelt]
            gone = {"left": sum(m[:n].sum() for m, n in zip(marks, lost, strict=True)),
                    "right": sum(m[len(m) - n:].sum() for m, n in zip(marks, lost, strict=True))}
            rows += [(prefix, variant, limit, side, size / len(marks), np.mean(np.array(lost) > 0), sum(lost) / size,
                      n / mine) for side, n in gone.items()]
    return pd.DataFrame(rows, columns=["prefix", "variant", "max_length", "side", "n_tokens", "with_loss", "lost",
                                       "own_lost"])


def leaks(prefixes: pd.DataFrame, preferences: pd.DataFrame) -> pd.DataFrame:
    """The prefixes that hold an answer to anybody's test question, of LEAK_WORDS words or more: none may."""
    answers = preferences.loc[preferences["split"] == "test", ["chosen", "rejected"]].to_numpy().ravel()
    told = [answer for answer in dict.fromkeys(answers) if len(answer.split()) >= LEAK_WORDS]
    return prefixes[[any(answer in text for answer in told) for text in prefixes["text"]]]


def _own_tokens(tokenizer, head: str, text: str) -> np.ndarray:
    """Which of a head's tokens spell the person's own text, and not the template's words: bool [tokens]."""
    own = np.zeros(len(head), dtype=bool)
    for found in re.finditer(re.escape(text), head):
        own[found.start():found.end()] = True
    spans = tokenizer(head, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    return np.array([own[start:end].any() for start, end in spans], dtype=bool)


def _write(prefix: str, variant: str, people: pd.DataFrame, shots: list[pd.DataFrame], teacher: "Teacher | None",
           policy: tuple, cfg: Profile, seed: int) -> tuple[list[str], str]:
    """The texts of one prefix for all people, and who wrote them ("" for what is copied)."""
    seed, rejected = seed + RESEED * (variant == "reseed"), variant == "with_rejected"
    if prefix in FIXED:
        return people[prefix].tolist(), ""
    if prefix == "few_shot":
        return [few_shot_text(s, cfg.policy.templates) for s in shots], ""
    if prefix == "persona_gold" and cfg.data.preferences:
        return people["description"].tolist(), ""  # data.people says it, not the teacher
    if prefix == "persona_gold":
        asked = [prompts.render("teacher", "gold_persona", NAME=name) for name in people["name"]]
    else:
        group = cfg.policy.templates if prefix == "persona" else "teacher"
        asked = [prompts.render(group, "infer_persona", SHOTS=few_shot_text(s, group, rejected))
                 for s in shots]
    ask, whom, writer = ((_policy_says, policy, cfg.policy.path) if prefix == "persona"
                         else (_teacher_says, teacher, cfg.teacher.model))
    texts = _insist(asked, lambda again, attempt: ask(again, whom, cfg, seed + 10 * attempt))
    if "" in texts:
        raise ValueError(f"{writer} wrote no {prefix} for {texts.count('')} people, asked {ATTEMPTS} times: "
                         "leave it out of prefixes.names, or take another policy.path or teacher.model")
    return texts, writer


def _insist(asked: Sequence[str], say: Callable[[list[str], int], Sequence[str]]) -> list[str]:
    """What is said to each prompt; where that is blank it is asked again, ATTEMPTS times in all."""
    texts = [""] * len(asked)
    for attempt in range(ATTEMPTS):
        if blank := [i for i, text in enumerate(texts) if not text]:
            for i, text in zip(blank, say([asked[i] for i in blank], attempt), strict=True):
                texts[i] = text.strip()
    return texts


def _policy_says(asked: list[str], policy: tuple, cfg: Profile, seed: int) -> list[str]:
    """One text each, of at most half the window: the question and the answers need the rest."""
    said = sampling.generate(*policy, asked, n=1, temperature=PERSONA_TEMPERATURE, top_p=1.0, seed=seed,
                             max_new_tokens=cfg.policy.max_length // 2, batch=cfg.responses.batch,
                             dtype=cfg.policy.dtype)
    return [texts[0] for texts in said]


def _teacher_says(asked: list[str], teacher: "Teacher", cfg: Profile, seed: int) -> list[str]:
    from helpers.llm import Request  # slow to import, by way of openai: not for who only reads prefixes

    requests = [Request([{"role": "user", "content": text}], tag="prefixes", seed=seed) for text in asked]
    return [answer.text if answer.outcome == "ok" else "" for answer in teacher.map(requests, "personas")]


def _shuffled(main: pd.DataFrame, people: pd.DataFrame, seed: int) -> pd.DataFrame:
    """Everybody's main prefixes given to somebody else, of another category if that can be."""
    ids = people["persona_id"].tolist()
    texts = main.pivot(index="persona_id", columns="prefix", values="text").reindex(ids).to_numpy()
    same = (texts[:, None, :] == texts[None, :, :]).any(axis=2)
    on = [set(zip(a, c, strict=True)) for a, c in zip(people["axes"], people["categories"], strict=True)]
    gives = derange(ids, seed, forbidden=same, avoided=np.array([[bool(a & b) for b in on] for a in on]))
    return main.assign(persona_id=main["persona_id"].map(gives), variant="shuffled")
