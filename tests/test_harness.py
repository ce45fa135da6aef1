"""The harness scores what helpers.scoring scores, behind the same text, and leaves the base as it was."""

import json
from dataclasses import asdict, dataclass
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import yaml
from lm_eval.tasks import TaskManager
from peft import LoraConfig, get_peft_model
from tiny import END, Policy, make_policy

from helpers import harness, models, scoring

HEADS = ["", "The user likes lentil stew and a slow roast.\n"]
QUESTION = "Question: what should I cook?\nAnswer:"
ANSWERS = [("lentil stew", "a slow roast of herbs"), ("Good.", "spares the animals"), ("Sunday", "Sunday Sunday")]


@dataclass(frozen=True)
class ShortPolicy(Policy):
    templates: str = "short"


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    return ShortPolicy(**asdict(make_policy(tmp_path_factory.mktemp("base"))))


@pytest.fixture(scope="module")
def loaded(policy):
    return models.load_policy(policy)


@pytest.fixture
def data(tmp_path):
    rows = [{"kind": "x", "question": QUESTION, "choices": [a + END, b + END], "answer": 0} for a, b in ANSWERS]
    (tmp_path / "little_facts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


@pytest.mark.parametrize("head", HEADS)
def test_the_harness_and_scoring_agree(loaded, data, head):
    found = harness.evaluate(*loaded, harness.load_tasks(["little_facts"], data), head, dtype="float32")
    right, wrong = zip(*ANSWERS, strict=True)
    plain = scoring.score_pairs(*loaded, [(head, QUESTION)] * 3, right, wrong, dtype="float32")
    both = plain[["logp_chosen", "logp_rejected"]]
    np.testing.assert_allclose(found[["logp_right", "logp_wrong"]], both, rtol=1e-5, atol=1e-4)
    assert found["correct"].tolist() == (plain["logp_chosen"] > plain["logp_rejected"]).astype(float).tolist()
    assert found[["task", "item", "kind"]].to_numpy().tolist() == [["little_facts", i, "x"] for i in range(3)]


@pytest.mark.parametrize("window", [2048, 20])
def test_a_shared_context_changes_nothing(loaded, window):
    """Against the harness's own model: questions of two and of three choices, one of a single one, one too long."""
    model, tokenizer = loaded
    asked = [(QUESTION, [" lentil stew", " a slow roast"]), (HEADS[1] + QUESTION, [" a", " Good.", " stew, because"]),
             ("The user", [" likes"]), ("Sunday " * 40, [" a", " roast"])]
    pairs = [(context, choice) for context, choices in asked for choice in choices]
    encoded = [(pair, *(tokenizer(text, add_special_tokens=False)["input_ids"] for text in pair)) for pair in pairs]
    options = {"pretrained": model, "tokenizer": tokenizer, "batch_size": 4, "max_length": window}
    ours, plain = (kind(**options)._loglikelihood_tokens(encoded[::-1], disable_tqdm=True)
                   for kind in (harness._Sharing, harness.HFLM))
    np.testing.assert_allclose([logp for logp, _ in ours], [logp for logp, _ in plain], rtol=1e-5, atol=1e-4)
    assert len(ours) == len(pairs)


def test_a_limit_and_nothing_outside_the_folder(loaded, data):
    tasks = harness.load_tasks(["little_facts"], data)
    assert len(harness.evaluate(*loaded, tasks, limit=2)) == 2
    assert (data / "cache").is_dir()


def test_rewardbench_rows_are_filtered_and_a_tie_is_wrong(loaded, tmp_path):
    rows = [("refusals-dangerous", "no", "yes"), ("refusals-offensive", "no", "yes"), ("refusals-dangerous", "no", "no")]
    bench = pd.DataFrame(rows, columns=["subset", "chosen", "rejected"]).assign(prompt="Question: may I?")
    bench.to_parquet(tmp_path / "filtered.parquet")
    config = yaml.safe_load((harness.FOLDER / "refusals_dangerous.yaml").read_text()) | {"dataset_path": "parquet"}
    config["dataset_kwargs"] |= {"data_files": {"filtered": str(tmp_path / "filtered.parquet")},
                                 "cache_dir": str(tmp_path / "cache")}
    found = harness.evaluate(*loaded, TaskManager(include_defaults=False).load([config]))
    assert len(found) == 2
    assert found["correct"].iloc[1] == 0
    assert found["logp_right"].iloc[1] == found["logp_wrong"].iloc[1]


def test_system_text_goes_where_the_template_has_a_place_for_it():
    made = {"keeps": ["system", "user"], "drops": ["user"]}
    for name, roles in made.items():
        tokenizer = SimpleNamespace(chat_template=name, apply_chat_template=lambda turns, tokenize, roles=roles: "".join(
            turn["content"] for turn in turns if turn["role"] in roles))
        assert harness.takes_system_text(SimpleNamespace(templates="full"), tokenizer) == (name == "keeps")
        assert not harness.takes_system_text(SimpleNamespace(templates="short"), tokenizer)
    assert not harness.takes_system_text(SimpleNamespace(templates="full"), SimpleNamespace(chat_template=None))


def test_chat_puts_the_head_into_the_system_turn(loaded, data):
    model, tokenizer = loaded
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}answer:"
    tasks = harness.load_tasks(["little_facts"], data)
    harness.evaluate(model, tokenizer, tasks, "I like stew.", chat=True)
    asked = tasks["tasks"]["little_facts"].instances[0].args[0]
    tokenizer.chat_template = None
    assert asked == f"system: I like stew.\nuser: {QUESTION}\nanswer:"


def cell(policy, out, data, **changed) -> harness.Cell:
    return harness.Cell(**{"out": out, "policy": policy, "adapter": None, "head": "", "names": ("little_facts",),
                       "data": data} | changed)


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # peft's own
def test_cells_run_once_and_leave_the_base_as_it_was(policy, data, tmp_path):
    adapted = get_peft_model(models.load_policy(policy)[0], LoraConfig(init_lora_weights=False, target_modules="all-linear"))
    adapted.save_pretrained(tmp_path / "adapter")
    cells = [cell(policy, tmp_path / "0.parquet", data),
             cell(policy, tmp_path / "1.parquet", data, adapter=tmp_path / "adapter"),
             cell(policy, tmp_path / "2.parquet", data), cell(policy, tmp_path / "3.parquet", data, head=HEADS[1])]
    found = harness.run(cells, 1, "sequential").groupby("cell")["logp_right"].agg(list)
    assert found[0] == found[2]
    assert found[0] != found[1]
    assert found[0] != found[3]
    pd.DataFrame({"task": ["kept"]}).to_parquet(cells[0].out)
    assert harness.run(cells[:1], 1, "sequential")["task"].tolist() == ["kept"]
    assert harness.run([], 1).empty
