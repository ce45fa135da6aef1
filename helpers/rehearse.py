"""Before a run starts: is everything there, does it fit, and what will each stage take?

python -m helpers.rehearse PROFILE [--set key=value]...   (or ./run_all.sh rehearse PROFILE)
"""

import argparse
import shutil
import sys
from collections.abc import Mapping, Sequence
from os import environ
from typing import Any

import httpx2
import numpy as np
import openai
import pandas as pd
import psutil
import torch
import yaml
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError

from helpers import DATA, projection, shapes, unit_costs
from helpers.config import ConfigError, Profile, load_profile

PAPER = {"03_responses": "11 GPU-days, 40 GB or more (App. C)", "04_preferences": "about $500 (App. C)",
         "09_multitask": "under 12 GPU-hours a model (App. H)"}
TOO_LONG_DAYS = 30


def main(argv: Sequence[str] | None = None) -> int:
    """Print checks and projection. Returns 0 if the run can start, 1 if something will not fit, 2 for usage."""
    parser = argparse.ArgumentParser(prog="./run_all.sh rehearse", description=__doc__.split("\n")[0])
    parser.add_argument("profile")
    parser.add_argument("--set", action="append", default=[], metavar="key=value")
    args = parser.parse_args(argv)
    try:
        cfg = load_profile(args.profile, args.set)
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 2
    print(f"Rehearsing profile {cfg.name} on {psutil.cpu_count()} cores, {_card()}", flush=True)
    try:
        costs, notes = unit_costs.measure(cfg)
    except ConfigError as error:
        print(f"WILL NOT FIT: {error}")
        return 1
    table = projection.project(cfg, costs, price(cfg))
    table.loc[len(table)] = total(table)
    print(*notes, _shown(table).to_string(index=False), sep="\n")
    problems = check(cfg, table)
    print(*(f"WILL NOT FIT: {problem}" for problem in problems), sep="\n")
    print(f"{len(problems)} things to change before it starts" if problems else f"It fits: ./run_all.sh {args.profile}")
    return int(bool(problems))


def total(table: pd.DataFrame) -> list:
    """The last row of a projection: sums, and of memory the largest."""
    most = {"memory_mb", "gpu_mb"}
    return ["all", *(table[c].max() if c in most else table[c].sum() for c in table.columns[1:])]


def price(cfg: Profile) -> Mapping[str, float]:
    """Dollars per million tokens of the teacher's model; NaN where data/prices.yaml does not have it."""
    known = yaml.safe_load((DATA / "prices.yaml").read_text())["models"]
    return known.get(cfg.teacher.model, {"input": np.nan, "output": np.nan})


def check(cfg: Profile, table: pd.DataFrame) -> list[str]:
    """What would stop the run, each with its remedy. table: a projection with the row `all`."""
    whole = table[table["stage"] == "all"].iloc[0]
    return [*_access(cfg), *_endpoint(cfg), *_room(cfg, whole), *_money(cfg, whole)]


def _room(cfg: Profile, whole: pd.Series) -> list[str]:
    found, free = [], shutil.disk_usage(DATA).free / 2**20
    sizes = [shapes.parameters(model.path) * 2 / 2**20 for model in _models(cfg).values() if not shapes.at_hand(model)]
    download = sum(size for size in sizes if size == size)
    if (wants := whole["disk_mb"] + download) > free:
        found.append(f"disk: {free / 1024:.1f} GiB free at {DATA}, {wants / 1024:.1f} wanted: free some, or let data/runs "
                     "be a symbolic link to a larger one")
    memory = psutil.virtual_memory().available / 2**20
    if not whole["gpu_mb"] and whole["memory_mb"] > memory:
        found.append(f"memory: {memory:,.0f} MB free, {whole['memory_mb']:,.0f} wanted: fewer training.workers")
    if whole["gpu_mb"] and not torch.cuda.is_available():
        found.append(f"GPU: none that torch sees, {whole['gpu_mb'] / 1024:.0f} GiB wanted (arithmetic): use a machine with "
                     "one, or a smaller policy.path")
    elif whole["gpu_mb"] and whole["gpu_mb"] > (card := torch.cuda.get_device_properties(0).total_memory / 2**20):
        found.append(f"GPU memory: {card / 1024:.0f} GiB, {whole['gpu_mb'] / 1024:.0f} wanted: policy.load_in_4bit=true, a "
                     "smaller policy.max_length or fewer training.workers")
    if whole["seconds"] > TOO_LONG_DAYS * 86400:
        found.append(f"time: {whole['seconds'] / 86400:,.0f} days on this machine: a GPU, a smaller policy, or less of "
                     "questions.* and responses.*")
    return found


