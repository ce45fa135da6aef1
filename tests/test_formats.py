"""The formats that others write: found by their fields, read alike from every kind of file."""

import csv
import gzip
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from helpers import formats
from helpers.formats import DEMO, PAIRS, UGC, Row, detect, parse, units

TRL = {"user": "ann", "prompt": "Tea or coffee?", "chosen": "Tea.", "rejected": "Coffee."}


def shot(i):
    return {"prompt": f"Post {i}?", "chosen": f"Yes {i}.", "rejected": f"No {i}.", "Preference Direction": [0.5]}


def alignx(n=3, **more):
    return {"prompt": "Sea?", "chosen": "Yes.", "rejected": "No.", DEMO: "Likes the sea.", UGC: [],
            PAIRS: [shot(i) for i in range(n)]} | more


def said(role, text):
    return {"role": role, "content": text}


def answer(text, score, chosen=False, conversation="c1", interaction="i1", prompt="Why?", user="ann"):
    return {"user_id": user, "conversation_id": conversation, "interaction_id": interaction, "user_prompt": prompt,
            "model_response": text, "score": score, "if_chosen": chosen}


def save(path, rows):
    """The rows in the kind of file that the name says."""
    text = "".join(json.dumps(row) + "\n" for row in rows)
    if ".parquet" in path.name:
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif ".csv" in path.name:
        with (gzip.open if path.suffix == ".gz" else open)(path, "wt", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)
    else:
        text = json.dumps(rows, indent=1) if ".json" in path.suffixes else text
        path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.parquet", "a.jsonl.gz", "a.json.gz", "a.csv.gz"])
def test_every_kind_of_file_gives_the_same_rows(tmp_path, name):
    rows = [TRL | {"prompt": f"Line {i},\n\"quoted\"?", "note": i} for i in range(5)]
    path = save(tmp_path / name, rows)
    assert detect(path) == "trl"
    found = [parse(unit, "trl") for _, unit in units(path, "trl")]
    assert [row[:4] for row in found] == [("ann", f"Line {i},\n\"quoted\"?", "Tea.", "Coffee.") for i in range(5)]
    # a CSV row of two lines is numbered by its first, after the header
    numbers = [number for number, _ in units(path, "trl")]
    assert numbers == ([2, 4, 6, 8, 10] if "csv" in name else [1, 2, 3, 4, 5])


@pytest.mark.parametrize(("row", "form"), [
    (TRL, "trl"), (alignx(), "alignx"), (answer("A", 1), "prism"), ({"prompt": "a", PAIRS: []}, "alignx"),
    ({"chosen": [said("user", "a")], "rejected": []}, "trl")])
def test_the_format_is_found_by_the_fields_after_broken_lines(tmp_path, row, form):
    path = tmp_path / "a.jsonl"
    path.write_text(f"oops\n[1]\n{json.dumps(row)}\n")
    assert detect(path) == form


def test_conversations_as_trl_has_them():
    asked, one, two = said("user", "Tea?"), said("assistant", "Yes."), said("assistant", "No.")
    whole = {"user": 7, "chosen": [asked, one], "rejected": [asked, two]}  # the prompt stands in both answers alone
    assert parse(whole, "trl") == Row("7", "Tea?", "Yes.", "No.")
    assert parse(whole | {"prompt": [asked], "chosen": [one], "rejected": [two]}, "trl")[:4] == ("7", "Tea?", "Yes.", "No.")
    assert parse(whole | {"prompt": "Tea?"}, "trl")[:4] == ("7", "Tea?", "Yes.", "No.")  # as in ultrafeedback_binarized
    longer = [said("system", "Be brief."), asked, said("assistant", "Perhaps."), said("user", "Now?")]
    row = parse({"user": "ann", "chosen": [*longer, one], "rejected": [*longer, two]}, "trl")
    assert row.prompt == "System: Be brief.\n\nUser: Tea?\n\nAssistant: Perhaps.\n\nUser: Now?"
    with pytest.raises(ValueError, match=r"not a message: chosen\[0\]"):
        parse(TRL | {"chosen": ["Yes."], "rejected": ["No."]}, "trl")


def test_alignx_rows_bring_the_person():
    row = parse(alignx(), "alignx")
    assert (row.prompt, row.chosen, row.rejected, row.split) == ("Sea?", "Yes.", "No.", "test")
    assert row.history == (("Post 0?", "Yes 0.", "No 0."), ("Post 1?", "Yes 1.", "No 1."), ("Post 2?", "Yes 2.", "No 2."))
    assert row.description == "Likes the sea."
    # the same person in front: the same user, whatever is asked; another description: another user
    assert parse(alignx(prompt="Hills?"), "alignx").user == row.user != parse(alignx(**{DEMO: "?"}), "alignx").user
    comments = parse(alignx(**{DEMO: "", UGC: [{"prompt": "p", "comment": "So blue."}]}), "alignx")
    assert comments.description == "Wrote: So blue."


