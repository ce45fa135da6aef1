"""The label check: packs, pages, files and Table 6; the page itself is filled in by a real browser (slow)."""

import os
import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from markupsafe import escape
from sklearn.metrics import cohen_kappa_score

from helpers.annotation import (
    AnnotationError,
    alike,
    draw_packs,
    quiz,
    read_pack,
    simulate,
    table6,
    write_answers,
    write_pack,
)
from helpers.claims import paper
from tests.browser import Browser

NASTY = '</p><script>document.title = "owned"</script><img src=x onerror="document.title=1"> & "quoted"'


def cast(n=6):
    personas = pd.DataFrame({
        "persona_id": [f"p{i:02d}" for i in range(1, n + 1)], "name": [f"Person {i}" for i in range(1, n + 1)],
        "axes": [["diet"] if i % 2 else ["music", "diet"] for i in range(n)],
        "categories": [[f"d{i}"] if i % 2 else [f"m{i}", f"d{i}"] for i in range(n)],
        "description": [f"somebody who does {i}" for i in range(n)]})
    rows = [(f"{p}:q{i}", p, "personal" if i < 8 else "divergent", f"Question {i}?", f"good {p} {i}", f"bad {p} {i}",
             f"{p}{i}-good", f"{p}{i}-bad") for p in personas["persona_id"] for i in range(16)]
    columns = ["pair_id", "persona_id", "kind", "prompt", "chosen", "rejected", "chosen_id", "rejected_id"]
    return personas, pd.DataFrame(rows, columns=columns)


@pytest.fixture(name="packs")
def make_packs():
    personas, preferences = cast()
    return draw_packs(preferences, personas, seed=1)


def filled(packs, number=0, answers=None, annotator="ann", **changes):
    """A filled-in file of the page, by default all answered as the judge did."""
    pack = packs[packs["pack_id"] == packs["pack_id"].unique()[number]]
    given = list(pack["judge"]) if answers is None else answers
    return pd.DataFrame({"pack_id": pack["pack_id"], "annotator": annotator, "quiz_tries": 1, "pair_id": pack["pair_id"],
                         "answer": given} | changes)


def utility(preferences):
    good = preferences.rename(columns={"chosen_id": "response_id"}).assign(utility=1.0)
    bad = preferences.rename(columns={"rejected_id": "response_id"}).assign(utility=0.0)
    return pd.concat([good, bad])[["persona_id", "response_id", "utility"]]


def test_a_pack_is_half_personal_half_divergent_and_the_judges_answer_is_where_it_says(packs):
    assert packs.groupby("persona_id").size().tolist() == [10] * 5
    assert packs.groupby(["persona_id", "kind"]).size().unique().tolist() == [5]
    chosen = packs["first"].where(packs["judge"] == 1, packs["second"])
    chosen_id = packs["first_id"].where(packs["judge"] == 1, packs["second_id"])
    assert chosen.str.startswith("good").all()
    assert chosen_id.str.endswith("-good").all()
    assert 15 <= (packs["judge"] == 1).sum() <= 35  # of 50 fair coins


def test_the_pack_changes_with_the_seed_and_its_id_with_its_texts(packs):
    personas, preferences = cast()
    pd.testing.assert_frame_equal(draw_packs(preferences, personas, seed=1), packs)
    assert set(draw_packs(preferences, personas, seed=2)["pair_id"]) != set(packs["pair_id"])
    edited = draw_packs(preferences.assign(prompt="Another?"), personas, seed=1)
    assert not set(edited["pack_id"]) & set(packs["pack_id"])


def test_only_people_of_the_axes_are_drawn():
    personas, preferences = cast()
    assert set(draw_packs(preferences, personas, seed=1, axes=["music"])["persona_id"]) == {"p01", "p03", "p05"}


def test_the_quiz_asks_what_is_said_and_a_category_and_knows_the_right_option():
    said, category = quiz("p03", cast()[0], seed=1)
    assert said["options"][said["right"]] == "somebody who does 2"
    assert category["options"][category["right"]] == "m2"
    assert sorted(category["options"]) == ["m0", "m2", "m4"]  # the categories of that axis
    assert len(set(said["options"])) == 4


