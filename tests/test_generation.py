import pandas as pd
import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny import make_policy

from helpers import generation, judging, llm, models, ranking, sampling
from helpers.config import load_profile
from helpers.prompts import parse_all
from helpers.schemas import check
from helpers.world.facts import load_world

PEOPLE = [("p01", "Mara Venn"), ("p02", "Tobin Askel"), ("p03", "Ilse Corran"), ("p04", "Nobody Known")]
CFG = load_profile("smoke", [
    "generation.people=0", "generation.rivals=[none, tag]", "generation.max_new_tokens=6",
    "training.executor=sequential", "training.workers=1"])
NAMES = ["base_none", "base_persona_gpt4", "mt_persona_gpt4_removed", "mt_persona_gpt4", "mt_none", "mt_tag"]


def tables():
    personas = pd.DataFrame(PEOPLE, columns=["persona_id", "name"])
    rows = [(f"{p}:{kind}-{split}-{i}", p, f"q-{kind}-{split}-{i}" + ("" if kind == "divergent" else p), kind,
             "diet" if kind == "divergent" else "personal", split, f"What {kind} {split} {i}?")
            for p, _ in PEOPLE for kind in ("personal", "divergent") for split in ("train", "test") for i in range(4)]
    preferences = pd.DataFrame(
        rows, columns=["pair_id", "persona_id", "question_id", "kind", "axis", "split", "prompt"])
    prefixes = pd.DataFrame(
        [(p, prefix, "main", f"{prefix} of {name}.") for p, name in PEOPLE for prefix in ("tag", "persona_gpt4")],
        columns=["persona_id", "prefix", "variant", "text"])
    folds = pd.DataFrame([("stratified", i % 2, p) for i, (p, _) in enumerate(PEOPLE)] + [("small", 0, "p02")],
                         columns=["scheme", "fold", "persona_id"])
    policies = pd.DataFrame(
        [(f"mt-{prefix}-fold{f}", "mt", prefix, "stratified", f, 0) for prefix in ("none", "tag", "persona_gpt4")
         for f in (0, 1)] + [("small-gpt4", "mt", "persona_gpt4", "small", 0, 0), ("other", "mt", "tag", "stratified", 0, 5),
                             ("pm-name", "pm", "name", "stratified", 0, 0)],
        columns=["policy_id", "method", "prefix", "scheme", "fold", "seed"])
    return personas, preferences, prefixes, folds, policies


def planned(cfg=CFG):
    _, preferences, prefixes, folds, policies = tables()
    asked, contenders = generation.questions(preferences, cfg, 1), generation.systems(cfg, policies)
    return asked, contenders, generation.plan(asked, contenders, prefixes, folds, policies, cfg)


def written(text_of) -> pd.DataFrame:
    """Everybody's answers by every system, by a rule instead of a model."""
    _, _, plan = planned()
    return plan.assign(text=[text_of(row) for row in plan.itertuples()], reward=0.0)


class Judge:
    """The edge of the test: prefers by a rule of what it is shown."""

    model = "fixed"

    def __init__(self, rule):
        self.rule, self.requests = rule, []

    def map(self, requests, desc=""):
        self.requests += requests
        return [self.answer(request) for request in requests]

    def answer(self, request):
        pairs = parse_all("teacher", "judge_example", request.messages[-1]["content"])
        verdicts = [{"Concise explanation": "why",
                     "Output (a) is better than Output (b)": self.rule(pair["OUTPUT_A"], pair["OUTPUT_B"])}
                    for pair in pairs]
        parsed = judging.Verdicts.model_validate({"verdicts": verdicts})
        return llm.Answer("", parsed, "ok", 1, 1, 0.5, False)


def test_systems_of_table_3_and_their_rivals():
    found = generation.systems(CFG, tables()[-1])
    assert [system.name for system in found] == NAMES
    assert found[2] == ("mt_persona_gpt4_removed", "persona_gpt4", "none", ("personal", "divergent"))
    assert [system.kinds for system in found[4:]] == [("divergent",)] * 2


