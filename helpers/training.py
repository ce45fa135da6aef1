"""Training adapters with DPO on trl and peft, many side by side; the only module that imports trl."""

import gc
import json
import os
import shutil
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any
from zlib import crc32

import numpy as np
import pandas as pd
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model_state_dict
from safetensors.torch import save_file
from transformers.trainer_callback import PrinterCallback
from transformers.trainer_utils import TrainOutput
from trl import DPOConfig, DPOTrainer

from helpers import artifacts, decoder, dpo, grid, memory, models, scoring, vpl

LOSS_POINTS = 20  # of an adapter's loss curve
TIDY = 32  # updates, after which freed memory is given back: else pieces pile up, and a long training needs more
REFERENCE = ("ref_chosen_logps", "ref_rejected_logps")


@dataclass(frozen=True)
class Cell:
    """One unit of the grid: an adapter to train and score, or one to load and score, or the base to score.

    train, validation and score have columns head, tail (as from prefixes.prompt), chosen, rejected; train has
    ref_chosen_logps and ref_rejected_logps too, the base's sums of log-probabilities (nats). Other columns of
    score stand in the result as they are. policy, training: sections of a profile. out: the cell's folder; it
    appears when the cell is finished, and a cell whose folder is there is not computed again. reading: a soft
    token stands in front of each prompt; train, validation and score then have persona_id and pair_id.
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
    learning_rate: float | None = None  # None: that of training
    side: str = "left"  # prefixes.side
    reading: vpl.Reading | None = None  # method vpl


def run_grid(cells: Sequence[Cell], workers: int, executor: str = "loky",
             desc: str = "adapters") -> list[dict]:
    """Compute the cells that are not finished, each in one thread; what done.json says of each, in order.

    Cells are independent and seeded: results do not depend on workers, order or interruptions.
    """
    for cell in cells:
        for left in cell.out.parent.glob(f"{cell.out.name}.*.part"):
            shutil.rmtree(left)
    todo = sorted((cell for cell in cells if not cell.out.exists()), key=_work, reverse=True)
    jobs = [partial(run_cell, cell) for cell in todo]
    grid.run_units(jobs, workers, executor, desc, "cell", finished=len(cells) - len(todo))
    return [json.loads((cell.out / "done.json").read_text()) for cell in cells]


def read_scores(cells: Iterable[Cell]) -> pd.DataFrame:
    """The scores of finished cells: a row per scored pair, with policy_id."""
    tables = [pd.read_parquet(cell.out / "scores.parquet").assign(policy_id=cell.policy_id) for cell in cells]
    return pd.concat(tables, ignore_index=True)


def keep_adapters(cells: Iterable[Cell], folder: Path) -> list[Path]:
    """Copy the adapters of finished cells to folder/<policy_id>, in place of what was there; their paths."""
    shutil.rmtree(folder, ignore_errors=True)
    for cell in cells:
        shutil.copytree(cell.out, folder / cell.policy_id, ignore=lambda *_: ["scores.parquet"])
    return [folder / cell.policy_id for cell in cells]


def write_pool(asked: pd.DataFrame, policy: Any, side: str, path: Path) -> Path:
    """Keep what VPL's encoders read of the train pairs (vpl.features) in a file, if it is not there yet.

    asked: preferences with head and tail, prefix none.
    """
    if not path.exists():
        with models.one_thread():
            table = vpl.features(*models.base(policy), asked, policy.max_length, policy.dtype, side)
        with artifacts.atomic(path) as file:
            table.to_parquet(file, index=False)
    return path


def run_cell(cell: Cell) -> dict:
    """Train (or load) and score one adapter on this process's base, and leave the cell's folder behind."""
    started, part = time.perf_counter(), cell.out.with_name(f"{cell.out.name}.{os.getpid()}.part")
    part.mkdir(parents=True)
    try:
        with models.one_thread():
            facts = _train_and_score(cell, part)
    except BaseException:
        models.base.cache_clear()  # it may carry half an adapter
        raise
    memory.give_back()
    facts |= {"policy_id": cell.policy_id, "wall_seconds": time.perf_counter() - started}
    if os.environ.get("RANK", "0") != "0":  # of several processes that train one adapter together one writes
        shutil.rmtree(part)
        return facts
    (part / "done.json").write_text(json.dumps(facts, indent=1))
    try:
        part.rename(cell.out)
    except OSError:  # the orphan of a killed run has finished this cell meanwhile
        shutil.rmtree(part)
    shutil.rmtree(checkpoints(cell), ignore_errors=True)
    return facts


def train_adapter(base: torch.nn.Module, tokenizer, cell: Cell, out: Path) -> tuple[PeftModel, dict]:
    """Train a LoRA adapter on `cell.train` and save it to `out`; the base with the adapter, and facts.

    Facts: steps, pairs, pairs_per_second, learning_rate, history (of step and loss). `model.unload()` gives
    the base back, bit for bit. With training.checkpoint_steps it goes on from where a killed one has been.
    """
    kind, more = (VplTrainer, {"cell": cell}) if cell.reading else (PairTrainer, {})
    trainer = kind(model=base, args=training_args(cell, out), processing_class=tokenizer,
                   train_dataset=dataset(tokenizer, cell), peft_config=lora(cell.training),
                   dtype=cell.policy.dtype, **more)
    del base.forward  # trl patches it for its own loss; the next adapter is to find the base as it was
    result = trainer.train(resume_from_checkpoint=_last_checkpoint(checkpoints(cell)))
    save_adapter(trainer.model, out, cell.policy.path)
    if cell.reading:
        vpl.save(trainer.model.vpl, out)
    logged, seen = trainer.state.log_history, len(cell.train) * cell.training.epochs * trainer.share_trained
    return trainer.model, {"steps": result.global_step, "pairs": len(cell.train),
                           "pairs_per_second": seen / result.metrics["train_runtime"],
                           "learning_rate": trainer.args.learning_rate,
                           "history": [{"step": h["step"], "loss": h["loss"]} for h in logged if "loss" in h]}


def trl_losses(model: PeftModel, tokenizer, cell: Cell) -> tuple[pd.DataFrame, float]:
    """What trl's own DPOTrainer computes for the cell's train pairs as one batch: the yardstick of notebook 07.

    model: the base with the trained adapter. Tokens are ours (`dataset`); collator, forward passes, reference
    and loss are trl's, in the precision of the weights. Returns logp_chosen, logp_rejected, ref_chosen_logps,
    ref_rejected_logps (sums, nats; a row per pair, in order) and the mean loss (nats).
    """
    pairs = dataset(tokenizer, cell).remove_columns(REFERENCE)
    with models.peft_quiet(), torch.no_grad():
        trainer = _Untouched(model=model, args=training_args(cell, cell.out), processing_class=tokenizer,
                             train_dataset=pairs)
        batch = {name: part.to(model.device) for name, part in trainer.data_collator(list(pairs)).items()}
        logps = trainer.compute_ref_log_probs(model.eval(), batch)
        model.delete_adapter("ref")  # so far trl's reference was a copy of the adapter; now it is the base
        logps += trainer.compute_ref_log_probs(model, batch)
        loss = trainer.compute_loss(model, batch)
    del model.get_base_model().forward  # trl patches it
    table = torch.stack(logps, 1).cpu().numpy()
    return pd.DataFrame(table, columns=["logp_chosen", "logp_rejected", *REFERENCE]), loss.item()


class _Untouched(DPOTrainer):
    """trl's trainer on pairs that are tokenised already."""

    def _prepare_dataset(self, dataset: Dataset, *_: Any) -> Dataset:
        return dataset