def test_the_page_escapes_texts_loads_nothing_and_does_not_tell_the_judges_choice(tmp_path):
    personas, preferences = cast()
    packs = draw_packs(preferences.assign(prompt=NASTY, chosen=NASTY), personas.assign(name=NASTY), seed=1)
    pack = packs[packs["persona_id"] == packs["persona_id"].iloc[0]]
    html = write_pack(pack, personas, tmp_path, 1, simulated=True).read_text()
    assert "<script>document.title" not in html
    assert "<img" not in html
    assert html.count("&lt;script&gt;document.title") >= 20
    plain = html.replace(escape(NASTY), "")  # its "src" is text
    assert not re.search(r"<[^>]*\s(src|href|srcset|action)\s*=|https?://|url\(|@import", plain)
    assert "default-src 'none'" in html
    assert not [i for i in (*pack["first_id"], *pack["second_id"]) if i in html]
    # exactly the same page for a judge who chose the others
    other = pack.assign(judge=3 - pack["judge"])
    assert write_pack(other, personas, tmp_path / "other", 1, simulated=True).read_text() == html


def test_files_come_back_as_ratings_and_zero_is_missing(packs, tmp_path):
    path = write_answers(filled(packs, answers=[1, 2, 0, 1, 2, 1, 1, 1, 1, 2]), tmp_path)
    ratings = read_pack([path], packs)
    assert path.name == f"{packs['pack_id'].iloc[0]}-ann.csv"
    assert ratings["answer"].tolist()[:2] == [1.0, 2.0]
    assert ratings["answer"].isna().tolist() == [False, False, True] + [False] * 7
    assert set(ratings["persona_id"]) == {packs["persona_id"].iloc[0]}
    assert read_pack([], packs).empty


@pytest.mark.parametrize(("change", "complaint"), [
    ({"pack_id": "p01-00000000"}, "made for the pack p01-00000000; this run's packs are p0"),
    ({"answer": 3}, r"off the scale: \['3'\], expected 1, 2, 0"),
    ({"answer": "left"}, r"off the scale: \['left'\]"),
    ({"annotator": ""}, "no name in the column annotator"),
    ({"annotator": "=cmd()"}, "no name in the column annotator"),
    ({"quiz_tries": 0}, r"quiz_tries: found \['0'\], expected whole numbers from 1 on"),
])
def test_what_is_wrong_in_a_file_is_named(packs, tmp_path, change, complaint):
    (tmp_path / "x.csv").write_text(filled(packs, **change).to_csv(index=False))
    with pytest.raises(AnnotationError, match=f"x.csv: .*{complaint}"):
        read_pack([tmp_path / "x.csv"], packs)


def test_missing_repeated_and_foreign_rows_are_named(packs, tmp_path):
    rows, path = filled(packs), tmp_path / "x.csv"
    cases = {"pairs missing: .*of 10": rows.iloc[:-1], "pairs more than once": pd.concat([rows, rows.iloc[:1]]),
             "not in the pack: .*'new'": pd.concat([rows, rows.iloc[:1].assign(pair_id="new")]),
             "more than one pack or annotator": pd.concat([rows, rows.assign(annotator="bo")]),
             "found 10 rows with the columns": rows.drop(columns="answer"), "found 0 rows": rows.iloc[:0]}
    for complaint, bad in cases.items():
        path.write_text(bad.to_csv(index=False))
        with pytest.raises(AnnotationError, match=complaint):
            read_pack([path], packs)
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(AnnotationError, match="not a CSV file"):
        read_pack([path], packs)


def test_one_name_fills_in_a_pack_once(packs, tmp_path):
    for name in ("a.csv", "b.csv"):
        (tmp_path / name).write_text(filled(packs).to_csv(index=False))
    with pytest.raises(AnnotationError, match="b.csv: ann filled in pack .* before, in a.csv"):
        read_pack(tmp_path.glob("*.csv"), packs)