def _money(cfg: Profile, whole: pd.Series) -> list[str]:
    if np.isnan(whole["cost_usd"]):
        return [f"price: none of {cfg.teacher.model} in data/prices.yaml: add a line, all 0 for a server of your own"]
    if whole["cost_usd"] > cfg.teacher.budget_usd:
        return [f"money: ${whole['cost_usd']:,.2f} projected, teacher.budget_usd is {cfg.teacher.budget_usd:g}: raise it, or "
                "lower questions.* or people.per_axis, or take a cheaper teacher.model"]
    return []


def _models(cfg: Profile) -> dict[str, Any]:
    return {"policy": cfg.policy, "reward": cfg.reward, "embedder": cfg.embedder}


def _access(cfg: Profile) -> list[str]:
    """Models that are neither here nor to be had."""
    found = []
    for section, model in _models(cfg).items():
        if shapes.at_hand(model):
            continue
        path = model.path
        try:
            if path.startswith(("data/", ".", "/")) or path.count("/") != 1:
                raise FileNotFoundError("no such folder")
            HfApi().model_info(path, timeout=8)
        except (OSError, HfHubHTTPError, httpx2.HTTPError, ValueError) as error:
            found.append(f"{section}.path {path}: {type(error).__name__}: the comments of data/profiles/{cfg.name}.yaml say "
                         "how it is made or had; a gated one wants `hf auth login`; or name another model")
    return found


def _endpoint(cfg: Profile) -> list[str]:
    """Key and endpoint of the teacher, asked for its list of models, which costs nothing."""
    if unit_costs.simulated(cfg) or cfg.data.preferences:
        return []
    key = environ.get(cfg.teacher.api_key_env, "")
    if not key:
        return [f"teacher: no key in the environment variable {cfg.teacher.api_key_env}: export it (any word does for a "
                "server of your own)"]
    try:
        with openai.OpenAI(api_key=key, base_url=cfg.teacher.base_url, timeout=8, max_retries=0) as client:
            offered = [model.id for model in client.models.list()]
    except openai.OpenAIError as error:
        said = str(error).replace(key, "(key)")
        return [f"teacher at {cfg.teacher.base_url}: {type(error).__name__}: {said}: check teacher.base_url and the key"]
    if offered and cfg.teacher.model not in offered:
        return [f"teacher at {cfg.teacher.base_url} does not offer {cfg.teacher.model}, but {', '.join(offered[:5])}: "
                "set teacher.model"]
    return []


def _card() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"


def _shown(table: pd.DataFrame) -> pd.DataFrame:
    out = pd.DataFrame({"stage": table["stage"], "minutes": (table["seconds"] / 60).map("{:,.1f}".format),
                        "memory MB": table["memory_mb"].map("{:,.0f}".format),
                        "GPU MB": table["gpu_mb"].map("{:,.0f}".format), "disk MB": table["disk_mb"].map("{:,.0f}".format),
                        "tokens": table["tokens"].map("{:,.0f}".format), "$": table["cost_usd"].map("{:,.2f}".format)})
    return out.assign(paper=table["stage"].map(PAPER).fillna(""))


if __name__ == "__main__":
    sys.exit(main())
