import json
import multiprocessing
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from datasets import Dataset
from peft import PeftModel
from safetensors.torch import load_file
from tiny import Training, make_policy
from trl import DPOConfig, DPOTrainer

from helpers import dpo, memory, models, scoring, training

# peft 0.21 asks transformers 5.23 by a name that is deprecated there; nothing here can be said otherwise
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
WORDS = ["lentil", "stew", "slow", "roast", "herbs", "rainy", "Sunday", "fox", "quick", "brown", "lazy"]


def make_pairs(n: int, seed: int = 3) -> pd.DataFrame:
    """Pairs of uneven length, with a head and a tail."""
    rng = np.random.default_rng(seed)

    def say(low: int, high: int) -> str:
        return " ".join(rng.choice(WORDS, rng.integers(low, high)))

    return pd.DataFrame({
        "pair_id": [f"q{i}" for i in range(n)], "head": [f"The user likes {say(1, 8)}.\n" for _ in range(n)],
        "tail": [f"Question: {say(2, 6)}?\nAnswer:" for _ in range(n)],
        "chosen": [say(2, 9) for _ in range(n)], "rejected": [say(2, 9) for _ in range(n)]})


def score(model, tokenizer, pairs: pd.DataFrame) -> pd.DataFrame:
    prompts = list(zip(pairs["head"], pairs["tail"], strict=True))
    return scoring.score_pairs(model, tokenizer, prompts, pairs["chosen"], pairs["rejected"], dtype="float32")


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    return make_policy(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def pairs(policy):
    rows = make_pairs(10)  # batches of 4, 4 and 2
    found = score(*models.load_policy(policy), rows)
    return rows.assign(ref_chosen_logps=found["logp_chosen"], ref_rejected_logps=found["logp_rejected"])


@pytest.fixture
def cell(policy, pairs, tmp_path):
    return training.Cell(policy_id="a", out=tmp_path / "a", policy=policy, training=Training(), seed=1,
                         train=pairs, validation=make_pairs(4, seed=5),
                         score=make_pairs(6, seed=9).assign(kind="divergent"))


def ours(cell, token_budget: int, fast: bool = True, **changes) -> tuple[dict[str, torch.Tensor], list[float]]:
    """The adapter that PairTrainer trains, and the loss of each update."""
    model, tokenizer = models.load_policy(cell.policy)
    args = training.training_args(cell, cell.out)
    for name, value in changes.items():
        setattr(args, name, value)
    trainer = training.PairTrainer(model=model, args=args, processing_class=tokenizer, dtype="float32",
                                   train_dataset=training.dataset(tokenizer, cell), token_budget=token_budget,
                                   peft_config=training.lora(Training()))
    trainer.train()
    assert bool(trainer.decoder) == fast
    return training.get_peft_model_state_dict(trainer.model), losses(trainer)


def losses(trainer) -> list[float]:
    return [h["loss"] for h in trainer.state.log_history if "loss" in h]


def stock(cell, **changes) -> tuple[dict[str, torch.Tensor], list[float]]:
    """The same of trl's own DPOTrainer from the same texts, with its own reference passes."""
    model, tokenizer = models.load_policy(cell.policy)
    t = cell.train
    data = Dataset.from_dict({"prompt": (tokenizer.bos_token + t["head"] + t["tail"]).tolist(),
                              "chosen": (" " + t["chosen"]).tolist(),
                              "rejected": (" " + t["rejected"]).tolist()})
    config = DPOConfig(**{
        "output_dir": str(cell.out), "beta": 0.1, "learning_rate": 5e-3, "num_train_epochs": 2, "seed": 1,
        "warmup_steps": 0.1, "lr_scheduler_type": "linear", "per_device_train_batch_size": 4, "bf16": False,
        "max_length": None, "activation_checkpointing": False, "report_to": "none", "save_strategy": "no",
        "logging_steps": 1, "disable_tqdm": True, "dataloader_pin_memory": False} | changes)
    trainer = DPOTrainer(model=model, args=config, processing_class=tokenizer, train_dataset=data,
                         peft_config=training.lora(Training()))
    trainer.train()
    return training.get_peft_model_state_dict(trainer.model), losses(trainer)


def assert_equal(a: tuple, b: tuple) -> None:
    """The matrices of two adapters to 1e-5 of their size, and the losses of all updates to 1e-5."""
    assert a[0].keys() == b[0].keys()
    assert max(((a[0][name] - b[0][name]).norm() / b[0][name].norm()).item() for name in b[0]) < 1e-5
    np.testing.assert_allclose(a[1], b[1], atol=1e-5, rtol=0)


@pytest.mark.parametrize("token_budget", [4096, 100])  # one micro-batch a batch, or up to four
def test_six_updates_are_trls(cell, token_budget):
    found = ours(cell, token_budget)
    assert len(found[1]) == 6
    assert_equal(found, stock(cell))


@pytest.mark.parametrize("size", [2, 3])  # batches of 2, of which the last update has one; of 3, the last of 1
def test_updates_are_trls_with_accumulation(cell, size):
    parts = {"per_device_train_batch_size": size, "gradient_accumulation_steps": 2}
    assert_equal(ours(cell, 100, **parts), stock(cell, **parts))


def test_updates_are_trls_with_recomputed_activations(cell, monkeypatch):
    monkeypatch.setattr(memory, "free_bytes", lambda device: 1000)
    model, seen = stock(cell), []
    fit = memory.fit
    monkeypatch.setattr(memory, "fit", lambda *args: seen.append(fit(*args)) or seen[-1])
    assert_equal(ours(cell, 4096, fast=False), model)
    assert [recompute for _, recompute in seen] == [True]


@pytest.mark.parametrize("at", [3, 5])  # in the second epoch after a checkpoint of the first, and of the second
def test_a_resumed_training_equals_an_uninterrupted_one(cell, tmp_path, monkeypatch, at):
    plain = training.run_cell(cell)
    kept = replace(cell, out=tmp_path / "kept", training=Training(checkpoint_steps=2))
    step, steps = training.PairTrainer.training_step, []

    def counted(trainer, *args):
        steps.append(trainer.state.global_step)
        if len(steps) == at + 1:
            raise KeyboardInterrupt
        return step(trainer, *args)

    monkeypatch.setattr(training.PairTrainer, "training_step", counted)
    with pytest.raises(KeyboardInterrupt):
        training.run_cell(kept)
    last = training.checkpoints(kept) / f"checkpoint-{at - 1}"
    assert list(last.parent.glob("checkpoint-*")) == [last]
    (last.parent / "checkpoint-99").mkdir()  # one that was killed while it was written
    [facts] = training.run_grid([kept], workers=1, executor="sequential")
    assert steps == [*range(at + 1), *range(at - 1, 6)]  # from the checkpoint on
    assert facts["history"] == plain["history"]
    for name in ("adapter_model.safetensors", "scores.parquet"):
        assert (kept.out / name).read_bytes() == (cell.out / name).read_bytes()
    assert not training.checkpoints(kept).exists()


def test_two_processes_equal_one(cell, tmp_path):
    """accelerate launch, two processes on CPUs, each with half of every batch."""
    even = replace(cell, train=cell.train.iloc[:8])
    training.run_cell(even)
    even.train.to_parquet(tmp_path / "pairs.parquet")
    launch = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--cpu", "--num_processes", "2",
              "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    here = Path(__file__).parent
    done = subprocess.run([*launch, str(here / "launched.py"), cell.policy.path, str(tmp_path / "pairs.parquet"),
                           str(tmp_path / "both")], capture_output=True, text=True,
                          env=os.environ | {"PYTHONPATH": f"{here.parent}:{here}", "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-3000:]
    both, one = (load_file(folder / "adapter_model.safetensors") for folder in (tmp_path / "both", even.out))
    facts = [json.loads((folder / "done.json").read_text())["history"] for folder in (tmp_path / "both", even.out)]
    assert_equal(*((weights, [h["loss"] for h in history]) for weights, history in zip((both, one), facts, strict=True)))
    assert not list(tmp_path.glob("*.part"))


def test_a_batch_that_processes_cannot_share_is_refused(cell, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(ValueError, match="batch_size is 4, of which 3 processes"):
        training.training_args(cell, cell.out)


def test_a_cell_learns_and_leaves_the_base_alone(cell):
    base, tokenizer = models.base(cell.policy)
    before = {name: values.clone() for name, values in base.state_dict().items()}
    plain_forward = type(base).forward
    facts = training.run_cell(cell)
    assert all(torch.equal(values, before[name]) for name, values in base.state_dict().items())
    assert base.forward.__func__ is plain_forward
    assert (facts["steps"], facts["pairs"]) == (6, 10)  # two epochs of three batches
    assert [h["step"] for h in facts["history"]] == [1, 2, 3, 4, 5, 6]
    assert facts["history"][0]["loss"] == pytest.approx(np.log(2), abs=1e-5)  # the reference is the base
    assert facts["history"][-1]["loss"] < 0.6
    assert sorted(f.name for f in cell.out.iterdir()) == [
        "adapter_config.json", "adapter_model.safetensors", "done.json", "scores.parquet"]
    loaded = PeftModel.from_pretrained(models.load_policy(cell.policy)[0], str(cell.out))
    again = score(loaded.eval(), tokenizer, cell.score)
    kept = training.read_scores([cell])
    np.testing.assert_allclose(kept["logp_chosen"], again["logp_chosen"], rtol=1e-5)
    assert kept[["pair_id", "kind", "policy_id"]].iloc[0].tolist() == ["q0", "divergent", "a"]
    assert facts["validation_accuracy"] == score(loaded, tokenizer, cell.validation)["correct"].mean()
    untrained = score(base, tokenizer, cell.score)
    assert not np.allclose(kept["logp_chosen"], untrained["logp_chosen"], rtol=1e-2)


def test_four_numbers_and_the_loss_are_trls(cell):
    training.run_cell(cell)
    model, tokenizer = models.load_policy(cell.policy, cell.out)
    (trl, loss), mine = training.trl_losses(model, tokenizer, cell), score(model, tokenizer, cell.train)
    np.testing.assert_allclose(trl[["logp_chosen", "logp_rejected"]], mine[["logp_chosen", "logp_rejected"]],
                               rtol=1e-5)
    reference = cell.train[list(training.REFERENCE)]
    np.testing.assert_allclose(trl[list(training.REFERENCE)], reference, rtol=1e-5)
    four = [torch.tensor(column.to_numpy()) for column in (mine["logp_chosen"], mine["logp_rejected"],
                                                           *(reference[name] for name in reference))]
    assert loss == pytest.approx(dpo.dpo_loss(*four, beta=0.1).mean().item(), rel=1e-4)
    assert loss < np.log(2) - 0.05  # and the adapter is not the reference
    again = score(model, tokenizer, cell.train)  # the model is as it was
    pd.testing.assert_frame_equal(mine, again)


def test_several_adapters_live_on_one_base(cell, tmp_path):
    cells = [replace(cell, policy_id=f"s{s}", seed=s, out=tmp_path / f"s{s}") for s in (1, 2)]
    training.run_grid(cells, workers=1, executor="sequential")
    model, tokenizer = models.load_adapters(cell.policy, {c.policy_id: c.out for c in cells})
    ids = tokenizer([cell.score["tail"].iloc[0]] * 3, return_tensors="pt", add_special_tokens=False).to(model.device)
    with torch.inference_mode():
        mixed = model(**ids, adapter_names=["__base__", "s1", "s2"]).logits
    for row, one in enumerate(cells, start=1):
        model.set_adapter(one.policy_id)
        again, kept = score(model, tokenizer, cell.score), training.read_scores([one])
        np.testing.assert_allclose(again["logp_chosen"], kept["logp_chosen"], rtol=1e-5)
        with torch.inference_mode():
            torch.testing.assert_close(model(**ids).logits[0], mixed[row], rtol=1e-4, atol=1e-5)
    assert (mixed[0] - mixed[1]).abs().max() > 1e-2
    assert (mixed[1] - mixed[2]).abs().max() > 1e-2


def test_the_grid_resumes_and_does_not_depend_on_workers(cell, tmp_path):
    def grid(folder: str) -> list[training.Cell]:
        trained = [replace(cell, policy_id=f"s{s}", seed=s, out=tmp_path / folder / f"s{s}") for s in (1, 2)]
        loaded = replace(trained[0], policy_id="again", train=None, validation=None,
                         adapter=tmp_path / "one" / "s1", out=tmp_path / folder / "again")
        base = replace(loaded, policy_id="base", adapter=None, out=tmp_path / folder / "base")
        return [*trained, loaded, base]

    training.run_grid(grid("one"), workers=1, executor="sequential")
    kept = (tmp_path / "one" / "s1" / "done.json").stat().st_mtime_ns
    (tmp_path / "one" / "s1.123.part").mkdir()  # what a killed run leaves
    done = training.run_grid(grid("one"), workers=1, executor="sequential")
    assert (tmp_path / "one" / "s1" / "done.json").stat().st_mtime_ns == kept
    assert [facts["policy_id"] for facts in done] == ["s1", "s2", "again", "base"]
    assert sorted(f.name for f in (tmp_path / "one").iterdir()) == ["again", "base", "s1", "s2"]
    training.run_grid(grid("two"), workers=2)
    one, two = (training.read_scores(grid(folder)) for folder in ("one", "two"))
    pd.testing.assert_frame_equal(one, two, check_exact=True)
    logps = {policy_id: rows["logp_chosen"].to_numpy() for policy_id, rows in one.groupby("policy_id")}
    np.testing.assert_allclose(logps["again"], logps["s1"])
    assert not np.allclose(logps["again"], logps["s2"])
    untrained = score(*models.load_policy(cell.policy), cell.score)
    np.testing.assert_allclose(logps["base"], untrained["logp_chosen"])
    paths = training.keep_adapters(grid("one")[:2], tmp_path / "models")
    assert [p.name for p in paths] == ["s1", "s2"]
    assert (paths[0] / "adapter_model.safetensors").exists()


def test_a_killed_grid_loses_the_cell_in_flight_only(cell, tmp_path):
    cells = [replace(cell, policy_id=f"s{s}", seed=s, out=tmp_path / f"s{s}") for s in range(12)]
    spawn = multiprocessing.get_context("spawn")
    run = spawn.Process(target=training.run_grid, args=(cells, 1, "sequential"))
    run.start()
    deadline = time.monotonic() + 120
    while not any(c.out.exists() for c in cells) and time.monotonic() < deadline:
        time.sleep(0.01)
    run.kill()  # SIGKILL
    run.join()
    finished = {c.out: (c.out / "done.json").stat().st_mtime_ns for c in cells if c.out.exists()}
    assert 0 < len(finished) < len(cells)
    done = training.run_grid(cells, workers=1, executor="sequential")
    assert [facts["policy_id"] for facts in done] == [c.policy_id for c in cells]
    assert all((out / "done.json").stat().st_mtime_ns == when for out, when in finished.items())
    assert len(list(tmp_path.glob("s*"))) == len(cells)  # nothing half done is left


def test_logs_go_where_the_profile_says(cell):
    assert training.training_args(cell, cell.out).report_to == []
    args = training.training_args(replace(cell, training=Training(report_to="tensorboard")), cell.out)
    assert args.report_to == ["tensorboard"]