def test_table_6_by_hand(packs, tmp_path):
    """One person; ann agrees with the judge on all ten, bo on seven, and with one that bo cannot tell."""
    pack = packs[packs["pack_id"] == packs["pack_id"].iloc[0]]
    judge = pack["judge"].to_numpy()
    bo = judge.copy()
    bo[:2] = 3 - bo[:2]
    bo[2] = 0
    files = [write_answers(filled(packs), tmp_path), write_answers(filled(packs, answers=bo, annotator="bo"), tmp_path)]
    table = table6(read_pack(files, packs), packs).set_index("measure")
    name = pack["name"].iloc[0]
    assert list(table.columns) == [name, "mean", "std"]
    assert table.loc["human_1", name] == 1.0
    assert table.loc["human_2", name] == pytest.approx(7 / 9)  # of the nine that bo could tell
    assert table.loc["average", name] == pytest.approx(8 / 9)
    kappa = cohen_kappa_score(judge[[0, 1, *range(3, 10)]], bo[[0, 1, *range(3, 10)]])
    assert table.loc["kappa_human_human", name] == pytest.approx(kappa)  # ann is the judge's copy
    assert table.loc["kappa_human_judge", name] == pytest.approx((1 + kappa) / 2)
    assert list(table.index) == ["human_1", "human_2", "average", "kappa_human_human", "kappa_human_judge",
                                 "krippendorff_alpha"]


def test_the_papers_own_means_follow_from_its_cells():
    """Its .78, .49, .51 and .51 are means over the five people, its spreads their std with ddof 1, as in `table6`."""
    cells = paper("Table 6")
    for _, rows in cells[cells["measure"].isin(["average", "kappa_human_human", "kappa_human_gpt4", "krippendorff_alpha"])
                         ].groupby("measure"):
        people, printed = rows[rows["person"] != "average"]["value"], rows[rows["person"] == "average"].iloc[0]
        assert people.mean() == pytest.approx(printed["value"], abs=0.0051)
        assert people.std() == pytest.approx(printed["spread"], abs=0.0051)


@pytest.mark.parametrize(("knowledge", "low", "high"), [(1.0, 1.0, 1.0), (0.0, 0.3, 0.7), (0.5, 0.6, 0.9)])
def test_simulated_annotators_know_as_much_as_they_are_told(packs, tmp_path, knowledge, low, high):
    """The better answer is the judge's: all 50 right with knowledge 1, half of them with 0, .75 with .5."""
    personas, preferences = cast()
    files = [write_answers(simulate(pack, utility(preferences), "simulated-1", knowledge, 1), tmp_path)
             for _, pack in packs.groupby("pack_id")]
    ratings = read_pack(files, packs)
    right = ratings.merge(packs[["pair_id", "judge"]]).eval("answer == judge").mean()
    assert low <= right <= high
    assert (ratings["quiz_tries"] == 1).all() or knowledge < 1


def test_pairs_that_are_worth_the_same_are_guessed_and_counted(packs):
    personas, preferences = cast()
    worth = utility(preferences).assign(utility=lambda u: u["utility"].where(u["persona_id"] > "p03", 1.0))
    people = packs["persona_id"]
    assert alike(packs, worth) == (people <= "p03").mean()  # the first people like everything the same
    pack = packs[people == people[people <= "p03"].iloc[0]]
    rates = [(simulate(pack, worth, "all-knowing", 1.0, seed)["answer"] == pack["judge"].to_numpy()).mean()
             for seed in range(40)]
    assert 0.4 < np.mean(rates) < 0.6  # 400 guesses: sd .025


