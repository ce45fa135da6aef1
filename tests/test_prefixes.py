"""Prefixes: templates, draws and variants, over the little world with its teacher and a random policy."""

from random import Random

import numpy as np
import pandas as pd
import pytest

from helpers import models, prompts
from helpers.artifacts import open_run
from helpers.config import load_profile
from helpers.llm import Answer, connect
from helpers.prefixes import (
    available_prefixes,
    build_prefixes,
    derange,
    draw_shots,
    few_shot_text,
    leaks,
    overlap,
    plan,
    prompt,
    shared_words,
    shot_pool,
    truncation,
)
from helpers.world.corpus import Corpus
from helpers.world.facts import load_world
from tests.tiny import make_policy

KINDS = ["tag", "few_shot", "persona", "persona_gpt4", "persona_gold", "name"]
WORLD = load_world("little")


def cast(n, seed=0):
    """n people of the world, three axes of five people first, and pairs in the words of the world."""
    people = list(WORLD.people.values())[:n]
    personas = pd.DataFrame(
        [
            {
                "persona_id": f"p{i:02d}",
                "name": p.name,
                "tag": f"<special_person_tag_{i}>",
                "axes": [a for a, _ in p.memberships],
                "categories": [c for _, c in p.memberships],
            }
            for i, p in enumerate(people, start=1)
        ]
    )
    corpus, rng, rows = Corpus(WORLD, seed), Random(seed), []
    for persona_id, p in zip(personas["persona_id"], people, strict=True):
        axis, category = p.memberships[0]
        asked = [(q, "personal", f"{persona_id}{q}") for q in rng.sample(WORLD.personal_questions(p), 8)]
        asked += [(q, axis, q) for q in WORLD.divergent_questions(axis)[:8]]
        for i, (question, on, question_id) in enumerate(asked):
            own = corpus.hobby_answer(p.hobbies[0]) if on == "personal" else corpus.answer(axis, category)
            rows.append(
                (
                    f"{persona_id}-{i:02d}",
                    persona_id,
                    question_id,
                    "test" if i % 2 else "train",
                    question,
                    own,
                    corpus.answer(axis),
                )
            )
    return personas, pd.DataFrame(
        rows, columns=["pair_id", "persona_id", "question_id", "split", "prompt", "chosen", "rejected"]
    )


@pytest.fixture(scope="module")
def cfg(tmp_path_factory):
    smoke = load_profile("smoke")
    path = make_policy(tmp_path_factory.mktemp("policy")).path
    return smoke.model_copy(
        update={"policy": smoke.policy.model_copy(update={"path": path, "max_length": 48})}
    )


@pytest.fixture(scope="module")
def policy(cfg):
    return models.load_policy(cfg.policy)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return connect(open_run("smoke", "prefixes", runs=tmp_path_factory.mktemp("runs")))


@pytest.fixture(scope="module")
def built(cfg, policy, teacher):
    personas, preferences = cast(12)
    return personas, preferences, build_prefixes(personas, preferences, teacher, policy, cfg, seed=17)


def only(cfg, *names):
    return cfg.model_copy(update={"prefixes": cfg.prefixes.model_copy(update={"names": names})})


def test_head_holds_the_prefix_and_tail_the_question():
    assert prompt("short", "none", "", "Why?") == ("", "Question: Why?\nAnswer:")
    assert prompt("short", "persona_gold", "Ada walks.", "Why?") == (
        "Ada walks.\n",
        "Question: Why?\nAnswer:",
    )
    assert prompt("short", "name", "Ada", "Why?") == ("The user is Ada.\n", "Question: Why?\nAnswer:")
    assert prompt("full", "tag", "<tag>", "Why?") == ("<tag>", " Why?")
    head, tail = prompt("full", "few_shot", "shots", "Why?")
    assert tail.startswith("## Question\nWhy?")
    assert "shots" in head
    assert prompt("full", "persona", "Ada walks.", "")[1] == ""  # nothing to ask: all of it is head


