"""The blanks of the exercises, generated from their solutions: the two cannot drift apart.

notebooks/solutions/<notebook>.py has the solved cells, `# %%` before each. A line that ends in `# solution` becomes a
blank: what it assigns is replaced by `...`; words after `# solution:` stay as a hint. To write the blanks into the
notebooks: python -m helpers.exercises
"""

import json
import re
from pathlib import Path
from typing import Any

from helpers import ROOT

NOTEBOOKS = ROOT / "notebooks"
SOLVED = re.compile(r"^(\s*[\w, ]+?) = .*?  # solution(?:: (.*))?$")


class ExerciseError(ValueError):
    """Solutions and notebook do not fit together: says which cell, and what to do."""


def solutions(stem: str, folder: Path = NOTEBOOKS) -> list[str]:
    """The solved exercise cells of a notebook, in order; none if it has no exercise."""
    path = folder / "solutions" / f"{stem}.py"
    parts = path.read_text().split("# %%\n") if path.exists() else []
    return [part.strip() for part in parts if part.strip()]


def blank(solved: str) -> str:
    """The exercise as a student finds it. Raises ExerciseError where no line is marked as the solution."""
    if "# solution" not in solved:
        raise ExerciseError(f"no line ends in '# solution' in the cell {solved.splitlines()[0]!r}")
    return "\n".join(SOLVED.sub(_hide, line) for line in solved.splitlines())


def fill(notebook: dict[str, Any], cells: list[str]) -> dict[str, Any]:
    """The notebook with these sources in its cells tagged `exercise`, in order. Raises ExerciseError."""
    tagged = [cell for cell in notebook["cells"] if "exercise" in cell["metadata"].get("tags", ())]
    if len(tagged) != len(cells):
        raise ExerciseError(f"{len(tagged)} cells are tagged `exercise`, but there are {len(cells)} solutions")
    for cell, source in zip(tagged, cells, strict=True):
        cell["source"] = source.splitlines(keepends=True)
    return notebook


def main() -> None:
    """Write the blanks of every notebook."""
    for path in sorted(NOTEBOOKS.glob("*.ipynb")):
        notebook = fill(json.loads(path.read_text()), [blank(cell) for cell in solutions(path.stem)])
        path.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n")


def _hide(found: re.Match) -> str:
    target, hint = found.groups()
    return f"{target} = ..." + (f"  # {hint}" if hint else "")


if __name__ == "__main__":
    main()