class PairTrainer(DPOTrainer):
    """trl's DPOTrainer on rows that hold a prompt once: its updates are trl's, its time a fraction of trl's.

    train_dataset (see `dataset`) is tokenised and has the reference's log-probabilities. A batch is worked
    through in micro-batches of rows of like length; an update is the mean over the batch, as in trl, and with
    several processes (accelerate launch) over their batches. token_budget: padded tokens of a micro-batch; 0:
    what suits the device and fits into its memory. Activations are recomputed only if a single row does not fit.
    """

    def __init__(self, *args: Any, dtype: str = "auto", token_budget: int = 0, **kwargs: Any) -> None:
        super().__init__(*args, data_collator=self._collate, **kwargs)
        dpo.check_model(self.model)
        self.dtype, self.token_budget = dtype, token_budget or dpo.TOKEN_BUDGET[self.args.device.type]
        self.decoder: decoder.Decoder | None = None
        self.remove_callback(PrinterCallback)

    def train(self, *args: Any, **kwargs: Any) -> TrainOutput:
        self.decoder, self.trained = decoder.of(self.model), [p for p in self.model.parameters() if p.requires_grad]
        self.token_budget = self._fitting_budget()
        return super().train(*args, **kwargs)

    @property
    def share_trained(self) -> float:
        """Of all updates, those since the last checkpoint that was loaded."""
        return 1 - self._initial_global_step / max(1, self.state.global_step)

    def training_step(self, model: torch.nn.Module, inputs: dict, *args: Any) -> torch.Tensor:
        step, parts = super().training_step, inputs["parts"]  # on the bare model: the loss does not go through DDP's forward
        while True:
            try:
                loss = torch.stack([step(self.model, part, *args) for part in parts]).sum()
                break
            except torch.OutOfMemoryError:
                if all(len(part["input_ids"]) == 1 for part in parts):
                    raise
            # what was added to the gradients of this update is taken back, and the update begun anew
            self.model.zero_grad(set_to_none=True)
            self.token_budget = scoring.halved(self.token_budget, self.args.device.type)
            parts = [half for part in parts for half in (dpo.halves(part) if len(part["input_ids"]) > 1 else [part])]
        if self.accelerator.num_processes > 1 and self.accelerator.sync_gradients:
            self._average_gradients()
        if self.state.global_step % TIDY == TIDY - 1:
            memory.give_back()
        return loss

    def compute_loss(self, model: torch.nn.Module, inputs: dict, *_: Any, **__: Any) -> torch.Tensor:
        with models.autocast(model, self.dtype):
            chosen, rejected, _, _ = dpo.pair_logps(model, inputs, self.decoder)
        losses = dpo.dpo_loss(chosen, rejected, *(inputs[name] for name in REFERENCE), self.beta)
        if not torch.isfinite(losses).all():
            raise FloatingPointError(f"the loss is {losses.detach().sum().item()} at update {self.state.global_step} for the "
                                     f"pairs {', '.join(inputs['ids'])}: lower training.learning_rate, or leave these pairs "
                                     "out. This adapter is not kept, finished ones are.")
        return losses.sum() / inputs["of"]

    def _clip_grad_norm(self, _: torch.nn.Module) -> torch.Tensor:
        """trl's, over what is trained alone: to look for it among all modules takes longer than the norm."""
        return self.accelerator.clip_grad_norm_(self.trained, self.args.max_grad_norm)

    def _average_gradients(self) -> None:
        grads = [weight.grad for weight in self.trained if weight.grad is not None]
        mean = self.accelerator.reduce(torch.cat([grad.flatten() for grad in grads]), "mean")
        for grad, part in zip(grads, mean.split([grad.numel() for grad in grads]), strict=True):
            grad.copy_(part.view_as(grad))

    def _fitting_budget(self) -> int:
        """The part of the token budget that memory allows, from what one more of the longest row keeps for its way back."""
        longest, device = max(self.train_dataset, key=_row_length), self.args.device
        first, *others = longest["prompt_ids"]
        begins_otherwise = longest | {"prompt_ids": [int(first == 0), *others]}  # else the two would share a prompt
        one, two = (self._prepare_inputs(self._rows([longest, begins_otherwise][:n]) | {"of": torch.tensor(n)}) for n in (1, 2))
        kept = [memory.kept_bytes(partial(self.compute_loss, self.model.train(), rows)) for rows in (one, two)]
        budget, recompute = memory.fit(kept[1] - kept[0], one["input_ids"].shape[1], self.token_budget,
                                       memory.free_bytes(device))
        if recompute:
            self.decoder = None
            self.model.activation_checkpointing_enable({"use_reentrant": False})
        return budget

    def _prepare_dataset(self, dataset: Dataset, *_: Any) -> Dataset:
        return dataset  # trl would tokenise again, cut answers and drop rows

    def _collate(self, pairs: list[dict]) -> dict[str, list[dict]]:
        batches = dpo.budget_batches([_row_length(p) for p in pairs], self.token_budget)
        micro = [[pairs[i] for i in at] for at in batches]
        return {"parts": [self._rows(part) | {"of": torch.tensor(len(pairs))} for part in micro]}

    def _rows(self, pairs: list[dict]) -> dict[str, torch.Tensor]:
        answers = [(p["chosen_ids"], p["rejected_ids"]) for p in pairs]
        reference = {name: torch.tensor([p[name] for p in pairs]) for name in REFERENCE}
        ids = {"ids": [p["pair_id"] for p in pairs]}  # to name the pairs of a loss that is no number
        multiple = 2 * dpo.WIDTH if self.decoder else 8  # padding costs the decoder attention alone, and see Heads.behind
        return dpo.pack([p["prompt_ids"] for p in pairs], answers, multiple=multiple) | reference | ids