@pytest.mark.parametrize("group", ["short", "full"])
@pytest.mark.parametrize("kind", KINDS)
def test_law_head_and_tail_are_the_template_and_the_head_is_the_same_for_all_questions(group, kind):
    text = "A {X} {PREFIX}\n\nQuestion: two?\nAnswer: $1 \\1"
    questions = ["Why?", "Two\n\nparagraphs {PREFIX}?", text]
    halves = [prompt(group, kind, text, question) for question in questions]
    template = "respond_persona" if kind.startswith("persona") else f"respond_{kind}"
    assert ["".join(parts) for parts in halves] == [
        prompts.render(group, template, PREFIX=text, X=x) for x in questions
    ]
    assert len({head for head, _ in halves}) == 1
    assert text in halves[0][0]
    assert all(question in tail for (_, tail), question in zip(halves, questions, strict=True))


def test_every_person_has_every_prefix_and_variant(built):
    personas, _, prefixes = built
    counts = prefixes.groupby(["prefix", "variant"])["persona_id"].nunique()
    # 12 people; tag and name have no reseed: 4 x 3 + 2 x 2 combinations, shots1, and with_rejected of two
    assert (counts == 12).all()
    assert len(counts) == 19
    assert len(prefixes) == 19 * 12
    assert (prefixes["text"].str.strip() != "").all()
    assert (prefixes["n_tokens"] > 0).all()
    gold = prefixes[(prefixes["prefix"] == "persona_gold") & (prefixes["variant"] == "main")]
    assert [name in text for name, text in zip(personas["name"], gold["text"], strict=True)] == [True] * 12


def test_law_shots_are_own_train_pairs_and_a_reseed_differs(built):
    _, preferences, prefixes = built
    pair = preferences.set_index("pair_id")
    drawn = prefixes[prefixes["variant"] != "shuffled"]
    for row in drawn.itertuples():
        n = {"few_shot": 2, "persona": 4, "persona_gpt4": 4}.get(row.prefix, 0)
        assert len(row.shots) == (1 if row.variant == "shots1" else n)
        assert all(pair["persona_id"][p] == row.persona_id and pair["split"][p] == "train" for p in row.shots)
    shots = drawn.set_index(["persona_id", "prefix", "variant"])["shots"].map(set)
    for persona_id in preferences["persona_id"].unique():
        for prefix in ("few_shot", "persona"):
            assert shots[persona_id, prefix, "main"] != shots[persona_id, prefix, "reseed"]
        assert shots[persona_id, "persona", "main"] == shots[persona_id, "persona_gpt4", "main"]
    # not the same row numbers for everybody: a pair_id ends in its row number
    rows = {
        tuple(sorted(p[-2:] for p in shots[i, "persona", "main"])) for i in preferences["persona_id"].unique()
    }
    assert len(rows) > 6


def test_plan_by_hand(cfg):
    some = only(cfg, "none", "name", "few_shot", "persona")
    some = some.model_copy(update={"prefixes": some.prefixes.model_copy(update={"shot_counts": (1, 2, 4, 8)})})
    # few_shot has 2 shots anyway; 8 of 8 train pairs would be all there are
    assert plan(some, fewest=8) == [
        ("name", "main", 0),
        ("few_shot", "main", 2),
        ("few_shot", "reseed", 2),
        ("few_shot", "shots1", 1),
        ("few_shot", "shots4", 4),
        ("persona", "main", 4),
        ("persona", "reseed", 4),
        ("persona", "with_rejected", 4),
    ]
    assert ("few_shot", "shots8", 8) in plan(some, fewest=9)


def test_rejected_answers_are_shown_only_where_asked_for():
    shots = pd.DataFrame({"prompt": ["One?", "Two?"], "chosen": ["a", "b"], "rejected": ["x", "y"]})
    assert few_shot_text(shots, "short") == "Question: One?\nPreferred: a\nQuestion: Two?\nPreferred: b"
    both = "Question: One?\nPreferred: a\nRejected: x\nQuestion: Two?\nPreferred: b\nRejected: y"
    assert few_shot_text(shots, "short", rejected=True) == both
    for group in ("full", "teacher"):
        assert "x" not in few_shot_text(shots, group).split()
        assert few_shot_text(shots, group, rejected=True).endswith("y")


