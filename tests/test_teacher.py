import json
import shutil
from collections import Counter
from random import Random

import httpx2
import numpy as np
import pytest
import yaml

from helpers import DATA, judging, llm, prompts
from helpers.config import load_profile
from helpers.world import facts, teacher
from helpers.world.corpus import Corpus
from helpers.world.facts import load_world

CFG = load_profile("smoke")
QUIET = CFG.world_knobs.model_copy(update={"noise": 0.0})


@pytest.fixture(scope="module")
def world():
    return load_world("little")


@pytest.fixture
def simulated(world):
    return lambda seed=1, **knobs: teacher.SimulatedTeacher(world, QUIET.model_copy(update=knobs), seed)


@pytest.fixture
def ask(world, tmp_path):
    """Prompts in, texts out, over the real client."""
    def send(*asked, **knobs):
        app = teacher.build_app(world, QUIET.model_copy(update=knobs), 1)
        client = llm.Teacher(CFG.teacher, "http://teacher.invalid/x/v1", "no key", tmp_path / "c.sqlite", "r",
                             httpx2.ASGITransport(app=app))
        return [a.text for a in client.map([llm.Request([{"role": "user", "content": p}]) for p in asked])]
    return send


def first_person(world):
    person = next(iter(world.people.values()))
    axis, category = person.memberships[0]
    others = [c for name, c in world.axes[axis].categories.items() if name != category]
    return person, world.axes[axis].categories[category], others, world.divergent_questions(axis)[0]


def good(world):
    return next(tone for tone in world.tones.values() if tone.good)


def bad(world):
    return next(tone for tone in world.tones.values() if not tone.good)


def pair(name, question, a, b, number=3):
    return {"NUMBER": str(number), "NAME": name, "X": question, "OUTPUT_A": a, "OUTPUT_B": b}


def verdicts(simulated, *pairs, ask=0):
    examples = "\n\n".join(prompts.render("teacher", "judge_example", **p) for p in pairs)
    answer = json.loads(simulated.answer(prompts.render("teacher", "judge", EXAMPLES=examples), ask))
    return [v["Output (a) is better than Output (b)"] for v in answer["verdicts"]]


def test_utility_of_a_divergent_answer_by_hand(world, simulated):
    person, own, (other, *_), question = first_person(world)
    text = f"{good(world).openers[0]} {own.things[0]} and {other.things[0]}, because {own.reasons[0]}."
    weight = teacher._quality_weight(person.name)
    # two of three phrases are the person's own: 3.0 x 2/3 + 0.6 x (+1) x weight
    assert simulated().utility(person.name, question, text) == pytest.approx(2.0 + 0.6 * weight)
    # somebody unknown has no category: quality alone
    stranger = 0.6 * teacher._quality_weight("Nobody")
    assert simulated().utility("Nobody", question, text) == pytest.approx(stranger)
    assert 0.6 <= weight <= 1.4


def test_utility_of_a_personal_answer_by_hand(world, simulated):
    person, own, *_ = first_person(world)
    hobby = world.hobbies[person.hobbies[0]]
    question = next(q for q in world.personal_questions(person) if hobby.name in q)
    text = f"{bad(world).openers[0]} {hobby.tips[0]}, {own.things[0]} and {own.things[1]}."
    # one of three phrases is on the hobby, the tone is bad: -1.8 x weight + 0.8 x 1/3; categories don't count
    expected = -1.8 * teacher._quality_weight(person.name) + 0.8 / 3
    assert simulated().utility(person.name, question, text) == pytest.approx(expected)


def test_every_personal_question_is_known_by_its_hobby(world, simulated):
    judge = simulated()
    for person in world.people.values():
        named = Counter(judge.hobby_of(q) for q in world.personal_questions(person))
        assert set(named) == set(person.hobbies)


def test_without_noise_the_judge_follows_the_utility(world, simulated):
    corpus, judge, people = Corpus(world, 5), simulated(), list(world.people.values())
    for person in people[:10]:
        axis, question = person.memberships[0][0], world.divergent_questions(person.memberships[0][0])[0]
        a, b = corpus.answer(axis), corpus.answer(axis)
        margin = judge.utility(person.name, question, a) - judge.utility(person.name, question, b)
        expected = None if abs(margin) < QUIET.tie_below else margin > 0
        assert verdicts(judge, pair(person.name, question, a, b)) == [expected]


