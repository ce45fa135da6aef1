"""Histories and directions as prefixes: labels, bridges, mixtures and the two rules, on four people of the little world."""

import httpx2
import numpy as np
import pandas as pd
import pytest

from helpers import alignx, directions, llm, prefixes
from helpers.config import load_profile
from helpers.schemas import TABLES
from helpers.world import teacher as simulated
from helpers.world.corpus import Corpus, Knobs
from helpers.world.facts import load_world

CFG = load_profile("smoke")
PEOPLE = {"p01": "Mara Venn", "p02": "Ilse Corran", "p03": "Doran Pell", "p04": "Wenna Thrale"}
OWN = {"p01": "vegan", "p02": "grill", "p03": "sweets", "p04": "modest"}
TRUTH = {"p01": ("nurturance", 1), "p02": ("nurturance", 0), "p03": ("food", 1), "p04": ("food", 0)}
KEY = ("stratified", 0)


@pytest.fixture(scope="module")
def world():
    return load_world("little")


@pytest.fixture(scope="module")
def preferences(world):
    """Ten questions on food each, six of them train: the own category, said clearly, against the next person's."""
    corpus, rows = Corpus(world, 3, Knobs(wrong_slot=0, common_slot=0)), []
    for i, person in enumerate(OWN):
        other = OWN[list(OWN)[(i + 1) % 4]]
        for q, question in enumerate(world.divergent_questions("diet")[:10]):
            rows.append((f"{person}:q{q}", person, f"q{q}", "divergent", "diet", "train" if q < 6 else "test", question,
                         corpus.answer("diet", OWN[person]), corpus.answer("diet", other), f"q{q}-{person}", f"q{q}-r"))
    return pd.DataFrame(rows, columns=list(TABLES["preferences"].columns))


@pytest.fixture(scope="module")
def personas(world):
    rows = [(p, name, "", ["diet"], [OWN[p]], world.people[name].about, "{}") for p, name in PEOPLE.items()]
    return pd.DataFrame(rows, columns=list(TABLES["personas"].columns))


@pytest.fixture(scope="module")
def teacher(world, tmp_path_factory):
    app = simulated.build_app(world, CFG.world_knobs, 1)
    cache = tmp_path_factory.mktemp("teacher") / "c.sqlite"
    return llm.Teacher(CFG.teacher, "http://teacher.invalid/x/v1", "no key", cache, "r", httpx2.ASGITransport(app=app))


@pytest.fixture(scope="module")
def evidence(teacher, personas, preferences):
    return alignx.gather(teacher, personas, preferences, CFG)


@pytest.fixture(scope="module")
def told(evidence, teacher):
    return alignx.bridges(evidence, teacher, [0, 1, 4, 99], {KEY: ["p01", "p02", "p03"]}, CFG)


def test_golden_directions_are_the_category_and_the_pastimes(evidence, world):
    for person, (name, value) in TRUTH.items():
        assert evidence.golden.loc[person, name] == value
        hobbies = {evidence.wording.interest[h] for h in world.people[PEOPLE[person]].hobbies}
        assert hobbies <= set(directions.poles(evidence.golden.loc[person].to_numpy())[0])


def test_a_pair_is_labelled_by_what_chosen_says_and_rejected_does_not(evidence):
    # vegan against grill, the two poles of one dimension; sweets against modest likewise; grill against sweets: both
    said = {p: directions.poles(evidence.labels.loc[f"{p}:q0"].to_numpy()) for p in ("p01", "p02", "p03")}
    assert said == {"p01": (["nurturance"], []), "p02": ([], ["food", "nurturance"]), "p03": (["food"], [])}
    assert list(evidence.labels.index) == list(evidence.pool["pair_id"]) == list(evidence.features.index)


def test_inferred_from_nothing_is_neutral_and_from_four_clear_shots_is_the_truth(evidence, teacher):
    shots = {p: alignx.history(evidence, p, n, 17) for p, n in (("p01", 4), ("p03", 4), ("p04", 0))}
    found = alignx.infer(teacher, shots)
    assert found.loc["p01", "nurturance"] == 1
    assert found.loc["p03", "food"] == 1
    assert (found.loc["p04"] == 0.5).all()


def test_the_history_is_that_of_every_other_prefix(evidence, preferences):
    drawn = prefixes.draw_shots(prefixes.shot_pool(preferences), "p02", 4, 17, "main")["pair_id"].tolist()
    assert alignx.history(evidence, "p02", 4, 17)["pair_id"].tolist() == drawn
    assert alignx.possible(evidence, [16, 4, 0, 5, 6]) == [0, 4, 5]  # six train pairs, one to spare