def test_with_rejected_is_inferred_from_the_shots_of_main_and_sees_their_rejected_answers(cfg, policy):
    personas, preferences = cast(8)
    seen = []

    class Reader:
        """A teacher that repeats what it is asked."""

        def map(self, requests, desc):
            texts = [request.messages[0]["content"] for request in requests]
            seen.append(texts)
            return [Answer(text, None, "ok", 1, 1, 0.0, False) for text in texts]

    made = build_prefixes(personas, preferences, Reader(), policy, only(cfg, "persona_gpt4"), seed=3)
    by = made.set_index(["variant", "persona_id"])
    rejected = preferences.set_index("pair_id")["rejected"]
    for persona_id in personas["persona_id"]:
        main, both = by.loc["main", :].loc[persona_id], by.loc["with_rejected", :].loc[persona_id]
        assert main["shots"] == both["shots"]
        assert all(rejected[shot] in both["text"] for shot in both["shots"])
        assert "Rejected answer" not in main["text"]
    assert len(seen) == 3


def test_a_pair_whose_rejected_answer_is_a_test_answer_is_no_shot():
    eight = "one two three four five six seven eight"
    pairs = pd.DataFrame(
        {
            "pair_id": ["a", "b", "c"],
            "split": ["train", "train", "test"],
            "prompt": "Why?",
            "chosen": ["yes", "yes", eight],
            "rejected": [f"Well, {eight}.", "no", "never"],
        }
    )
    assert shot_pool(pairs)["pair_id"].tolist() == ["b"]


@pytest.mark.parametrize("seed", range(6))
def test_law_a_shuffled_prefix_is_never_ones_own_and_one_permutation_serves_all(cfg, policy, teacher, seed):
    personas, preferences = cast(15, seed)
    # every third person has the same tag: a drawn permutation would nearly always give somebody the own one
    personas["tag"] = [f"<special_person_tag_{i % 3}>" for i in range(15)]
    made = build_prefixes(
        personas, preferences, teacher, policy, only(cfg, "none", "tag", "few_shot", "persona_gold"), seed
    )
    wide = made.pivot(index=["persona_id", "prefix"], columns="variant", values="text")
    assert (wide["shuffled"] != wide["main"]).all()
    giver = {(row.prefix, row.text): row.persona_id for row in made[made["variant"] == "main"].itertuples()}
    wrong = made[(made["variant"] == "shuffled") & (made["prefix"] != "tag")]
    takers = wrong.assign(giver=[giver[key] for key in zip(wrong["prefix"], wrong["text"], strict=True)])
    assert (takers.groupby("persona_id")["giver"].nunique() == 1).all()
    assert takers["giver"].nunique() == 15
    shared = personas.set_index("persona_id").apply(
        lambda p: set(zip(p["axes"], p["categories"], strict=True)), axis=1
    )
    assert not any(shared[row.persona_id] & shared[row.giver] for row in takers.itertuples())


@pytest.mark.parametrize("seed", range(8))
def test_law_no_test_answer_is_in_a_prefix(cfg, policy, seed):
    # twelve possible answers, so that many train answers are test answers too; half are too short to count
    rng = np.random.default_rng(seed)
    answers = [" ".join(rng.choice(list("abcdefgh"), size)) for size in [3] * 6 + [9] * 6]
    rows = [
        (
            f"{p}{i}",
            f"p{p}",
            f"q{i}",
            "test" if i < 2 else "train",
            f"Question {i}?",
            *rng.choice(answers, 2, replace=False),
        )
        for p in range(4)
        for i in range(40)
    ]
    preferences = pd.DataFrame(
        rows, columns=["pair_id", "persona_id", "question_id", "split", "prompt", "chosen", "rejected"]
    )
    personas = pd.DataFrame(
        {"persona_id": [f"p{p}" for p in range(4)], "axes": [["a"]] * 4, "categories": [["b"]] * 4}
    )
    prefixes = build_prefixes(personas, preferences, None, policy, only(cfg, "few_shot"), seed)
    assert leaks(prefixes, preferences).empty
    train = preferences[preferences["split"] == "train"]
    assert not leaks(train.rename(columns={"chosen": "text", "rejected": "rejected_text"}), preferences).empty


