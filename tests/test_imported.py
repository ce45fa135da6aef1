"""Reading pairs that nobody here wrote: every kind of broken line, and laws of the tables."""

import csv
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from synthetic import write_alignx

from helpers import ROOT, audit
from helpers.artifacts import open_run
from helpers.config import ConfigError, load_profile
from helpers.formats import DEMO, MAX_CHARS, PAIRS
from helpers.imported import MIN_PAIRS, import_into, left_out, pairs, read_people, scan, to_tables


def read_pairs(path, min_pairs=MIN_PAIRS):
    found = scan(path, min_pairs)
    return pairs(path, found), list(left_out(path, found, min_pairs))


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
    good_rows, problems = read_pairs(write(tmp_path / "pairs.jsonl", lines))
    found = {problem.line: problem for problem in problems}
    assert found[26].reason.startswith(reason)
    assert len(found[26].raw) >= len(broken)
    # the 30 good ones stay, but for the line that a contradictory one contradicts
    contradicted = [2] if "contradictory" in reason else []
    assert sorted(found) == [*contradicted, 26]
    assert len(good_rows) == 30 - len(contradicted)


def test_one_file_with_every_kind_of_broken_line(tmp_path):
    lines = [*good("ann", 30), "", *(broken for _, broken in BROKEN), *good("bob", 19), "  "]
    good_rows, problems = read_pairs(write(tmp_path / "pairs.jsonl", lines))
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
        "user with too few pairs",
    }
    # nothing is lost: each line that is not blank is either a good row or a problem (30 + 14 + 19 lines)
    assert len(good_rows) + len(problems) == 30 + len(BROKEN) + 19
    assert not set(good_rows["line"]) & {problem.line for problem in problems}
    # ann's 30 but for line 2; bob's 19 are too few and listed with the count
    assert good_rows["user"].tolist() == ["ann"] * 29
    assert [p.line for p in problems if "'bob' has 19 good ones" in p.reason] == list(range(46, 65))


def test_windows_line_ends_a_byte_order_mark_and_extra_fields_are_fine(tmp_path):
    text = (
        "\r\n".join([line("ann", f"Is {i} prime?", " Yes,\nit is. ", "No", source="web") for i in range(20)])
        + "\r\n"
    )
    (tmp_path / "pairs.jsonl").write_bytes(b"\xef\xbb\xbf" + text.encode())
    good_rows, problems = read_pairs(tmp_path / "pairs.jsonl")
    assert problems == []
    assert good_rows.iloc[0].tolist() == [1, "ann", "Is 0 prime?", "Yes,\nit is.", "No", "", ""]
    assert len(good_rows) == 20


def test_a_file_without_a_good_line_gives_no_pairs_and_all_problems(tmp_path):
    good_rows, problems = read_pairs(write(tmp_path / "pairs.jsonl", ["x", "y"]))
    assert good_rows.empty
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


def opened(tmp_path, path, *sets):
    """A run folder of the smoke profile for these pairs."""
    return open_run("smoke", "own", sets=[f"data.preferences={path}", *sets], runs=tmp_path)


def test_import_writes_tables_and_lists_problems(tmp_path, capsys):
    lines = [*good("ann"), *good("bob"), line("cy", rejected='a "quoted",\ttext'), b"caf\xe9"]
    store = opened(tmp_path, write(tmp_path / "pairs.jsonl", lines))
    import_into(store)
    assert [len(store.read(table)) for table in ("personas", "questions", "preferences")] == [2, 40, 40]
    facts = store.log()["stages"]["import"]
    assert {key: facts[key] for key in ("format", "users", "pairs", "rows_left_out")} == {
        "format": "trl", "users": 2, "pairs": 40, "rows_left_out": 2}
    with (store.path / "import_problems.csv").open(newline="") as file:
        listed = list(csv.reader(file))
    assert listed[0] == ["line", "reason", "raw"]
    assert listed[1] == ["41", f"user with too few pairs: 'cy' has 1 good ones, expected {MIN_PAIRS}", lines[40]]
    assert listed[2] == ["42", "not UTF-8: byte 4 is 0xe9", "caf\\xe9"]
    said = capsys.readouterr().out
    assert "format trl, 40 good pairs of 2 users; 2 rows left out" in said
    assert "can't be read: not UTF-8: 1 of 42" in said


