"""What is known of a model before it is loaded: whether it is at hand, its weights, what they take on a GPU."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from huggingface_hub import try_to_load_from_cache
from transformers import AutoConfig, AutoModelForCausalLM

from helpers import DATA, ROOT, models
from helpers.config import ConfigError, Profile


def at_hand(model: Any) -> bool:
    """Whether a model lies here, as a folder or in the hub's cache. model: a section of the profile (path, revision)."""
    return _here(model.path, model.revision)


def _here(path: str, revision: str = "") -> bool:
    """As a folder, or in the hub's cache; of an adapter there its base as well."""
    if (ROOT / path).is_dir() or str(path).count("/") != 1:
        return (ROOT / path).is_dir()
    config, adapter = (try_to_load_from_cache(str(path), name, revision=revision or None)
                       for name in ("config.json", "adapter_config.json"))
    if not isinstance(adapter, str) or isinstance(config, str):
        return isinstance(config, str)
    about = json.loads(Path(adapter).read_text())
    return _here(about["base_model_name_or_path"], about.get("revision") or "")


def config_of(policy: Any) -> Any:
    """The config of a policy that is at hand, an adapter's base's. policy: the section of the profile."""
    return AutoConfig.from_pretrained(models.policy_folder(policy.path, policy.revision))


def shape_of(path: str) -> Any:
    """The config of a model that is not at hand, by its name in data/shapes.yaml. Raises ConfigError if it has none."""
    name, shape = _listed(path)
    if "model_type" not in shape:
        raise ConfigError(f"policy.path {path} is not at hand and data/shapes.yaml has no {name}: "
                          "download the model, or add a line with the sizes of its config.json")
    return AutoConfig.for_model(**shape)


def parameters(path: str) -> float:
    """Weights of a model by its folder or data/shapes.yaml; NaN where nothing is known."""
    local = Path(ROOT / path)
    if local.is_dir():
        return sum(f.stat().st_size for f in local.rglob("*.safetensors")) / 4
    _, shape = _listed(path)
    if "model_type" in shape:
        return float(_count(AutoConfig.for_model(**shape)))
    return float(shape.get("parameters", np.nan))


def _listed(path: str) -> tuple[str, dict[str, Any]]:
    """A model's name without whose it is, and what data/shapes.yaml says of it."""
    name = str(path).rsplit("/", 1)[-1]
    return name, yaml.safe_load((DATA / "shapes.yaml").read_text()).get(name.lower(), {})


def _count(config: Any) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())


def active(config: Any) -> int:
    """Weights that a token is multiplied with: all but the embedding, the head once."""
    return _count(config) - (0 if config.tie_word_embeddings else config.vocab_size * config.hidden_size)


def gpu_mb(cfg: Profile, whole: float) -> float:
    """Weights (4-bit: half a byte and a tenth for scales; else 2), adapter with gradients and AdamW, and one full row.

    The least that must fit, for a batch is halved where memory is short. A row of two max_length tokens keeps about
    34 bytes a token, layer and hidden unit for the way back, and 6 a token and word. Arithmetic, not a measurement.
    """
    shape = (config_of(cfg.policy) if at_hand(cfg.policy) else shape_of(cfg.policy.path)).get_text_config()
    weights = whole * (0.55 if cfg.policy.load_in_4bit else 2)
    adapter = 16 * cfg.training.lora_r * shape.num_hidden_layers * 18 * shape.hidden_size
    batch = 2 * cfg.policy.max_length * (34 * shape.num_hidden_layers * shape.hidden_size + 6 * shape.vocab_size)
    return (weights + adapter + batch) / 2**20