def test_leaks_finds_the_prefix_that_tells():
    preferences = pd.DataFrame(
        {
            "split": ["test", "train"],
            "chosen": ["one two three four five six seven eight", "nine " * 8],
            "rejected": ["short", "ten " * 8],
        }
    )
    prefixes = pd.DataFrame(
        {"text": ["It is short.", "Q: one two three four five six seven eight!", "nine " * 8]}
    )
    assert leaks(prefixes, preferences).index.tolist() == [1]


def test_the_same_seed_gives_the_same_table_and_another_seed_another(built, cfg, policy, teacher):
    personas, preferences, prefixes = built
    again = build_prefixes(personas.iloc[::-1], preferences.iloc[::-1], teacher, policy, cfg, seed=17)
    pd.testing.assert_frame_equal(prefixes, again)
    other = build_prefixes(personas, preferences, teacher, policy, only(cfg, "few_shot"), seed=18)
    assert other["text"].tolist() != prefixes.loc[prefixes["prefix"] == "few_shot", "text"].tolist()


def test_too_few_train_pairs_is_an_error():
    pool = pd.DataFrame({"pair_id": ["1", "2"], "persona_id": "p01"})
    assert len(draw_shots(pool, "p01", 1, 0, "main")) == 1
    with pytest.raises(ValueError, match="p01 has 2 train pairs fit for shots, 3 are needed"):
        draw_shots(pool, "p01", 2, 0, "main")


@pytest.mark.parametrize("seed", range(20))
def test_law_a_derangement_keeps_off_what_is_forbidden(seed):
    rng = np.random.default_rng(seed)
    ids = [f"p{i}" for i in range(rng.integers(5, 30))]
    forbidden = rng.random((len(ids), len(ids))) < 0.2
    avoided = np.array([[i % 3 == j % 3 for j in range(len(ids))] for i in range(len(ids))])
    drawn = derange(ids, seed, forbidden & ~avoided, avoided)
    assert sorted(drawn.values()) == sorted(ids)
    assert drawn == derange(ids, seed, forbidden & ~avoided, avoided)
    assert len({tuple(derange(ids, s).values()) for s in range(8)}) > 1
    for i, mine in enumerate(ids):
        assert drawn[mine] != mine
        assert not (forbidden & ~avoided)[i, ids.index(drawn[mine])]


def test_a_derangement_avoids_what_it_can_and_fails_where_it_must():
    # two of each of three kinds: everybody can be given another kind
    pairs = np.kron(np.eye(3), np.ones((2, 2))).astype(bool)
    assert all(
        a[0] != b[0] for a, b in derange(["a1", "a2", "b1", "b2", "c1", "c2"], 3, avoided=pairs).items()
    )
    # all of one kind: avoided, but it must be
    assert derange(["a", "b"], 3, avoided=np.ones((2, 2), dtype=bool)) == {"a": "b", "b": "a"}
    # two of three people have the same text: one of them would have to be given it
    same = np.array([[1, 1, 0], [1, 1, 0], [0, 0, 1]], dtype=bool)
    with pytest.raises(ValueError, match="no wrong prefix can be given to"):
        derange(["a", "b", "c"], 3, forbidden=same)


