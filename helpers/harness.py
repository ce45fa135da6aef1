"""The evaluation harness (lm-eval) on a loaded policy: its own tasks and ours, with a prefix as the system text.

The only module that imports lm_eval; what is made of the answers is arithmetic, in `tax`.
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from functools import lru_cache, partial
from io import StringIO
from itertools import chain
from logging import ERROR, getLogger
from os.path import commonprefix
from pathlib import Path
from typing import Any

import jinja2
import pandas as pd
import torch
import yaml
from lm_eval import evaluator
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from helpers import grid, models, scoring
from helpers.artifacts import atomic
from helpers.sharing import Asked
from helpers.tax import FOLDER

BATCH = {"cpu": 32, "cuda": 16}  # sequences computed at a time
ITEM = ["task", "item", "kind", "correct", "logp_right", "logp_wrong"]


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


def run(cells: Sequence[Cell], workers: int, executor: str = "loky") -> pd.DataFrame:
    """Evaluate the cells that are not finished, each in one thread; the items of all, with `cell`, its place.

    Cells are independent: results do not depend on workers, order or interruptions.
    """
    todo = [cell for cell in cells if not cell.out.exists()]
    jobs = [partial(run_cell, cell) for cell in todo]
    grid.run_units(jobs, workers, executor, "evaluations", "cell", finished=len(cells) - len(todo))
    found = [pd.read_parquet(cell.out).assign(cell=i) for i, cell in enumerate(cells)]
    numbers = {"item": int, "correct": float, "logp_right": float, "logp_wrong": float, "cell": int}
    return pd.concat(found or [pd.DataFrame(columns=[*ITEM, "cell"]).astype(numbers)], ignore_index=True)


def run_cell(cell: Cell) -> None:
    """Evaluate one cell on this process's base and leave its file behind."""
    base, tokenizer = models.base(cell.policy)
    small = base.device.type == "cpu" and not getattr(base, "is_quantized", False)
    with models.one_thread(), models.adapted(base, cell.adapter) as model:
        model = models.merged_copy(model) if cell.adapter and small else model
        items = evaluate(model, tokenizer, _tasks(cell.names, cell.data), cell.head, cell.limit, cell.policy.dtype,
                         takes_system_text(cell.policy, tokenizer))
    with atomic(cell.out) as file:
        items.to_parquet(file, index=False)


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
        lm = _Sharing(pretrained=model, tokenizer=tokenizer, batch_size=BATCH[device], mixed_precision_dtype=half,
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


class _Sharing(HFLM):
    """The harness's model; the context of a question is computed once for all its choices (helpers.scoring).

    The harness itself computes it for every choice, and log-probabilities of the whole vocabulary at every token.
    """

    def _loglikelihood_tokens(self, requests, disable_tqdm: bool = False, override_bs=None) -> list[tuple[float, bool]]:
        """(summed log-probability, False) of each (texts, context, continuation): no task of choices reads the second."""
        choices = defaultdict(list)
        for i, (_, context, _) in enumerate(requests):
            choices[tuple(context)].append(i)
        found = self._of_choices(requests, [at for context, at in choices.items() if len(at) > 1
                                 and len(context) + max(len(requests[i][2]) for i in at) <= self.max_length])
        rest = [i for i in range(len(requests)) if i not in found]
        plain = super()._loglikelihood_tokens([requests[i] for i in rest], disable_tqdm, override_bs) if rest else []
        found |= dict(zip(rest, plain, strict=True))
        return [found[i] for i in range(len(requests))]

    def _of_choices(self, requests, questions: list[list[int]]) -> dict[int, tuple[float, bool]]:
        """The same for questions of several choices; what all contexts begin with is their head."""
        contexts = [requests[at[0]][1] for at in questions]
        head = len(commonprefix(contexts))
        asked = [Asked(context, [requests[i][2] for i in at], 0, 0, head)
                 for context, at in zip(contexts, questions, strict=True)]
        sums = scoring.answer_sums(self.model, asked, dtype="bfloat16" if self.mixed_precision_dtype else "float32")
        return {i: (logp, False) for i, logp in zip(chain.from_iterable(questions), sums.tolist(), strict=True)}


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


def _begin(tokenizer) -> str:
    """The begin token as text, where the tokenizer does not put it there itself: training always has it."""
    first = tokenizer("a")["input_ids"][:1]
    return "" if first == [tokenizer.bos_token_id] else tokenizer.bos_token or ""


def _config(path: Path, data: Path) -> dict[str, Any]:
    """Our YAML with absolute data_files; nothing is written outside `data` for them."""
    config = yaml.safe_load(path.read_text())
    options = config.setdefault("dataset_kwargs", {})
    if "data_files" in options:
        options["data_files"] = {split: str(data / name) for split, name in options["data_files"].items()}
        options["cache_dir"] = str(data / "cache")
    return config


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
def _tasks(names: tuple[str, ...], data: Path) -> dict[str, Any]:
    return load_tasks(names, data)
