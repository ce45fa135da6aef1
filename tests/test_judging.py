import pandas as pd
import pytest

from helpers import artifacts, judging, llm
from helpers.config import load_profile
from helpers.schemas import check
from helpers.world.corpus import Corpus
from helpers.world.facts import load_world
from helpers.world.teacher import truth

CFG = load_profile("smoke")


def judge_cfg(**changes):
    return CFG.model_copy(update={"judge": CFG.judge.model_copy(update=changes)})


class Fixed:
    """The edge of the test: a judge who likes the alphabetically first text, or does as it is told."""

    model = "fixed"

    def __init__(self, odd=None):
        self.odd, self.requests = odd or (lambda a, b, ask: "judge"), []

    def map(self, requests, desc=""):
        self.requests += requests
        return [self.answer(request) for request in requests]

    def answer(self, request):
        texts = [part.split("\n")[0] for part in request.messages[-1]["content"].split("> ")[1:]]
        pairs = list(zip(texts[2::4], texts[3::4], strict=True))
        verdicts = [self.odd(a, b, request.seed) for a, b in pairs]
        verdicts = [(a < b) if v == "judge" else v for v, (a, b) in zip(verdicts, pairs, strict=True)]
        if "broken" in verdicts:
            return llm.Answer("{", None, "unparsable", 1, 1, 0.5, False)
        fields = ("Concise explanation", "Output (a) is better than Output (b)")
        verdicts = [dict(zip(fields, ("why", v), strict=True)) for v in verdicts]
        parsed = judging.Verdicts.model_validate({"verdicts": verdicts})
        return llm.Answer("", parsed, "ok", 1, 1, 0.5, False)


def tables(n_questions=3):
    personas = pd.DataFrame([("p01", "Ada", ["diet"]), ("p02", "Bo", ["diet"])],
                            columns=["persona_id", "name", "axes"])
    questions = pd.DataFrame(
        [(f"q-diet-{i}", "divergent", "diet", "", "train", f"What {i}?") for i in range(n_questions)]
        + [("q-p01-1", "personal", "personal", "p01", "test", "My own?")],
        columns=["question_id", "kind", "axis", "persona_id", "split", "text"])
    responses = pd.DataFrame(
        [(f"{q}-r{i}", q, f"{'zyxwv'[i]} answer to {q}", i < 4)
         for q in questions["question_id"] for i in range(5)],
        columns=["response_id", "question_id", "text", "selected"])
    return personas, questions, responses


def test_a_tournament_by_hand():
    """Texts start with z, y, x, w (r0..r3; r4 with v is not selected): r3 is liked best, then r2, r1, r0."""
    comparisons = judging.judge(Fixed(), *tables(), CFG, seed=1)
    for _, rounds in comparisons.groupby(["persona_id", "question_id"]):
        one, two, final = (rounds[rounds["round"] == i].squeeze() for i in (1, 2, 3))
        met = [{one.response_a, one.response_b}, {two.response_a, two.response_b}]
        assert {r[-1] for r in met[0] | met[1]} == {"0", "1", "2", "3"}
        for game, pair in zip((one, two), met, strict=True):
            assert game.winner == max(pair)  # the higher number is the alphabetically earlier text
        assert {final.response_a, final.response_b} == {one.winner, two.winner}
        assert final.winner.endswith("r3")
    assert set(comparisons["outcome"]) == {"clear"}
    assert set(comparisons["asks"]) == {1}


def test_everybody_judges_the_questions_of_their_axes_and_their_own_only():
    comparisons = judging.judge(Fixed(), *tables(), CFG, seed=1)
    check("comparisons", comparisons)
    assert len(comparisons) == 3 * (4 + 3)  # Ada: three divergent and one personal question; Bo: three
    assert set(comparisons.loc[comparisons["question_id"] == "q-p01-1", "persona_id"]) == {"p01"}


def test_five_pairs_a_request_and_the_cost_is_shared():
    fixed = Fixed()
    comparisons = judging.judge(fixed, *tables(), CFG, seed=1)
    # 14 semi-finals: 5 + 5 + 4; 7 finals: 5 + 2
    assert [r.messages[-1]["content"].count("## Pair") for r in fixed.requests] == [5, 5, 4, 5, 2]
    assert comparisons["cost_usd"].sum() == pytest.approx(5 * 0.5)
    assert all(r.schema is judging.Verdicts for r in fixed.requests)