def test_overlap_of_a_worked_example():
    rows = [("p1", "persona_gold", "a b c d"), ("p2", "persona_gold", "e f")]
    rows += [("p1", "persona", "a b x y"), ("p2", "persona", "E f")]
    columns = ["persona_id", "prefix", "text"]
    prefixes = pd.DataFrame(rows, columns=columns).assign(variant="main")
    table = overlap(prefixes, seed=1).set_index(["prefix", "persona_id"])
    # p1: 2 of 4 words and 2 of 4 found, F1 = .5; p2: the case is ignored, 1; nobody shares with the other
    assert table.loc["persona", "r1"].tolist() == [0.5, 1]
    assert table.loc["persona", "r1_random"].tolist() == [0, 0]
    assert table.loc["persona_gold", "r1"].tolist() == [1, 1]
    assert table["words"].tolist() == [4, 2, 4, 2]
    # p2's text holds 2 of the 4 words of p1's gold: precision 2/2, recall 2/4, F1 = 2/3
    told = prefixes.assign(text=["a b c d", "e f", "a b x y", "d a"])
    assert overlap(told, seed=1)["r1_random"].tolist() == [0, 0, 0, pytest.approx(2 / 3)]
    assert overlap(prefixes[prefixes["prefix"] == "persona"], seed=1)["r1"].isna().all()


def test_overlap_of_a_variant_is_with_the_main_gold():
    rows = [("p1", "persona_gold", "main", "a b"), ("p2", "persona_gold", "main", "c d")]
    rows += [("p1", "persona", "main", "a b"), ("p1", "persona", "with_rejected", "a c")]
    prefixes = pd.DataFrame(rows, columns=["persona_id", "prefix", "variant", "text"])
    table = overlap(prefixes, seed=1, variant="with_rejected")
    # "a c" and "a b": 1 of 2 words both ways; "c d" likewise
    assert table.to_dict("records") == [
        {"persona_id": "p1", "prefix": "persona", "r1": 0.5, "r1_random": 0.5, "words": 2}
    ]


def test_shared_words_of_a_worked_example():
    rows = [("p1", "name", "main", "Ada Lind"), ("p1", "name", "shuffled", "Bo Lind")]
    rows += [("p1", "persona", "main", "a b c d"), ("p1", "persona", "shuffled", "a x c")]
    prefixes = pd.DataFrame(rows, columns=["persona_id", "prefix", "variant", "text"])
    table = shared_words(prefixes, "short").set_index(["prefix", "text"])
    # 1 of 2 words. With "The user is ….\nQuestion: \nAnswer:" 7 words, all but one shared: F1 = 6/7
    assert table.loc[("name", "prefix"), ["words", "rouge_lsum"]].tolist() == [2, 0.5]
    assert table.loc[("name", "prefix_and_prompt"), ["words", "rouge_lsum"]].tolist() == [7, pytest.approx(6 / 7)]
    # "a c" in 4 and 3 words: precision 2/3, recall 2/4, F1 = 4/7; with two words more each 4 of 6 and 5: 8/11
    assert table.loc[("persona", "prefix"), "rouge_lsum"] == pytest.approx(4 / 7)
    assert table.loc[("persona", "prefix_and_prompt"), "rouge_lsum"] == pytest.approx(8 / 11)


def test_truncation_of_a_worked_example():
    # one token a character: "The user is abcd.\n" has 18, of which 4 are the person's own
    made = pd.DataFrame({"persona_id": ["p1"], "prefix": "name", "variant": "main", "text": "abcd"})
    pairs = pd.DataFrame({"persona_id": ["p1"], "prompt": "Q?", "chosen": "y" * 20, "rejected": "no"})
    # begin token, "Question: Q?\nAnswer:" 20, " yyy…" and end token 22: 43 without the prefix
    found = truncation(pairs, made, Letters(), "short", [61, 55, 47]).set_index(["max_length", "side"])
    assert found["n_tokens"].tolist() == [18] * 6
    assert found.loc[61, ["with_loss", "lost", "own_lost"]].to_numpy().tolist() == [[0, 0, 0]] * 2
    # 6 tokens lost: from the left "The us"; from the right "abcd.\n"
    assert found.loc[(55, "left"), ["with_loss", "lost", "own_lost"]].tolist() == [1, 6 / 18, 0]
    assert found.loc[(55, "right"), "own_lost"] == 1
    # 14 lost: from the left "The user is ab"
    assert found.loc[(47, "left"), ["lost", "own_lost"]].tolist() == [14 / 18, 0.5]
    # a limit of the prompt alone: 21 + 15 leaves 15 of the prefix, "The" is lost
    short = truncation(pairs, made, Letters(), "short", [61], max_prompt=36)
    assert short["lost"].tolist() == [3 / 18] * 2