@pytest.mark.slow
def test_a_pack_is_filled_in_by_keyboard_in_a_real_browser(tmp_path):
    """Name, one wrong quiz answer, the right ones, ten pairs by 1, 2 and 0 and one changed by arrow keys, save, read."""
    personas, preferences = cast()
    packs = draw_packs(preferences.assign(prompt=NASTY, chosen="long words " * 60 + NASTY), personas, seed=1)
    pack = packs[packs["pack_id"] == packs["pack_id"].iloc[0]]
    page, asked = write_pack(pack, personas, tmp_path, 1, simulated=True), quiz(pack["persona_id"].iloc[0], personas, 1)
    downloads = tmp_path / "downloads"
    downloads.mkdir()
    shots = Path(os.environ.get("LABEL_CHECK_SHOTS", tmp_path))
    with Browser(tmp_path / "chromium", downloads) as browser:
        browser.open(page)
        browser.press("Tab")
        assert browser.focused() == "input annotator"
        browser.type("ann_1")
        browser.press("Enter")  # the quiz is open: the focus goes to it, and the pairs stay hidden
        assert browser.focused() == "input quiz-1"
        browser.press(" ")
        browser.press("ArrowDown", asked[0]["right"])
        browser.press("Tab")
        assert browser.focused() == "input quiz-2"
        browser.press(" ")
        browser.press("ArrowDown", (asked[1]["right"] + 1) % len(asked[1]["options"]))
        browser.press("Enter")
        assert browser.focused() == "div about"
        assert browser.look("document.getElementById('pairs').hidden")
        browser.until("document.getElementById('quiz-problem').textContent.includes('1 of 2 not right')")
        browser.screenshot(shots / "label_check_quiz.png")
        back = Shift(browser)
        back.tab()  # to the button
        back.tab()  # to the second quiz question
        browser.press("ArrowDown", len(asked[1]["options"]) - 1)
        browser.press("Enter")
        assert browser.focused() == "fieldset pair"
        browser.screenshot(shots / "label_check_pair.png")
        keys = ["1", "2", "0", "1", "1", "2", "2", "1", "2", "1"]
        for i, key in enumerate(keys):
            browser.press(key)
            assert browser.look("document.getElementById('progress').textContent") == f"{i + 1} of 10 answered"
        assert browser.focused().startswith("button")
        back.tab()  # the choices of the last pair: 1 becomes 2
        assert browser.focused() == "input pair-10"
        assert browser.look("getComputedStyle(document.activeElement).outlineStyle") == "solid"
        browser.press("ArrowDown")
        browser.screenshot(shots / "label_check_last.png")
        browser.press("Tab")
        browser.press("Enter")
        assert browser.focused() == "h2 done"
        text = browser.look("document.getElementById('csv').value")
        saved = downloads / browser.look("document.getElementById('file').textContent")
        browser._wait(lambda: saved.stat().st_size)
        browser.screenshot(shots / "label_check_saved.png")
        assert browser.look("document.title").startswith("Label check")  # no text became code
        loaded = [e["params"]["request"]["url"] for e in browser.events if e["method"] == "Network.requestWillBeSent"]
        assert [url for url in loaded if not url.startswith(("file:", "blob:"))] == []
        assert [e for e in browser.events if e["method"] in ("Runtime.exceptionThrown", "Log.entryAdded")] == []
    assert saved.read_bytes().decode().replace("\r\n", "\n") == text.replace("\r\n", "\n")
    ratings = read_pack([saved], packs)
    expected = [1, 2, np.nan, 1, 1, 2, 2, 1, 2, 2]
    assert ratings.set_index("pair_id")["answer"][pack["pair_id"]].tolist() == pytest.approx(expected, nan_ok=True)
    assert set(ratings["annotator"]) == {"ann_1"}
    assert set(ratings["quiz_tries"]) == {2}


class Shift:
    """Tab backwards."""

    def __init__(self, browser: Browser):
        self.browser = browser

    def tab(self) -> None:
        about = {"key": "Tab", "code": "Tab", "windowsVirtualKeyCode": 9, "modifiers": 8}
        self.browser.send("Input.dispatchKeyEvent", type="rawKeyDown", **about)
        self.browser.send("Input.dispatchKeyEvent", type="keyUp", **about)