@pytest.mark.parametrize(("row", "reason"), [
    (alignx(n=2), "history too short: 2 pairs, expected 3 or more"),
    (alignx(**{PAIRS: [shot(0), shot(1), {"prompt": "a", "chosen": "b"}]}), "history: pair 3, missing field: rejected"),
    (alignx(**{PAIRS: [shot(0), "x", shot(1)]}), "history: pair 2 is str"),
    (alignx(chosen=""), "empty field: chosen"),
    (alignx(rejected="Yes."), "chosen equals rejected"),
])
def test_alignx_rows_that_are_left_out(row, reason):
    with pytest.raises(ValueError, match=reason):
        parse(row, "alignx")


def test_an_own_answer_in_the_own_history_is_told():
    long = "I would go to the sea every single day"  # nine words
    assert parse(alignx(chosen=long, **{UGC: [{"comment": f"Well: {long}."}]}), "alignx").told
    assert not parse(alignx(chosen="Yes 1."), "alignx").told  # two words may stand anywhere


def test_prism_answers_are_grouped_by_prompt_with_the_talk_before(tmp_path):
    rows = [answer("A", 90, True), answer("B", 20), answer("C", 40),
            answer("D", 55, True, interaction="i2", prompt="And?"), answer("E", 50, interaction="i2", prompt="And?"),
            answer("F", 10, conversation="c2", interaction="i3"), answer("G", 70, conversation="c2", interaction="i3"),
            answer("H", 5, conversation="c3", interaction="i4"),
            answer("I", 5, conversation="c4", interaction="i5"), answer("J", 5, True, conversation="c4", interaction="i5")]
    path = save(tmp_path / "utterances.csv", rows)  # numbers and booleans are texts there
    assert detect(path) == "prism"
    found = list(units(path, "prism"))
    assert [number for number, _ in found] == [2, 5, 7, 9, 10]
    assert parse(found[0][1], "prism")[:4] == ("ann", "Why?", "A", "B")  # the chosen one against the lowest
    second = parse(found[1][1], "prism")
    assert second[:4] == ("ann", "User: Why?\n\nAssistant: A\n\nUser: And?", "D", "E")
    assert parse(found[2][1], "prism")[2:4] == ("G", "F")  # nothing chosen: the highest score
    for at, reason in ((3, "one answer only"), (4, "no preference: the chosen answer's score is 5, the lowest 5")):
        with pytest.raises(ValueError, match=reason):
            parse(found[at][1], "prism")


def test_a_broken_prism_line_is_a_unit_of_its_own(tmp_path):
    path = tmp_path / "u.jsonl"
    path.write_text("\n".join([json.dumps(answer("A", 9)), "oops", json.dumps(answer("B", 1)), '{"user_prompt": "x"}']))
    found = list(units(path, "prism"))
    assert [number for number, _ in found] == [2, 4, 1]
    assert parse(found[2][1], "prism")[2:4] == ("A", "B")
    with pytest.raises(ValueError, match="not JSON"):
        parse(found[0][1], "prism")
    with pytest.raises(ValueError, match="missing field: model_response"):
        parse(found[1][1], "prism")


def test_an_array_is_read_piece_by_piece_and_up_to_what_is_broken(tmp_path, monkeypatch):
    monkeypatch.setattr(formats, "MAX_ROW", 2048)  # pieces of 128 characters
    path = tmp_path / "a.json"
    path.write_text(json.dumps([TRL | {"prompt": f"Question {i}" + "?" * i} for i in range(50)], indent=1))
    assert [parse(unit, "trl").prompt for _, unit in units(path, "trl")] == [f"Question {i}" + "?" * i for i in range(50)]
    path.write_text("[" + json.dumps(TRL) + ", {broken}, " + json.dumps(TRL) + "]")
    found = list(units(path, "trl"))
    assert [number for number, _ in found] == [1, 2]
    with pytest.raises(ValueError, match="not JSON: .*nothing after it in the array was read"):
        parse(found[1][1], "trl")
    path.write_text("[]")
    assert list(units(path, "trl")) == []


def test_csv_rows_that_are_too_long_or_too_short(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("user,prompt,chosen,rejected\nann,a,b,c,d\nann,a,b\nann,a,b,c\n")
    found = list(units(path, "trl"))
    with pytest.raises(ValueError, match="more cells than columns"):
        parse(found[0][1], "trl")
    with pytest.raises(ValueError, match="missing field: rejected"):
        parse(found[1][1], "trl")
    assert parse(found[2][1], "trl") == Row("ann", "a", "b", "c")


@pytest.mark.parametrize(("said_so", "split"), [("train", "train"), ("TEST", "test"), ("validation", "test"), ("?", "")])
def test_a_split_that_the_file_gives(said_so, split):
    assert parse(TRL | {"split": said_so}, "trl").split == split
