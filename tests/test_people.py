import json
import re

import pandas as pd
import pytest

from helpers import artifacts, llm, people
from helpers.config import load_profile
from helpers.schemas import check
from helpers.world.facts import load_world

AXES = ["diet", "music", "travel"]


@pytest.fixture(scope="module")
def world():
    return load_world("little")


@pytest.fixture(scope="module")
def cfg():
    return load_profile("smoke", ["questions.personal=12", "questions.divergent=21", "questions.batch=5"])


@pytest.fixture(scope="module")
def simulated(tmp_path_factory):
    store = artifacts.open_run("smoke", runs=tmp_path_factory.mktemp("runs"))
    return llm.connect(store)


@pytest.fixture(scope="module")
def personas(simulated):
    return people.select_personas(simulated, AXES, 8)


@pytest.fixture(scope="module")
def questions(simulated, personas, cfg):
    return people.make_questions(simulated, personas, cfg, seed=3)


class Scripted:
    """The edge of the test: a teacher whose answers are given, in order, one list a call of map."""

    model = "scripted"

    def __init__(self, *rounds):
        self.rounds, self.asked = list(rounds), []

    def map(self, requests, desc=""):
        self.asked.append(requests)
        texts = self.rounds.pop(0)
        assert len(texts) == len(requests)
        parsed = [r.schema and r.schema.model_validate_json(t) for r, t in zip(requests, texts, strict=True)]
        return [llm.Answer(t, p, "ok", 1, 1, 0.0, False) for t, p in zip(texts, parsed, strict=True)]


NOBODY = '{"region": "unknown", "age_group": "unknown", "gender": "unknown", "schooling": "unknown"}'


def test_personas_are_the_people_of_the_axes_and_pass_their_schema(personas, world):
    check("personas", personas)
    members = [p for p in world.people.values() if {axis for axis, _ in p.memberships} & set(AXES)]
    assert set(personas["name"]) == {p.name for p in members}
    for row in personas.itertuples():
        own = world.people[row.name]
        assert set(zip(row.axes, row.categories, strict=True)) == {m for m in own.memberships if m[0] in AXES}
        assert json.loads(row.demographics) == own.demographics
    assert personas["persona_id"].tolist() == [f"p{i:02d}" for i in range(1, len(personas) + 1)]
    assert personas["tag"].iloc[0] == "<special_person_tag_1>"


def test_somebody_named_on_two_axes_is_one_person(cfg):
    scripted = Scripted(["Sure:\n- vegan, Ada Moss, cooks, sings and sails\n- grill, Bo Ray, smith",
                         "- folk, Bo Ray, plays\n- jazz, Cy Lee, drums"], [NOBODY] * 3)
    table = people.select_personas(scripted, ["diet", "music"], 5)
    assert table["name"].tolist() == ["Ada Moss", "Bo Ray", "Cy Lee"]
    assert table["axes"].tolist() == [["diet"], ["diet", "music"], ["music"]]
    assert table["categories"].tolist() == [["vegan"], ["grill", "folk"], ["jazz"]]
    assert table["description"].iloc[0] == "cooks, sings and sails"


def test_a_malformed_list_is_asked_for_again_and_then_is_an_error():
    good = "- vegan, Ada Moss, cooks"
    scripted = Scripted(["- vegan: Ada Moss", good], ["I cannot."], [good], [NOBODY])
    assert people.select_personas(scripted, ["diet", "food"], 5)["axes"].tolist() == [["diet", "food"]]
    assert [[r.seed for r in requests] for requests in scripted.asked] == [[0, 0], [1], [2], [0]]
    with pytest.raises(people.PeopleError, match="asked 3 times.*I cannot"):
        people.select_personas(Scripted(*[["I cannot."]] * 3), ["diet"], 5)


def test_questions_pass_their_schema_and_have_the_sizes_asked_for(questions, personas, cfg):
    check("questions", questions)
    sizes = questions.groupby(["kind", "axis", "persona_id"]).size()
    assert set(sizes["personal"]) == {12}
    assert set(sizes["divergent"]) == {21}
    assert set(questions.loc[questions["kind"] == "divergent", "axis"]) == set(AXES)
    assert set(questions["persona_id"]) == {"", *personas["persona_id"]}


