"""Reading pairs that nobody here wrote: every kind of broken line, and laws of the tables."""

import csv
import json
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

from helpers.imported import MAX_CHARS, MIN_PAIRS, import_into, read_pairs, to_tables


def line(user="ann", prompt="What to eat?", chosen="Bean stew.", rejected="Roast lamb.", **more):
    return json.dumps({"user": user, "prompt": prompt, "chosen": chosen, "rejected": rejected, **more})


def good(user, n=MIN_PAIRS, start=0):
    return [line(user, f"Question {i} of {user}?") for i in range(start, start + n)]


def write(path, lines):
    path.write_bytes(b"\n".join(one if isinstance(one, bytes) else one.encode() for one in lines))
    return path


BROKEN = [
    ("not JSON", b"user: ann, prompt: oh"),
    ("not an object", '["ann", "What?", "A", "B"]'),
    ("missing field: rejected", '{"user": "ann", "prompt": "What?", "chosen": "A"}'),
    ("empty field: chosen", line(chosen=" \t ")),
    ("not a string: prompt is int", line(prompt=7)),
    ("chosen equals rejected", line(chosen="Tea. ", rejected="Tea.")),
    ("repeated row: the same as line 1", good("ann")[0]),
    ("not UTF-8: byte 12 is 0xff", b'{"user": "a\xffn", "prompt": "a", "chosen": "b", "rejected": "c"}'),
    ("contradictory pair: line 2 swaps", line("ann", "Question 1 of ann?", "Roast lamb.", "Bean stew.")),
    (f"over-long text: chosen has {MAX_CHARS + 1} characters", line(chosen="x" * (MAX_CHARS + 1))),
    ("control character: prompt holds U+0000 at 5", line(prompt="what\x00")),
    ("control character: chosen holds U+D800 at 1", line(chosen="\ud800")),
    ("not JSON", b"[" * 100_000),
    ("not JSON", b'{"user": ' + b"1" * 5000 + b"}"),
]


@pytest.mark.parametrize(("reason", "broken"), BROKEN, ids=[reason for reason, _ in BROKEN])
def test_a_broken_line_is_reported_with_its_number_and_text(tmp_path, reason, broken):
    lines = good("ann", 30)
    lines.insert(25, broken)
    pairs, problems = read_pairs(write(tmp_path / "pairs.jsonl", lines))
    found = {problem.line: problem for problem in problems}
    assert found[26].reason.startswith(reason)
    assert len(found[26].raw) >= len(broken)
    # the 30 good ones stay, but for the line that a contradictory one contradicts
    contradicted = [2] if "contradictory" in reason else []
    assert sorted(found) == [*contradicted, 26]
    assert len(pairs) == 30 - len(contradicted)


def test_one_file_with_every_kind_of_broken_line(tmp_path):
    lines = [*good("ann", 30), "", *(broken for _, broken in BROKEN), *good("bob", 19), "  "]
    pairs, problems = read_pairs(write(tmp_path / "pairs.jsonl", lines))
    kinds = {problem.reason.split(":")[0] for problem in problems}
    assert kinds == {
        "not JSON",
        "not an object",
        "missing field",
        "empty field",
        "not a string",
        "chosen equals rejected",
        "repeated row",
        "not UTF-8",
        "contradictory pair",
        "over-long text",
        "control character",
        f"user with fewer than {MIN_PAIRS} pairs",
    }
    # nothing is lost: each line that is not blank is either a good row or a problem (30 + 14 + 19 lines)
    assert len(pairs) + len(problems) == 30 + len(BROKEN) + 19
    assert not set(pairs["line"]) & {problem.line for problem in problems}
    # ann's 30 but for line 2; bob's 19 are too few and listed with the count
    assert pairs["user"].tolist() == ["ann"] * 29
    assert [p.line for p in problems if "'bob' has 19 good ones" in p.reason] == list(range(46, 65))


def test_windows_line_ends_a_byte_order_mark_and_extra_fields_are_fine(tmp_path):
    text = (
        "\r\n".join([line("ann", f"Is {i} prime?", " Yes,\nit is. ", "No", source="web") for i in range(20)])
        + "\r\n"
    )
    (tmp_path / "pairs.jsonl").write_bytes(b"\xef\xbb\xbf" + text.encode())
    pairs, problems = read_pairs(tmp_path / "pairs.jsonl")
    assert problems == []
    assert pairs.iloc[0].tolist() == [1, "ann", "Is 0 prime?", "Yes,\nit is.", "No"]
    assert len(pairs) == 20


def test_a_file_without_a_good_line_gives_no_pairs_and_all_problems(tmp_path):
    pairs, problems = read_pairs(write(tmp_path / "pairs.jsonl", ["x", "y"]))
    assert pairs.empty
    assert [problem.line for problem in problems] == [1, 2]


