import pandas as pd
import pytest
import yaml
from datasets import load_dataset
from peft import LoraConfig, PeftModel, get_peft_model
from tiny import make_policy
from transformers import AutoModelForCausalLM

from helpers import export, models


@pytest.fixture
def pairs() -> pd.DataFrame:
    return pd.DataFrame({
        "pair_id": ["a", "b", "c"], "persona_id": ["p1", "p1", "p2"], "question_id": ["q1", "q2", "q1"],
        "kind": ["divergent", "personal", "divergent"], "axis": "diet", "split": ["train", "test", "train"],
        "prompt": ["What to cook?", "Stew?", "What to cook?"], "chosen": ["Stew.", "Yes.", "Fish."],
        "rejected": ["Fish.", "No.", "Stew."], "chosen_id": ["1", "3", "2"], "rejected_id": ["2", "4", "1"]})


def test_the_pairs_are_read_by_plain_load_dataset(store, pairs, tmp_path):
    store.write("preferences", pairs)
    folder = export.write(store)
    read = load_dataset(str(folder), cache_dir=str(tmp_path / "cache"))
    assert {split: rows.num_rows for split, rows in read.items()} == {"train": 2, "test": 1}
    assert read["test"][0] == {
        "prompt": [{"role": "user", "content": "Stew?"}], "chosen": [{"role": "assistant", "content": "Yes."}],
        "rejected": [{"role": "assistant", "content": "No."}], "pair_id": "b", "persona_id": "p1", "question_id": "q2",
        "kind": "personal", "axis": "diet"}
    card = (folder / "README.md").read_text()
    assert yaml.safe_load(card.split("---")[1])["configs"][0]["data_files"][0] == {"split": "train", "path": "train.parquet"}
    assert "| train | 2 | 2 |" in card
    assert "simulated world" in card
    assert export.write(store) == folder  # again, in its place
    assert [path.name for path in folder.parent.iterdir()] == ["preferences"]


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # peft's
def test_an_adapter_has_a_card_and_is_read_by_plain_peft(store, pairs, tmp_path):
    policy = make_policy(tmp_path / "base")
    lora = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    get_peft_model(models.load_policy(policy)[0], lora).save_pretrained(store.path / "models/mt/one")
    store.write("preferences", pairs)
    store.write("policies", pd.DataFrame([{
        "policy_id": "one", "method": "vpl", "prefix": "name", "scheme": "stratified", "fold": 0, "seed": 3,
        "trained_on": ["p1", "p2"], "path": "models/mt/one", "steps": 7, "pairs": 2, "validation_accuracy": 0.5}]))
    export.write(store)
    card = (store.path / "models/mt/one/README.md").read_text()
    assert yaml.safe_load(card.split("---")[1])["library_name"] == "peft"
    assert "2 pairs of 2 people, 7 updates, seed 3" in card
    assert "encoder.safetensors" in card
    base = AutoModelForCausalLM.from_pretrained(policy.path)
    assert PeftModel.from_pretrained(base, str(store.path / "models/mt/one")).active_adapter == "default"
