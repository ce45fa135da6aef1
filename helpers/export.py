"""A run's results for other programs: its pairs as a dataset, its adapters with model cards."""

import os
import shutil
from pathlib import Path

import pandas as pd
import pyarrow.parquet as pq
from datasets import Dataset
from huggingface_hub import DatasetCardData, ModelCardData

from helpers import ROOT
from helpers.artifacts import Store, atomic
from helpers.schemas import SPLITS

KEPT = ("pair_id", "persona_id", "question_id", "kind", "axis")  # beside prompt, chosen and rejected


def write(store: Store) -> Path:
    """The folder export/preferences in the run folder, made anew, and a card beside each adapter.

    The folder is what `datasets.load_dataset(folder)` reads, in trl's conversational format: prompt, chosen and
    rejected are lists of messages; splits train and test. Returns the folder.
    """
    target = store.path / "export" / "preferences"
    scratch = target.with_name(f".preferences.{os.getpid()}")
    scratch.mkdir(parents=True)
    pairs = store.read("preferences")
    for split in SPLITS:
        pq.write_table(conversational(pairs[pairs["split"] == split]).data.table, scratch / f"{split}.parquet")
    (scratch / "README.md").write_text(dataset_card(store, pairs), encoding="utf-8")
    shutil.rmtree(target, ignore_errors=True)
    scratch.rename(target)
    if store.has("policies"):
        for policy in store.read("policies").itertuples():
            with atomic(store.path / policy.path / "README.md") as file:
                file.write_text(model_card(store, policy), encoding="utf-8")
    return target


def conversational(pairs: pd.DataFrame) -> Dataset:
    """The rows of `preferences` as messages: the question the user's, the answers the assistant's."""
    turns = {"prompt": "user", "chosen": "assistant", "rejected": "assistant"}
    columns = {name: [[{"role": role, "content": text}] for text in pairs[name]] for name, role in turns.items()}
    return Dataset.from_dict(columns | {name: pairs[name].tolist() for name in KEPT})


def dataset_card(store: Store, pairs: pd.DataFrame) -> str:
    """README.md of the dataset: where the pairs come from, what a row is, how it is read."""
    data = DatasetCardData(
        pretty_name=f"Personal preferences, run {store.name}", language=["en"], task_categories=["text-generation"],
        tags=["preference", "dpo", "trl", "personalization", *["synthetic"] * store.profile.simulated],
        configs=[{"config_name": "default", "data_files": [{"split": s, "path": f"{s}.parquet"} for s in SPLITS]}])
    counts = "\n".join(f"| {split} | {(pairs['split'] == split).sum()} | "
                       f"{pairs.loc[pairs['split'] == split, 'persona_id'].nunique()} |" for split in SPLITS)
    return f"""---
{data.to_yaml()}
---
# Personal preferences: run {store.name}

{_origin(store)}

| split | pairs | people |
|---|---|---|
{counts}

A row is one question, the answer that a person would prefer (`chosen`) and one of the others (`rejected`), as messages.
`persona_id` says whose preference it is; `kind` is personal (the person's own question) or divergent (asked of everybody
on an `axis`). Train and test have no question in common within a person. Read it with

    datasets.load_dataset("export/preferences")
"""


def model_card(store: Store, policy) -> str:
    """README.md of one adapter: what it was trained on, and how it is loaded. policy: a row of `policies`."""
    cfg, base = store.profile, store.profile.policy
    from_hub = not (ROOT / Path(base.path).expanduser()).is_dir()
    data = ModelCardData(library_name="peft", pipeline_tag="text-generation", base_model=base.path if from_hub else None,
                         tags=["dpo", "lora", "trl", "personalization"])
    at = f" at revision {base.revision}" if base.revision else ""
    more = ("\nA vector read from a person's pairs stands in front of each prompt: `encoder.safetensors`, see helpers.vpl.\n"
            if policy.method == "vpl" else "")
    return f"""---
{data.to_yaml()}
---
# {policy.policy_id}

A LoRA adapter (r = {cfg.training.lora_r}, alpha = {cfg.training.lora_alpha}, all linear layers) for `{base.path}`{at}.
{_origin(store)}

| | |
|---|---|
| method | {policy.method}, DPO with beta = {cfg.training.beta} |
| prefix in front of each question | {policy.prefix} |
| held out | scheme {policy.scheme}, fold {policy.fold} |
| trained on | {policy.pairs} pairs of {len(policy.trained_on)} people, {policy.steps} updates, seed {policy.seed} |
| weights of the base in training | {"NF4, double quantisation" if base.load_in_4bit else base.dtype} |
{more}
    base = AutoModelForCausalLM.from_pretrained("{base.path}")
    model = PeftModel.from_pretrained(base, "{policy.path}")

Where that base is itself an adapter, merge it first: `AutoPeftModelForCausalLM.from_pretrained(…).merge_and_unload()`.
Questions are asked in its chat template, if it has one. The adapter serves research; it has not been tested for use.
"""


def _origin(store: Store) -> str:
    """Where preferences come from, in a sentence."""
    if store.profile.simulated:
        return "Everything about people and preferences comes from a simulated world: fictional people, no evidence about any."
    if store.profile.data.preferences:
        return "The preferences were brought by whoever made the run."
    return f"The preferences are judgements of a language model ({store.profile.teacher.model}), not of the people themselves."