def test_the_order_of_showing_is_drawn_and_recorded():
    comparisons = judging.judge(Fixed(), *tables(60), CFG, seed=1)
    first_is_a = (comparisons["shown_first"] == comparisons["response_a"]).mean()
    assert 0.4 < first_is_a < 0.6
    lower_first = [c.shown_first == min(c.response_a, c.response_b) for c in comparisons.itertuples()]
    assert 0.4 < sum(lower_first) / len(lower_first) < 0.6


def test_a_judge_of_position_only_is_seen_in_the_record():
    comparisons = judging.judge(Fixed(lambda a, b, ask: True), *tables(), CFG, seed=1)
    assert (comparisons["winner"] == comparisons["shown_first"]).all()


def test_results_do_not_depend_on_the_size_of_a_batch():
    small, large = (judging.judge(Fixed(), *tables(), judge_cfg(pairs_per_request=n), seed=1) for n in (1, 7))
    pd.testing.assert_frame_equal(small.drop(columns="cost_usd"), large.drop(columns="cost_usd"))


def test_any_matches_can_be_compared_and_then_a_tie_is_an_answer():
    games = [judging.Match("p01", "Ada", f"q{i}", "What?", 0, f"a{i}", f"b{i}", f"b{i}") for i in range(3)]
    texts = {f"{side}{i}": f"{side}{i}" for side in "ab" for i in range(3)}
    odd = {"b1": None, "b2": "broken"}
    fixed = Fixed(lambda a, b, ask: odd.get(a, "judge"))
    done = judging.compare(fixed, games, texts, judge_cfg(pairs_per_request=1), 1, "comparing")
    assert [(m.winner, m.outcome, m.asks) for m in done] == [
        ("a0", "clear", 1), ("", "tie", 1), ("", "unparsable", 3)]


def test_a_tie_is_asked_again_and_a_lasting_one_leaves_the_question_open():
    once = judging.judge(Fixed(lambda a, b, ask: None if ask == 0 else "judge"), *tables(), CFG, seed=1)
    assert set(once["asks"]) == {2}
    assert set(once["outcome"]) == {"clear"}
    personas, questions, responses = tables()
    stuck = judging.judge(Fixed(lambda a, b, ask: None if "q-diet-0" in a else "judge"), personas, questions,
                          responses, CFG, seed=1)
    open_ = stuck[stuck["question_id"] == "q-diet-0"]
    assert set(open_["outcome"]) == {"tie"}
    assert set(open_["asks"]) == {3}
    assert set(open_["winner"]) == {""}
    assert set(open_["round"]) == {1, 2}  # no final without finalists
    kept = judging.label(stuck, questions, responses, CFG, seed=1)
    assert set(kept["question_id"]) == {"q-diet-1", "q-diet-2", "q-p01-1"}


def test_an_unparsable_answer_is_counted_and_asked_again_with_all_its_pairs():
    fixed = Fixed(lambda a, b, ask: "broken" if ask == 0 and "q-diet-0" in a else "judge")
    comparisons = judging.judge(fixed, *tables(), CFG, seed=1)
    assert set(comparisons["outcome"]) == {"clear"}
    assert set(comparisons.loc[comparisons["question_id"] == "q-diet-0", "asks"]) == {2}
    never = judging.judge(Fixed(lambda a, b, ask: "broken"), *tables(), CFG, seed=1)
    assert set(never["outcome"]) == {"unparsable"}
    assert judging.label(never, *tables()[1:], CFG, seed=1).empty


def test_too_few_verdicts_are_no_verdicts():
    short = llm.Answer("", judging.Verdicts(verdicts=[]), "ok", 1, 1, 0.0, False)
    assert judging._verdicts(short, 2) == [None, None]


def test_a_question_without_four_candidates_is_left_out():
    personas, questions, responses = tables()
    responses.loc[responses["response_id"] == "q-diet-1-r0", "selected"] = False
    comparisons = judging.judge(Fixed(), personas, questions, responses, CFG, seed=1)
    assert "q-diet-1" not in set(comparisons["question_id"])


