"""Training adapters with DPO on trl and peft, one after another or many at once; the only module that imports trl."""

import json
import os
import shutil
import time
from collections.abc import Iterable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import joblib
import pandas as pd
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model_state_dict
from safetensors.torch import save_file
from tqdm.auto import tqdm
from transformers.trainer_callback import PrinterCallback
from trl import DPOConfig, DPOTrainer

from helpers import dpo, models, scoring

TOKEN_BUDGET = {"cpu": 2048, "cuda": 16384}  # tokens of a micro-batch: what a core's cache likes, what a GPU is busy with
LOGGED = 20  # points of the loss curve of one adapter


class PairTrainer(DPOTrainer):
    """trl's DPOTrainer on rows that hold a prompt once; its updates are trl's, its time is not.

    train_dataset has prompt_ids, chosen_ids, rejected_ids (end tokens included) and, for both answers, the reference's sums
    of log-probabilities (ref_chosen_logps, ref_rejected_logps, nats). A batch is worked through in micro-batches of rows of
    like length under a token budget; each weighs as many pairs as it holds, so that one update is the mean over the batch.
    """

    def __init__(self, *args: Any, dtype: str = "auto", token_budget: int = 0, **kwargs: Any) -> None:
        super().__init__(*args, data_collator=self._collate, **kwargs)
        if self.accelerator.num_processes > 1:
            raise ValueError("one adapter trains on one device here; give the grid more workers instead")
        dpo.check_model(self.model)
        self.dtype, self.token_budget = dtype, token_budget or TOKEN_BUDGET[self.args.device.type]
        self.remove_callback(PrinterCallback)

    def _prepare_dataset(self, dataset: Dataset, *_: Any) -> Dataset:
        return dataset  # tokenised by scoring.encode_pairs: trl would cut answers and drop rows

    def _collate(self, pairs: list[dict]) -> dict[str, list[dict]]:
        lengths = [dpo.row_length(p["prompt_ids"], (p["chosen_ids"], p["rejected_ids"])) for p in pairs]
        return {"parts": [self._part([pairs[i] for i in at], len(pairs))
                          for at in dpo.budget_batches(lengths, self.token_budget)]}

    @staticmethod
    def _part(pairs: list[dict], n_batch: int) -> dict[str, torch.Tensor]:
        part = dpo.pack([p["prompt_ids"] for p in pairs], [(p["chosen_ids"], p["rejected_ids"]) for p in pairs])
        reference = {name: torch.tensor([p[name] for p in pairs]) for name in ("ref_chosen_logps", "ref_rejected_logps")}
        return part | reference | {"weight": torch.tensor(1 / n_batch)}

    def training_step(self, model: torch.nn.Module, inputs: dict, *args: Any) -> torch.Tensor:
        return torch.stack([super(PairTrainer, self).training_step(model, part, *args) for part in inputs["parts"]]).sum()

    def compute_loss(self, model: torch.nn.Module, inputs: dict, *_: Any, **__: Any) -> torch.Tensor:
        with models.autocast(model, self.dtype):
            chosen, rejected, _, _ = dpo.pair_logps(model, inputs)
        losses = dpo.dpo_loss(chosen, rejected, inputs["ref_chosen_logps"], inputs["ref_rejected_logps"], self.beta)
        return losses.sum() * inputs["weight"]


@dataclass(frozen=True)
class Cell:
    """One unit of the grid: an adapter to train and score, or (train is None) one to load and score. It can be pickled.

    train, validation and score have columns head, tail (prefixes.prompt), chosen, rejected; train has ref_chosen_logps and
    ref_rejected_logps too. Any other column of score stands in the result as it is. policy, training: sections of a profile.
    out is the cell's folder; it appears when the cell is finished, and a cell whose folder is there is not computed again.
    """

    policy_id: str
    out: Path
    policy: Any
    training: Any
    seed: int
    score: pd.DataFrame
    train: pd.DataFrame | None = None
    validation: pd.DataFrame | None = None
    adapter: Path | None = None
    learning_rate: float | None = None  # None: training.learning_rate
    side: str = "left"  # prefixes.side


def run_grid(cells: Sequence[Cell], workers: int, executor: str = "loky", desc: str = "adapters") -> list[dict]:
    """Compute the cells that are not finished, each in a single-thread process; what `done.json` says of each, in order.

    Cells are independent and seeded: the results do not depend on workers, order or interruptions.
    """
    for cell in cells:
        for left in cell.out.parent.glob(f"{cell.out.name}.*.part"):
            shutil.rmtree(left)
    todo = sorted((cell for cell in cells if not cell.out.exists()), key=_work, reverse=True)
    with joblib.parallel_config(executor, n_jobs=workers, inner_max_num_threads=1 if executor == "loky" else None):
        done = joblib.Parallel(return_as="generator_unordered", batch_size=1)(joblib.delayed(run_cell)(c) for c in todo)
        for _ in tqdm(done, total=len(cells), initial=len(cells) - len(todo), desc=desc, unit="cell", mininterval=1):
            continue
    return [json.loads((cell.out / "done.json").read_text()) for cell in cells]


def read_scores(cells: Iterable[Cell]) -> pd.DataFrame:
    """The scores of finished cells, one row per scored pair, with policy_id."""
    tables = [pd.read_parquet(cell.out / "scores.parquet").assign(policy_id=cell.policy_id) for cell in cells]
    return pd.concat(tables, ignore_index=True)


