"""Asking as somebody: the right adapter and text for each person, and what each sentence of a prefix moves."""

import pandas as pd
import pytest
import torch
from peft import LoraConfig, get_peft_model

from helpers import models, why
from helpers.artifacts import open_run
from helpers.prefixes import prompt
from helpers.scoring import score_pairs

GOLD = {"p01": "Ann eats beans. Ann likes the sea.", "p02": "Bob eats lamb."}


@pytest.fixture(scope="module")
def desk(policy, tmp_path_factory):
    """Two people, each held out by one fold; the adapters differ."""
    sets = [f"policy.path={policy.path}", "policy.dtype=float32"]
    store = open_run("smoke", "why", sets=sets, runs=tmp_path_factory.mktemp("runs"))
    store.write("personas", pd.DataFrame([
        {"persona_id": p, "name": name, "tag": "t", "axes": ["diet"], "categories": ["x"], "description": "",
         "demographics": "{}"} for p, name in (("p01", "Ann"), ("p02", "Bob"))]))
    store.write("prefixes", pd.DataFrame([
        {"persona_id": p, "prefix": "persona_gold", "variant": variant, "text": text, "shots": [], "model": "", "n_tokens": 1}
        for variant in ("main", "shuffled") for p, text in GOLD.items()]))
    store.write("folds", pd.DataFrame([("stratified", 0, "p02"), ("stratified", 1, "p01")],
                                      columns=["scheme", "fold", "persona_id"]))
    rows = []
    for fold in (0, 1):
        torch.manual_seed(fold)
        config = LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
        with models.peft_quiet():
            get_peft_model(models.load_policy(policy)[0], config).save_pretrained(store.path / f"models/fold{fold}")
        rows.append({"policy_id": f"f{fold}", "method": "mt", "prefix": "persona_gold", "scheme": "stratified", "fold": fold,
                     "seed": 0, "trained_on": [], "path": f"models/fold{fold}", "steps": 1, "pairs": 1,
                     "validation_accuracy": 0.5})
    store.write("policies", pd.DataFrame(rows))
    return why.Desk(store)


def test_a_text_without_each_of_its_sentences():
    assert why.without_each("name", "A b. C d! E?") == [
        ("nothing", "name", "A b. C d! E?"), ("A b.", "name", "C d! E?"), ("C d!", "name", "A b. E?"),
        ("E?", "name", "A b. C d!"), ("everything", "none", "")]
    # shots keep their lines; of one sentence there is all or nothing
    assert why.without_each("few_shot", "Question: Q\nPreferred: A")[1] == ("Question: Q", "few_shot", "Preferred: A")
    assert [left for left, *_ in why.without_each("tag", "<tag_1>")] == ["nothing", "everything"]


def test_a_person_is_asked_with_the_adapter_that_never_met_them(desk):
    assert desk.prefix == "persona_gold"
    assert desk.who("Ann") == desk.who("p01") == (GOLD["p01"], 1)
    assert desk.who("Bob") == (GOLD["p02"], 0)
    assert desk.adapter(1).name == "fold1"
    assert desk.who("I eat what there is.") == ("I eat what there is.", 0)  # nobody's name: a description
    with pytest.raises(ValueError, match="no adapter was trained with the prefix tag"):
        why.Desk(desk.store, "tag")


def test_what_a_sentence_moves_is_the_margin_with_it_minus_that_without(desk):
    found = desk.why("Ann", "What to eat?", "Bean stew.", "Roast lamb tonight.")
    assert found["left_out"].tolist() == ["nothing", "Ann eats beans.", "Ann likes the sea.", "everything"]
    model, tokenizer = models.load_policy(desk.cfg.policy, desk.adapter(1))
    asked = [prompt("short", "persona_gold", text, "What to eat?") for text in (GOLD["p01"], "Ann likes the sea.")]
    asked.append(prompt("short", "none", "", "What to eat?"))
    s = score_pairs(model, tokenizer, asked, ["Bean stew."] * 3, ["Roast lamb tonight."] * 3, dtype="float32")
    margin = s["logp_chosen"] / s["n_chosen"] - s["logp_rejected"] / s["n_rejected"]
    assert found["margin"][[0, 1, 3]].tolist() == pytest.approx(margin.tolist(), abs=1e-4)
    assert found["moves"].tolist() == pytest.approx((found["margin"][0] - found["margin"]).tolist())
    # the base is as it was: the next person's adapter is not on top of it
    assert desk.why("Ann", "What to eat?", "Bean stew.", "Roast lamb tonight.").equals(found)


def test_the_strongest_sentence_is_the_one_whose_loss_costs_most(desk):
    pairs = pd.DataFrame([("p01", "What to eat?", "Bean stew.", "Lamb."), ("p02", "What to eat?", "Lamb.", "Stew.")],
                         columns=["persona_id", "prompt", "chosen", "rejected"])
    found = why.strongest(desk, pairs, seed=1, n_boot=20).set_index("left_out")
    each = desk.why("p01", "What to eat?", "Bean stew.", "Lamb.")["margin"]
    assert found["n_people"].tolist() == [1] * 4  # p02's prefix is one sentence
    assert found["accuracy"].isna().all()  # one person: no number
    many = why.strongest(desk, pd.concat([pairs.head(1)] * 5), seed=1, n_boot=20).set_index("left_out")["accuracy"]
    assert many["nothing"] == pytest.approx(each.iloc[0])
    assert many["the strongest sentence"] == pytest.approx(min(each.iloc[1:3]))
    assert many["everything"] == pytest.approx(each.iloc[3])


def test_answers_are_escaped_and_the_same_again(desk):
    page = desk.show("<b>me</b>", "Why <i>?").data
    assert "&lt;b&gt;me" in page
    assert "<i>" not in page
    assert desk.show("<b>me</b>", "Why <i>?").data == page
