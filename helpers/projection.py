"""How much work a profile asks for, and what it takes at the price of a unit: arithmetic, nothing is measured here.

`unit_costs` measures what a unit costs; notebook 00 and ./run_all.sh rehearse show the product.
"""

from collections.abc import Mapping
from functools import cache
from math import ceil, comb
from typing import NamedTuple

import numpy as np
import pandas as pd

from helpers import ROOT, claims, imported, judge_lab, prefixes
from helpers.config import Profile
from helpers.fingerprint import modules, notebook_code
from helpers.schemas import STAGES
from helpers.world.facts import load_world

TEACHER = ("personas", "demographics", "questions", "judge", "judge_lab", "prefixes")  # units that are requests
SPREAD = ("answer", "reply", "pair scored", "pair trained", "adapter", "item", "evaluation")  # over the workers
UNCONTESTED = 0.15  # of the train pairs, about: what drop_uncontested leaves out in a run of the little world
LIMITS = 7  # of length, at which notebook 05 looks what each main prefix loses
ITEMS = 1000  # of a task that is asked whole (tax.limit 0), about the mean of the paper's


class Counts(NamedTuple):
    """The sizes of a run, upper bounds: nothing is lost to duplicates, open tournaments or uncontested pairs."""

    people: int
    memberships: int  # who is on two axes counts for both
    axes: int
    small: int  # people of the small set
    questions: int
    responses: int
    comparisons: int
    train: int  # pairs
    test: int


