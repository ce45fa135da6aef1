"""What is timed: rows of the little world at the laptop profile's sizes, and the models they go through."""

import json
from pathlib import Path
from random import Random

import pandas as pd
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, MistralConfig

from helpers import models, prefixes, prompts
from helpers.world.corpus import Corpus
from helpers.world.facts import load_world

PER_PERSON = 18  # a person's test pairs in the laptop profile
ANSWERS = ["first", "second", "third", "fourth"]
SHAPES = {  # mistralai/Mistral-7B-v0.1, and the same small enough for a rehearsal on any CPU
    "7b": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
           "num_key_value_heads": 8, "vocab_size": 32000},
    "tiny": {"hidden_size": 64, "intermediate_size": 224, "num_hidden_layers": 2, "num_attention_heads": 4,
             "num_key_value_heads": 1, "vocab_size": 32000},
}


def make_rows(prefix: str, n: int, seed: int, times: int = 1) -> pd.DataFrame:
    """n divergent questions behind a prefix, PER_PERSON for each person in a row: head, tail, and four answers.

    chosen and rejected are the first two answers. times: how often the prefix's text stands in the prefix.
    """
    world, rng, rows = load_world("little"), Random(seed), []
    corpus, people = Corpus(world, seed), list(world.people.values())
    for start in range(0, n, PER_PERSON):
        person = rng.choice(people)
        axis, own = rng.choice(person.memberships)
        text = "\n".join(_text(prefix, world, corpus, rng, person, axis, own) for _ in range(times))
        for _ in range(min(PER_PERSON, n - start)):
            head, tail = prefixes.prompt("short", prefix, text, rng.choice(world.divergent_questions(axis)))
            others = rng.sample([name for name in world.axes[axis].categories if name != own], 3)
            rows.append((head, tail, *(corpus.answer(axis, category) for category in (own, *others))))
    table = pd.DataFrame(rows, columns=["head", "tail", *ANSWERS])
    return table.assign(chosen=table["first"], rejected=table["second"])


def make_policy(shape: str, folder: Path) -> str:
    """Save a model of random weights with the shipped tokenizer; the folder's path, for policy.path."""
    tokenizer = AutoTokenizer.from_pretrained(models.resolve("data/models/base"))
    config = MistralConfig(**SHAPES[shape], max_position_embeddings=4096, bos_token_id=tokenizer.bos_token_id,
                           eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    torch.manual_seed(0)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def _text(prefix, world, corpus, rng, person, axis, own) -> str:
    if prefix == "few_shot":
        asked = rng.sample(world.divergent_questions(axis), 2)
        return "\n".join(prompts.render("short", "shot", X=x, CHOSEN=corpus.answer(axis, own)) for x in asked)
    return world.describe(rng, person.name, person.memberships, person.hobbies[0])


def machine() -> dict[str, str | int]:
    """The processor or GPU, its threads, and torch, to stand beside every number."""
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else _processor()
    return {"machine": name, "threads": torch.get_num_threads(), "torch": torch.__version__,
            "bfloat16": models.bf16_available()}


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "CPU")


def describe() -> str:
    return json.dumps(machine())