def test_the_same_files_are_imported_once(tmp_path, capsys):
    path = write(tmp_path / "pairs.jsonl", [*good("ann"), *good("bob")])
    import_into(opened(tmp_path, path))
    capsys.readouterr()
    import_into(opened(tmp_path, path))
    assert capsys.readouterr().out == ""
    write(path, [*good("ann"), *good("bob", 30)])
    import_into(store := opened(tmp_path, path))
    assert len(store.read("preferences")) == 50


def test_fewer_users_than_folds_is_an_error_after_the_problems_are_written(tmp_path):
    store = opened(tmp_path, write(tmp_path / "pairs.jsonl", [*good("ann"), "oops"]), "training.folds=5")
    with pytest.raises(ValueError, match="1 users .* training.folds is 5"):
        import_into(store)
    assert "oops" in (store.path / "import_problems.csv").read_text()
    assert not store.has("preferences")


def test_at_most_so_many_users_are_drawn_whatever_their_order(tmp_path):
    users = [good(f"user{i}") for i in range(12)]
    paths = [write(tmp_path / name, sum(part, [])) for name, part in (("a.jsonl", users), ("b.jsonl", users[::-1]))]
    drawn = [set(pairs(path, scan(path), limit=5, seed=3)["user"]) for path in paths]
    assert drawn[0] == drawn[1]
    assert len(drawn[0]) == 5
    assert set(pairs(paths[0], scan(paths[0]), limit=5, seed=4)["user"]) != drawn[0]


def test_leaks_between_given_splits_are_left_out(tmp_path):
    rows = [line("ann", f"Train {i}?", split="train") for i in range(4)]
    rows += [line("ann", "Test?", split="test"), line("ann", "Train 0 !", split="test"),
             line("bob", "Train 1?", chosen="Another.", split="test"), line("bob", "Only?", split="train")]
    path = write(tmp_path / "a.jsonl", rows)
    # 6: a question that ann trains on, but for case and punctuation; 7: the prompt and an answer are trained on (bob is
    # left with one row to train on, and none to test on)
    _, problems = read_pairs(path, min_pairs=2)
    assert [(p.line, p.reason.split(":")[0]) for p in problems] == [
        (6, "leak"), (7, "leak"), (8, "user with too few pairs")]
    kept, _ = read_pairs(path, min_pairs=2)
    labels = to_tables(kept, seed=1)["preferences"]
    assert labels["split"].tolist() == ["train"] * 4 + ["test"]


def test_a_prompt_on_both_sides_is_nobodys_shared_question():
    rows = pd.DataFrame([("ann", "Tea?", "Yes.", "No.", "train"), ("bob", "Tea?", "Ja.", "Nein.", "test"),
                         ("ann", "Sea?", "Yes.", "No.", "test"), ("bob", "Sea?", "No.", "Yes.", "test")],
                        columns=["user", "prompt", "chosen", "rejected", "split"])
    tables = to_tables(rows, seed=1)
    assert tables["preferences"]["kind"].tolist() == ["personal", "personal", "divergent", "divergent"]
    assert tables["questions"]["split"].tolist() == ["train", "test", "test"]


def test_prompts_that_differ_in_case_alone_have_one_split():
    rows = [("ann", f"Question {i}?", "Yes.", "No.") for i in range(10)]
    rows += [("ann", f"QUESTION {i}", "Yes.", "No.") for i in range(10)]
    labels = to_tables(pd.DataFrame(rows, columns=["user", "prompt", "chosen", "rejected"]), seed=1)["preferences"]
    assert labels["split"].tolist()[:10] == labels["split"].tolist()[10:]
    assert audit.audit(labels)["status"].ne("stop").all()


def test_people_of_a_csv_bring_names_descriptions_and_groups(tmp_path, capsys):
    path = write(tmp_path / "pairs.jsonl", [*good("ann"), *good("bob"), *good("cy")])
    people = tmp_path / "people.csv"
    people.write_text("user,name,description,region\nann,Ann Lee,Likes beans.,north\nbob,,Hunts.,\n")
    store = opened(tmp_path, path, f"data.people={people}")
    assert store.profile.prefixes.names == ("none", "tag", "few_shot", "persona_gold", "name")
    import_into(store)
    got = store.read("personas")[["name", "description", "demographics"]].to_numpy().tolist()
    assert got == [["Ann Lee", "Likes beans.", '{"region": "north"}'], ["bob", "Hunts.", '{"region": "unknown"}']]
    assert "1 users left out:" in capsys.readouterr().out  # cy has no description
    people.write_text("who\nann\n")
    with pytest.raises(ValueError, match="no column user, persona_id or user_id, only who"):
        read_people(people)
    people.write_text("user\nann\nann\n")
    with pytest.raises(ValueError, match="'ann' is there twice"):
        read_people(people)
    with pytest.raises(ConfigError, match="data.people: no .*; expected a CSV"):
        load_profile("smoke", [f"data.preferences={path}", "data.people=absent.csv"])


