"""The notebooks as texts: parameters, headers, links, no outputs, no definitions, short cells."""

import ast
import json
import re

import pytest

from helpers import ROOT
from helpers.schemas import STAGES

FOLDER = ROOT / "notebooks"
NOTEBOOKS = sorted(path.stem for path in FOLDER.glob("*.ipynb"))


def cells(stem: str, kind: str) -> list[dict]:
    notebook = json.loads((FOLDER / f"{stem}.ipynb").read_text())
    return [cell for cell in notebook["cells"] if cell["cell_type"] == kind]


def source(cell: dict) -> str:
    return "".join(cell["source"])


def test_every_stage_has_its_notebook():
    assert set(STAGES) <= set(NOTEBOOKS)


@pytest.mark.parametrize("stem", NOTEBOOKS)
def test_parameters_are_plain_and_the_same_everywhere(stem):
    tagged = [cell for cell in cells(stem, "code") if "parameters" in cell["metadata"].get("tags", [])]
    assert len(tagged) == 1
    values = {a.targets[0].id: ast.literal_eval(a.value) for a in ast.parse(source(tagged[0])).body}
    assert (values["profile"], values["run"], values["seed"]) == ("smoke", "", 17)


@pytest.mark.parametrize("stem", NOTEBOOKS)
def test_no_outputs_no_definitions_no_drawers(stem):
    for cell in cells(stem, "code"):
        assert cell["outputs"] == []
        assert cell["execution_count"] is None
        body = ast.parse(source(cell)).body
        assert not [node for node in body if isinstance(node, ast.FunctionDef | ast.ClassDef)]
        assert len(source(cell).splitlines()) <= 20, source(cell)[:80]


@pytest.mark.parametrize("stem", NOTEBOOKS)
def test_tables_and_sources_are_seen(stem):
    """Jupyter shows the last expression of a cell; one inside a block, or before others, has to be displayed."""
    for cell in cells(stem, "code"):
        tree = ast.parse(source(cell))
        lost = {node.value for node in ast.walk(tree) if isinstance(node, ast.Expr)} - {getattr(tree.body[-1], "value", None)}
        called = {ast.unparse(value.func) for value in lost if isinstance(value, ast.Call)}
        assert not called & {"show.table", "show.source", "HTML"}, source(cell)[:80]


@pytest.mark.parametrize("stem", NOTEBOOKS)
def test_the_title_asks_and_the_header_tells(stem):
    header = source(cells(stem, "markdown")[0])
    assert header.splitlines()[0].endswith("?")
    for field in ("Needs", "Reads", "Makes", "Time", "Paper"):
        assert f"**{field}**" in header or f"*{field}*" in header, field


@pytest.mark.parametrize("stem", [stem for stem in NOTEBOOKS if stem in STAGES])
def test_the_header_names_the_tables_of_its_stage(stem):
    header = source(cells(stem, "markdown")[0])
    for table in STAGES[stem].makes:
        assert f"`{table}`" in header, f"{stem} makes {table}; its header does not say so"


@pytest.mark.parametrize("stem", NOTEBOOKS)
def test_links_between_notebooks_lead_somewhere(stem):
    text = "\n".join(source(cell) for cell in cells(stem, "markdown"))
    linked = re.findall(r"\]\(([\w./]+\.ipynb)\)", text)
    assert linked
    assert [link for link in linked if not (FOLDER / link).exists()] == []