def counts(cfg: Profile) -> Counts:
    """What the profile's numbers multiply to; of imported pairs what the file holds."""
    if cfg.data.preferences:
        return _imported(cfg)
    q, axes, people, memberships, small = cfg.questions, *_cast(cfg)
    questions = people * q.personal + axes * q.divergent
    return Counts(people, memberships, axes, small, questions, questions * cfg.responses.n_cot * cfg.responses.per_cot,
                  3 * (people * q.personal + memberships * q.divergent),
                  people * (ceil(q.personal / 2) + ceil(q.divergent / 2)),
                  people * (q.personal // 2) + memberships * (q.divergent // 2))


def work(cfg: Profile) -> pd.DataFrame:
    """Rows stage, unit, amount: how often every notebook does what `unit_costs.measure` has a price for."""
    n, start = counts(cfg), {stem: _notebook(stem) for stem in STAGES}
    parts = {"00_start_here": {"rehearsal": 1}} | ({} if cfg.data.preferences else _teacher_stages(cfg, n))
    parts |= {"05_prefixes": _prefixes(cfg, n), "06_prompting": {"grid": 1, "pair scored": n.test * _prompted(cfg, n)},
              "07_dpo_by_hand": {"grid": 1, "adapter": 1, "pair scored": 2 * min(200, n.test)},
              "08_personal_models": _personal(cfg, n), "09_multitask": _multitask(cfg, n),
              "10_prefix_sensitivity": {"grid": 1, "pair scored": n.test * _changed(cfg) * len(cfg.training.seeds)},
              "12_generation": _generation(cfg, n), "13_alignment_tax": _tax(cfg, n), "14_alignx": _alignx(cfg, n)}
    rows = [(stem, unit, amount) for stem in STAGES for unit, amount in (start[stem] | parts.get(stem, {})).items()]
    return pd.DataFrame(rows, columns=["stage", "unit", "amount"]).query("amount > 0").reset_index(drop=True)


def project(cfg: Profile, costs: Mapping[str, Mapping[str, float]], price: Mapping[str, float]) -> pd.DataFrame:
    """A row per stage: seconds, memory_mb, gpu_mb, disk_mb, tokens (read and written by the teacher), cost_usd.

    costs: unit -> its seconds, memory_mb, gpu_mb, disk_mb, tokens_in, tokens_out (what is left out is 0). Memory
    is that of a stage's largest unit, once for each worker where workers share it. price: $ per million tokens.
    """
    rows, workers = work(cfg), cfg.training.workers
    table = pd.DataFrame([costs.get(unit, {}) for unit in rows["unit"]], index=rows.index)
    table = table.reindex(columns=["seconds", "memory_mb", "gpu_mb", "disk_mb", "tokens_in", "tokens_out"]).fillna(0.0)
    share = rows["unit"].isin(SPREAD).to_numpy() * (workers - 1) + 1
    rows["seconds"] = table["seconds"] * rows["amount"] / share
    for what in ("memory_mb", "gpu_mb"):
        rows[what] = table[what] * share
    for what in ("disk_mb", "tokens_in", "tokens_out"):
        rows[what] = table[what] * rows["amount"]
    rows["cost_usd"] = (rows["tokens_in"] * price["input"] + rows["tokens_out"] * price["output"]) / 1e6
    rows["tokens"], own = rows["tokens_in"] + rows["tokens_out"], costs["notebook"]["memory_mb"]
    by = rows.groupby("stage", sort=False)
    most = by[["memory_mb", "gpu_mb"]].max()
    most["memory_mb"] = np.where(most["memory_mb"] > own, most["memory_mb"] + own, own)  # a kernel beside its workers
    return by[["seconds", "disk_mb", "tokens", "cost_usd"]].sum().join(most).reset_index()


def _cast(cfg: Profile) -> tuple[int, int, int, int]:
    """Axes, people, memberships and people of the small set; the little world's cast is known by name."""
    if not cfg.simulated:
        axes, on = len(cfg.people.axes), cfg.people.per_axis
        small = on * len(set(cfg.people.small) & set(cfg.people.axes))
        return axes, axes * on, axes * on, small or min(10, axes * on)
    world = load_world(cfg.world)
    axes = cfg.people.axes or tuple(world.axes)
    on = {axis: [n for n, p in world.people.items() if axis in dict(p.memberships)][:cfg.people.per_axis] for axis in axes}
    small = {name for axis in cfg.people.small for name in on.get(axis, ())}
    people = len({name for names in on.values() for name in names})
    return len(axes), people, sum(map(len, on.values())), len(small) or min(10, people)


def _imported(cfg: Profile) -> Counts:
    pairs = imported.pairs(cfg.data.preferences, imported.scan(cfg.data.preferences, cfg.data.min_pairs),
                           cfg.data.users, cfg.seed)
    users, half = pairs["user"].nunique(), len(pairs) // 2
    return Counts(users, users, 0, min(10, users), pairs["prompt"].nunique(), 0, 0, len(pairs) - half, half)


def _teacher_stages(cfg: Profile, n: Counts) -> dict[str, dict[str, float]]:
    """01 to 04: what is asked of the teacher and sampled from the policy."""
    q, size, tournaments = cfg.questions, cfg.judge.pairs_per_request, n.comparisons // 3
    asked = n.people * ceil(q.personal / q.batch) + n.axes * ceil(q.divergent / q.batch)
    judges = 4 if cfg.simulated else 1  # three more have a fault planted
    return {"01_personas": {"personas": n.axes, "demographics": n.people}, "02_questions": {"questions": asked},
            "03_responses": {"grid": 1, "answer": n.responses, "selection": n.responses},
            "04_preferences": {"judge": ceil(2 * tournaments / size) + ceil(tournaments / size),
                               "judge_lab": judges * judge_lab.n_requests(cfg)}}


def _prefixes(cfg: Profile, n: Counts) -> dict[str, float]:
    """05: personas that teacher and policy write, in all their variants; questions embedded, to pick shots by."""
    made = prefixes.plan(cfg, n.train // max(1, n.people))
    written, main = [prefix for prefix, _, _ in made], [prefix for prefix, variant, _ in made if variant == "main"]
    by_teacher = sum(written.count(name) for name in ("persona_gpt4", "persona_gold"))
    measures = cfg.prefixes.retrieval if "few_shot" in main else ()
    return {"prefixes": n.people * by_teacher, "persona": n.people * written.count("persona"),
            "selection": n.questions * ("embedding" in measures), "picked": n.test * len(measures),
            "pair encoded": n.test * (len(written) + LIMITS * len(main))}


def _prompted(cfg: Profile, n: Counts) -> int:
    """06: behind how many prefixes each test pair is scored: none, those of `plan`, somebody else's, picked shots."""
    names = [name for name in prefixes.available_prefixes(cfg) if name != "none"]
    picked = 2 * len(cfg.prefixes.retrieval) * ("few_shot" in names)
    return 1 + len(prefixes.plan(cfg, n.train // max(1, n.people))) + len(names) + picked


def _personal(cfg: Profile, n: Counts) -> dict[str, float]:
    """08: an adapter for each person of the small set, seed and share; those of all pairs answer everybody."""
    p, kept = cfg.personal, 1 - cfg.training.validation
    shares, of = {1.0, *p.shares}, n.small * len(p.seeds)
    train, test = n.train / n.people, n.test / n.people
    return {"grid": 1, "adapter": of * len(shares), "pair trained": of * train * kept * sum(shares) * p.epochs,
            "pair scored": n.small * (train + 2 * test) + of * (2 * n.small * test + (len(shares) - 1) * test)}


def _multitask(cfg: Profile, n: Counts) -> dict[str, float]:
    """09: adapters for everybody, for the small set and without an axis; swapped labels; learned vectors."""
    t, v, s, names = cfg.training, cfg.vpl, cfg.schemes, prefixes.available_prefixes(cfg)
    kept, own, ends = _kept(cfg), n.train / n.people, {"persona_gold"} & set(names)
    everybody = len(names) * t.folds * len(t.seeds) + len(t.learning_rate_grid)
    everybody += len(ends) * min(2, t.folds) * (t.loser_ablation and t.drop_uncontested)
    everybody += len(t.label_noise) * min(2, t.folds) + len(v.shots) * t.folds * len(t.seeds)
    everybody += min(2, t.folds) * bool(v.as_released and v.shots)
    parts, train, some = min(t.folds, n.small), own * kept, len(set(names) & set(s.prefixes or names))
    small = some * parts * len(t.seeds) if "small" in s.names and n.small > 1 else 0
    without = min(s.axis_folds or n.axes, n.axes)
    apart = some * without if "leave_axis_out" in s.names and n.axes > 1 else 0
    each = min(t.pairs_per_person or train, train)
    trained = everybody * n.people * (1 - 1 / t.folds) * each * t.epochs
    trained += small * n.small * (1 - 1 / max(2, parts)) * each * s.small_epochs
    trained += apart * n.people * (1 - 1 / max(2, without)) * min(s.axis_pairs_per_person or train, train) * t.epochs
    scored = len(names) * n.train + n.test + everybody * (2 * n.test / t.folds + n.train * t.validation)
    scored += small * 2 * n.small * n.test / n.people / max(1, parts) + apart * 2 * n.test / max(1, without)
    return {"grid": 1, "adapter": everybody + small + apart, "pair trained": trained, "pair scored": scored}


def _kept(cfg: Profile) -> float:
    """The share of their train pairs that training people train on."""
    drops = cfg.training.drop_uncontested and not cfg.data.preferences
    return (1 - cfg.training.validation) * (1 - UNCONTESTED * drops)


def _alignx(cfg: Profile, n: Counts) -> dict[str, float]:
    """14: raw-history and bridge adapters for some folds, one without half of the axes; every prompt for the base too."""
    t, a, kept = cfg.training, cfg.alignx, _kept(cfg)
    folds, bridged = min(a.folds, t.folds), not cfg.data.preferences  # of imported pairs raw histories alone
    raw = min(a.raw_folds, folds)
    adapters = raw + folds * bridged
    trained = (adapters * (1 - 1 / t.folds) + 0.5 * bridged) * n.train * kept
    main = 5 * (adapters / t.folds + 0.5 * bridged)  # four representations and none: unseen, and axes never trained
    ladder = (len(a.counts) * (raw + 3 * folds * bridged) + 3 * folds * bridged) / t.folds  # trials, flips, other words
    return {"grid": 1, "adapter": adapters + bridged, "pair trained": trained * t.epochs,
            "pair scored": 2 * (main + ladder) * n.test + (adapters + bridged) * n.train,
            "reply": 2 * (a.people or n.people * folds / t.folds)}


def _changed(cfg: Profile) -> int:
    """10: times that each test pair is scored: five changed prefixes, another draw, picked shots, other personas."""
    names = [name for name in prefixes.available_prefixes(cfg) if name != "none"]
    drawn = [name for name in names if name not in prefixes.FIXED]
    picked = 2 * len(cfg.prefixes.retrieval) * ("few_shot" in names)
    return 5 * len(names) + len(drawn) + picked + len(set(prefixes.INFERRED) & set(names))


def _generation(cfg: Profile, n: Counts) -> dict[str, float]:
    """12: every system answers two questions a person, a rival one; all pairs are judged in both orders."""
    g, names = cfg.generation, prefixes.available_prefixes(cfg)
    chosen = set(g.prefixes) & set(names) - {"none"} or {name for name in names[-1:] if name != "none"}
    people, both = min(g.people or n.people, n.people), 1 + 3 * len(chosen)
    rivals = len(set(g.rivals) & set(names) - chosen)
    matches = 0 if cfg.data.preferences else people * (comb(both, 2) + comb(both + rivals, 2))
    return {"grid": 1, "reply": people * (2 * both + rivals), "pair scored": min(g.shown, people) * 2 * both,
            "judge": 2 * ceil(matches / cfg.judge.pairs_per_request)}


def _tax(cfg: Profile, n: Counts) -> dict[str, float]:
    """13: the base and every adapter without a prefix, and two of them behind the prefixes of some people."""
    names, t = prefixes.available_prefixes(cfg), cfg.tax
    evaluations = 1 + len(names) * cfg.training.folds + 2 * min(t.people, n.people) * len(set(t.prefixes) & set(names))
    return {"grid": 1, "evaluation": evaluations, "item": evaluations * len(t.tasks) * (t.limit or ITEMS)}


@cache
def _notebook(stem: str) -> dict[str, float]:
    """What every notebook takes: its start, that of torch where its helpers load models, figures and statistics."""
    path = ROOT / "notebooks" / f"{stem}.ipynb"
    code = notebook_code(path) if path.exists() else ""
    return {"notebook": 1, "models": "helpers.models" in modules(code), "figure": code.count("store.figure("),
            "statistic": code.count("stats.") + code.count("claims.evaluate(") * 2 * len(claims.CLAIMS)}  # of two cells or more
