"""What else got worse? The evaluation harness (lm-eval) on the base and on trained adapters, with and without prefixes.

Three groups of tasks (data/tasks/groups.yaml): safety, reasoning and factuality. A prefix is the system text.
"""

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from functools import lru_cache
from io import StringIO
from logging import ERROR, getLogger
from pathlib import Path
from typing import Any

import jinja2
import joblib
import numpy as np
import pandas as pd
import torch
import yaml
from joblib.externals.loky import get_reusable_executor
from lm_eval import evaluator
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from peft import PeftModel
from tqdm.auto import tqdm

from helpers import DATA, models, stats
from helpers.artifacts import atomic
from helpers.config import Profile
from helpers.prefixes import prompt
from helpers.world import tasks as little

FOLDER = DATA / "tasks"
BATCH = {"cpu": 32, "cuda": 16}  # sequences computed at a time
SYSTEM = ["system", "trained_prefix", "prefix", "persona_id", "policy_id"]  # what is evaluated
ITEM = ["task", "item", "kind", "correct", "logp_right", "logp_wrong"]
NO_PREFIX = "none"


@dataclass(frozen=True)
class Cell:
    """One evaluation: the base (adapter None) or an adapter on it, behind one system text, on all tasks.

    policy: section of a profile. names: the tasks; data: the folder with the little tasks' items. limit: items of
    a task, 0: all. out: the Parquet file of its items; a cell whose file is there is not computed again.
    """

    out: Path
    policy: Any
    adapter: Path | None
    head: str
    names: tuple[str, ...]
    data: Path
    limit: int = 0


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


def load_tasks(names: Sequence[str], data: Path) -> dict[str, Any]:
    """The harness's tasks: its own by their names, ours from data/tasks/<name>.yaml.

    data: where a relative path in our `data_files` begins; what the json builder prepares is kept there too.
    """
    own = {name: FOLDER / f"{name}.yaml" for name in names}
    specs = [_config(own[name], data) if own[name].exists() else name for name in names]
    manager = TaskManager(include_defaults=any(isinstance(spec, str) for spec in specs))  # a scan of seconds
    with _quiet():
        return manager.load(specs)


def evaluate(model: torch.nn.Module, tokenizer, tasks: Mapping[str, Any], head: str = "", limit: int = 0,
             dtype: str = "auto", chat: bool = False) -> pd.DataFrame:
    """One row per task and item: kind (of a little task's item, else ""), correct (0 to 1), logp_right, logp_wrong.

    tasks: from `load_tasks`. head: the text in front, as `prefixes.prompt` gives it for training; with chat it is
    the system turn of the model's template, else it simply precedes the question, as in training. logp_right,
    logp_wrong: summed log-probability of the (first) right choice and of the best other one, nats.
    """
    device = next(model.parameters()).device.type
    half = torch.bfloat16 if isinstance(models.autocast(model, dtype), torch.autocast) else None
    with _quiet():
        lm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=BATCH[device], mixed_precision_dtype=half,
                  softmax_dtype="float32")
        found = evaluator.evaluate(lm=lm, task_dict=tasks, limit=limit or None, bootstrap_iters=0,
                                   apply_chat_template=chat, fewshot_as_multiturn=True,
                                   system_instruction=(head if chat else _begin(tokenizer) + head) or None)
    rows = [(task, sample["doc_id"], sample["doc"].get("kind", ""), _accuracy(task, sample), *_best(sample))
            for task, samples in found["samples"].items() for sample in samples]
    return pd.DataFrame(rows, columns=ITEM)


def takes_system_text(policy: Any, tokenizer) -> bool:
    """Whether prefixes go into the system turn of a chat template: for the full templates, if it has such a turn."""
    if policy.templates != "full" or tokenizer.chat_template is None:
        return False
    turns = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hello"}]
    try:
        return "be brief" in tokenizer.apply_chat_template(turns, tokenize=False)
    except jinja2.exceptions.TemplateError:  # here the harness would drop the text, with no more than a log line
        return False


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


