"""What else got worse? Who is asked what behind whose prefix, and what changed from the untrained model.

Three groups of tasks (data/tasks/groups.yaml): safety, reasoning and factuality. `harness` asks them.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import yaml

from helpers import DATA, stats
from helpers.config import Profile
from helpers.prefixes import prompt
from helpers.world import tasks as little

FOLDER = DATA / "tasks"
SYSTEM = ["system", "trained_prefix", "prefix", "persona_id", "policy_id"]  # what is evaluated
NO_PREFIX = "none"


def group_of() -> dict[str, str]:
    """task -> safety, reasoning or factuality."""
    listed = yaml.safe_load((FOLDER / "groups.yaml").read_text())
    return {task: group for group, names in listed.items() for task in names}


def available(cfg: Profile) -> tuple[str, ...]:
    """The profile's tasks that this run can do: little tasks ask about the simulated world.

    Raises ValueError for a task that no group lists.
    """
    if unknown := sorted(set(cfg.tax.tasks) - set(group_of())):
        raise ValueError(f"tax.tasks: {', '.join(unknown)} in no group; add them to {FOLDER / 'groups.yaml'}")
    return tuple(name for name in cfg.tax.tasks if cfg.simulated or name not in little.TASKS)


def plan(policies: pd.DataFrame, prefixes: pd.DataFrame, folds: pd.DataFrame, cfg: Profile) -> pd.DataFrame:
    """What is evaluated, a row each: `SYSTEM`, path (of the adapter; "" for the base) and head (the text in front).

    The base and every multitask adapter of the first seed without a prefix; then, for each of tax.prefixes and
    tax.people drawn people, the base and the adapter that has not seen the person, both behind the person's own.
    Source: WikiPersona 4.3 (Figure 7) and Appendix O (Figure 17, prefixes taken away).
    """
    mt = policies.query("method == 'mt' and scheme == 'stratified'")
    mt = mt[mt["seed"] == mt["seed"].min()]
    rows = [("base", "", NO_PREFIX, "", "", "", "")]
    rows += [("mt", row.prefix, NO_PREFIX, "", row.policy_id, row.path, "") for row in mt.itertuples()]
    fold_of = folds[folds["scheme"] == "stratified"].set_index("persona_id")["fold"]
    of_fold = mt.set_index(["prefix", "fold"])
    for person in _people(prefixes, set(fold_of.index), cfg).itertuples():
        head = prompt(cfg.policy.templates, person.prefix, person.text, "?")[0]
        adapter = of_fold.loc[(person.prefix, fold_of[person.persona_id])]
        rows += [("base", "", person.prefix, person.persona_id, "", "", head),
                 ("mt", person.prefix, person.prefix, person.persona_id, adapter.policy_id, adapter.path, head)]
    return pd.DataFrame(rows, columns=[*SYSTEM, "path", "head"])


def summary(items: pd.DataFrame, n_boot: int = 2000, seed: int = 17, confidence: float = 0.95, **_: Any) -> pd.DataFrame:
    """The table `tax`: a row per task and system, with an interval from resampling the task's items.

    items: columns task, correct and `SYSTEM`. Such an interval says how a number moves with other questions; how
    it moves with other people, `changes` is for.
    """
    rows, options = [], {"n_boot": n_boot, "seed": seed, "confidence": confidence, "min_people": 1}
    for key, of in items.groupby(["task", *SYSTEM], sort=False):
        found = stats.resample(of[["correct"]].to_numpy(), _mean, **options)
        rows.append((*key, *found))
    table = pd.DataFrame(rows, columns=["task", *SYSTEM, "accuracy", "low", "high", "n_items"])
    return table.assign(group=table["task"].map(group_of()))


def changes(table: pd.DataFrame) -> pd.DataFrame:
    """Accuracy of each group (mean of its tasks) and what it changed from the untrained model without prefix.

    table: the table `tax`. Returns group, `SYSTEM` without policy_id (folds are averaged), accuracy, change.
    """
    keys = ["group", *SYSTEM[:-1]]
    of = table.groupby([*keys, "task"], sort=False)["accuracy"].mean().groupby(keys, sort=False).mean().reset_index()
    start = of.query(f"system == 'base' and prefix == '{NO_PREFIX}'").set_index("group")["accuracy"]
    return of.assign(change=of["accuracy"].astype(float) - of["group"].map(start).astype(float))


def over_people(changed: pd.DataFrame, **drawing: Any) -> pd.DataFrame:
    """Mean change over the people of each group and system, people resampled (NaN for too few of them).

    changed: rows of `changes`. drawing: options of stats.resample.
    """
    rows, keys = [], ["group", *SYSTEM[:3]]
    for key, of in changed[changed["persona_id"] != ""].groupby(keys, sort=False):
        rows.append((*key, *stats.resample(of[["change"]].to_numpy(), _mean, few="blank", **drawing)))
    return pd.DataFrame(rows, columns=[*keys, "change", "low", "high", "n_people"])


def over_items(items: pd.DataFrame, by: Sequence[str] = tuple(SYSTEM[:3]), n_boot: int = 2000, seed: int = 17,
               confidence: float = 0.95, **_: Any) -> pd.DataFrame:
    """The same change with an interval from resampling items, paired: both systems answered the same ones.

    items: as in `summary`. by: columns of `SYSTEM`; over the others (folds, people) an item's answers are averaged.
    In a group of several tasks each task's items are drawn on their own. Returns group, `by`, change, low, high,
    n_items.
    """
    rows, start = [], items.query(f"system == 'base' and prefix == '{NO_PREFIX}'")
    gaps = items.merge(start[["task", "item", "correct"]], on=["task", "item"], suffixes=("", "_start"))
    gaps = gaps.assign(group=gaps["task"].map(group_of()), gap=gaps["correct"] - gaps["correct_start"])
    for key, of in gaps.groupby(["group", *by], sort=False):
        tasks = [task.groupby("item")["gap"].mean().to_numpy() for _, task in of.groupby("task", sort=False)]
        rows.append((*key, *_by_task(tasks, n_boot, seed, confidence), sum(map(len, tasks))))
    return pd.DataFrame(rows, columns=["group", *by, "change", "low", "high", "n_items"])


def _by_task(tasks: list[np.ndarray], n_boot: int, seed: int, confidence: float) -> tuple[float, float, float]:
    """Mean over tasks of the mean over items, with an interval from drawing items within each task."""
    rng, tail = np.random.default_rng(seed), (1 - confidence) / 2
    drawn = np.mean([values[rng.integers(len(values), size=(n_boot, len(values)))].mean(1) for values in tasks], axis=0)
    return float(np.mean([values.mean() for values in tasks])), *map(float, np.quantile(drawn, [tail, 1 - tail]))


def _mean(values: np.ndarray) -> np.ndarray:
    return values[..., 0].mean(-1)


def _people(prefixes: pd.DataFrame, known: set[str], cfg: Profile) -> pd.DataFrame:
    """The main prefixes of the drawn people: the same people for every prefix, in the order of persona_id."""
    main = prefixes[(prefixes["variant"] == "main") & prefixes["prefix"].isin(cfg.tax.prefixes)]
    ids = sorted(set(main["persona_id"]) & known)
    drawn = np.random.default_rng([cfg.seed, 13]).permutation(ids)[:cfg.tax.people]
    return main[main["persona_id"].isin(drawn)].sort_values(["prefix", "persona_id"])
