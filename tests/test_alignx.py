"""Who is asked what behind which text, on four people of the little world."""

import pandas as pd
from four_people import CFG

from helpers import alignx


def test_no_text_is_no_prefix_and_a_text_stands_before_the_question(four):
    asked = alignx.ask(four.preferences.iloc[:2], ["", "Likes figs."], "pba", "golden", "main", CFG)
    assert asked["head"].tolist() == ["", "Likes figs.\n"]
    assert asked["tail"].iloc[0] == f"Question: {four.preferences['prompt'].iloc[0]}\nAnswer:"


def test_half_of_the_axes_are_left_out_and_who_is_on_both_sides_does_neither():
    people = pd.DataFrame({"persona_id": ["a", "b", "c", "d"], "axes": [["x"], ["y"], ["x", "y"], ["x", "z"]]})
    assert alignx.novel_people(people) == (["x", "z"], ["b"], ["a", "d"])
    assert alignx.novel_people(people.iloc[:1]) == ([], ["a"], [])