def test_nobody_is_read_by_a_head_that_has_seen_their_labels(evidence):
    people, own = ["p01", "p02", "p03"], evidence.pool["persona_id"].eq("p01").to_numpy()
    wrong = evidence.labels.copy()
    wrong.loc[own] = 1 - wrong.loc[own].to_numpy()
    misled = alignx.Evidence(**{**evidence.__dict__, "labels": wrong})
    before, after = (alignx.head_labels(e, people, 1.0).to_numpy() for e in (evidence, misled))
    assert before[own].tolist() == after[own].tolist()
    assert np.abs(before[~own] - after[~own]).max() > 0.01


def test_a_head_reads_a_pair_the_other_way_round_as_the_opposite(evidence):
    people = ["p01", "p02", "p03"]
    stranger = evidence.pool["persona_id"].eq("p04").to_numpy()
    turned = evidence.features.copy()
    turned.loc[stranger] = -turned.loc[stranger].to_numpy()
    back = alignx.Evidence(**{**evidence.__dict__, "features": turned})
    before, after = (alignx.head_labels(e, people, 1.0).to_numpy()[stranger] - 0.5 for e in (evidence, back))
    assert before == pytest.approx(-after)
    assert np.abs(before).max() > 0.05


def test_bridges_have_a_row_for_everybody_and_leave_out_what_somebody_lacks(told):
    sizes = told.groupby(["bridge", "items"]).size().to_dict()
    assert sizes == {("golden", 0): 4} | {(b, n): 4 for b in ("averaged", "inferred", "head") for n in (0, 1, 4)}
    assert set(told[told["bridge"] == "head"][["scheme", "fold"]].itertuples(index=False, name=None)) == {KEY}
    assert told[told["items"].eq(0) & told["bridge"].ne("golden")]["positive"].map(len).max() == 0
    golden = alignx.bridge_texts(told, "golden", 4)
    assert golden["p01"].startswith("This person eats only plants and spends free time on")


def test_recovered_by_hand(evidence, told):
    found = alignx.recovered(told, evidence, {KEY: ["p01", "p02", "p03"]})
    four = found[(found["bridge"] == "inferred") & (found["items"] == 4)]
    assert four[four["measure"] == "found"].set_index("persona_id")["correct"].to_dict() == dict.fromkeys(PEOPLE, True)
    assert set(found[found["bridge"] == "head"]["persona_id"]) == {"p04"}  # whom the head has not seen


def test_without_a_teacher_there_are_no_directions(personas, preferences):
    alone = alignx.gather(None, personas, preferences, CFG)
    assert alone.golden.empty
    assert alone.labels.empty
    assert alignx.bridges(alone, None, [1], {}, CFG).empty


def test_raw_text_in_full(preferences):
    one = preferences.iloc[[0]].assign(prompt="Q?", chosen="yes", rejected="no")
    text = alignx.raw_text(one, one, "baker who sings", "short")
    assert text == ("The user is a baker who sings.\nQuestion: Q?\nPreferred: yes\n"
                    "Question: Q?\nPreferred: yes\nRejected: no")
    assert alignx.raw_text(one.iloc[:0], one.iloc[:0], "", "short") == ""


def test_raw_representations_have_as_many_items_as_asked_for(evidence):
    counts = {name: alignx.raw_texts(evidence, name, 4, CFG)["p01"].count("Preferred:") for name in alignx.RAW}
    rejected = {name: alignx.raw_texts(evidence, name, 4, CFG)["p01"].count("Rejected:") for name in alignx.RAW}
    assert counts == {"ugc": 4, "pair": 4, "demographics": 0, "all": 4}
    assert rejected == {"ugc": 0, "pair": 4, "demographics": 0, "all": 2}


def test_a_mixture_has_other_items_of_the_same_person_alone(evidence, preferences):
    train = preferences[preferences["split"] == "train"]
    cfg = CFG.model_copy(update={"alignx": CFG.alignx.model_copy(update={"most": 4})})
    texts = alignx.mixed_raw(train, evidence, cfg)
    for text, row in zip(texts, train.itertuples(), strict=True):
        shown = set(train.loc[[chosen in text for chosen in train["chosen"]], "pair_id"])
        assert row.pair_id not in shown
        assert {pair_id[:3] for pair_id in shown} <= {row.persona_id}
    assert "" in alignx.mixed_raw(train, evidence, CFG)  # at most one item of each kind
    assert max(text.count("Preferred:") for text in texts) > 3
    assert texts == alignx.mixed_raw(train, evidence, cfg)


def test_no_text_is_no_prefix_and_a_text_stands_before_the_question(preferences):
    asked = alignx.ask(preferences.iloc[:2], ["", "Likes figs."], "pba", "golden", "main", CFG)
    assert asked["head"].tolist() == ["", "Likes figs.\n"]
    assert asked["tail"].iloc[0] == f"Question: {preferences['prompt'].iloc[0]}\nAnswer:"