class VplTrainer(PairTrainer):
    """PairTrainer with a soft token in front of each prompt; its encoder is trained along with the adapter.

    The encoder is `model.vpl`, so that the optimizer has its weights too. For every pair and every epoch other
    shots are drawn, never the pair itself, and other noise; the draws follow from seed, pair and epoch alone.
    """

    def __init__(self, *args: Any, cell: Cell, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.reading, self.pool = cell.reading, vpl.Pool(cell.reading.pool)
        self.draw_seed = cell.seed
        encoder = vpl.make_encoder(self.model, self.pool, cell.train["persona_id"], cell.reading.config, cell.seed)
        self.model.vpl = encoder.requires_grad_(not cell.reading.released)

    def compute_loss(self, model: torch.nn.Module, inputs: dict, *args: Any, **kwargs: Any) -> torch.Tensor:
        mean, logvar = model.vpl(inputs["features"], inputs["read"])
        z = vpl.sample(mean, logvar, inputs["noise"], self.reading.released)
        loss = super().compute_loss(model, inputs | {"soft": model.vpl.soft(z)}, *args, **kwargs)
        return loss + self._kl_weight() * vpl.kl(mean, logvar).sum() / inputs["of"]

    def _kl_weight(self) -> float:
        c, at = self.reading.config, self.state
        return 0.0 if self.reading.released else vpl.kl_weight(at.global_step, at.max_steps, c.kl_weight, c.kl_warmup)

    def _rows(self, pairs: list[dict]) -> dict[str, torch.Tensor]:
        rngs = [np.random.default_rng([self.draw_seed, 7, int(self.state.epoch or 0), crc32(p["pair_id"].encode())])
                for p in pairs]
        drawn = [self.pool.draw(p["persona_id"], p["pair_id"], self.reading.shots, rng)
                 for p, rng in zip(pairs, rngs, strict=True)]
        features, read = self.pool.read(drawn)
        noise = np.stack([rng.standard_normal(self.reading.config.latent, dtype=np.float32) for rng in rngs])
        return super()._rows(pairs) | {"features": features, "read": read, "noise": torch.from_numpy(noise)}

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        super()._save(output_dir, state_dict)
        if self.args.should_save:
            vpl.save(self.model.vpl, Path(output_dir or self.args.output_dir))

    def _load_from_checkpoint(self, checkpoint: str, model: torch.nn.Module | None = None) -> None:
        super()._load_from_checkpoint(checkpoint, model)
        self.model.vpl.load_state_dict(vpl.load(Path(checkpoint)).state_dict())


def training_args(cell: Cell, out: Path) -> DPOConfig:
    """trl's arguments: AdamW, linear decay after a warm-up; checkpoints if training.checkpoint_steps says so."""
    t, steps = cell.training, -(-len(cell.train) // cell.training.batch_size) * cell.training.epochs
    return DPOConfig(
        output_dir=str(checkpoints(cell) if t.checkpoint_steps else out), seed=cell.seed, beta=t.beta,
        learning_rate=cell.learning_rate or t.learning_rate,
        num_train_epochs=t.epochs, per_device_train_batch_size=_batch_size(t), lr_scheduler_type="linear",
        warmup_steps=t.warmup, optim="paged_adamw_32bit" if cell.policy.load_in_4bit else "adamw_torch_fused",
        bf16=False, activation_checkpointing=False, disable_dropout=t.lora_dropout == 0, max_length=None,
        logging_strategy="steps", logging_steps=max(1, steps // LOSS_POINTS), save_total_limit=1,
        save_strategy="steps" if t.checkpoint_steps else "no", save_steps=t.checkpoint_steps or 500,
        report_to=t.report_to, disable_tqdm=True, remove_unused_columns=False,
        dataloader_pin_memory=torch.cuda.is_available())  # bf16: compute_loss casts by policy.dtype


def checkpoints(cell: Cell) -> Path:
    """Where trl keeps the checkpoints of a cell that is not finished."""
    return cell.out.with_name(f"{cell.out.name}.checkpoints")


def lora(training: Any) -> LoraConfig:
    """LoRA on every linear layer but the head (Appendix H)."""
    return LoraConfig(r=training.lora_r, lora_alpha=training.lora_alpha, lora_dropout=training.lora_dropout,
                      target_modules="all-linear", task_type="CAUSAL_LM")


def dataset(tokenizer, cell: Cell) -> Dataset:
    """The train pairs for PairTrainer: prompt_ids, chosen_ids, rejected_ids and the reference's sums."""
    t = cell.train
    prompts = list(zip(t["head"], t["tail"], strict=True))
    pairs = scoring.encode_pairs(tokenizer, prompts, t["chosen"], t["rejected"], cell.policy.max_length,
                                 cell.side, cell.policy.max_prompt, soft=cell.reading is not None)
    columns = {f"{name}_ids": [getattr(p, name) for p in pairs] for name in ("prompt", "chosen", "rejected")}
    names = {name: t[name].tolist() for name in ("persona_id", "pair_id") if name in t}
    columns |= {"pair_id": [f"row {i}" for i in range(len(t))]} | names
    return Dataset.from_dict(columns | {name: t[name].tolist() for name in REFERENCE})


def save_adapter(model: PeftModel, out: Path, base_path: str) -> None:
    """Weights and config alone, for PeftModel.from_pretrained; the base by its path in the profile."""
    weights, config = get_peft_model_state_dict(model, save_embedding_layers=False), model.peft_config["default"]
    weights = {name: values.contiguous().cpu() for name, values in weights.items()}
    save_file(weights, out / "adapter_model.safetensors", metadata={"format": "pt"})
    config.base_model_name_or_path, config.inference_mode = str(base_path), True
    config.save_pretrained(str(out))


def _train_and_score(cell: Cell, part: Path) -> dict:
    (model, tokenizer), facts = models.base(cell.policy), {}
    _freeze()
    with models.peft_quiet():
        if cell.train is not None:
            model, facts = train_adapter(model, tokenizer, cell, part)
        elif cell.adapter:
            model = PeftModel.from_pretrained(model, str(cell.adapter))
            if cell.reading:
                model.vpl = vpl.load(cell.adapter).to(model.device)
    _score(model, tokenizer, cell, cell.score).to_parquet(part / "scores.parquet", index=False)
    if cell.validation is not None:
        found = _score(model, tokenizer, cell, cell.validation)
        facts["validation_accuracy"] = float(found["correct"].mean())
    if isinstance(model, PeftModel):
        model.unload()
    return facts


def _score(model: torch.nn.Module, tokenizer, cell: Cell, rows: pd.DataFrame) -> pd.DataFrame:
    soft = vpl.soft_tokens(model.vpl, vpl.Pool(cell.reading.pool), rows, cell.reading) if cell.reading else None
    prompts, p = zip(rows["head"], rows["tail"], strict=True), cell.policy
    found = scoring.score_pairs(model, tokenizer, prompts, rows["chosen"], rows["rejected"], dtype=p.dtype,
                                max_length=p.max_length, side=cell.side, max_prompt=p.max_prompt, soft=soft)
    kept = rows.drop(columns=["head", "tail", "chosen", "rejected"]).reset_index(drop=True)
    return pd.concat([kept, found], axis=1)


def _batch_size(training: Any) -> int:
    """Pairs of an update for each of the processes that accelerate launch has started, or for the only one."""
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    if training.batch_size % processes:
        raise ValueError(f"training.batch_size is {training.batch_size}, of which {processes} processes cannot have "
                         "equal parts; set one that they divide, or launch fewer")
    return training.batch_size // processes


def _last_checkpoint(folder: Path) -> str | None:
    """The newest checkpoint that was written to its end: the trainer's state is what trl writes last."""
    whole = [path.parent for path in folder.glob("checkpoint-*/trainer_state.json")]
    return str(max(whole, key=lambda path: int(path.name.split("-")[1]))) if whole else None


def _row_length(pair: dict) -> int:
    return dpo.row_length(pair["prompt_ids"], (pair["chosen_ids"], pair["rejected_ids"]))


@cache
def _freeze() -> None:
    """trl collects garbage at every start: half a second, if it looks at all that was imported."""
    gc.freeze()


def _work(cell: Cell) -> int:
    """Characters to read. The longest cells go first, so that no worker waits for a long one at the end."""
    passes = 0 if cell.train is None else 3 * cell.training.epochs
    read = [cell.score] + [cell.train] * passes
    return sum(int(rows["head"].str.len().sum() + rows["tail"].str.len().sum()) for rows in read)
