"""Before anything is written: what a run reads is there and can be used. Looks at files alone, and loads no model."""

import json
import os
from itertools import islice
from pathlib import Path

import yaml

from helpers import DATA, ROOT, imported, tax
from helpers.config import Profile
from helpers.world.facts import load_world


class InputError(ValueError):
    """An input that a run cannot use: names the file or setting, what was found, and what to do."""


def check(cfg: Profile) -> None:
    """Raises InputError for the first input that would stop a run later on."""
    if cfg.simulated:
        _world(cfg)
    if cfg.data.preferences:
        _pairs(cfg)
    elif cfg.teacher.base_url != "simulated":
        _teacher(cfg)
    for section, path in {"policy": cfg.policy.path, "reward": cfg.reward.path, "embedder": cfg.embedder.path}.items():
        _model(section, path)
    _length(cfg)
    try:
        tax.available(cfg)
    except ValueError as error:
        raise InputError(str(error)) from None


def _world(cfg: Profile) -> None:
    folder = DATA / "world" / cfg.world
    for file in sorted(folder.glob("*.yaml")):
        try:
            yaml.safe_load(file.read_text(encoding="utf-8"))
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise InputError(f"{file}: {error}\nMend that line; {DATA / 'world/little'} is a model.") from None
    try:
        world = load_world(cfg.world)
    except (KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{folder}: {type(error).__name__} {error}: a key is missing or of the wrong kind; "
                         f"{DATA / 'world/little/README.md'} says how these files are written") from None
    except (OSError, ValueError) as error:
        raise InputError(str(error)) from None
    if unknown := sorted({*cfg.people.axes, *(cfg.people.small if not cfg.people.axes else ())} - set(world.axes)):
        raise InputError(f"people.axes: world {cfg.world} has no {', '.join(unknown)}; expected some of "
                         f"{', '.join(world.axes)}")


def _pairs(cfg: Profile) -> None:
    path, least = Path(cfg.data.preferences), cfg.data.min_pairs
    found = imported.scan(path, least)
    if (users := len(found.users)) < cfg.training.folds:
        problems = list(islice(imported.left_out(path, found, least), 5))
        told = "".join(f"\n  line {p.line}: {p.reason}" for p in problems)
        raise InputError(f"{path}: {users} users with {least} good pairs or more, but training.folds is {cfg.training.folds}: "
                         "add pairs or users, or set training.folds from 2 to the number of users. "
                         f"Of what cannot be used, the first lines:{told or ' none'}")


def _teacher(cfg: Profile) -> None:
    prices = yaml.safe_load((DATA / "prices.yaml").read_text(encoding="utf-8"))["models"]
    if cfg.teacher.model not in prices:
        raise InputError(f"teacher.model: no price for {cfg.teacher.model!r} in {DATA / 'prices.yaml'}; add a line, all 0 "
                         "for a server of your own")
    if not os.environ.get(cfg.teacher.api_key_env):
        raise InputError(f"teacher.api_key_env: no key in the environment variable {cfg.teacher.api_key_env}: export it (any "
                         "word does for a server of your own), or use --set teacher.base_url=simulated")


def _model(section: str, path: str) -> None:
    """A folder with a readable config.json, or something that may be a hub name."""
    folder = ROOT / Path(path).expanduser()
    if not folder.is_dir() and (path.count("/") != 1 or path.startswith((".", "/", "data/"))):
        raise InputError(f"{section}.path: no model at {path}; expected a folder (relative to {ROOT}) or a hub name, "
                         "owner/model")
    config = folder / "config.json"
    if config.exists():
        _json(config)
    elif folder.is_dir() and not (folder / "modules.json").exists():
        raise InputError(f"{section}.path: {folder} has no config.json: it is no model; copy it again, or name another folder")


def _length(cfg: Profile) -> None:
    config = ROOT / Path(cfg.policy.path).expanduser() / "config.json"
    longest = _json(config).get("max_position_embeddings") if config.exists() else None
    if longest and cfg.policy.max_length > longest:
        raise InputError(f"policy.max_length is {cfg.policy.max_length}, but {config} allows {longest} tokens: lower it")


def _json(file: Path) -> dict:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{file}: {error}: copy the model again") from None
