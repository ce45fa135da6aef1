"""The sheet from the draw to the table, what is refused, and the paper's own Table 4."""

import pandas as pd
import pytest

from helpers import check_sheet, claims
from helpers.world import annotator
from helpers.world.facts import load_world

PERSONAS = pd.DataFrame([(f"p{i:02d}", f"Name {i}", ["diet", "music"] if i == 1 else ["diet"], f"says, \"{i}\"")
                         for i in range(1, 13)], columns=["persona_id", "name", "axes", "description"])
QUESTIONS = pd.DataFrame(
    [(f"q-{p}-{s}{i}", "personal", "personal", p, s, f"={p}, {s} {i}?") for p in PERSONAS["persona_id"]
     for s in ("train", "test") for i in range(7)]
    + [(f"q-{a}-{s}{i}", "divergent", a, "", s, f"{a} {s} {i}?") for a in ("diet", "music", "travel")
       for s in ("train", "test") for i in range(4)],
    columns=["question_id", "kind", "axis", "persona_id", "split", "text"])


@pytest.fixture
def sheet():
    return check_sheet.draw(PERSONAS, QUESTIONS, seed=3)


@pytest.fixture
def path(sheet, tmp_path):
    return check_sheet.write(sheet, tmp_path / "checks" / "questions.csv")


def fill(path, **values):
    """Rate everything 1, then put values as line1_validity="5" (line 0 is the first question)."""
    rows = pd.read_csv(path, dtype=str, keep_default_na=False).assign(validity="1", verifiable="1")
    for where, value in values.items():
        line, measure = where.removeprefix("line").split("_")
        rows.loc[int(line), measure] = value
    rows.to_csv(path, index=False)
    return rows


def test_ten_people_and_half_of_their_questions_personal(sheet):
    assert sheet["persona_id"].nunique() == 10
    counts = sheet.groupby(["persona_id", "kind"]).size().unstack()
    # 7 test questions of their own, of which 5; 4 of diet, all; p01 would have 8 of diet and music, of which 5
    assert set(counts["personal"]) == {5}
    assert set(counts["divergent"].drop("p01", errors="ignore")) == {4}
    assert sheet["question"].str.contains("test").all()
    assert not sheet.duplicated(["persona_id", "question_id"]).any()
    assert sheet[["validity", "verifiable"]].eq("").to_numpy().all()


def test_the_seed_decides_and_not_the_order_of_rows(sheet):
    again = check_sheet.draw(PERSONAS.iloc[::-1], QUESTIONS.iloc[::-1], seed=3)
    pd.testing.assert_frame_equal(sheet, again)
    assert not sheet.equals(check_sheet.draw(PERSONAS, QUESTIONS, seed=4))
    small = check_sheet.draw(PERSONAS, QUESTIONS, seed=3, n_people=2, n_questions=4)
    assert small.groupby(["persona_id", "kind"]).size().tolist() == [2, 2, 2, 2]


def test_an_empty_sheet_says_how_to_fill_it(path, sheet):
    with pytest.raises(check_sheet.SheetError, match=r"ratings are still empty.*1 \(definitely\).*any editor"):
        check_sheet.read(path, sheet)


def test_ratings_come_back_and_make_the_table(path, sheet):
    rows = fill(path, line0_validity="3", line1_verifiable=" 2.0 ")
    ratings = check_sheet.read(path, sheet)
    assert ratings.loc[[0, 1], ["validity", "verifiable"]].to_numpy().tolist() == [[3, 1], [1, 2]]
    table = check_sheet.table(ratings).set_index("name")
    first = table.loc[rows["name"][0]]  # five personal ratings: 3 1 1 1 1 and 1 2 1 1 1
    assert first.tolist() == pytest.approx([1.4, 1.2, 1.0, 1.0])
    assert table.loc["average", "personal, validity"] == pytest.approx(1.04)  # one of ten people has 1.4
    assert table.loc["stdev", "personal, validity"] == pytest.approx(0.4 / 10**0.5)  # sd of nine 0 and one .4


def test_the_papers_ratings_give_the_papers_last_rows():
    printed = claims.paper("Table 4")
    cells = printed.pivot(index=["person", "kind"], columns="measure", values="value").reset_index()
    table = check_sheet.table(cells[cells["person"] != "average"].rename(columns={"person": "name"})).set_index("name")
    last = printed[printed["person"] == "average"].set_index(["kind", "measure"])
    for kind, measure in last.index:
        assert table.loc["average", f"{kind}, {measure}"] == pytest.approx(last.loc[(kind, measure), "value"], abs=0.0051)
        assert table.loc["stdev", f"{kind}, {measure}"] == pytest.approx(last.loc[(kind, measure), "spread"], abs=0.0051)


@pytest.mark.parametrize("value", ["0", "4", "1.5", "x", "1,0"])
def test_values_off_the_scale_are_named_with_their_line(path, sheet, value):
    fill(path, line4_validity=value)
    with pytest.raises(check_sheet.SheetError, match=f"line 6: validity is '{value}', expected 1 .definitely."):
        check_sheet.read(path, sheet)


