"""The paper profile from end to end without the paper's machines: tiny models of the same shapes from an offline hub.

A Mistral, an SFT adapter on it with Zephyr's chat template, a Llama reward model, a sentence-t5: everything by hub name,
as the profile has it, and the simulated teacher in place of GPT-4.
"""

import importlib.util
import json
import os
import shutil
import subprocess
import sys

import pandas as pd
import pytest
import torch
from datasets import load_dataset
from peft import LoraConfig, PeftModel, get_peft_model
from tinyhub import ZEPHYR, make_hub
from transformers import AutoModelForCausalLM, AutoTokenizer, MistralConfig, MistralForCausalLM

from helpers import ROOT, chat, models, prompts
from helpers.world.corpus import Corpus
from helpers.world.facts import load_world

RUN = "paper-in-small"
FOUR = importlib.util.find_spec("bitsandbytes") is not None  # without it the same in bfloat16
SETS = [
    "simulated=true", "world=little", "teacher.base_url=simulated", "teacher.model=simulated-teacher",
    "policy.path=tiny/zephyr-sft-qlora", "reward.path=tiny/reward", "embedder.path=tiny/sentence-t5",
    f"policy.load_in_4bit={str(FOUR).lower()}",
    "people.axes=[diet, music]", "people.small=[diet]", "questions.personal=6", "questions.divergent=8", "questions.batch=4",
    "responses.n_cot=2", "responses.per_cot=5", "responses.span=8", "responses.min_chars=20", "responses.temperature=1.0",
    "responses.max_new_tokens=64", "responses.batch=64", "prefixes.shot_counts=[1]", "prefixes.persona_shots=2",
    "prefixes.retrieval=[tfidf]",
    "prefixes.names=[none, few_shot, persona, persona_gpt4, persona_gold, name]",
    "training.epochs=1", "training.folds=2", "training.label_noise=[]", "training.workers=2", "training.batch_size=8",
    "personal.seeds=[0]", "personal.shares=[0.5]", "personal.epochs=1", "schemes.names=[]",
    "vpl.shots=[4]", "vpl.as_released=false", "vpl.hidden=32", "generation.people=6", "generation.max_new_tokens=64",
    "tax.tasks=[little_reasoning, little_facts, little_refusals]", "tax.people=2", "tax.limit=10", "stats.n_boot=200",
    "alignx.folds=1", "alignx.most=1", "alignx.counts=[0, 1, 4]", "alignx.dial=[0.0, 1.0]", "alignx.people=4"]


def taught():
    """(base, base with an SFT adapter, tokenizer): the shipped base as a Mistral, taught the full prompts in Zephyr's turns."""
    home = models.resolve("data/models/base")
    tokenizer = AutoTokenizer.from_pretrained(home)
    tokenizer.chat_template = ZEPHYR
    llama = AutoModelForCausalLM.from_pretrained(home)
    sizes = {key: value for key, value in llama.config.to_dict().items()
             if key in MistralConfig().to_dict() and key not in ("architectures", "model_type")}
    base = MistralForCausalLM(MistralConfig(**sizes | {"sliding_window": 512}))
    base.load_state_dict(llama.state_dict())
    lora = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    with models.peft_quiet():
        model = get_peft_model(base, lora)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=4e-3)
    corpus = Corpus(load_world("little"), seed=5)
    for _ in range(90):
        optimizer.zero_grad()
        for question, answer in (turn(corpus) for _ in range(6)):
            (asked,), (said,) = chat.encode_prompts(tokenizer, [("", question)]), chat.encode_answers(tokenizer, [answer])
            ids = torch.tensor([sum(asked, []) + said])
            labels = ids.clone()
            labels[0, :-len(said)] = -100
            (model(input_ids=ids, labels=labels).loss / 6).backward()
        optimizer.step()
    base = MistralForCausalLM(base.config)
    base.load_state_dict(llama.state_dict())
    return base, model, tokenizer


def turn(corpus: Corpus) -> tuple[str, str]:
    """A prompt of data/prompts/full and what a good assistant of the little world says to it."""
    axis, question = corpus._axis_question()
    options, chosen = corpus._options(list(corpus.world.axes[axis].categories), 3)
    answer, names = corpus.answer(axis, chosen), ", ".join(options)
    thought = f"{axis}\nCategories: {names}\nChosen category: {chosen}\nResponse: {answer}"
    given = {"X": question, "AXIS": axis, "CATEGORIES": names, "CATEGORY": chosen}
    return corpus.rng.choice([(prompts.render("full", "cot", X=question), thought),
                              (prompts.render("full", "cot_given", **given), answer),
                              (prompts.render("full", "respond_none", X=question), answer)])


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The run folder of the whole profile, executed in a process that cannot reach the hub."""
    hub = tmp_path_factory.mktemp("hf") / "hub"
    hub.mkdir()
    base, sft, tokenizer = taught()
    commits = make_hub(hub, base, tokenizer, sft)
    pinned = [f"{part}.revision={commits[name]}" for part, name in
              (("policy", "tiny/zephyr-sft-qlora"), ("reward", "tiny/reward"), ("embedder", "tiny/sentence-t5"))]
    folder = ROOT / "data/runs" / RUN
    merged = models.MERGED / f"zephyr-sft-qlora-{commits['tiny/zephyr-sft-qlora'][:8]}"
    for old in (folder, merged):
        shutil.rmtree(old, ignore_errors=True)
    environment = os.environ | {"HF_HOME": str(hub.parent), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "helpers.run", "paper", "--run", RUN]
    command += [word for text in SETS + pinned for word in ("--set", text)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    (hub.parent / "log").write_text(done.stdout + done.stderr)
    yield done, folder, merged
    shutil.rmtree(folder, ignore_errors=True)
    shutil.rmtree(merged, ignore_errors=True)


@pytest.mark.slow
def test_the_paper_profile_runs_from_an_offline_hub(finished):
    done, folder, merged = finished
    assert done.returncode == 0, done.stdout[-1500:] + done.stderr[-3000:]
    assert (merged / "model.safetensors").exists()
    tables = {name: pd.read_parquet(folder / f"tables/{name}.parquet") for name in
              ("responses", "preferences", "scores", "generations", "claims")}
    assert tables["responses"].loc[tables["responses"]["selected"], "reward"].notna().all()
    assert set(tables["preferences"]["kind"]) == {"personal", "divergent"}
    assert set(tables["scores"]["method"]) >= {"prompting", "pm", "mt", "vpl"}
    assert not tables["generations"]["text"].str.contains("<|assistant|>", regex=False).any()
    assert len(tables["claims"]) > 50


@pytest.mark.slow
def test_its_results_are_read_by_others(finished, tmp_path):
    _, folder, merged = finished
    pairs = load_dataset(str(folder / "export/preferences"), cache_dir=str(tmp_path))
    assert pairs["train"][0]["chosen"][0]["role"] == "assistant"
    adapter = next(folder.glob("models/09_multitask/mt-name-*"))
    assert json.loads((adapter / "adapter_config.json").read_text())["base_model_name_or_path"] == "tiny/zephyr-sft-qlora"
    with models.peft_quiet():
        model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(merged), str(adapter))
    assert model.active_adapter == "default"