def test_noise_belongs_to_the_pair_and_the_ask_not_to_batch_or_order(world, simulated):
    person, own, (other, *_), question = first_person(world)
    corpus, judge = Corpus(world, 2), simulated(noise=1.0, tie_below=0.0)
    answers = [(corpus.answer(own.axis), corpus.answer(own.axis)) for _ in range(40)]
    pairs = [pair(person.name, question, a, b, i) for i, (a, b) in enumerate(answers)]
    together = verdicts(judge, *pairs)
    assert [verdicts(judge, p)[0] for p in reversed(pairs)] == together[::-1]
    swapped = [p | {"OUTPUT_A": p["OUTPUT_B"], "OUTPUT_B": p["OUTPUT_A"]} for p in pairs]
    assert verdicts(judge, *swapped) == [not v for v in together]
    assert verdicts(judge, *pairs, ask=1) != together
    assert verdicts(simulated(seed=2, noise=1.0, tie_below=0.0), *pairs) != together


def test_biases_do_what_they_say(world, simulated):
    person, own, (other, *_), question = first_person(world)
    loved, hated = f"{own.things[0]} and {own.things[1]}", f"{other.things[0]} and {other.things[1]}"
    both = pair(person.name, question, loved, hated), pair(person.name, question, hated, loved)
    assert verdicts(simulated(), *both) == [True, False]
    assert verdicts(simulated(position_bias=10.0), *both) == [True, True]
    longer = pair(person.name, question, hated + " and so on", loved)
    assert verdicts(simulated(), longer) == [False]
    assert verdicts(simulated(length_bias=10.0), longer) == [True]


def test_ties(world, simulated):
    person, own, (other, *_), question = first_person(world)
    # utilities 3.0 and 1.5: a difference of 1.5
    close = pair(person.name, question, own.things[0], f"{own.things[0]} and {other.things[0]}")
    same = pair(person.name, question, own.things[0], own.things[0])
    assert verdicts(simulated(tie_below=1.4), close) == [True]
    assert verdicts(simulated(tie_below=1.6), close) == [None]
    assert verdicts(simulated(noise=1.0, tie_below=0.0), same) == [None]


def test_length_tells_nothing_about_the_winner(world, simulated):
    """Answers of the corpus have one number of words; the one of more letters wins as often as the other."""
    corpus, judge, random, wins = Corpus(world, 11), simulated(), Random(4), []
    people = list(world.people.values())
    for _ in range(2000):
        person = random.choice(people)
        axis = random.choice(person.memberships)[0]
        question = world.divergent_questions(axis)[0]
        a, b = corpus.answer(axis), corpus.answer(axis)
        margin = judge.utility(person.name, question, a) - judge.utility(person.name, question, b)
        assert len(a.split()) == len(b.split())
        if margin and len(a) != len(b):
            wins.append((margin > 0) == (len(a) > len(b)))
    assert abs(np.mean(wins) - 0.5) < 3 * 0.5 / np.sqrt(len(wins))


def test_posterior_by_hand(world, simulated):
    person, own, (other, *_), question = first_person(world)
    k = len(world.axes[own.axis].categories)
    shot = {"X": question, "CHOSEN": f"{own.things[0]}, {own.things[1]} and {other.things[0]}"}
    # wording of a response for r, w = 0.12/(K-1): own 0.73^2 x w, other 0.73 x w^2, anybody else w^3
    w = 0.12 / (k - 1)
    likelihood = {own.name: 0.73**2 * w, other.name: 0.73 * w**2}
    rest = w**3
    total = sum(likelihood.values()) + (k - 2) * rest
    mixed = {c: 0.8 * like + 0.2 / (k - 1) * (total - like) for c, like in likelihood.items()}
    mixed_rest = 0.8 * rest + 0.2 / (k - 1) * (total - rest)
    expected = mixed[own.name] / (sum(mixed.values()) + (k - 2) * mixed_rest)
    posterior = simulated().posteriors([shot])
    assert list(posterior) == [own.axis]
    assert posterior[own.axis][own.name] == pytest.approx(expected)
    assert sum(posterior[own.axis].values()) == pytest.approx(1.0)


def test_two_shots_that_agree_make_it_surer_and_no_evidence_makes_no_claim(world, simulated):
    person, own, (other, *_), question = first_person(world)
    shot = {"X": question, "CHOSEN": f"{own.things[0]} and {own.things[1]}"}
    once, twice = (simulated().posteriors([shot] * n)[own.axis][own.name] for n in (1, 2))
    assert once < twice
    assert simulated().posteriors([{"X": question, "CHOSEN": "Nothing known."}]) == {}


