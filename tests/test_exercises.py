"""Exercises: blanks made from solutions, and every solution passes the check of its own cell."""

import json
import textwrap

import nbformat
import pytest
from nbclient import NotebookClient

from helpers import ROOT, exercises
from helpers.artifacts import open_run

NOTEBOOKS = sorted(path.stem for path in exercises.NOTEBOOKS.glob("*.ipynb"))
WRONG = {  # answers that a student might give; for the others -1 is as wrong as anything
    "06_prompting": '("chosen", "chosen")', "10_prefix_sensitivity": '("unseen", "unseen_removed")', "11_equity": "62",
    "12_generation": "59", "13_alignment_tax": "20", "14_alignx": "3",
    "15_claims": '("mt tag divergent", "mt persona_gold divergent")', "16_your_own": "2",
}
REFUSED = """try:
{}
except AssertionError:
    print("refused")
else:
    raise RuntimeError("a wrong answer passes")"""


def wrongly(solved: str, answer: str) -> str:
    """The exercise with a wrong answer; the cell fails unless its check refuses it."""
    lines = solved.splitlines()
    last = max(i for i, line in enumerate(lines) if "# solution" in line)
    lines[last] = f"{lines[last].split(' = ')[0]} = {answer}"
    return REFUSED.format(textwrap.indent("\n".join(lines), "    "))


def test_a_marked_line_becomes_a_blank_and_keeps_its_hint():
    solved = "a = 1 + 2  # solution\nif a is not ...:\n    assert a == 3\nb = f(a)  # solution: call f\nc = 4"
    assert exercises.blank(solved) == "a = ...\nif a is not ...:\n    assert a == 3\nb = ...  # call f\nc = 4"


def test_a_cell_without_a_marked_line_is_refused():
    with pytest.raises(exercises.ExerciseError, match="# solution"):
        exercises.blank("a = 3")


def test_as_many_solutions_as_tagged_cells():
    notebook = {"cells": [{"metadata": {"tags": ["exercise"]}, "source": []}, {"metadata": {}, "source": ["b"]}]}
    filled = exercises.fill(notebook, ["x = ...\ny"])
    assert [cell["source"] for cell in filled["cells"]] == [["x = ...\n", "y"], ["b"]]
    with pytest.raises(exercises.ExerciseError, match="1 cells .* 2 solutions"):
        exercises.fill(notebook, ["x", "y"])


@pytest.mark.parametrize("stem", NOTEBOOKS)
def test_the_notebooks_hold_the_blanks_of_the_solutions(stem):
    notebook = json.loads((exercises.NOTEBOOKS / f"{stem}.ipynb").read_text())
    blanks = [exercises.blank(cell) for cell in exercises.solutions(stem)]
    assert blanks, f"{stem} has no exercise"
    tagged = [cell for cell in notebook["cells"] if "exercise" in cell["metadata"].get("tags", ())]
    assert ["".join(cell["source"]) for cell in tagged] == blanks


@pytest.mark.slow
@pytest.mark.parametrize("stem", NOTEBOOKS)
def test_the_checks_pass_solutions_and_refuse_wrong_answers(stem, monkeypatch):
    """In the run `smoke` of this clone, whose missing tables the notebook makes first."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))  # a kernel is a process of its own
    open_run("smoke")
    plain, solved = json.loads((exercises.NOTEBOOKS / f"{stem}.ipynb").read_text()), exercises.solutions(stem)
    notebook = nbformat.reads(json.dumps(exercises.fill(plain, solved)), as_version=4)
    for at in [i for i, cell in enumerate(notebook.cells) if "exercise" in cell["metadata"].get("tags", ())][::-1]:
        wrong = wrongly(notebook.cells[at]["source"], WRONG.get(stem, "-1"))
        notebook.cells.insert(at, nbformat.v4.new_code_cell(wrong, metadata={"tags": ["wrong"]}))
    NotebookClient(notebook, timeout=1800, resources={"metadata": {"path": str(ROOT / "notebooks")}}).execute()
    done = {tag: [cell for cell in notebook.cells if tag in cell["metadata"].get("tags", ())] for tag in ("exercise", "wrong")}
    assert len(done["exercise"]) == len(done["wrong"]) == len(solved) > 0
    assert all(cell["execution_count"] and "# solution" in cell["source"] for cell in done["exercise"])
    assert all(cell["outputs"][-1]["text"].endswith("refused\n") for cell in done["wrong"])