def test_missing_unknown_and_repeated_rows_are_refused(path, sheet):
    rows = fill(path)
    pd.concat([rows.iloc[2:], rows.iloc[[5]], rows.iloc[[0]].assign(question_id="q-mine")]).to_csv(path, index=False)
    with pytest.raises(check_sheet.SheetError, match="1 rows are unknown, such as p.. q-mine; 2 rows are missing.*"
                                                     "1 rows are repeated"):
        check_sheet.read(path, sheet)


def test_half_a_sheet_says_what_is_left(path, sheet):
    fill(path, line7_validity="", line9_verifiable="")
    with pytest.raises(check_sheet.SheetError, match=f"2 of {2 * len(sheet)} ratings are still empty"):
        check_sheet.read(path, sheet)


def test_a_spreadsheet_may_save_it_its_own_way(path, sheet):
    rows = fill(path)
    rows.to_csv(path, index=False, sep=";", encoding="utf-8-sig")
    assert check_sheet.read(path, sheet)["validity"].eq(1).all()
    rows.drop(columns="validity").to_csv(path, index=False)
    with pytest.raises(check_sheet.SheetError, match="no column validity"):
        check_sheet.read(path, sheet)


def test_ratings_are_never_written_over(path, sheet, capsys):
    fill(path, line0_validity="3")
    check_sheet.write(sheet, path)
    assert check_sheet.read(path, sheet)["validity"].iloc[0] == 3
    other = check_sheet.draw(PERSONAS, QUESTIONS, seed=4)
    check_sheet.write(other, path)
    (kept,) = path.parent.glob("questions-*.csv")
    assert kept.name in capsys.readouterr().out
    assert check_sheet.read(kept, sheet)["validity"].iloc[0] == 3
    with pytest.raises(check_sheet.SheetError, match="still empty"):
        check_sheet.read(path, other)
    check_sheet.write(sheet, path)  # nobody has rated the other one
    assert len(list(path.parent.glob("*.csv"))) == 2


def test_a_question_is_no_formula(path):
    own = pd.read_csv(path).query("kind == 'personal'")["question"]
    assert own.str.startswith("'=p").all()


def test_the_form_writes_every_click(path, sheet):
    form = check_sheet.form(path)
    number, shown, _, validity, _, verifiable = form.children
    assert "0 of" in shown.value
    validity.value, verifiable.value = "2", "3"
    number.value = 2
    assert validity.value is None
    assert "1 of" in shown.value
    validity.value = "1"
    number.value = 1
    assert (validity.value, verifiable.value) == ("2", "3")
    found = pd.read_csv(path, dtype=str, keep_default_na=False)
    assert found.loc[:1, ["validity", "verifiable"]].to_numpy().tolist() == [["2", "3"], ["1", ""]]


def test_the_form_escapes_what_a_model_wrote(tmp_path):
    questions = QUESTIONS.assign(text="<script>alert(1)</script>")
    path = check_sheet.write(check_sheet.draw(PERSONAS, questions, seed=1), tmp_path / "q.csv")
    assert "<script>" not in check_sheet.form(path).children[1].value


@pytest.fixture(scope="module")
def world():
    return load_world("little")


def rows_about(world, swap):
    """Every person's first personal question and an axis question; swapped: those of somebody unlike them."""
    rows, people = [], list(world.people.values())
    for person in people:
        others = [p for p in people if not set(p.hobbies) & set(person.hobbies)
                  and not set(dict(p.memberships)) & set(dict(person.memberships))]
        asker = others[0] if swap else person
        for kind, text in (("personal", world.personal_questions(asker)[0]),
                           ("divergent", world.divergent_questions(asker.memberships[0][0])[0])):
            rows.append((person.name, f"{kind} {person.name}", person.name, "", kind, "", text, "", ""))
    return pd.DataFrame(rows, columns=check_sheet.COLUMNS)


def test_an_annotator_who_knows_all_approves_own_questions_and_refuses_others(world):
    documented = {name for name, person in world.people.items() if person.documented == 1}
    for swap, rating in ((False, "1"), (True, "3")):
        rated = annotator.rate(world, rows_about(world, swap), knowledge=1.0, seed=2)
        known = rated[rated["name"].isin(documented)]
        assert set(known["validity"]) == set(known["verifiable"]) == {rating}
        assert set(rated["validity"]) == {rating, "2"}  # of the isles a third is on record


def test_an_annotator_who_knows_nothing_says_maybe_and_strangers_are_strangers(world):
    rated = annotator.rate(world, rows_about(world, False), knowledge=0.0, seed=2)
    assert set(rated["validity"]) == {"2"}
    stranger = rows_about(world, False).assign(name="Nobody At All")
    assert set(annotator.rate(world, stranger, knowledge=1.0, seed=2)["verifiable"]) == {"2"}
