"""Exercises: blanks made from solutions, and every solution passes the check of its own cell."""

import json

import nbformat
import pytest
from nbclient import NotebookClient

from helpers import ROOT, exercises
from helpers.artifacts import open_run

NOTEBOOKS = sorted(path.stem for path in exercises.NOTEBOOKS.glob("*.ipynb"))


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
def test_solutions_pass_their_checks(stem, monkeypatch):
    """In the run `smoke` of this clone, whose missing tables the notebook makes first."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))  # a kernel is a process of its own
    open_run("smoke")
    plain = json.loads((exercises.NOTEBOOKS / f"{stem}.ipynb").read_text())
    notebook = nbformat.reads(json.dumps(exercises.fill(plain, exercises.solutions(stem))), as_version=4)
    NotebookClient(notebook, timeout=1800, resources={"metadata": {"path": str(ROOT / "notebooks")}}).execute()
    solved = [cell for cell in notebook.cells if "exercise" in cell["metadata"].get("tags", ())]
    assert solved
    assert all(cell["execution_count"] and "# solution" in cell["source"] for cell in solved)
