import json

import numpy as np
import pandas as pd
import pytest
import torch
from datasets import Dataset
from peft import PeftModel
from safetensors.torch import load_file
from tests.tiny import Training, make_policy
from trl import DPOConfig, DPOTrainer

from helpers import models, scoring, training

WORDS = ("lentil stew slow roast herbs rainy Sunday fox quick brown lazy dog market bread cheese apples").split()


def make_pairs(n: int, seed: int = 3) -> pd.DataFrame:
    """Pairs of uneven length, with a head and a tail."""
    rng = np.random.default_rng(seed)
    say = lambda low, high: " ".join(rng.choice(WORDS, rng.integers(low, high)))  # noqa: E731
    return pd.DataFrame({
        "pair_id": [f"q{i}" for i in range(n)], "head": [f"The user likes {say(1, 8)}.\n" for _ in range(n)],
        "tail": [f"Question: {say(2, 6)}?\nAnswer:" for _ in range(n)],
        "chosen": [say(2, 9) for _ in range(n)], "rejected": [say(2, 9) for _ in range(n)]})


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    return make_policy(tmp_path_factory.mktemp("base"))


def with_reference(policy, pairs: pd.DataFrame) -> pd.DataFrame:
    model, tokenizer = models.load_policy(policy)
    found = scoring.score_pairs(model, tokenizer, list(zip(pairs["head"], pairs["tail"], strict=True)), pairs["chosen"],
                                pairs["rejected"], max_length=policy.max_length, dtype="float32")
    return pairs.assign(ref_chosen_logps=found["logp_chosen"], ref_rejected_logps=found["logp_rejected"])


def make_cell(policy, tmp_path, name: str = "a", **changes) -> training.Cell:
    pairs = with_reference(policy, make_pairs(10))
    settings = {"train": pairs, "validation": make_pairs(4, seed=5), "score": make_pairs(6, seed=9).assign(kind="divergent")}
    return training.Cell(policy_id=name, out=tmp_path / name, policy=policy, training=Training(), seed=1, **settings | changes)


def stock(policy, pairs: pd.DataFrame, out, **changes) -> dict[str, torch.Tensor]:
    """The adapter that trl's own DPOTrainer trains, from text, with its own reference pass."""
    model, tokenizer = models.load_policy(policy)
    end = tokenizer.eos_token
    data = Dataset.from_dict({"prompt": [end + h + t for h, t in zip(pairs["head"], pairs["tail"], strict=True)],
                              "chosen": [" " + y for y in pairs["chosen"]], "rejected": [" " + y for y in pairs["rejected"]]})
    config = DPOConfig(output_dir=str(out), beta=0.1, learning_rate=5e-3, num_train_epochs=2, warmup_steps=0.1, seed=1,
                       lr_scheduler_type="linear", bf16=False, activation_checkpointing=False, report_to="none",
                       save_strategy="no", logging_strategy="no", disable_tqdm=True, max_length=None,
                       dataloader_pin_memory=False, **{"per_device_train_batch_size": 4} | changes)
    trainer = DPOTrainer(model=model, args=config, processing_class=tokenizer, train_dataset=data,
                         peft_config=training.lora(Training()))
    trainer.train()
    return training.get_peft_model_state_dict(trainer.model)


def ours(policy, pairs: pd.DataFrame, tmp_path, token_budget: int) -> dict[str, torch.Tensor]:
    cell = make_cell(policy, tmp_path, train=pairs)
    model, tokenizer = models.load_policy(policy)
    trainer = training.PairTrainer(
        model=model, args=training.training_args(cell, tmp_path / "ours"), processing_class=tokenizer, dtype="float32",
        token_budget=token_budget, train_dataset=training._dataset(tokenizer, cell), peft_config=training.lora(Training()))
    trainer.train()
    return training.get_peft_model_state_dict(trainer.model)


def difference(a: dict, b: dict) -> float:
    assert a.keys() == b.keys()
    return max(((a[k] - b[k]).norm() / b[k].norm()).item() for k in a)


@pytest.mark.parametrize("token_budget", [4096, 100])
def test_updates_are_trls(policy, tmp_path, token_budget):
    pairs = with_reference(policy, make_pairs(10))  # batches of 4, 4 and 2: the last one is weighed by its two pairs
    mine, theirs = ours(policy, pairs, tmp_path, token_budget), stock(policy, pairs, tmp_path / "stock")
    print(difference(mine, theirs))
    assert difference(mine, theirs) < 1e-5
