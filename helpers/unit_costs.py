"""What a unit of work costs on this machine: every stage's core function really runs on a few rows of a profile's shapes.

The simulated teacher stands in the teacher's place (nothing is paid), random weights in that of a policy that is not at
hand. `projection` counts the units. Nothing is left behind.
"""

import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from os import environ
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from transformers import AutoModelForCausalLM

from helpers import (
    ROOT,
    figures,
    harness,
    judging,
    llm,
    memory,
    models,
    people,
    prefixes,
    projection,
    prompts,
    responses,
    retrieval,
    sampling,
    scoring,
    shapes,
    stats,
)
from helpers import settings as asking
from helpers.artifacts import Store, open_run
from helpers.config import Profile
from helpers.training import REFERENCE, Cell, train_adapter
from helpers.world.facts import load_world

SMALL = 3e8  # parameters: a larger policy is rehearsed on a CPU by one of its layers
PERSONS, ASKED = 3, 10  # people of a rehearsal, and questions of each
SECONDS_A_REQUEST = 4.0  # of a teacher that is no simulation


class Body(NamedTuple):
    """What stands for the policy: seconds measured here times `scale` are those of the whole model."""

    model: torch.nn.Module
    tokenizer: Any
    scale: float
    note: str


def measure(cfg: Profile) -> tuple[dict[str, dict[str, float]], list[str]]:
    """unit -> seconds, memory_mb, gpu_mb, disk_mb, tokens_in, tokens_out for `projection.project`; and notes.

    On a CPU one thread's processor time counts, so that other programs on the machine change little; on a GPU the
    clock does. Raises ConfigError for a policy that is not at hand and of unknown shape.
    """
    if not shapes.at_hand(cfg.policy):
        shapes.shape_of(cfg.policy.path)  # raises what is to be changed, before anything is started
    began, started = time.process_time(), _importing()  # first: a child's memory is counted from its parent's
    body = _body(cfg)
    rng = np.random.default_rng(cfg.seed)
    costs = {"figure": _figure(), "statistic": _statistic(cfg, rng)}
    with TemporaryDirectory() as folder, models.one_thread():
        store = _stand_in(cfg, Path(folder))
        teacher = llm.connect(store)
        who = people.select_personas(teacher, store.profile.people.axes, PERSONS).head(PERSONS)
        asked = people.make_questions(teacher, who, store.profile, cfg.seed)
        costs["answer"], texts = _answers(cfg, body, asked["text"].tolist(), rng)
        costs["selection"] = _selection(cfg, asked, texts, costs["answer"]["seconds"])
        pairs = _pairs(who, asked, texts)
        costs["picked"] = _picked(cfg, pairs)
        judged = [_clock(lambda seed=seed: _judge(teacher, store.profile, who, pairs, seed)) for seed in (0, 1)]
        costs["persona"], made = _personas(cfg, store.profile, body, who, pairs, teacher, costs["answer"]["seconds"])
        costs |= _requests(cfg, teacher, *judged[1])  # the first time there is a connection to be made
        costs |= _policy(cfg, body, pairs, made, Path(folder))
        size = 2 * costs["adapter"]["disk_mb"]  # in work and in models
        costs["adapter"]["disk_mb"] = size
    costs |= _start(*started) | {"rehearsal": {"seconds": time.process_time() - began}}
    _memory(cfg, costs, body)
    notes = [body.note] if body.note else []
    if not simulated(cfg):
        notes.append(f"teacher: the simulated one stood in; {SECONDS_A_REQUEST:g} s a request are assumed")
    return costs, notes


def _body(cfg: Profile) -> Body:
    """The policy itself, or, where it is not at hand or too large for this CPU, some of its layers at random."""
    cuda, at_hand = torch.cuda.is_available(), shapes.at_hand(cfg.policy)
    config = shapes.config_of(cfg.policy) if at_hand else shapes.shape_of(cfg.policy.path)
    whole = shapes.active(config)
    if at_hand and (cuda or whole < SMALL):
        return Body(*models.load_policy(cfg.policy), 1.0, "")
    layers, tokenizer = config.num_hidden_layers, models.load_tokenizer("data/models/base")
    config.num_hidden_layers = layers if cuda else 1
    torch.manual_seed(cfg.seed)
    dtype = models._weights_dtype(cfg.policy.dtype, models._device())
    with torch.device(models._device()):
        model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa", dtype=dtype).eval()
    scale = whole / shapes.active(config)
    return Body(model, tokenizer, scale, f"policy {cfg.policy.path}: random weights, {config.num_hidden_layers} of {layers} "
                f"layers, seconds times {scale:.1f}; texts as long as the profile allows: upper bounds")


