"""Lengths and distinctive words, worked by hand."""

import numpy as np
import pandas as pd
import pytest

from helpers import texts


def preferences():
    rows = [("p01", "a", "divergent", "diet", "one two three", "one two"),
            ("p01", "b", "personal", "personal", " one\ttwo\n", "one  two"),
            ("p02", "c", "divergent", "diet", "one", "one two three four")]
    return pd.DataFrame(rows, columns=["persona_id", "pair_id", "kind", "axis", "chosen", "rejected"])


def test_words_are_counted_between_white_space():
    # "one two three" against "one two": 3 - 2; tabs, line ends and double blanks make no words; 1 - 4 = -3.
    found = texts.pair_lengths(preferences())
    assert found["chosen"].tolist() == [3, 2, 1]
    assert found["rejected"].tolist() == [2, 2, 4]
    assert found["difference"].tolist() == [1, 0, -3]
    assert texts.lengths(pd.Series(["", "a b"])).tolist() == [0, 2]


def test_pairs_of_equal_length_say_nothing_about_length():
    found = texts.differing_lengths(texts.pair_lengths(preferences()))
    assert found.set_index("pair_id")["correct"].to_dict() == {"a": True, "c": False}


def explanations():
    rows = [("Ada likes an expert answer", "work"), ("an expert is asked, an expert answers", "work"),
            ("Bo likes a vegan answer", "diet"), ("a vegan answer for Bo", "diet")]
    return pd.DataFrame(rows, columns=["text", "axis"])


def test_the_words_of_one_group_are_found_and_shared_words_are_not():
    found = texts.distinctive_words(explanations()["text"], explanations()["axis"], drop=["Ada", "Bo"], top=1)
    assert found[["group", "word"]].to_records(index=False).tolist() == [("diet", "vegan"), ("work", "expert")]
    assert found[["share", "elsewhere", "n"]].to_numpy().tolist() == [[1, 0, 2], [1, 0, 2]]


def test_a_word_that_both_use_alike_is_nobodys():
    text, axis = pd.Series(["shared red", "shared red", "shared blue", "shared blue"]), pd.Series(["a", "a", "b", "b"])
    found = texts.distinctive_words(text, axis)
    assert found.groupby("group")["word"].agg(list).to_dict() == {"a": ["red"], "b": ["blue"]}
    # "shared" has idf 1 + ln(5/5) = 1, "red" 1 + ln(5/3) = 1.5108: red's share of the unit vector is .8339; none elsewhere
    assert found["weight"].to_numpy() == pytest.approx(1.5108 / np.hypot(1, 1.5108), abs=1e-4)


def test_names_are_left_out_whole_and_in_any_case():
    text = pd.Series(["MARA VENN wants soup", "Mara Venn wants soup", "he wants nuts", "he wants nuts"])
    found = texts.distinctive_words(text, pd.Series(["a", "a", "b", "b"]), drop=["Mara Venn"])
    assert set(found["word"]) == {"soup", "nuts"}


def test_rare_words_do_not_decide():
    text = pd.Series(["vegan"] * 60 + ["sport"] * 59 + ["once sport"])
    found = texts.distinctive_words(text, pd.Series(["a"] * 60 + ["b"] * 60))
    assert set(found["word"]) == {"vegan", "sport"}


def test_one_group_is_refused():
    with pytest.raises(ValueError, match="found .'a'., expected two or more"):
        texts.distinctive_words(pd.Series(["x y"]), pd.Series(["a"]))