def run(cells: Sequence[Cell], workers: int, executor: str = "loky") -> pd.DataFrame:
    """Evaluate the cells that are not finished, each in one thread; the items of all, with `cell`, its place.

    Cells are independent: results do not depend on workers, order or interruptions.
    """
    todo = [cell for cell in cells if not cell.out.exists()]
    if executor == "ray":
        from ray.util.joblib import register_ray  # an extra

        register_ray()
    threads = {"inner_max_num_threads": 1} if executor == "loky" else {}
    with joblib.parallel_config(executor, n_jobs=workers, **threads):
        done = joblib.Parallel(return_as="generator_unordered", batch_size=1)(map(joblib.delayed(run_cell), todo))
        for _ in tqdm(done, total=len(todo), desc="evaluations", unit="cell"):
            pass
    if todo and executor == "loky":
        get_reusable_executor().shutdown()  # each worker holds the model
    found = [pd.read_parquet(cell.out).assign(cell=i) for i, cell in enumerate(cells)]
    return pd.concat(found, ignore_index=True) if found else pd.DataFrame(columns=[*ITEM, "cell"])


def run_cell(cell: Cell) -> None:
    """Evaluate one cell on this process's base and leave its file behind."""
    base, tokenizer = _base(cell.policy)
    with _one_thread(), _adapted(base, cell.adapter) as model:
        items = evaluate(model, tokenizer, _tasks(cell.names, cell.data), cell.head, cell.limit, cell.policy.dtype,
                         takes_system_text(cell.policy, tokenizer))
    with atomic(cell.out) as file:
        items.to_parquet(file, index=False)


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


def _config(path: Path, data: Path) -> dict[str, Any]:
    """Our YAML with absolute data_files; nothing is written outside `data` for them."""
    config = yaml.safe_load(path.read_text())
    options = config.setdefault("dataset_kwargs", {})
    if "data_files" in options:
        options["data_files"] = {split: str(data / name) for split, name in options["data_files"].items()}
        options["cache_dir"] = str(data / "cache")
    return config


def _begin(tokenizer) -> str:
    """The begin token as text, where the tokenizer does not put it there itself: training always has it."""
    first = tokenizer("a")["input_ids"][:1]
    return "" if first == [tokenizer.bos_token_id] else tokenizer.bos_token or ""


def _accuracy(task: str, sample: Mapping[str, Any]) -> float:
    if "acc" not in sample:
        raise ValueError(f"task {task} reports {sample['metrics']}; expected acc: choose another in tax.tasks")
    return float(sample["acc"])


def _best(sample: Mapping[str, Any]) -> tuple[float, float]:
    """Log-probability of the right choice and of the best other one; NaN where no single choice is right."""
    logps, right = [float(logp) for logp, _ in sample["filtered_resps"]], sample["target"]
    if not isinstance(right, int) or not 0 <= right < len(logps) or len(logps) < 2:
        return float("nan"), float("nan")
    return logps[right], max(logps[:right] + logps[right + 1:])


@contextmanager
def _adapted(base: torch.nn.Module, adapter: Path | None) -> Iterator[torch.nn.Module]:
    """The base with an adapter on it, which comes off again."""
    if not adapter:
        yield base
        return
    with warnings.catch_warnings():  # peft 0.21 asks transformers 5.23 by a name that is deprecated there
        warnings.filterwarnings("ignore", ".is_gradient_checkpointing. is deprecated", FutureWarning)
        model = PeftModel.from_pretrained(base, str(adapter))
    try:
        yield model
    finally:
        model.unload()


@contextmanager
def _one_thread() -> Iterator[None]:
    """So that a result does not depend on where a cell runs."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def _quiet() -> Iterator[None]:
    """The harness logs advice for its command line and draws a bar per task and step, with no switch for either.

    Errors, and warnings that are raised as errors, come through; `run` has the one bar that tells something.
    """
    logger = getLogger("lm_eval")
    before = logger.level
    logger.setLevel(ERROR)
    try:
        with redirect_stderr(StringIO()):
            yield
    finally:
        logger.setLevel(before)


@lru_cache(maxsize=1)
def _base(policy: Any) -> tuple[torch.nn.Module, Any]:
    """Loaded once in the life of a worker; adapters come and go on it."""
    return models.load_policy(policy)


@lru_cache(maxsize=1)
def _tasks(names: tuple[str, ...], data: Path) -> dict[str, Any]:
    return load_tasks(names, data)
