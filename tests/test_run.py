"""The runner executes what is stale, in order, with real kernels, and says clearly what went wrong."""

import json
import sys
import time
from pathlib import Path
from unittest.mock import patch

import nbformat
import psutil
import pytest
from nbformat.v4 import new_code_cell, new_notebook

from helpers import ROOT, artifacts, fingerprint, kernels, run
from helpers.artifacts import RunError, open_run
from helpers.schemas import STAGES, Stage

PARAMETERS = 'profile = "smoke"\nrun = ""\nseed = 17'
MINI = {"00_fold": Stage((), ("folds",)), "01_ask": Stage(("folds",), ("questions",))}
FOLD = """\
import sys
import pandas as pd
from pathlib import Path
from helpers.artifacts import open_run
store = open_run(profile, run, seed, runs=Path(RUNS))
store.write("folds", pd.DataFrame({"scheme": ["stratified"], "fold": [0], "persona_id": ["p01"]}))
print(sys.executable)"""
ASK = """\
import pandas as pd
from pathlib import Path
from helpers.artifacts import open_run
store = open_run(profile, run, seed, runs=Path(RUNS))
who = store.read("folds").persona_id
store.write("questions", pd.DataFrame({
    "question_id": "q1", "kind": "personal", "axis": "personal", "persona_id": who, "split": "train",
    "text": "Why?"}))"""


def write_notebook(root: Path, stem: str, code: str, parameters: str = PARAMETERS) -> None:
    cells = [new_code_cell(parameters, metadata={"tags": ["parameters"]}), new_code_cell(code)]
    notebook = new_notebook(cells=cells, metadata={"kernelspec": {
        "name": "python3", "display_name": "Python 3", "language": "python"}})
    nbformat.write(notebook, root / "notebooks" / f"{stem}.ipynb")


@pytest.fixture
def mini(tmp_path, monkeypatch):
    """A repository of two small notebooks, the second reading what the first makes, and an open run."""
    (tmp_path / "notebooks").mkdir()
    (tmp_path / "helpers").symlink_to(ROOT / "helpers")
    for module in (run, fingerprint, artifacts, kernels):
        monkeypatch.setattr(module, "ROOT", tmp_path)
    monkeypatch.setattr(artifacts, "RUNS", tmp_path / "runs")
    write_notebook(tmp_path, "00_fold", FOLD.replace("RUNS", repr(str(tmp_path / "runs"))))
    write_notebook(tmp_path, "01_ask", ASK.replace("RUNS", repr(str(tmp_path / "runs"))))
    with patch.dict(STAGES, MINI, clear=True):
        yield tmp_path


def executed(text: str) -> dict[str, bool]:
    """stem -> whether it was executed, from the runner's lines."""
    lines = [line.split() for line in text.splitlines() if line.startswith("[")]
    return {line[line.index(stem)]: "skipped" not in line for line in lines for stem in MINI if stem in line}


def test_a_run_is_executed_once_and_again_only_where_something_changed(mini, capsys):
    command = ["smoke", "--run", "t"]
    assert run.main(command) == 0
    assert executed(capsys.readouterr().out) == {"00_fold": True, "01_ask": True}
    store = open_run("smoke", "t")
    assert store.read("questions").persona_id.tolist() == ["p01"]
    assert "Why?" in (store.path / "notebooks" / "01_ask.html").read_text()
    facts = store.log()["stages"]["00_fold"]
    assert facts["wall_seconds"] > 0
    assert facts["peak_memory_mb"] > 20  # a Python with pandas needs more
    assert store.log()["profile"]["name"] == "smoke"
    printed = json.loads((store.path / "notebooks" / "00_fold.ipynb").read_text())["cells"][-1]["outputs"]
    assert printed[-1]["text"] == [sys.executable + "\n"]  # the kernel is this interpreter

    assert run.main(command) == 0
    assert executed(capsys.readouterr().out) == {"00_fold": False, "01_ask": False}

    store.file("questions").unlink()  # an output is gone: only its maker runs
    assert run.main(command) == 0
    assert executed(capsys.readouterr().out) == {"00_fold": False, "01_ask": True}

    assert run.main([*command, "--from", "1"]) == 0  # asked for by number: run although fresh
    assert executed(capsys.readouterr().out) == {"01_ask": True}


def test_the_next_kernel_has_imported_when_its_notebook_begins_and_none_is_left(mini, capsys):
    early = 'import sys\nprint("pandas" in sys.modules, "pd" in globals())'
    write_notebook(mini, "00_fold", f"{early}\n{FOLD.replace('RUNS', repr(str(mini / 'runs')))}")
    write_notebook(mini, "01_ask", f"{early}\n{ASK.replace('RUNS', repr(str(mini / 'runs')))}")
    assert run.main(["smoke", "--run", "t"]) == 0
    store = open_run("smoke", "t")
    cells = [json.loads((store.path / "notebooks" / f"{stem}.ipynb").read_text())["cells"][-1] for stem in MINI]
    assert [cell["outputs"][0]["text"][0] for cell in cells] == ["True False\n"] * 2
    assert [cell["execution_count"] for cell in cells] == [3, 3]
    assert not kernels_left()


