"""Trains and scores one cell in each process that `accelerate launch` starts; tests/test_training.py does."""

import sys
from pathlib import Path

import pandas as pd
from tiny import Policy, Training

from helpers import training

if __name__ == "__main__":
    policy, pairs, out = sys.argv[1:]
    rows = pd.read_parquet(pairs)
    training.run_cell(training.Cell(policy_id="both", out=Path(out), policy=Policy(policy), training=Training(), seed=1,
                                    train=rows, score=rows[["pair_id", "head", "tail", "chosen", "rejected"]]))