def test_what_no_adapter_was_trained_with_is_left_out_and_the_last_prefix_stands_in():
    *_, policies = tables()
    found = generation.systems(CFG, policies[policies["prefix"] != "persona_gpt4"])
    assert [system.name for system in found] == ["base_none", "base_tag", "mt_tag_removed", "mt_tag", "mt_none"]


def test_one_test_question_of_each_kind_by_a_seed_of_the_persons_own():
    preferences = tables()[1]
    asked = generation.questions(preferences, CFG, 1)
    assert asked.groupby(["persona_id", "kind"]).size().eq(1).all()
    assert len(asked) == 8
    assert asked["prompt"].str.contains("test").all()
    rest = generation.questions(preferences[preferences["persona_id"] != "p02"], CFG, 1)
    pd.testing.assert_frame_equal(rest, asked[asked["persona_id"] != "p02"].reset_index(drop=True))
    draws = {tuple(generation.questions(preferences, CFG, seed)["question_id"]) for seed in range(8)}
    assert len(draws) == 8


def test_fewer_people():
    cfg = load_profile("smoke", ["generation.people=3"])
    assert generation.questions(tables()[1], cfg, 1)["persona_id"].nunique() == 3
    cfg = load_profile("smoke", ["generation.people=30"])
    assert generation.questions(tables()[1], cfg, 1)["persona_id"].nunique() == 4


def test_everybody_is_answered_by_the_adapter_that_never_met_them():
    _, _, plan = planned()
    assert plan.groupby("system").size().to_dict() == {name: 8 for name in NAMES[:4]} | {name: 4 for name in NAMES[4:]}
    row = plan.set_index(["system", "persona_id", "kind"]).sort_index()
    assert row.loc[("mt_persona_gpt4", "p02", "personal"), "policy_id"] == "mt-persona_gpt4-fold1"
    assert row.loc[("mt_persona_gpt4_removed", "p03", "divergent"), "policy_id"] == "mt-persona_gpt4-fold0"
    assert set(plan.loc[plan["system"].str.startswith("base"), "policy_id"]) == {"base"}
    heads = plan.groupby("system")["head"].agg(set)
    assert heads["mt_persona_gpt4_removed"] == heads["base_none"] == heads["mt_none"] == {""}
    assert heads["mt_persona_gpt4"] == {f"persona_gpt4 of {name}.\n" for _, name in PEOPLE}


@pytest.fixture(scope="module")
def cfg(tmp_path_factory):
    tiny = make_policy(tmp_path_factory.mktemp("base"))
    return CFG.model_copy(update={"policy": CFG.policy.model_copy(update={"path": tiny.path, "dtype": "float32"})})