def test_alignx_rows_become_people_with_a_history(tmp_path):
    path = tmp_path / "alignx.jsonl"
    write_alignx(path, 40)
    store = opened(tmp_path, path, f"data.people={path}", "data.users=10")
    import_into(store)
    labels, personas = store.read("preferences"), store.read("personas")
    # each brings four pairs to train on and one to be tested on, and a description of its own
    assert labels.groupby("persona_id")["split"].value_counts().unstack().to_numpy().tolist() == [[1, 4]] * 10
    assert personas["description"].str.match(r"Person \d+ likes path \d\.").all()
    assert audit.audit(labels)["status"].ne("stop").all()


def test_a_json_array_with_bad_rows_keeps_the_good_ones(tmp_path):
    path = tmp_path / "alignx.json"
    write_alignx(tmp_path / "lines.jsonl", 30)
    rows = [json.loads(one) for one in (tmp_path / "lines.jsonl").read_text().splitlines()]
    rows[4]["chosen"], rows[7][PAIRS] = "", rows[7][PAIRS][:1]
    del rows[9]["prompt"], rows[11][DEMO]
    path.write_text(json.dumps(rows))
    _, problems = read_pairs(path)
    found = {problem.line: problem.reason for problem in problems}
    assert found[5] == "empty field: chosen"
    assert found[8].startswith("history too short: 1 pairs")
    assert found[10] == "missing field: prompt"
    assert 12 not in found  # nobody has to be described
    assert len(found) <= 3 + 3  # and the three that the generator planted


MEASURE = """
import re, sys
from pathlib import Path
from helpers import audit, imported
path = sys.argv[1]
found = imported.scan(path)
report = audit.of_file(found).set_index("check")
listed = sum(1 for _ in imported.left_out(path, found))
people = imported.pairs(path, found, limit=1000)["user"].nunique()
print(*report["found"].reindex(sys.argv[2:]).tolist(), report["of"].iloc[-1], listed, people)
print(int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) / 1024)
"""
CHECKS = ["row repeated", "test prompt with answer trained on", "test answer in the person's history",
          "longer answer wins (characters)"]


needs_proc = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc")


def measured(path, n, parquet=False):
    """What is planted, what a process of its own finds, and its peak memory in MiB.

    (VmHWM: what getrusage tells includes the peak of the process that started it.)
    """
    planted = write_alignx(path, n)
    if parquet:
        import pyarrow.json as pj
        import pyarrow.parquet as pq
        pq.write_table(pj.read_json(path), path := path.with_suffix(".parquet"), row_group_size=5000)
    out = subprocess.run([sys.executable, "-c", MEASURE, str(path), *CHECKS], cwd=ROOT,
                         capture_output=True, text=True, check=True)
    counts, memory = out.stdout.strip().splitlines()[-2:]
    return planted, [int(float(count)) for count in counts.split()], float(memory)


@needs_proc
@pytest.mark.parametrize("parquet", [False, True])
def test_planted_flaws_are_found_exactly(tmp_path, parquet):
    planted, found, memory = measured(tmp_path / "a.jsonl", 2_000 if parquet else 20_000, parquet)
    # the next row's history is what leaks, so every plant is found once; the rest is good
    assert found == [planted.copies, planted.leaks, planted.told, planted.longer, planted.good,
                     planted.copies + planted.leaks + planted.told, min(1000, planted.good)]
    assert memory < 500


@needs_proc
@pytest.mark.slow
def test_a_million_rows_in_bounded_memory(tmp_path):
    planted, found, memory = measured(tmp_path / "a.jsonl", 1_000_000)
    assert found[:5] == [planted.copies, planted.leaks, planted.told, planted.longer, planted.good]
    assert memory < 1000
