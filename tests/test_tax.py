"""The harness scores what helpers.scoring scores; changes and their intervals come out as worked by hand."""

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

from helpers import models, scoring, tax
from helpers.config import load_profile

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
    found = tax.evaluate(*loaded, tax.load_tasks(["little_facts"], data), head, dtype="float32")
    right, wrong = zip(*ANSWERS, strict=True)
    plain = scoring.score_pairs(*loaded, [(head, QUESTION)] * 3, right, wrong, dtype="float32")
    both = plain[["logp_chosen", "logp_rejected"]]
    np.testing.assert_allclose(found[["logp_right", "logp_wrong"]], both, rtol=1e-5, atol=1e-4)
    assert found["correct"].tolist() == (plain["logp_chosen"] > plain["logp_rejected"]).astype(float).tolist()
    assert found[["task", "item", "kind"]].to_numpy().tolist() == [["little_facts", i, "x"] for i in range(3)]


def test_a_limit_and_nothing_outside_the_folder(loaded, data):
    tasks = tax.load_tasks(["little_facts"], data)
    assert len(tax.evaluate(*loaded, tasks, limit=2)) == 2
    assert (data / "cache").is_dir()


def test_rewardbench_rows_are_filtered_and_a_tie_is_wrong(loaded, tmp_path):
    rows = [("refusals-dangerous", "no", "yes"), ("refusals-offensive", "no", "yes"), ("refusals-dangerous", "no", "no")]
    bench = pd.DataFrame(rows, columns=["subset", "chosen", "rejected"]).assign(prompt="Question: may I?")
    bench.to_parquet(tmp_path / "filtered.parquet")
    config = yaml.safe_load((tax.FOLDER / "refusals_dangerous.yaml").read_text()) | {"dataset_path": "parquet"}
    config["dataset_kwargs"] |= {"data_files": {"filtered": str(tmp_path / "filtered.parquet")},
                                 "cache_dir": str(tmp_path / "cache")}
    found = tax.evaluate(*loaded, TaskManager(include_defaults=False).load([config]))
    assert len(found) == 2
    assert found["correct"].iloc[1] == 0
    assert found["logp_right"].iloc[1] == found["logp_wrong"].iloc[1]


def test_system_text_goes_where_the_template_has_a_place_for_it():
    made = {"keeps": ["system", "user"], "drops": ["user"]}
    for name, roles in made.items():
        tokenizer = SimpleNamespace(chat_template=name, apply_chat_template=lambda turns, tokenize, roles=roles: "".join(
            turn["content"] for turn in turns if turn["role"] in roles))
        assert tax.takes_system_text(SimpleNamespace(templates="full"), tokenizer) == (name == "keeps")
        assert not tax.takes_system_text(SimpleNamespace(templates="short"), tokenizer)
    assert not tax.takes_system_text(SimpleNamespace(templates="full"), SimpleNamespace(chat_template=None))


def test_chat_puts_the_head_into_the_system_turn(loaded, data):
    model, tokenizer = loaded
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}answer:"
    tasks = tax.load_tasks(["little_facts"], data)
    tax.evaluate(model, tokenizer, tasks, "I like stew.", chat=True)
    asked = tasks["tasks"]["little_facts"].instances[0].args[0]
    tokenizer.chat_template = None
    assert asked == f"system: I like stew.\nuser: {QUESTION}\nanswer:"


def test_every_task_of_every_profile_has_a_group():
    for name in ("smoke", "laptop", "gpu", "paper"):
        cfg = load_profile(name)
        assert tax.available(cfg) == cfg.tax.tasks
        assert {tax.group_of()[task] for task in cfg.tax.tasks} == {"safety", "reasoning", "factuality"}
    with pytest.raises(ValueError, match="arc_hard in no group"):
        tax.available(load_profile("smoke", ["tax.tasks=[arc_hard]"]))
    assert tax.available(load_profile("laptop", ["simulated=false", "tax.tasks=[little_facts, piqa]"])) == ("piqa",)


def cell(policy, out, data, **changed) -> tax.Cell:
    return tax.Cell(**{"out": out, "policy": policy, "adapter": None, "head": "", "names": ("little_facts",),
                       "data": data} | changed)


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # peft's own
def test_cells_run_once_and_leave_the_base_as_it_was(policy, data, tmp_path):
    adapted = get_peft_model(models.load_policy(policy)[0], LoraConfig(init_lora_weights=False, target_modules="all-linear"))
    adapted.save_pretrained(tmp_path / "adapter")
    cells = [cell(policy, tmp_path / "0.parquet", data),
             cell(policy, tmp_path / "1.parquet", data, adapter=tmp_path / "adapter"),
             cell(policy, tmp_path / "2.parquet", data), cell(policy, tmp_path / "3.parquet", data, head=HEADS[1])]
    found = tax.run(cells, 1, "sequential").groupby("cell")["logp_right"].agg(list)
    assert found[0] == found[2]
    assert found[0] != found[1]
    assert found[0] != found[3]
    pd.DataFrame({"task": ["kept"]}).to_parquet(cells[0].out)
    assert tax.run(cells[:1], 1, "sequential")["task"].tolist() == ["kept"]
    assert tax.run([], 1).empty