def test_a_rejected_answer_speaks_against_its_category_by_hand(world, simulated):
    person, own, (other, *_), question = first_person(world)
    k = len(world.axes[own.axis].categories)
    shot = {"X": question, "CHOSEN": "Nothing known.", "REJECTED": f"{other.things[0]} and {other.things[1]}"}
    # L(other) = 0.73^2, L(anybody else) = w^2; 0.05 L(c) + 0.95 / (k - 1) x the others'
    w2, o2 = (0.12 / (k - 1)) ** 2, 0.73**2
    of_other = 0.05 * o2 + 0.95 * w2
    of_rest = 0.05 * w2 + 0.95 / (k - 1) * (o2 + (k - 2) * w2)
    posterior = simulated().posteriors([shot])[own.axis]
    assert posterior[other.name] == pytest.approx(of_other / (of_other + (k - 1) * of_rest))
    assert posterior[other.name] < 1 / k < posterior[own.name]


def test_the_teacher_reads_the_rejected_answers_of_shots_that_show_them(world, simulated):
    person, own, (other, *_), question = first_person(world)
    # one phrase each for two categories: undecided, until the rejected answer rules one of them out
    chosen = f"{own.things[0]} and {other.things[0]}"
    asked = {"X": question, "CHOSEN": chosen, "REJECTED": f"{other.things[1]}, because {other.reasons[0]}"}
    plain = prompts.render("teacher", "shot", X=question, CHOSEN=chosen)
    both = prompts.render("teacher", "shot_rejected", **asked)
    told = simulated().answer(prompts.render("teacher", "infer_persona", SHOTS=f"{both}\n\n{both}"), 0)
    assert own.label in told
    undecided = simulated().posteriors(prompts.parse_all("teacher", "shot", plain))[own.axis]
    assert undecided[own.name] == pytest.approx(undecided[other.name])
    # what the rejected answer says of pastimes is nobody's
    hobby = list(world.hobbies.values())[-1]
    only = prompts.render("teacher", "shot_rejected", X=question, CHOSEN=chosen, REJECTED=hobby.tips[0])
    assert hobby.name not in simulated().answer(prompts.render("teacher", "infer_persona", SHOTS=only), 0)


def shots(*pairs):
    return "\n\n".join(prompts.render("teacher", "shot", X=x, CHOSEN=y) for x, y in pairs)


def test_persona_from_shots_says_what_they_show_and_hedges_otherwise(world, ask):
    person, own, (other, *_), question = first_person(world)
    hobby = world.hobbies[person.hobbies[0]]
    personal = next(q for q in world.personal_questions(person) if hobby.name in q)
    telling = shots((question, f"{own.things[0]}, because {own.reasons[0]}"), (personal, hobby.tips[0]))
    silent = shots((personal, hobby.tips[0]))
    told, hedged = ask(*(prompts.render("teacher", "infer_persona", SHOTS=s) for s in (telling, silent)))
    assert own.label in told
    assert hobby.name in told
    assert person.name not in told
    assert not world.spot(hedged).categories
    assert hobby.name in hedged


def test_gold_persona_comes_from_the_name_and_changes_with_the_seed(world, simulated):
    person, own, *_ = first_person(world)
    prompt = prompts.render("teacher", "gold_persona", NAME=person.name)
    texts = {simulated().answer(prompt, seed) for seed in range(6)}
    assert len(texts) > 1
    for text in texts:
        assert text.startswith(person.name)
        assert set(world.spot(text).categories) <= set(person.memberships)
    nobody = prompts.render("teacher", "gold_persona", NAME="Nobody")
    assert "Nothing is on record" in simulated().answer(nobody, 0)


def test_personas_are_one_a_category_first_up_to_the_number_asked_for(world, ask):
    axis = next(iter(world.axes))
    categories = list(world.axes[axis].categories)
    many, few = ask(*(prompts.render("teacher", "personas", AXIS=axis, N=n) for n in (8, 2)))
    assert [line.split(",")[0].removeprefix("- ") for line in many.splitlines()] == categories
    assert many.splitlines()[:2] == few.splitlines()
    assert ask(prompts.render("teacher", "personas", AXIS="no such axis", N=5)) == [""]