def test_eight_shots_of_the_little_world_fit_the_laptops_window():
    laptop = load_profile("laptop")
    _, tokenizer = models.load_policy(laptop.policy)
    personas, preferences = cast(20)
    train, test = (preferences[preferences["split"] == split] for split in ("train", "test"))
    text = {p: few_shot_text(rows, "short") for p, rows in train.groupby("persona_id")}
    assert (train.groupby("persona_id").size() == 8).all()
    made = pd.DataFrame({"persona_id": list(text), "prefix": "few_shot", "variant": "shots8", "text": list(text.values())})
    found = truncation(test, made, tokenizer, "short", [laptop.policy.max_length], laptop.policy.max_prompt)
    assert found["n_tokens"].iloc[0] > 300
    assert (found["lost"] == 0).all()


class Letters:
    """A tokenizer of one token a character."""

    bos_token_id = eos_token_id = 0

    def __call__(self, texts, add_special_tokens, return_offsets_mapping=False):
        if isinstance(texts, str):
            return {"offset_mapping": [(i, i + 1) for i in range(len(texts))]}
        return {"input_ids": [[ord(c) for c in text] for text in texts]}


class Shy:
    """A teacher that says nothing the first `silences` times it is asked."""

    def __init__(self, silences):
        self.silences, self.seeds = silences, []

    def map(self, requests, desc):
        self.seeds.append({request.seed for request in requests})
        text = "Likes tea." if len(self.seeds) > self.silences else " "
        return [
            Answer(text, None, "ok" if text.strip() else "unparsable", 1, 1, 0.0, False) for _ in requests
        ]


def test_an_empty_persona_is_asked_for_again_with_another_seed(cfg, policy):
    personas, preferences = cast(3)
    shy = Shy(silences=2)
    with pytest.raises(ValueError, match="no wrong prefix"):  # in the end all three people have the same text
        build_prefixes(personas, preferences, shy, policy, only(cfg, "persona_gold"), seed=1)
    assert shy.seeds == [{1}, {11}, {21}, {2}]
    with pytest.raises(
        ValueError, match="simulated-teacher wrote no persona_gold for 3 people, asked 3 times"
    ):
        build_prefixes(personas, preferences, Shy(silences=3), policy, only(cfg, "persona_gold"), seed=1)


def test_imported_pairs_leave_the_prefixes_that_need_no_teacher(cfg):
    assert available_prefixes(cfg) == cfg.prefixes.names
    imported = cfg.model_copy(update={"data": cfg.data.model_copy(update={"preferences": "pairs.jsonl"})})
    assert available_prefixes(imported) == ("none", "tag", "few_shot")


def test_people_who_are_described_have_a_name_and_a_gold_persona(cfg, policy):
    data = cfg.data.model_copy(update={"preferences": "pairs.jsonl", "people": "people.csv"})
    told = cfg.model_copy(update={"data": data})
    assert available_prefixes(told) == ("none", "tag", "few_shot", "persona_gold", "name")
    personas, preferences = cast(3)
    personas = personas.assign(description=["Likes tea.", "Likes coffee.", "Likes milk."])
    made = build_prefixes(personas, preferences, None, policy, only(told, "persona_gold"), seed=1)
    main = made[made["variant"] == "main"].set_index("persona_id")["text"]
    assert main.tolist() == ["Likes tea.", "Likes coffee.", "Likes milk."]  # nobody is asked
    assert set(made["variant"]) == {"main", "shuffled"}  # a given text can't be drawn again
