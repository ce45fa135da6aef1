"""Do the answers themselves get better? Systems answer test questions, and the judge compares their answers.

A system is a policy (the base, or an adapter trained on other people) with a prefix in front or without
(paper section 4.2, Table 3). Every person asks one personal and one divergent question.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import combinations
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, NamedTuple

import pandas as pd

from helpers import chat, grid, judging, models, prompts, sampling, scoring, settings
from helpers.artifacts import atomic
from helpers.config import Profile
from helpers.judging import Match
from helpers.prefixes import available_prefixes
from helpers.schemas import KINDS, TABLES

if TYPE_CHECKING:
    from helpers.llm import Teacher


class System(NamedTuple):
    """Who answers: the base (trained is "") or the adapter trained with `trained`, with `prefix` in front."""

    name: str
    trained: str
    prefix: str
    kinds: tuple[str, ...] = KINDS


def systems(cfg: Profile, policies: pd.DataFrame) -> list[System]:
    """The systems of Table 3 for each of generation.prefixes, then the rivals, on the divergent question alone.

    What "MT without prefix" means is not spelt out in the paper; section 4.2 ("degrades to baseline after
    removing prefixes") makes it the same adapter with its prefix taken away. The adapter that never had one is
    the rival mt_none. A prefix that the run does not have, or that no adapter was trained with, is left out; if
    that leaves none of generation.prefixes, the run's last one stands in.
    """
    trained = set(policies.loc[_main_policies(policies, cfg), "prefix"])
    usable = [name for name in available_prefixes(cfg) if name in trained]
    chosen = [name for name in cfg.generation.prefixes if name in usable and name != "none"]
    chosen = chosen or [name for name in usable if name != "none"][-1:]
    if not chosen:
        raise ValueError(f"no adapter was trained with a prefix, only {sorted(trained)}: add one to prefixes.names")
    found = [System("base_none", "", "none")]
    for name in chosen:
        found += [System(f"base_{name}", "", name), System(f"mt_{name}_removed", name, "none"),
                  System(f"mt_{name}", name, name)]
    rivals = [name for name in cfg.generation.rivals if name in usable and name not in chosen]
    return found + [System(f"mt_{name}", name, name, ("divergent",)) for name in rivals]


def questions(preferences: pd.DataFrame, cfg: Profile, seed: int) -> pd.DataFrame:
    """One personal and one divergent test question of each person, drawn by a seed of the person's own.

    generation.people: how many people are drawn; 0: all. Returns persona_id, question_id, kind, axis, prompt.
    """
    test, people = preferences[preferences["split"] == "test"], sorted(preferences["persona_id"].unique())
    drawn = sorted(Random(f"{seed} generation").sample(people, min(cfg.generation.people or len(people), len(people))))
    rows = []
    for (persona_id, kind), own in test.sort_values("question_id").groupby(["persona_id", "kind"]):
        if persona_id in drawn:
            rows.append(Random(f"{seed} generation {persona_id} {kind}").choice(own.index))
    return test.loc[rows, ["persona_id", "question_id", "kind", "axis", "prompt"]].reset_index(drop=True)


def plan(asked: pd.DataFrame, contenders: Sequence[System], prefixes: pd.DataFrame, folds: pd.DataFrame,
         policies: pd.DataFrame, cfg: Profile) -> pd.DataFrame:
    """Every prompt to be answered: system, policy_id, prefix, head, tail, and the columns of `questions`.

    A person is answered by the adapter of the fold in which they were held out, of the first training seed.
    """
    main = policies[_main_policies(policies, cfg)].set_index(["prefix", "fold"])["policy_id"]
    fold_of = folds[folds["scheme"] == "stratified"].set_index("persona_id")["fold"]
    parts = []
    for system in contenders:
        rows = asked[asked["kind"].isin(system.kinds)]
        rows = settings.ask(rows, prefixes, system.prefix, cfg.policy.templates).drop(columns="variant")
        ids = [main[system.trained, fold_of[p]] if system.trained else "base" for p in rows["persona_id"]]
        parts.append(rows.assign(system=system.name, policy_id=ids))
    return pd.concat(parts, ignore_index=True)


def answer(planned: pd.DataFrame, adapters: Mapping[str, Path], cfg: Profile, seed: int, work: Path) -> pd.DataFrame:
    """The `generations` table: one sampled answer to each planned prompt, and the reward model's mark for it.

    adapters: policy_id -> folder; the base is in none. A policy is one unit of work, in one thread; what it has
    answered is kept in `work` and not asked for again. A worker loads one base for all its adapters.
    """
    parts = {policy_id: rows for policy_id, rows in planned.groupby("policy_id")}
    files = {policy_id: work / f"{policy_id}.json" for policy_id in parts}
    todo = [partial(_answer_all, rows, adapters.get(policy_id, ""), cfg, seed, files[policy_id])
            for policy_id, rows in parts.items() if not files[policy_id].exists()]
    t, finished = cfg.training, len(parts) - len(todo)
    grid.run_units(todo, t.workers, t.executor, "answering", "policy", finished)
    told = [rows.assign(text=json.loads(files[policy_id].read_text())) for policy_id, rows in parts.items()]
    told = pd.concat(told, ignore_index=True)
    with models.one_thread():
        judge = models.load_reward(cfg.reward.path, cfg.reward.revision, work / "rewards.sqlite")
        marks = judge.score(told["prompt"].tolist(), told["text"].tolist())
    return told.assign(reward=marks.astype(float))[list(TABLES["generations"].columns)]


def judge(teacher: "Teacher | None", generations: pd.DataFrame, personas: pd.DataFrame, asked: pd.DataFrame, cfg: Profile,
          seed: int) -> pd.DataFrame:
    """The `winrates` table: all answers to a person's question, in pairs, each pair in both orders.

    teacher: None where nobody knows the people (imported pairs); the table then has no rows.
    """
    if teacher is None:
        return pd.DataFrame(columns=list(TABLES["winrates"].columns))
    texts = {_id(row): row.text for row in generations.itertuples()}
    forth = pairings(generations, personas, asked)
    back = [replace(match, shown_first=match.shown_second) for match in forth]
    for matches, desc in ((forth, "judging"), (back, "judging, turned round")):
        judging.compare(teacher, matches, texts, cfg, seed, desc)
    kind_of = dict(zip(asked["question_id"], asked["kind"], strict=True))
    rows = [{"persona_id": m.persona_id, "question_id": m.question_id, "kind": kind_of[m.question_id],
             "system_a": _system(m.response_a), "system_b": _system(m.response_b),
             "shown_first": _system(m.shown_first), "winner": _system(m.winner), "outcome": m.outcome,
             "explanation": m.explanation, "model": teacher.model, "cost_usd": m.cost_usd} for m in forth + back]
    return pd.DataFrame(rows, columns=list(TABLES["winrates"].columns))


def pairings(generations: pd.DataFrame, personas: pd.DataFrame, asked: pd.DataFrame) -> list[Match]:
    """Every two systems that answered the same person's same question, in one order; nothing is judged yet."""
    name_of = personas.set_index("persona_id")["name"]
    text_of = dict(zip(asked["question_id"], asked["prompt"], strict=True))
    matches = []
    for (persona_id, question_id), rows in generations.groupby(["persona_id", "question_id"]):
        ids = [_id(row) for row in rows.sort_values("system").itertuples()]
        about = (persona_id, name_of[persona_id], question_id, text_of[question_id])
        matches += [Match(*about, round=0, response_a=a, response_b=b, shown_first=a)
                    for a, b in combinations(ids, 2)]
    return matches


def discrimination(scores: pd.DataFrame, contenders: Sequence[System], generations: pd.DataFrame) -> pd.DataFrame:
    """The scored divergent pairs of every system, by the same adapter for the same people: scores and system.

    A system whose scores the run does not have (a removed prefix is scored by notebook 10) has no rows.
    """
    parts = []
    for system in contenders:
        own = generations[generations["system"] == system.name]
        removed = bool(system.trained) and system.prefix != system.trained
        rows = scores[(scores["kind"] == "divergent") & ~scores["trained"]
                      & (scores["setting"] == ("unseen_removed" if removed else "main"))
                      & (scores["prefix"] == (system.trained or system.prefix))]
        parts.append(rows.merge(own[["persona_id", "policy_id", "system"]].drop_duplicates()))
    return pd.concat(parts, ignore_index=True)


def categories(world, generations: pd.DataFrame, personas: pd.DataFrame, asked: pd.DataFrame) -> pd.DataFrame:
    """What no real run can know: whose side of the axis each divergent answer takes.

    Returns system, persona_id, taken (the category with the most phrases in the answer; "" if none has) and
    correct: whether it is one of the person's own. world: helpers.world.facts.World.
    """
    own = {p.persona_id: set(world.people[p.name].memberships) for p in personas.itertuples() if p.name in world.people}
    axis_of = dict(zip(asked["question_id"], asked["axis"], strict=True))
    rows = []
    for row in generations[generations["kind"] == "divergent"].itertuples():
        axis = axis_of[row.question_id]
        taken = _taken(world.spot(row.text).categories, axis)
        rows.append((row.system, row.persona_id, taken, (axis, taken) in own.get(row.persona_id, ())))
    return pd.DataFrame(rows, columns=["system", "persona_id", "taken", "correct"])


def _main_policies(policies: pd.DataFrame, cfg: Profile) -> pd.Series:
    """Which rows are the multitask adapters of the stratified folds, of the first training seed."""
    return ((policies["method"] == "mt") & (policies["scheme"] == "stratified")
            & (policies["seed"] == cfg.training.seeds[0]))


def _answer_all(rows: pd.DataFrame, adapter: str | Path, cfg: Profile, seed: int, file: Path) -> None:
    base, tokenizer = models.base(cfg.policy)
    with models.one_thread(), models.adapted(base, adapter) as model, atomic(file) as part:
        part.write_text(json.dumps(_sample(model, tokenizer, rows, cfg, seed)))


def _sample(model, tokenizer, rows: pd.DataFrame, cfg: Profile, seed: int) -> list[str]:
    """An answer ends where the policy goes on to ask the next question itself, as one of plain text may."""
    size, asked = cfg.generation, fitting(tokenizer, rows, cfg)
    heading = prompts.load(cfg.policy.templates, "respond_none").literals[0]  # "" in templates of chat models
    said = sampling.generate(model, tokenizer, asked, n=1, temperature=size.temperature, top_p=1.0, seed=seed,
                             max_new_tokens=size.max_new_tokens, batch=cfg.responses.batch,
                             stop=f"\n{heading}" if heading else None, dtype=cfg.policy.dtype)
    return [text.strip() for (text,) in said]


def fitting(tokenizer, rows: pd.DataFrame, cfg: Profile) -> list[str]:
    """The prompts, head + tail; one too long for policy.max_length loses what it would lose when it is scored."""
    both = list(zip(rows["head"], rows["tail"], strict=True))
    room, none = cfg.policy.max_length - cfg.generation.max_new_tokens, [""] * len(both)
    pairs = scoring.encode_pairs(tokenizer, both, none, none, room, cfg.prefixes.side)
    shorten, side = partial(chat.shorten, tokenizer), cfg.prefixes.side
    return [shorten(head, pair.lost, side) + shorten(tail, pair.cut) if pair.lost or pair.cut else head + tail
            for pair, (head, tail) in zip(pairs, both, strict=True)]


def _taken(counts: Mapping[tuple[str, str], int], axis: str) -> str:
    """The category of the axis with the most phrases; "" if there is none or two share the lead."""
    ranked = sorted(((n, category) for (a, category), n in counts.items() if a == axis), reverse=True)
    return ranked[0][1] if ranked and (len(ranked) == 1 or ranked[0][0] > ranked[1][0]) else ""


def _id(row) -> str:
    return f"{row.system} {row.persona_id} {row.question_id}"


def _system(response_id: str) -> str:
    return response_id.partition(" ")[0]