def run_cell(cell: Cell) -> dict:
    """Train (or load) and score one adapter on this process's base model, and leave its folder behind."""
    started, part = time.perf_counter(), cell.out.with_name(f"{cell.out.name}.{os.getpid()}.part")
    part.mkdir(parents=True)
    with _one_thread():
        base, tokenizer = _base(cell.policy)
        if cell.train is None:
            model, facts = PeftModel.from_pretrained(base, str(cell.adapter)), {}
        else:
            model, facts = train_adapter(base, tokenizer, cell, part)
        try:
            _score(model, tokenizer, cell, cell.score).to_parquet(part / "scores.parquet", index=False)
            if cell.validation is not None and len(cell.validation):
                facts["validation_accuracy"] = float(_score(model, tokenizer, cell, cell.validation)["correct"].mean())
        finally:
            model.unload()
    facts |= {"policy_id": cell.policy_id, "wall_seconds": time.perf_counter() - started}
    (part / "done.json").write_text(json.dumps(facts, indent=1))
    try:
        part.rename(cell.out)
    except OSError:  # an orphan of a killed run finished the same cell meanwhile
        shutil.rmtree(part)
    return facts


def train_adapter(base: torch.nn.Module, tokenizer, cell: Cell, out: Path) -> tuple[PeftModel, dict]:
    """Train a LoRA adapter on `cell.train`, save it to `out`, and return the model with it and facts of the training.

    Facts: steps, pairs, pairs_per_second, learning_rate, history (step, loss). Restore the base by `model.unload()`.
    """
    trainer = PairTrainer(model=base, args=training_args(cell, out), processing_class=tokenizer, dtype=cell.policy.dtype,
                          train_dataset=_dataset(tokenizer, cell), peft_config=lora(cell.training))
    del base.forward  # trl patches the base's forward for its own loss; the next adapter starts from a clean base
    result = trainer.train()
    save_adapter(trainer.model, out, cell.policy.path)
    history = [{"step": row["step"], "loss": row["loss"]} for row in trainer.state.log_history if "loss" in row]
    return trainer.model, {"steps": result.global_step, "pairs": len(cell.train), "history": history,
                           "learning_rate": trainer.args.learning_rate,
                           "pairs_per_second": len(cell.train) * cell.training.epochs / result.metrics["train_runtime"]}


def training_args(cell: Cell, out: Path) -> DPOConfig:
    """Arguments of trl for one cell: AdamW, linear decay after a warm-up, no checkpoints of what trains in minutes."""
    t, steps = cell.training, -(-len(cell.train) // cell.training.batch_size) * cell.training.epochs
    return DPOConfig(
        output_dir=str(out), beta=t.beta, learning_rate=cell.learning_rate or t.learning_rate, num_train_epochs=t.epochs,
        per_device_train_batch_size=t.batch_size, lr_scheduler_type="linear", warmup_steps=t.warmup, seed=cell.seed,
        optim="paged_adamw_32bit" if cell.policy.load_in_4bit else "adamw_torch", max_length=None,
        bf16=False, activation_checkpointing=False, disable_dropout=t.lora_dropout == 0,  # autocast is compute_loss's
        logging_strategy="steps", logging_steps=max(1, steps // LOGGED), save_strategy="no", report_to="none",
        disable_tqdm=True, remove_unused_columns=False, dataloader_pin_memory=torch.cuda.is_available())


def lora(training) -> LoraConfig:
    """LoRA on every linear layer but the head (Appendix H)."""
    return LoraConfig(r=training.lora_r, lora_alpha=training.lora_alpha, lora_dropout=training.lora_dropout,
                      target_modules="all-linear", task_type="CAUSAL_LM")


def save_adapter(model: PeftModel, out: Path, base_path: str) -> None:
    """Weights and config alone, as PeftModel.from_pretrained reads them; the base by its path in the profile."""
    config = model.peft_config["default"]
    config.base_model_name_or_path, config.inference_mode = str(base_path), True
    config.save_pretrained(str(out))
    weights = {name: values.contiguous().cpu() for name, values in get_peft_model_state_dict(model).items()}
    save_file(weights, out / "adapter_model.safetensors", metadata={"format": "pt"})


def _dataset(tokenizer, cell: Cell) -> Dataset:
    t = cell.train
    pairs = scoring.encode_pairs(tokenizer, list(zip(t["head"], t["tail"], strict=True)), t["chosen"], t["rejected"],
                                 cell.policy.max_length, cell.side)
    ids = {f"{name}_ids": [getattr(pair, name) for pair in pairs] for name in ("prompt", "chosen", "rejected")}
    return Dataset.from_dict(ids | {name: t[name].tolist() for name in ("ref_chosen_logps", "ref_rejected_logps")})


def _score(model, tokenizer, cell: Cell, rows: pd.DataFrame) -> pd.DataFrame:
    found = scoring.score_pairs(model, tokenizer, list(zip(rows["head"], rows["tail"], strict=True)), rows["chosen"],
                                rows["rejected"], max_length=cell.policy.max_length, dtype=cell.policy.dtype, side=cell.side)
    kept = rows.drop(columns=["head", "tail", "chosen", "rejected"]).reset_index(drop=True)
    return pd.concat([kept, found], axis=1)


@lru_cache(maxsize=1)
def _base(policy) -> tuple[torch.nn.Module, Any]:
    """Loaded once in the life of a worker; adapters come and go on it."""
    return models.load_policy(policy)


def _work(cell: Cell) -> int:
    """Characters to read: the longest cells go first, so that no worker waits for a late long one."""
    rows = [cell.score] if cell.train is None else [cell.score, *[cell.train] * (3 * cell.training.epochs)]
    return sum(int(r["head"].str.len().sum() + r["tail"].str.len().sum()) for r in rows)


@contextmanager
def _one_thread():
    """So that a result does not depend on where the cell runs."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