def _clock(job: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds of a job and its result: of this process' processor, or by the clock with a GPU."""
    clock = time.perf_counter if torch.cuda.is_available() else time.process_time
    began = clock()
    result = job()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return clock() - began, result


def _figure() -> dict[str, float]:
    with TemporaryDirectory() as folder:
        return {"seconds": _clock(lambda: _draw(Path(folder) / "figure.png"))[0], "disk_mb": 0.1}


def _statistic(cfg: Profile, rng: np.random.Generator) -> dict[str, float]:
    """A difference between two prefixes on all test pairs, with its interval, and its test by permutation."""
    n = projection.counts(cfg)
    rows = pd.DataFrame({"persona_id": np.arange(n.test) % n.people, "correct": rng.random(n.test) < 0.5})
    options = cfg.stats.model_dump() | {"seed": cfg.seed}

    def test() -> None:
        others = rows.assign(correct=rng.random(n.test) < 0.5)
        stats.difference(rows, others, **options)
        stats.paired_permutation(stats.person_means(rows), stats.person_means(others))

    return {"seconds": _clock(test)[0]}


def _importing() -> list[subprocess.Popen]:
    """Fresh processes beside this one: one imports what every notebook imports, the other what loads models too."""
    code = ("import resource\nfrom helpers import {}\nused = resource.getrusage(resource.RUSAGE_SELF)\n"
            "print(used.ru_utime + used.ru_stime, used.ru_maxrss)")
    return [subprocess.Popen([sys.executable, "-c", code.format(names)], cwd=ROOT, text=True, stdout=subprocess.PIPE,
                             env=environ | {"PYTHONPATH": str(ROOT)}) for names in ("show, stats", "show, stats, training")]


def _start(*children: subprocess.Popen) -> dict[str, dict[str, float]]:
    """Seconds of the processor and memory of both: a notebook's start, what models add, and a worker's start."""
    said = [child.communicate()[0].split() for child in children]
    if not all(said):
        raise RuntimeError("a fresh process could not import the helpers; what it said stands above")
    (light, small), (heavy, large) = ((float(seconds), int(kilobytes) / 1024) for seconds, kilobytes in said)
    return {"notebook": {"seconds": light, "memory_mb": small, "disk_mb": 1.0},
            "models": {"seconds": max(0.0, heavy - light), "memory_mb": max(0.0, large - small)}, "grid": {"seconds": heavy}}


def _draw(path: Path) -> None:
    """A figure of twenty intervals, drawn twice, as a notebook does: for the file and for its own page."""
    rows = pd.DataFrame({"label": [f"prefix {i}" for i in range(20)], "estimate": 0.1, "low": 0.0, "high": 0.2, "n_people": 50})
    fig = figures.forest(rows, "label", "accuracy")
    for _ in range(2):
        fig.savefig(path, dpi=150, bbox_inches="tight")
    plt.close(fig)


def simulated(cfg: Profile) -> bool:
    """Whether the teacher is the little world's, in this process, and costs nothing."""
    return cfg.teacher.base_url == "simulated"


def _stand_in(cfg: Profile, folder: Path) -> Store:
    """A run folder for a rehearsal: the simulated teacher, one axis of its world, few people and questions."""
    world = cfg.world or "little"
    axes = cfg.people.axes if cfg.simulated else ()
    sets = ["teacher.base_url=simulated", "teacher.model=simulated-teacher", f"world={world}", "teacher.cache=",
            f"people.axes=[{(axes or tuple(load_world(world).axes))[0]}]", f"questions.personal={ASKED - 2}",
            "questions.divergent=2", "questions.batch=8", "data.preferences="]
    store = open_run("smoke", "rehearsal", sets=sets, runs=folder)
    return Store(store.path, store.profile.model_copy(update={"judge": cfg.judge}))


def _answers(cfg: Profile, body: Body, asked: list[str], rng: np.random.Generator) -> tuple[dict, list[list[str]]]:
    """The cost of a chain-of-thought answer, its thought counted in; and texts, four or more for each question."""
    r, group = cfg.responses, cfg.policy.templates
    each = max(4, r.batch // len(asked)) if body.scale == 1 else 1
    given = [prompts.render(group, "cot_given", X=x, AXIS="diet", CATEGORIES="one, other", CATEGORY="one") for x in asked]
    given = given if body.scale == 1 else given[:min(4, r.batch)]
    how = {"temperature": r.temperature, "top_p": r.top_p, "batch": r.batch, "seed": cfg.seed, "n": each}
    seconds, texts = _written(body, given, r.max_new_tokens, how)
    thought = 1 + 1.5 / r.per_cot  # half as many thoughts again are drawn
    per = seconds / len(given) / each * thought * body.scale
    if body.scale != 1:
        words = " ".join(asked).split()
        texts = [[" ".join(rng.choice(words, int(0.7 * r.max_new_tokens))) for _ in range(4)] for _ in asked]
    size = 2 * np.mean([len(text) for own in texts for text in own]) + 200
    return {"seconds": per, "disk_mb": size / 2**20}, [[text or "Nothing at all." for text in own] for own in texts]


def _written(body: Body, asked: list[str], new: int, how: dict[str, Any]) -> tuple[float, list[list[str]]]:
    """Seconds of writing texts of up to `new` tokens, and the texts; of a stand-in a few tokens, and what each adds."""
    run = lambda n: _clock(lambda: sampling.generate(body.model, body.tokenizer, asked, max_new_tokens=n, **how))  # noqa: E731
    if body.scale == 1:
        return run(new)
    few, more = run(2)[0], run(10)[0]
    return few + (new - 2) * max(0.0, more - few) / 8, []


def _selection(cfg: Profile, asked: pd.DataFrame, texts: list[list[str]], answer: float) -> dict[str, float]:
    """Cleaning, reward, embedding and clusters of an answer; for models not at hand in proportion to their size."""
    raw = pd.DataFrame([{"response_id": f"{q}-{i}", "question_id": q, "cot_axis": "", "cot_categories": ["one"],
                         "cot_category": "one", "text_raw": text}
                        for q, own in zip(asked["question_id"], texts, strict=True) for i, text in enumerate(own)])
    if all(map(shapes.at_hand, (cfg.reward, cfg.embedder))):
        responses.select(raw.head(8), asked, cfg)  # loads
        return {"seconds": _clock(lambda: responses.select(raw, asked, cfg))[0] / len(raw)}
    others = sum(map(shapes.parameters, (cfg.reward.path, cfg.embedder.path)))
    # reading a text at once costs an eighth, or less, of writing it word by word with as many weights
    return {"seconds": answer / 8 * np.nan_to_num(others / shapes.parameters(cfg.policy.path), nan=1.0)}


def _pairs(who: pd.DataFrame, asked: pd.DataFrame, texts: list[list[str]]) -> pd.DataFrame:
    """Preference pairs of two different texts, as notebook 04 makes them; two of each person's are test pairs."""
    rows, of = [], dict(zip(asked["question_id"], texts, strict=True))
    for person in who.itertuples():
        own = asked[(asked["persona_id"] == person.persona_id) | asked["axis"].isin(person.axes)]
        for i, q in enumerate(own.itertuples()):
            said = list(dict.fromkeys([*of[q.question_id], "Nothing at all."]))
            rows.append({"pair_id": f"{person.persona_id}:{q.question_id}", "persona_id": person.persona_id, "kind": q.kind,
                         "question_id": q.question_id, "axis": q.axis, "split": "test" if i < 2 else "train",
                         "prompt": q.text, "chosen": said[0], "rejected": said[1], "chosen_id": f"{q.question_id}-0",
                         "rejected_id": f"{q.question_id}-1"})
    return pd.DataFrame(rows)


def _judge(teacher: llm.Teacher, cfg: Profile, who: pd.DataFrame, pairs: pd.DataFrame, seed: int) -> int:
    """Have the pairs judged; how many requests that takes."""
    name, texts = who.set_index("persona_id")["name"], {}
    texts |= dict(zip(pairs["chosen_id"], pairs["chosen"], strict=True))
    texts |= dict(zip(pairs["rejected_id"], pairs["rejected"], strict=True))
    matches = [judging.Match(p.persona_id, name[p.persona_id], p.question_id, p.prompt, 1, p.chosen_id, p.rejected_id,
                             p.chosen_id) for p in pairs.itertuples()]
    judging.compare(teacher, matches, texts, cfg, seed, "judging")
    return -(-len(matches) // cfg.judge.pairs_per_request)


def _picked(cfg: Profile, pairs: pd.DataFrame) -> dict[str, float]:
    """Shots for a question by a measure: the nearest ones and the farthest ones, as two prefixes."""
    pool = pairs.sample(18, replace=True, random_state=cfg.seed)  # about as many train pairs as a person has
    likeness = np.linspace(0.0, 1.0, len(pool))

    def pick() -> None:
        for at in retrieval.nearest_and_farthest(likeness, cfg.prefixes.few_shot_shots):
            prefixes.few_shot_text(pool.iloc[at], cfg.policy.templates)

    return {"seconds": _clock(lambda: [pick() for _ in range(20)])[0] / 20}


def _personas(cfg: Profile, stand_in: Profile, body: Body, who: pd.DataFrame, pairs: pd.DataFrame, teacher: llm.Teacher,
              answer: float) -> tuple[dict[str, float], pd.DataFrame]:
    """What a persona inferred by the policy costs; and the prefixes, by a policy not at hand in a teacher's words."""
    names = [name for name in cfg.prefixes.names if name not in ("none", "persona")]
    few = cfg.prefixes.model_copy(update={"names": tuple(names), "shot_counts": ()})
    shaped = stand_in.model_copy(update={"prefixes": few, "policy": cfg.policy, "responses": cfg.responses})
    table = prefixes.build_prefixes(who, pairs, teacher, (body.model, body.tokenizer), shaped, cfg.seed)
    if "persona" not in cfg.prefixes.names:
        return {"seconds": 0.0}, table
    written = table[(table["variant"] == "main") & (table["prefix"] == (names[-1] if names else ""))].assign(prefix="persona")
    if body.scale != 1:
        return {"seconds": answer * cfg.policy.max_length / 2 / cfg.responses.max_new_tokens}, pd.concat([table, written])
    shots = prefixes.few_shot_text(pairs[pairs["split"] == "train"].head(cfg.prefixes.persona_shots), cfg.policy.templates)
    asked = [prompts.render(cfg.policy.templates, "infer_persona", SHOTS=shots)] * 16
    seconds, _ = _clock(lambda: prefixes._policy_says(asked, (body.model, body.tokenizer), cfg, cfg.seed))
    return {"seconds": seconds / len(asked)}, pd.concat([table, written])


def _requests(cfg: Profile, teacher: llm.Teacher, judging_seconds: float, judged: int) -> dict[str, dict[str, float]]:
    """Tokens of a request, by tag, from the prompts as rendered; seconds: the simulated teacher's, the judge's apart."""
    batch = [llm.Request([{"role": "user", "content": prompts.render("teacher", "gold_persona", NAME=f"Ada {i}")}], tag="speed")
             for i in range(32)]
    seconds, verdict = _clock(lambda: teacher.map(batch, "speed"))[0] / len(batch), judging_seconds / judged
    if not simulated(cfg):
        seconds = verdict = SECONDS_A_REQUEST / cfg.teacher.concurrency
    tags = teacher.ledger()["by_tag"]
    costs = {}
    for tag in projection.TEACHER:
        of = tags.get("judge" if tag == "judge_lab" else tag) or tags["personas"]
        read, written = (of[f"{what}_tokens"] / of["requests"] for what in ("prompt", "completion"))
        costs[tag] = {"seconds": verdict if tag.startswith("judge") else seconds, "tokens_in": read,
                      "tokens_out": written, "disk_mb": (written * 4 + 400) / 2**20}
    return costs


def _policy(cfg: Profile, body: Body, pairs: pd.DataFrame, made: pd.DataFrame, folder: Path) -> dict[str, dict[str, float]]:
    """Scoring, training, replying and the harness, behind every prefix of the profile."""
    names = [name for name in prefixes.available_prefixes(cfg) if name == "none" or name in set(made["prefix"])]
    rows = pd.concat([asking.ask(pairs, made, name, cfg.policy.templates) for name in names], ignore_index=True)
    rows = rows if body.scale == 1 else rows.sort_values("prefix").iloc[[len(rows) // 2]]
    p = cfg.policy if body.scale == 1 else cfg.policy.model_copy(update={"load_in_4bit": False})
    told = list(zip(rows["head"], rows["tail"], strict=True))
    answers = rows[["chosen", "rejected"]].to_numpy().T.tolist()
    options = {"max_length": p.max_length, "side": cfg.prefixes.side, "max_prompt": p.max_prompt}
    score = partial(scoring.score_pairs, body.model, body.tokenizer, dtype=p.dtype, **options)
    if body.scale == 1:
        score(told[:1], *(texts[:1] for texts in answers))  # what is done once in a process
    seconds, found = _clock(lambda: score(told, *answers))
    scored = seconds / len(rows) * body.scale
    encoded, _ = _clock(lambda: scoring.encode_pairs(body.tokenizer, told, *answers, **options))
    renamed = dict(zip(("logp_chosen", "logp_rejected"), REFERENCE, strict=True))
    train = pd.concat([rows.reset_index(drop=True), found[list(renamed)].rename(columns=renamed)], axis=1)
    train = _of_middling_length(train)  # one prefix, as in a real training: beside longer ones rows are padded
    cell = Cell("rehearsal", folder / "adapter", p, cfg.training.model_copy(update={"epochs": 1}), cfg.seed, train, train)
    cell.out.mkdir()
    one = replace(cell, train=train.head(1))
    times = 2 if len(train) > 1 else 1  # the first time each new shape of rows costs a new kernel, as in no long training
    every = min(_trained(body, cell) for _ in range(times))
    few = min(_trained(body, one) for _ in range(times)) if len(train) > 1 else 0.0
    learned = (every - few) / max(1, len(train) - 1)
    kept = sum(f.stat().st_size for f in cell.out.rglob("*") if f.is_file()) / 2**20
    whole = 1.0 if body.scale == 1 else shapes.shape_of(p.path).num_hidden_layers / body.model.config.num_hidden_layers
    reply = _reply(cfg, body, told)
    item, evaluation = _harness(cfg, body, rows["head"].iloc[-1]) if body.scale == 1 else (scored, 0.0)
    return {"pair scored": {"seconds": scored, "disk_mb": 5e-5}, "pair encoded": {"seconds": encoded / len(rows)},
            "pair trained": {"seconds": learned * body.scale},
            "adapter": {"seconds": max(0.0, few - learned), "disk_mb": kept * whole},
            "reply": {"seconds": reply}, "item": {"seconds": item}, "evaluation": {"seconds": evaluation, "disk_mb": 0.02}}


def _of_middling_length(rows: pd.DataFrame) -> pd.DataFrame:
    """The rows behind the prefix whose length is nearest to the mean, several times, so that there are enough."""
    length = rows["head"].str.len().groupby(rows["prefix"]).mean()
    of = rows[rows["prefix"] == (length - length.mean()).abs().idxmin()]
    return pd.concat([of] * -(-len(rows) // len(of) // 2), ignore_index=True) if len(rows) > 1 else of


def _trained(body: Body, cell: Cell) -> float:
    """Seconds of an adapter on these pairs, once through; of 7 billion weights one pair is enough."""
    with models.peft_quiet():
        seconds, (model, _) = _clock(lambda: train_adapter(body.model, body.tokenizer, cell, cell.out))
        model.unload()
    return seconds


def _reply(cfg: Profile, body: Body, told: list[tuple[str, str]]) -> float:
    asked = [head + tail for head, tail in told[:16]]
    how = {"n": 1, "temperature": cfg.generation.temperature, "top_p": 1.0, "seed": cfg.seed, "batch": cfg.responses.batch}
    return _written(body, asked, cfg.generation.max_new_tokens, how)[0] / len(asked) * body.scale


def _harness(cfg: Profile, body: Body, head: str) -> tuple[float, float]:
    """Seconds of an item and of an evaluation's start; tasks of the little world, as others may not be at hand."""
    from helpers.world import tasks as little

    with TemporaryDirectory() as folder:
        little.write(load_world(cfg.world or "little"), Path(folder), cfg.seed)
        tasks = harness.load_tasks(tuple(little.TASKS), Path(folder))
        run = [_clock(lambda n=n: harness.evaluate(body.model, body.tokenizer, tasks, head, n, cfg.policy.dtype))[0]
               for n in (2, 2, 27)]  # the first loads
    item = max(0.0, run[2] - run[1]) / 25 / len(tasks)
    return item, max(0.0, run[1] - 2 * len(tasks) * item)


def _memory(cfg: Profile, costs: dict[str, dict[str, float]], body: Body) -> None:
    """Of the units that hold the policy: this process' largest so far; on the GPU what was measured, or arithmetic."""
    here = memory.peak_mb()
    whole = shapes.parameters(cfg.policy.path)
    if body.scale != 1:  # the whole model, not the layers that were there
        here += (whole - sum(p.numel() for p in body.model.parameters())) * 2 / 2**20 if not torch.cuda.is_available() else 0
    wanted = cfg.policy.load_in_4bit or cfg.policy.templates == "full" or torch.cuda.is_available()
    gpu = max(shapes.gpu_mb(cfg, whole), torch.cuda.max_memory_allocated() / 2**20 if torch.cuda.is_available() else 0)
    for unit in projection.SPREAD:
        costs[unit] |= {"memory_mb": here, "gpu_mb": gpu if wanted else 0.0}