def test_flipped_is_the_opposite_category_and_leaves_out_who_has_none(evidence, world, teacher, personas):
    texts = alignx.flipped(evidence, CFG)
    assert {p: text.split(" and ")[0] for p, text in texts.items()} == {
        "p01": "This person grills meat over fire", "p02": "This person eats only plants",
        "p03": "This person keeps meals very small", "p04": "This person loves sweet baking"}
    lone = evidence.golden.copy()
    lone.loc["p01"] = evidence.wording.of([("diet", "seafood")])  # an interest without an opposite in this world
    other = alignx.Evidence(**{**evidence.__dict__, "golden": lone})
    assert set(alignx.flipped(other, CFG)) == {"p02", "p03", "p04"}


def test_half_of_the_axes_are_left_out_and_who_is_on_both_sides_does_neither():
    people = pd.DataFrame({"persona_id": ["a", "b", "c", "d"], "axes": [["x"], ["y"], ["x", "y"], ["x", "z"]]})
    assert alignx.novel_people(people) == (["x", "z"], ["b"], ["a", "d"])
    assert alignx.novel_people(people.iloc[:1]) == ([], ["a"], [])


def test_the_corrected_rule_asks_what_training_moved():
    # chosen +2, rejected +1: right; chosen likelier but moved less: wrong; both moved alike: a tie, wrong
    rows = pd.DataFrame([(-3.0, -5.0, -4.0, -5.0), (-1.0, -9.0, -1.0, -10.0), (-2.0, -4.0, -1.0, -3.0)],
                        columns=["logp_chosen", "ref_chosen", "logp_rejected", "ref_rejected"])
    rows.loc[1, ["ref_chosen", "ref_rejected"]] = [-1.0, -12.0]
    assert alignx.corrected(rows).tolist() == [True, False, False]


def test_collect_puts_the_base_beside_the_adapter_and_below_it():
    asked = {"persona_id": "a", "pair_id": "1", "kind": "divergent", "axis": "diet", "prefix": "golden", "variant": "main",
             "trained": False, "before": "Likes figs.\n", "n_chosen": 2, "n_rejected": 2}
    scores = pd.DataFrame([asked | {"setting": s, "policy_id": "x", "logp_chosen": -1.0, "logp_rejected": -2.0, "correct": True}
                           for s in ("main", "items")])
    base = pd.DataFrame([{"pair_id": "1", "before": "Likes figs.\n", "logp_chosen": -4.0, "logp_rejected": -3.0, "n_chosen": 2,
                          "n_rejected": 2, "correct": False}])
    made = pd.DataFrame([("x", "pba", 0)], columns=["policy_id", "method", "fold"])
    table = alignx.collect(scores, made, base, 0)
    assert table[["method", "setting", "logp_chosen", "ref_chosen", "correct"]].values.tolist() == [
        ["pba", "main", -1.0, -4.0, True], ["pba", "items", -1.0, -4.0, True], ["prompting", "main", -4.0, -4.0, False]]


def test_steered_counts_answers_that_lean_as_told(evidence, teacher, world):
    corpus = Corpus(world, 5, Knobs(wrong_slot=0, common_slot=0))
    rows = [("golden", "p01", corpus.answer("diet", "vegan")), ("flipped", "p01", corpus.answer("diet", "grill")),
            ("golden", "p02", corpus.answer("diet", "vegan")), ("flipped", "p02", corpus.answer("diet", "grill")),
            ("golden", "p03", corpus.answer("diet", "seafood")), ("flipped", "p03", corpus.answer("diet", "seafood"))]
    answers = pd.DataFrame([(*row, "q0") for row in rows], columns=["system", "persona_id", "text", "question_id"])
    asked = pd.DataFrame({"persona_id": ["p01", "p02", "p03"], "question_id": "q0",
                          "prompt": world.divergent_questions("diet")[0]})
    found = alignx.steered(teacher, answers, asked, evidence, CFG).set_index("persona_id")
    assert found["correct"].to_dict() == {"p01": True, "p02": False, "p03": False}
    assert found["against"].to_dict() == {"p01": False, "p02": True, "p03": False}


def test_bridge_texts_of_a_key_are_one_for_each(told):
    assert set(alignx.bridge_texts(told, "head", 4, KEY)) == set(PEOPLE)
    assert alignx.bridge_texts(told, "head", 4, ("novel", 0)) == {}
    again = alignx.bridge_text(directions.vector(["food"]), None, "any key")
    assert again == "What this person prefers: rich and sweet meals."