def test_plan_by_hand():
    mt = [("mt", prefix, "stratified", fold, 0) for prefix in ("none", "name") for fold in (0, 1)]
    others = [("mt", "none", "small", 0, 0), ("mt", "none", "stratified", 0, 1), ("mt_loser", "none", "stratified", 0, 0)]
    policies = pd.DataFrame(mt + others, columns=["method", "prefix", "scheme", "fold", "seed"])
    policies["policy_id"] = policies["path"] = [f"{r.prefix}{r.fold}" for r in policies.itertuples()]
    folds = pd.DataFrame({"scheme": "stratified", "fold": [0, 1, 1], "persona_id": ["p1", "p2", "p3"]})
    rows = [(p, "name", variant, f"N-{p}") for p in ("p1", "p2", "p3") for variant in ("main", "shuffled")]
    prefixes = pd.DataFrame(rows, columns=["persona_id", "prefix", "variant", "text"])
    cfg = load_profile("smoke", ["tax.prefixes=[name, persona_gold]", "tax.people=2"])
    found = tax.plan(policies, prefixes, folds, cfg)
    assert found.iloc[:5].to_numpy().tolist() == [
        ["base", "", "none", "", "", "", ""], ["mt", "none", "none", "", "none0", "none0", ""],
        ["mt", "none", "none", "", "none1", "none1", ""], ["mt", "name", "none", "", "name0", "name0", ""],
        ["mt", "name", "none", "", "name1", "name1", ""]]
    of = found.iloc[5:]
    assert len(of) == 4
    assert of["persona_id"].nunique() == 2
    for row in of.itertuples():
        held_out = {"p1": "name0", "p2": "name1", "p3": "name1"}[row.persona_id]
        assert row.policy_id == row.path == ("" if row.system == "base" else held_out)
        assert row.head == f"The user is N-{row.persona_id}.\n"


def make_items(correct: dict[tuple, list[float]], task="little_facts") -> pd.DataFrame:
    rows = [(task, item, value, *key) for key, values in correct.items() for item, value in enumerate(values)]
    return pd.DataFrame(rows, columns=["task", "item", "correct", *tax.SYSTEM])


BASE = ("base", "", "none", "", "")


def mt(person: str, fold: int) -> tuple:
    return ("mt", "name", "name" if person else "none", person, f"name{fold}")


def test_changes_by_hand():
    # removed: folds .5 and 1 make .75, the base .5: + .25. With prefixes p1 0 (-.5), p2 1 (+.5), p3 .5 (0): mean 0.
    items = make_items({BASE: [1, 0], mt("", 0): [1, 0], mt("", 1): [1, 1], mt("p1", 0): [0, 0], mt("p2", 1): [1, 1],
                        mt("p3", 1): [0, 1]})
    table = tax.summary(items, n_boot=200)
    assert table["n_items"].tolist() == [2] * 6
    assert table["accuracy"].tolist() == [0.5, 0.5, 1.0, 0.0, 1.0, 0.5]
    assert table.loc[[0, 2, 3], ["low", "high"]].to_numpy().tolist() == [[0, 1], [1, 1], [0, 0]]
    changed = tax.changes(table)
    assert changed["change"].tolist() == [0.0, 0.25, -0.5, 0.5, 0.0]
    (mean,) = tax.over_people(changed, n_boot=200, min_people=3).to_dict("records")
    assert (mean["change"], mean["low"], mean["high"], mean["n_people"]) == (0.0, -0.5, 0.5, 3)
    assert np.isnan(tax.over_people(changed, n_boot=200)["change"].item())  # three people are too few
    assert set(changed["group"]) == {"factuality"}


def test_paired_items_by_hand():
    # item 0: base 1, folds 1 and 0: -.5; item 1: base 0, folds 1 and 1: +1. Mean .25; a draw has -.5, .25 or 1.
    items = make_items({BASE: [1, 0], mt("", 0): [1, 1], mt("", 1): [0, 1]})
    found = tax.over_items(items, n_boot=500).query("system == 'mt'").iloc[0]
    assert found[["change", "low", "high", "n_items"]].tolist() == [0.25, -0.5, 1.0, 2]
    # a second task of the same group with one item that got worse by 1: mean of .25 and -1; items drawn in each task
    both = pd.concat([items, make_items({BASE: [1], mt("", 0): [0], mt("", 1): [0]}, "truthfulqa_mc1")])
    found = tax.over_items(both, n_boot=500).query("system == 'mt'").iloc[0]
    assert found[["change", "low", "high", "n_items"]].tolist() == [-0.375, -0.75, 0.0, 3]


def test_equal_systems_change_nothing_and_nothing_is_no_rows():
    items = make_items({BASE: [1, 0, 1], mt("p1", 0): [1, 0, 1]})
    assert (tax.over_items(items, by=["persona_id"])[["change", "low", "high"]] == 0).all(axis=None)
    empty = items.head(0)
    table = tax.summary(empty)
    assert table.empty
    assert tax.over_people(tax.changes(table)).empty
    assert tax.over_items(empty).empty