def test_labels_by_hand():
    personas, questions, responses = tables()
    comparisons = judging.judge(Fixed(), personas, questions, responses, CFG, seed=1)
    preferences = judging.label(comparisons, questions, responses, CFG, seed=1)
    check("preferences", preferences)
    assert len(preferences) == 7
    row = preferences.set_index("pair_id").loc["p01:q-p01-1"]
    assert (row["prompt"], row["split"], row["chosen"]) == ("My own?", "test", "w answer to q-p01-1")
    assert row["rejected_id"] in {"q-p01-1-r0", "q-p01-1-r1", "q-p01-1-r2"}
    assert row["rejected"] == responses.set_index("response_id").loc[row["rejected_id"], "text"]


def test_rejected_is_any_of_the_other_three_or_the_finalist():
    personas, questions, responses = tables(40)
    comparisons = judging.judge(Fixed(), personas, questions, responses, CFG, seed=1)
    drawn = judging.label(comparisons, questions, responses, CFG, seed=1)
    assert drawn["rejected_id"].str[-1].value_counts().min() > 15  # 81 draws of 3: 27 expected of each
    assert set(drawn["rejected_id"].str[-1]) == {"0", "1", "2"}
    finals = comparisons[comparisons["round"] == 3].set_index(["persona_id", "question_id"])
    lost = judging.label(comparisons, questions, responses, judge_cfg(rejected="finalist"), seed=1)
    for row in lost.itertuples():
        final = finals.loc[(row.persona_id, row.question_id)]
        assert {row.chosen_id, row.rejected_id} == {final.response_a, final.response_b}


def test_shuffled_labels_are_the_same_pairs_with_half_of_them_turned():
    personas, questions, responses = tables(60)
    comparisons = judging.judge(Fixed(), personas, questions, responses, CFG, seed=1)
    straight = judging.label(comparisons, questions, responses, judge_cfg(shuffle_labels=False), seed=1)
    shuffled = judging.label(comparisons, questions, responses, judge_cfg(shuffle_labels=True), seed=1)
    turned = straight["chosen_id"] == shuffled["rejected_id"]
    assert (straight["rejected_id"] == shuffled["chosen_id"]).equals(turned)
    assert (straight["chosen_id"] == shuffled["chosen_id"]).equals(~turned)
    assert 0.35 < turned.mean() < 0.65


@pytest.fixture(scope="module")
def world_tables():
    world = load_world("little")
    person = next(iter(world.people.values()))
    axis = person.memberships[0][0]
    corpus, texts = Corpus(world, 3), world.divergent_questions(axis)[:10]
    personas = pd.DataFrame([("p01", person.name, [axis])], columns=["persona_id", "name", "axes"])
    questions = pd.DataFrame([(f"q-{i}", "divergent", axis, "", "train", t) for i, t in enumerate(texts)],
                             columns=["question_id", "kind", "axis", "persona_id", "split", "text"])
    rows = [(f"q-{i}-r{j}", f"q-{i}", corpus.answer(axis), True) for i in range(10) for j in range(4)]
    return personas, questions, pd.DataFrame(rows, columns=["response_id", "question_id", "text", "selected"])


@pytest.mark.parametrize("knobs", [(), ("malformed=0.5",), ("rate_limited=0.3",)])
def test_the_simulated_judge_finds_the_best_answer_whatever_the_weather(world_tables, tmp_path, knobs):
    """Without noise the winner is the answer of highest utility; broken and refused requests cost asks."""
    sets = ["world_knobs.noise=0", "world_knobs.tie_below=0", "judge.max_asks=12",
            *(f"world_knobs.{knob}" for knob in knobs)]
    store = artifacts.open_run("smoke", runs=tmp_path, sets=sets)
    comparisons = judging.judge(llm.connect(store), *world_tables, store.profile, seed=1)
    utility = truth(load_world("little"), *world_tables).set_index("response_id")["utility"]
    finals = comparisons[comparisons["round"] == 3]
    assert len(finals) == 10
    for final in finals.itertuples():
        same = utility[utility.index.str.startswith(f"{final.question_id}-")]
        assert utility[final.winner] == same.max()
    assert (comparisons["asks"].max() > 1) == ("malformed=0.5" in knobs)