def test_a_kernel_that_waits_is_used_unless_the_helpers_have_changed_or_it_has_died(mini):
    notebook, seen = mini / "notebooks" / "01_ask.ipynb", []
    with run._kernel_environment(open_run("smoke", "t")), kernels.Ahead() as ahead:
        for change in ("none", "none", "helpers", "death"):
            if change == "helpers":
                ahead.code = "other"
            if change == "death":
                psutil.Process(ahead.pid).kill()
                time.sleep(0.2)
            ahead.kernel = ahead.take(notebook)
            seen.append(ahead.pid)
    assert [a == b for a, b in zip(seen, seen[1:], strict=False)] == [True, False, False]
    assert not kernels_left()


def kernels_left() -> list[int]:
    return [child.pid for child in psutil.Process().children(recursive=True)
            if child.status() != psutil.STATUS_ZOMBIE and "ipykernel_launcher" in " ".join(child.cmdline())]


def test_a_page_that_cannot_be_written_is_an_error_and_its_notebook_not_fresh(mini, monkeypatch):
    monkeypatch.setattr(run, "_to_html", lambda notebook: (_ for _ in ()).throw(OSError(f"no room for {notebook.stem}")))
    with pytest.raises(OSError, match="no room for 00_fold"):
        run.run_stages(open_run("smoke", "t"), list(MINI))
    assert not run.is_fresh(open_run("smoke", "t"), "00_fold")


def test_a_failing_notebook_stops_the_run_with_the_cell_error_and_the_command_that_resumes(mini, capsys):
    write_notebook(mini, "00_fold", 'raise ValueError("no " + "folds")')
    assert run.main(["smoke", "--run", "t"]) == 1
    out, err = capsys.readouterr()
    assert executed(out) == {"00_fold": True}  # and the second was not begun
    assert "00_fold failed in cell [3]: ValueError: no folds" in err  # papermill injects a cell of its own
    assert "To resume: ./run_all.sh smoke --run t" in err
    assert not run.is_fresh(open_run("smoke", "t"), "00_fold")


def test_a_kernel_that_dies_is_a_failure(mini, capsys):
    write_notebook(mini, "00_fold", "import os\nos._exit(1)")  # as when memory runs out
    assert run.main(["smoke", "--run", "t"]) == 1
    assert "00_fold failed: its kernel died" in capsys.readouterr().err


def test_a_parameter_that_the_notebook_does_not_take_is_refused_before_anything_runs(mini, capsys):
    write_notebook(mini, "01_ask", "1", parameters='profile = "smoke"\nseed = 17')
    assert run.main(["smoke", "--run", "t"]) == 2
    out, err = capsys.readouterr()
    assert "01_ask.ipynb takes no parameter run, only profile, seed" in err
    assert executed(out) == {}


def test_a_missing_notebook_is_an_error(mini):
    (mini / "notebooks" / "01_ask.ipynb").unlink()
    with pytest.raises(RunError, match="no notebook .*01_ask.ipynb"):
        run.run_stages(open_run("smoke", "t"), list(MINI))


def test_a_stored_profile_is_kept_and_the_difference_is_said(mini, capsys):
    with patch.dict(STAGES, {}, clear=True):
        assert run.main(["smoke", "--run", "t", "--set", "training.epochs=5"]) == 0
        assert run.main(["smoke", "--run", "t"]) == 0
    said = "keeps training.epochs = 5 from its profile.yaml; the profile now says 1"
    assert said in capsys.readouterr().out
    assert open_run("smoke", "t").profile.training.epochs == 5


@pytest.mark.parametrize(("argv", "complaint"), [
    (["smoke", "--only", "77"], "no notebook 77; expected one of 00, 01, 02"),
    (["smoke", "--set", "judge.noise=1"], "did you mean world_knobs.noise"),
    (["nosuch"], "no profile nosuch"),
    (["smoke", "--run", "../elsewhere"], "cannot be a folder name"),
])
def test_a_wrong_command_line_is_explained(argv, complaint, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(artifacts, "RUNS", tmp_path)
    assert run.main(argv) == 2
    assert complaint in capsys.readouterr().err


def test_select():
    assert run.select() == list(STAGES)
    assert run.select(only="5,03") == ["03_responses", "05_prefixes"]  # in the order of the pipeline
    assert run.select(start="13") == ["13_alignment_tax", "14_alignx", "15_claims", "16_your_own"]
