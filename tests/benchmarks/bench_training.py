"""Pairs per second of PairTrainer against trl's DPOTrainer, on the same rows, in one process, in turns.

    python tests/benchmarks/bench_training.py --pairs 128 --repeats 5 --threads 1

Reference passes are counted. Seconds are of CPU on a CPU (other jobs disturb them less) and of wall on a GPU.
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from random import Random

import pandas as pd
import torch
from datasets import Dataset
from trl import DPOConfig, DPOTrainer

from helpers import models, prefixes, prompts, scoring, training
from helpers.config import load_profile
from helpers.world.corpus import Corpus
from helpers.world.facts import load_world

STOCK = {  # what trl's users would write: nothing, or all its flags that help
    "trl, defaults": {},
    "trl, best flags": {"precompute_ref_log_probs": True, "activation_checkpointing": False},
}


def make_rows(prefix: str, n: int, seed: int) -> pd.DataFrame:
    """n pairs of the little world behind a prefix: head, tail, chosen, rejected."""
    world, rng, rows = load_world("little"), Random(seed), []
    corpus, people = Corpus(world, seed), list(world.people.values())
    for _ in range(n):
        person = rng.choice(people)
        axis, own = rng.choice(person.memberships)
        other = rng.choice([name for name in world.axes[axis].categories if name != own])
        asked = rng.sample(world.divergent_questions(axis), 3)
        shots = [prompts.render("short", "shot", X=x, CHOSEN=corpus.answer(axis, own)) for x in asked[1:]]
        about = world.describe(rng, person.name, person.memberships, person.hobbies[0])
        text = {"none": "", "few_shot": "\n".join(shots), "persona_gold": about}[prefix]
        head, tail = prefixes.prompt("short", prefix, text, asked[0])
        rows.append((head, tail, corpus.answer(axis, own), corpus.answer(axis, other)))
    return pd.DataFrame(rows, columns=["head", "tail", "chosen", "rejected"])


def run_ours(rows: pd.DataFrame, cfg, out: Path) -> None:
    model, tokenizer = models.load_policy(cfg.policy)
    prompts_of = list(zip(rows["head"], rows["tail"], strict=True))
    found = scoring.score_pairs(model, tokenizer, prompts_of, rows["chosen"], rows["rejected"])
    train = rows.assign(ref_chosen_logps=found["logp_chosen"], ref_rejected_logps=found["logp_rejected"])
    cell = training.Cell("bench", out, cfg.policy, cfg.training, seed=0, score=rows.head(0), train=train)
    training.train_adapter(model, tokenizer, cell, out)


def run_stock(rows: pd.DataFrame, cfg, out: Path, flags: dict) -> None:
    model, tokenizer = models.load_policy(cfg.policy)
    t, begin = cfg.training, tokenizer.bos_token
    data = Dataset.from_dict({"prompt": (begin + rows["head"] + rows["tail"]).tolist(),
                              "chosen": (" " + rows["chosen"]).tolist(),
                              "rejected": (" " + rows["rejected"]).tolist()})
    args = DPOConfig(output_dir=str(out), beta=t.beta, learning_rate=t.learning_rate, num_train_epochs=t.epochs,
                     per_device_train_batch_size=t.batch_size, warmup_steps=t.warmup, save_strategy="no",
                     lr_scheduler_type="linear", report_to="none", disable_tqdm=True, max_length=None,
                     bf16=models.bf16_available(), use_cpu=not torch.cuda.is_available(),
                     dataloader_pin_memory=torch.cuda.is_available(), **flags)
    DPOTrainer(model=model, args=args, processing_class=tokenizer, train_dataset=data,
               peft_config=training.lora(t)).train()


def timed(work: Callable[[], None]) -> float:
    clock = time.perf_counter if torch.cuda.is_available() else time.process_time
    start = clock()
    work()
    return clock() - start


def compare(prefix: str, cfg, n_pairs: int, repeats: int) -> pd.DataFrame:
    """Median pairs per second of each trainer and ours over it; the first round warms up and is left out."""
    seconds: dict[str, list[float]] = {name: [] for name in (*STOCK, "PairTrainer")}
    for repeat in range(repeats + 1):
        rows = make_rows(prefix, n_pairs if repeat else 2 * cfg.training.batch_size, seed=repeat)
        for name, taken in seconds.items():
            with tempfile.TemporaryDirectory() as folder:
                out = Path(folder)
                taken.append(timed(lambda rows=rows, out=out, name=name: run_stock(rows, cfg, out, STOCK[name])
                                   if name in STOCK else run_ours(rows, cfg, out)))
    table = pd.DataFrame({name: taken[1:] for name, taken in seconds.items()})
    speed = (n_pairs * cfg.training.epochs / table).median()
    ratio = (table.div(table["PairTrainer"], axis=0)).median()
    return pd.DataFrame({"prefix": prefix, "pairs_per_second": speed.round(1), "times_slower": ratio.round(2)})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--profile", default="laptop")
    parser.add_argument("--pairs", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--prefixes", nargs="+", default=["none", "persona_gold", "few_shot"])
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    cfg = load_profile(args.profile)
    tables = [compare(prefix, cfg, args.pairs, args.repeats) for prefix in args.prefixes]
    print(pd.concat(tables).to_string())


if __name__ == "__main__":
    main()