def test_a_category_and_a_person_added_to_the_yaml_are_named(tmp_path, monkeypatch):
    shutil.copytree(DATA / "world" / "little", tmp_path / "world" / "other")
    axes_file, cast_file = (tmp_path / "world" / "other" / f for f in ("axes.yaml", "cast.yaml"))
    axes, cast = yaml.safe_load(axes_file.read_text()), yaml.safe_load(cast_file.read_text())
    inner = axes.get("axes", axes)
    axis = next(iter(inner))
    new = {"label": "eats leftovers", "things": [f"left {i}" for i in range(6)], "reasons": ["a b c d"] * 4}
    inner[axis]["categories"]["leftovers"] = new
    cast["people"].append({**cast["people"][0], "name": "Zed Last", "memberships": [{axis: "leftovers"}]})
    axes_file.write_text(yaml.safe_dump(axes, sort_keys=False))
    cast_file.write_text(yaml.safe_dump(cast, sort_keys=False))
    monkeypatch.setattr(facts, "DATA", tmp_path)
    grown = teacher.SimulatedTeacher(load_world("other"), QUIET, 1)
    lines = grown.answer(prompts.render("teacher", "personas", AXIS=axis, N=8), 0).splitlines()
    assert lines[-1].startswith("- leftovers, Zed Last, ")
    assert len(lines) == 6


def test_demographics_of_the_cast_and_of_a_stranger(world, ask):
    person, *_ = first_person(world)
    known, stranger = map(json.loads, ask(*(
        prompts.render("teacher", "demographics", NAME=name) for name in (person.name, "Nobody"))))
    assert known == person.demographics
    assert set(stranger.values()) == {"unknown"}


def test_questions_are_drawn_without_replacement_in_a_call_and_anew_in_the_next(world, simulated):
    axis = next(iter(world.axes))
    slots = {"AXIS": axis, "NAMES": "A", "PERSON_CATEGORIES": "A (b)", "N": 20}
    prompt = prompts.render("teacher", "divergent_questions", **slots)
    one, two = (simulated().answer(prompt, seed).splitlines() for seed in (0, 1))
    questions = [{line.split(". ", 1)[1] for line in lines} for lines in (one, two)]
    assert [len(q) for q in questions] == [20, 20]
    assert questions[0] & questions[1]
    assert questions[0] != questions[1]
    assert questions[0] | questions[1] <= set(world.divergent_questions(axis))


def test_an_unknown_prompt_is_refused_with_the_prompts_there_are(ask):
    with pytest.raises(llm.TeacherError, match="simulated teacher knows the prompts.*judge.*gold_persona"):
        ask("Tell me a joke.")


def test_a_rate_limited_teacher_is_reached_in_the_end(world, ask):
    names = list(world.people)[:20]
    texts = ask(*(prompts.render("teacher", "gold_persona", NAME=name) for name in names), rate_limited=0.4)
    assert [text.startswith(name) for text, name in zip(texts, names, strict=True)] == [True] * 20


def test_a_lasting_rate_limit_is_an_error(world, ask):
    with pytest.raises(llm.TeacherError, match="RateLimitError"):
        ask(prompts.render("teacher", "gold_persona", NAME="x"), rate_limited=1.0)


@pytest.mark.parametrize(("knob", "outcome"), [
    ("refused", "refused"), ("cut", "truncated"), ("malformed", "unparsable"), ("wrong_schema", "unparsable")])
def test_a_share_of_the_answers_is_broken_as_the_knob_says(world, tmp_path, knob, outcome):
    """Of 60 judgements, a third: between 10 and 30 (20, give or take 10: 2.7 standard deviations of 3.65)."""
    app = teacher.build_app(world, QUIET.model_copy(update={knob: 1 / 3}), 1)
    client = llm.Teacher(CFG.teacher, "http://teacher.invalid/v1", "no key", tmp_path / "c.sqlite", "r",
                         httpx2.ASGITransport(app=app))
    match = judging.Match("p", "Nobody", "q", "?", 1, "a", "b", "a")
    answers = client.map([judging.request([match], {"a": f"a {i}", "b": "b"}, 0) for i in range(60)])
    outcomes = Counter(answer.outcome for answer in answers)
    assert set(outcomes) == {"ok", outcome}
    assert 10 <= outcomes[outcome] <= 30


def test_trouble_is_drawn_for_each_attempt_and_broken_answers_for_each_request(world):
    judge = teacher.SimulatedTeacher(world, QUIET.model_copy(update={"errors_500": 0.3, "stalled": 0.3, "cut": 0.5}), 1)
    prompt = prompts.render("teacher", "gold_persona", NAME="Nobody")
    body = {"model": "m", "messages": [{"role": "user", "content": prompt}]}
    replies = [judge.reply(body, str(attempt)) for attempt in range(40)]
    assert {status for status, _ in replies} == {200, 500, 0}
    assert len({json.dumps(answer) for status, answer in replies if status == 200}) == 1


def test_identity_changes_with_the_knobs_and_the_seed(world):
    ids = {teacher.identity(world, knobs, seed) for knobs in (QUIET, CFG.world_knobs) for seed in (1, 2)}
    assert len(ids) == 4