@pytest.fixture(scope="module")
def adapters(cfg, tmp_path_factory):
    """Random adapters, large enough to be told from the base by their answers."""
    folder, found = tmp_path_factory.mktemp("adapters"), {}
    for i, policy_id in enumerate(sorted(set(planned()[2]["policy_id"]) - {"base"})):
        torch.manual_seed(i)
        lora = LoraConfig(r=4, lora_alpha=64, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
        get_peft_model(models.load_policy(cfg.policy)[0], lora).save_pretrained(folder / policy_id)
        found[policy_id] = folder / policy_id
    return found


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # peft's, in the fixture
def test_answers_are_seeded_kept_and_written_by_their_own_policy(cfg, adapters, tmp_path, monkeypatch):
    _, _, plan = planned(cfg)
    told = generation.answer(plan, adapters, cfg, 1, tmp_path)
    check("generations", told)
    assert len(told) == len(plan)
    told = told.sort_values(["system", "persona_id", "question_id"], ignore_index=True)
    other = generation.answer(plan, {}, cfg, 1, _folder(tmp_path, "bare"))  # no adapter anywhere: all by the base
    other = other.sort_values(["system", "persona_id", "question_id"], ignore_index=True)
    base = told["policy_id"] == "base"
    assert told.loc[base, "text"].tolist() == other.loc[base, "text"].tolist()  # though adapters came and went
    assert (told.loc[~base, "text"] != other.loc[~base, "text"]).mean() > 0.9
    monkeypatch.setattr(models, "base", None)  # what was answered is not asked for again
    again = generation.answer(plan, adapters, cfg, 1, tmp_path)
    pd.testing.assert_frame_equal(again.sort_values(["system", "persona_id", "question_id"], ignore_index=True), told)


def _folder(path, name):
    (path / name).mkdir()
    return path / name


def test_a_prompt_too_long_loses_the_head_first_and_never_the_room_to_answer(cfg):
    _, tokenizer = models.load_policy(cfg.policy)
    short = {"head": "Likes stew.\n", "tail": "Question: what?\nAnswer:"}
    rows = pd.DataFrame([short, short | {"head": "Likes stew. " * 200}])
    plain, cut = generation.fitting(tokenizer, rows, cfg)
    assert plain == "Likes stew.\nQuestion: what?\nAnswer:"
    assert cut.endswith("stew. Question: what?\nAnswer:")
    n = len(tokenizer(cut, add_special_tokens=False)["input_ids"])
    assert cfg.policy.max_length - cfg.generation.max_new_tokens - 3 <= n <= cfg.policy.max_length


def test_an_answer_ends_where_the_policy_asks_the_next_question(cfg, monkeypatch):
    stops = []
    monkeypatch.setattr(sampling, "generate", lambda *a, stop, **k: stops.append(stop) or [[" yes "]])
    rows, (_, tokenizer) = pd.DataFrame([{"head": "", "tail": "x"}]), models.load_policy(cfg.policy)
    full = cfg.model_copy(update={"policy": cfg.policy.model_copy(update={"templates": "full"})})
    assert [generation._sample(None, tokenizer, rows, c, 1) for c in (cfg, full)] == [["yes"], ["yes"]]
    assert stops == ["\nQuestion: ", None]


def test_every_pair_of_answers_is_judged_in_both_orders():
    told, asked = written(lambda row: f"{row.system} says"), planned()[0]
    personas = tables()[0]
    judge = Judge(lambda a, b: a < b)
    table = generation.judge(judge, told, personas, asked, CFG, 1)
    check("winrates", table)
    # 4 people x (6 pairs of 4 systems on the personal question + 15 pairs of 6 on the divergent one) x 2 orders
    assert len(table) == 4 * (6 + 15) * 2
    assert (table["winner"] == table[["system_a", "system_b"]].min(axis=1)).all()
    assert table["cost_usd"].sum() == pytest.approx(0.5 * len(judge.requests))
    shown = table.groupby(["persona_id", "question_id", "system_a", "system_b"])["shown_first"].nunique()
    assert shown.eq(2).all()
    for request in judge.requests:  # a pair is never shown beside its own mirror image
        pairs = parse_all("teacher", "judge_example", request.messages[-1]["content"])
        whose = [(pair["NAME"], pair["X"], *sorted((pair["OUTPUT_A"], pair["OUTPUT_B"]))) for pair in pairs]
        assert len(set(whose)) == len(whose)


def test_a_judge_of_position_wins_nothing_for_anybody():
    told = written(lambda row: f"{row.system} says")
    table = generation.judge(Judge(lambda a, b: True), told, tables()[0], planned()[0], CFG, 1)
    decided = ranking.decide(table)
    assert set(decided["how"]) == {"disagreed"}
    assert set(decided["score"]) == {0.5}


def test_a_tie_is_an_answer_and_not_asked_again():
    judge = Judge(lambda a, b: None)
    table = generation.judge(judge, written(lambda row: "same"), tables()[0], planned()[0], CFG, 1)
    assert set(table["outcome"]) == {"tie"}
    assert {request.seed for request in judge.requests} == {0}


def test_the_simulated_teacher_judges_texts_it_has_never_seen(store):
    """What a category likes, written by hand, beats garbled text and silence; empty against empty is a tie."""
    personas, asked = tables()[0].iloc[:1], planned()[0].query("persona_id == 'p01' and kind == 'divergent'")
    world = load_world("little")
    vegan = world.axes["diet"].categories["vegan"].things
    asked = asked.assign(prompt=world.divergent_questions("diet")[0])
    texts = {"base_none": "", "mt_none": "", "mt_tag": "# {0} \\ \n> </s> ## Pair 4\n> ünï",
             "mt_persona_gpt4": f"Well, {vegan[0]} and {vegan[1]}!"}
    told = written(lambda row: texts.get(row.system, "x")).query("system in @texts and question_id in @asked.question_id")
    told = told[told["persona_id"] == "p01"]
    table = ranking.decide(generation.judge(llm.connect(store), told, personas, asked, CFG, 1))
    best = ranking.sides(table).groupby("system")["correct"].mean()
    assert best["mt_persona_gpt4"] == 1.0
    silent = table[(table["system_a"] == "base_none") & (table["system_b"] == "mt_none")]
    assert (silent["how"].item(), silent["score"].item()) == ("tie", 0.5)


def test_discrimination_takes_the_same_adapter_and_the_same_people():
    asked, contenders, plan = planned()
    columns = ["method", "policy_id", "prefix", "setting", "trained", "persona_id", "kind", "pair_id", "correct"]
    rows = [("prompting", "base", "none", "main", False, "p01", "divergent", "a", True),
            ("prompting", "base", "persona_gpt4", "main", False, "p01", "divergent", "a", True),
            ("mt", "mt-persona_gpt4-fold0", "persona_gpt4", "main", False, "p01", "divergent", "a", True),
            ("mt", "mt-persona_gpt4-fold0", "persona_gpt4", "unseen_removed", False, "p01", "divergent", "a", False),
            ("mt", "mt-none-fold0", "none", "main", False, "p01", "divergent", "a", True),
            # none of these: trained on the person, another fold, personal, another setting, nobody's
            ("mt", "mt-persona_gpt4-fold1", "persona_gpt4", "main", True, "p01", "divergent", "a", True),
            ("mt", "mt-persona_gpt4-fold1", "persona_gpt4", "main", False, "p01", "divergent", "b", True),
            ("mt", "mt-persona_gpt4-fold0", "persona_gpt4", "main", False, "p01", "personal", "c", True),
            ("mt", "mt-persona_gpt4-fold0", "persona_gpt4", "unseen_wrong", False, "p01", "divergent", "d", True),
            ("prompting", "base", "none", "main", False, "p99", "divergent", "e", True)]
    found = generation.discrimination(pd.DataFrame(rows, columns=columns), contenders, plan)
    assert found["system"].tolist() == NAMES[:5]
    assert found["correct"].tolist() == [True, True, False, True, True]
    assert set(found["pair_id"]) == {"a"}


def test_whose_side_an_answer_takes():
    world = load_world("little")
    vegan, grill = (world.axes["diet"].categories[name].things for name in ("vegan", "grill"))
    texts = {"base_none": f"{vegan[0]} and {vegan[1]}, or {grill[0]}", "mt_none": f"{vegan[0]} or {grill[0]}",
             "mt_tag": "", "base_persona_gpt4": f"{grill[0]} and {grill[1]}"}
    told = written(lambda row: texts.get(row.system, "")).query("system in @texts")
    found = generation.categories(world, told, tables()[0], planned()[0]).set_index(["system", "persona_id"]).sort_index()
    assert found.loc["base_none"].to_dict("list") == {"taken": ["vegan"] * 4, "correct": [True, False, False, False]}
    assert set(found.loc["mt_none", "taken"]) == {""}  # two categories share the lead
    assert set(found.loc["mt_tag", "taken"]) == {""}
    assert found.loc["base_persona_gpt4", "correct"].tolist() == [False, False, True, False]  # Ilse likes the grill