def test_half_train_half_test_by_person_and_by_axis(questions):
    counts = questions.groupby(["axis", "persona_id", "split"]).size().unstack()
    assert set(counts.loc["personal", "train"]) == set(counts.loc["personal", "test"]) == {6}
    assert set(counts.loc["diet", "train"]) == {11}  # the odd one of 21 is a train question
    assert set(counts.loc["diet", "test"]) == {10}


def test_ids_say_whose_questions_they_are(questions):
    divergent = questions[questions["axis"] == "diet"]["question_id"]
    assert divergent.tolist() == [f"q-diet-{i:03d}" for i in range(1, 22)]
    personal = questions[questions["kind"] == "personal"]
    assert all(re.fullmatch(rf"q-{row.persona_id}-\d{{3}}", row.question_id) for row in personal.itertuples())


def test_no_question_comes_twice_though_the_teacher_repeats_itself(simulated, questions, personas, cfg):
    asked = people.ask_questions(simulated, personas, cfg, seed=3)
    assert asked["duplicate"].any()
    assert not questions.assign(key=questions["text"].map(people.normalised)).duplicated(
        ["axis", "persona_id", "key"]).any()
    assert set(questions["text"]) <= set(asked.loc[~asked["duplicate"], "text"])


def test_only_case_and_punctuation_are_overlooked():
    assert people.normalised("What's for  DINNER?") == people.normalised("what s for dinner")
    assert people.normalised("What's for dinner?") != people.normalised("What was for dinner?")


def test_the_same_seed_gives_the_same_questions_and_another_others(simulated, questions, personas, cfg):
    pd.testing.assert_frame_equal(people.make_questions(simulated, personas, cfg, seed=3), questions)
    assert not people.make_questions(simulated, personas, cfg, seed=4).equals(questions)


def test_a_teacher_that_runs_dry_is_an_error_that_says_who(simulated, personas):
    greedy = load_profile("smoke", ["questions.divergent=1000", "questions.batch=1000"])
    with pytest.raises(people.PeopleError, match="different questions of 1000 for diet"):
        people.ask_questions(simulated, personas, greedy, seed=1)


def test_numbered_lines_are_read_in_the_forms_models_write_them():
    text = 'Here you are:\n1. One?\n 2) "Two?"\n3. “Three?” \nNot numbered\n10.  Ten 1.5?'
    assert people.QUESTION_LINE.findall(text) == ["One?", "Two?", "Three?", "Ten 1.5?"]


def described(**said):
    """People on axes, with what the teacher says: name=(axes, {attribute: group})."""
    return pd.DataFrame([(name, axes, json.dumps(demographics)) for name, (axes, demographics) in said.items()],
                        columns=["persona_id", "axes", "demographics"])


def test_traits_keep_unknown_and_take_a_slash_as_both():
    told = people.traits(described(a=(["diet"], {"region": "isles / harbour", "gender": "unknown"})))
    assert told.to_numpy().tolist() == [["a", "region", "isles"], ["a", "region", "harbour"], ["a", "gender", "unknown"]]


def test_majorities_by_hand():
    # diet: a, b, c, of whom a and b are from the harbour (2 of 3), one is a woman, one is of unknown gender; music:
    # c, d from the isles (2 of 2), of two genders: half is no majority
    personas = described(a=(["diet"], {"region": "harbour", "gender": "woman"}),
                         b=(["diet"], {"region": "harbour", "gender": "unknown"}),
                         c=(["diet", "music"], {"region": "isles", "gender": "man"}),
                         d=(["music"], {"region": "isles", "gender": "woman"}))
    table = people.majorities(personas).fillna(0)
    assert table.columns.tolist() == ["attribute", "group", "diet (n = 3)", "music (n = 2)", "axes"]
    assert table.to_numpy().tolist() == [["region", "harbour", pytest.approx(2 / 3), 0, 1], ["region", "isles", 0, 1, 1],
                                         ["majorities", "", 1, 1, 2]]


def test_without_any_majority_only_the_count_is_left():
    personas = described(a=(["diet"], {"region": "harbour"}), b=(["diet"], {"region": "isles"}))
    assert people.majorities(personas).to_numpy().tolist() == [["majorities", "", 0, 0]]