def test_tables_of_a_worked_example():
    rows = [
        (1, "ann", "Tea or coffee?", "Tea.", "Coffee."),
        (2, "bob", "Tea or coffee?", "Coffee.", "Tea."),
        (3, "ann", "Sea?", "Yes.", "No."),
    ]
    tables = to_tables(pd.DataFrame(rows, columns=["line", "user", "prompt", "chosen", "rejected"]), seed=1)
    assert tables["personas"][["persona_id", "name", "tag"]].to_numpy().tolist() == [
        ["p01", "ann", "<special_person_tag_1>"],
        ["p02", "bob", "<special_person_tag_2>"],
    ]
    # both users label the first prompt: divergent, of nobody; the other is ann's own
    assert tables["questions"][["kind", "axis", "persona_id", "text"]].to_numpy().tolist() == [
        ["divergent", "imported", "", "Tea or coffee?"],
        ["personal", "personal", "p01", "Sea?"],
    ]
    labels = tables["preferences"]
    assert labels["chosen_id"][0] == labels["rejected_id"][1]
    assert labels["rejected_id"][0] == labels["chosen_id"][1]
    assert labels["question_id"][0] == labels["question_id"][1] != labels["question_id"][2]
    assert labels["pair_id"].is_unique
    # ann's two prompts go to different sides
    assert set(labels.loc[labels["persona_id"] == "p01", "split"]) == {"train", "test"}


@pytest.mark.parametrize("seed", range(25))
def test_law_a_prompt_has_one_split_and_each_user_gets_half(seed):
    rng = np.random.default_rng(seed)
    prompts = [f"Question {i}?" for i in range(80)]
    rows = [
        (0, f"user{u}", p, "Yes.", "No.")
        for u in range(6)
        for p in rng.choice(prompts, rng.integers(20, 60), replace=False)
    ]
    pairs = pd.DataFrame(rows, columns=["line", "user", "prompt", "chosen", "rejected"])
    pairs["line"] = range(len(pairs))
    labels = to_tables(pairs, seed)["preferences"]
    assert labels.groupby("prompt")["split"].nunique().max() == 1
    share = labels.groupby("persona_id")["split"].apply(lambda split: (split == "train").mean())
    assert share.between(0.35, 0.65).all()
    # ids don't depend on the order of lines or on other users
    fewer = to_tables(pairs[pairs["user"] != "user5"].iloc[::-1], seed)["preferences"]
    assert set(fewer["pair_id"]) == set(labels.loc[labels["persona_id"] != "p06", "pair_id"])
    pd.testing.assert_frame_equal(labels, to_tables(pairs, seed)["preferences"])


class Folder:
    """A run folder as far as import_into uses it."""

    def __init__(self, path, pairs, folds):
        self.path, self.tables, self.facts = path, {}, {}
        self.profile = SimpleNamespace(
            seed=17, data=SimpleNamespace(preferences=str(pairs)), training=SimpleNamespace(folds=folds)
        )

    def write(self, table, df):
        self.tables[table] = df

    def record(self, stage, **facts):
        self.facts[stage] = facts


def test_import_writes_tables_and_lists_problems(tmp_path, capsys):
    lines = [*good("ann"), *good("bob"), line("cy", rejected='a "quoted",\ttext'), b"caf\xe9"]
    store = Folder(tmp_path, write(tmp_path / "pairs.jsonl", lines), folds=2)
    import_into(store)
    assert set(store.tables) == {"personas", "questions", "preferences"}
    assert store.facts["import"] == {
        "path": str(tmp_path / "pairs.jsonl"),
        "users": 2,
        "pairs": 40,
        "lines_left_out": 2,
    }
    with (tmp_path / "import_problems.csv").open(newline="") as file:
        listed = list(csv.reader(file))
    assert listed[0] == ["line", "reason", "raw"]
    assert listed[1] == ["41", f"user with fewer than {MIN_PAIRS} pairs: 'cy' has 1 good ones", lines[40]]
    assert listed[2] == ["42", "not UTF-8: byte 4 is 0xe9", "caf\\xe9"]
    said = capsys.readouterr().out
    assert "40 pairs of 2 users" in said
    assert "1 x not UTF-8" in said


def test_fewer_users_than_folds_is_an_error_after_the_problems_are_written(tmp_path):
    store = Folder(tmp_path, write(tmp_path / "pairs.jsonl", [*good("ann"), "oops"]), folds=5)
    with pytest.raises(ValueError, match="1 users .* training.folds is 5"):
        import_into(store)
    assert "oops" in (tmp_path / "import_problems.csv").read_text()
    assert store.tables == {}
