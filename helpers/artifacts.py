"""The run folder: tables written atomically and schema-checked, and the record of how they were made.

data/runs/<run>/ holds tables/ notebooks/ figures/ models/ work/ and run.json, profile.yaml, report.html.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from helpers import ROOT
from helpers.config import Profile, load_profile
from helpers.fingerprint import fingerprint
from helpers.schemas import STAGES, TABLES, SchemaError, check, made_by

RUNS = ROOT / "data" / "runs"
DRAWING = tuple(f"helpers.{name}" for name in ("show", "figures", "claims", "measures", "printed"))
FOLDERS = ("tables", "notebooks", "figures", "models", "work")


class RunError(RuntimeError):
    """A run folder that does not fit what was asked of it."""


class MissingTable(FileNotFoundError):
    """A table that no notebook has made yet: says which one makes it, and the command."""


def open_run(profile: str, run: str = "", seed: int | None = None, sets: Sequence[str] = (),
             runs: Path | None = None) -> "Store":
    """The run folder of that name, made if need be; empty: the profile's name, and what the overrides change.

    A stored profile.yaml is the truth unless overrides are given. Raises RunError if name or seed disagree.
    """
    folder = run_folder(profile, run, sets, runs)
    stored = folder / "profile.yaml"
    if stored.exists() and not sets:
        store = Store(folder, load_profile(stored))
        store.expect(load_profile(profile).name if profile.endswith(".yaml") else profile, seed)
        return store
    resolved = load_profile(profile, [*sets, *([] if seed is None else [f"seed={seed}"])])
    for inner in FOLDERS:
        (folder / inner).mkdir(parents=True, exist_ok=True)
    with atomic(stored) as file:
        file.write_text(yaml.safe_dump(resolved.dump(), sort_keys=False))
    return Store(folder, resolved)


def run_folder(profile: str, run: str = "", sets: Sequence[str] = (), runs: Path | None = None) -> Path:
    """Where `open_run` has that run; nothing is made. Raises RunError for a name that cannot be a folder's."""
    name = run or _name(profile, sets)
    if not re.fullmatch(r"\w[\w.-]*", name):
        raise RunError(f"run {name!r} cannot be a folder name; use letters, digits, '-', '_' and '.'")
    return (runs or RUNS) / name


@dataclass(frozen=True)
class Store:
    """One run folder and its profile. Everything that notebooks hand to each other goes through here."""

    path: Path
    profile: Profile

    @property
    def name(self) -> str:
        return self.path.name

    def write(self, table: str, df: pd.DataFrame) -> Path:
        """Check, sort by the table's keys and write; equal rows give equal bytes. Returns the file."""
        df = check(table, df)
        spec = TABLES[table]
        ordered = df.sort_values(list(spec.keys), kind="stable", ignore_index=True)
        rows = pa.Table.from_pandas(ordered, spec.arrow, preserve_index=False)
        with atomic(self.file(table)) as file:
            pq.write_table(rows.replace_schema_metadata(None), file, compression="zstd", store_schema=False)
        return self.file(table)

    def merge(self, table: str, df: pd.DataFrame, by: Sequence[str] = ("method", "setting")) -> Path:
        """Write `df` in place of the rows that share a `by` combination with it; keep all others."""
        if self.has(table):
            by, old = list(by), self.read(table)
            new = set(df[by].itertuples(index=False, name=None))
            kept = [row not in new for row in old[by].itertuples(index=False, name=None)]
            df = pd.concat([old[kept], check(table, df)], ignore_index=True)
        return self.write(table, df)

    def read(self, table: str) -> pd.DataFrame:
        """All rows, schema-checked. Raises MissingTable naming the notebook and the command that make it."""
        if not self.has(table):
            makers = made_by(table)
            raise MissingTable(
                f"no table {table} in {self.path}; notebook {' or '.join(makers)} makes it: ./run_all.sh "
                f"{self.profile.name} --run {self.name} --only {','.join(stem[:2] for stem in makers)}")
        try:
            rows = pq.read_table(self.file(table)).to_pandas()
        except (pa.ArrowInvalid, OSError) as error:
            raise SchemaError(f"{self.file(table)} cannot be read ({error}): delete it and give the same command again; "
                              f"notebook {' or '.join(made_by(table))} then makes it anew") from None
        return check(table, rows)

    def has(self, table: str) -> bool:
        return self.file(table).exists()

    def file(self, table: str) -> Path:
        return self.path / "tables" / f"{table}.parquet"

    def missing(self, *tables: str) -> list[str]:
        """The notebooks that have to run for these tables, in order."""
        absent, todo = {table for table in tables if not self.has(table)}, set()
        for stem, stage in reversed(STAGES.items()):
            if absent & set(stage.makes):
                todo.add(stem)
                absent |= {table for table in stage.reads if not self.has(table)}
        return [stem for stem in STAGES if stem in todo]

    def require(self, *tables: str) -> None:
        """Run the earlier notebooks that make what is missing, so that any notebook works from a clone."""
        todo = self.missing(*tables)
        if not todo:
            return
        print(f"Not made yet in this run: running {', '.join(todo)} first.", flush=True)
        command = [sys.executable, "-m", "helpers.run", str(self.path / "profile.yaml"), "--run", self.name,
                   "--only", ",".join(stem[:2] for stem in todo)]
        # Line by line through print, because a notebook shows only what Python itself prints.
        streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        with subprocess.Popen(command, cwd=ROOT, text=True, **streams) as child:
            for line in child.stdout or ():
                print(line, end="", flush=True)
        if child.returncode:
            raise RunError(f"the notebooks before this one did not finish; to try again: {' '.join(command)}")

    def figure(self, fig: Any, name: str) -> Path:
        """Save a matplotlib figure as figures/<name>.png (150 dpi)."""
        path = self.path / "figures" / f"{name}.png"
        with atomic(path) as file:
            fig.savefig(file, dpi=150, format="png", bbox_inches="tight", metadata={"Software": None})
        return path

    def work(self, stage: str) -> Path:
        """Folder for finished units of a stage; emptied of what other code, profiles or inputs have made.

        What only draws or judges is left out of the comparison: a new colour retrains nothing.
        """
        folder = self.path / "work" / stage / fingerprint(self, stage, without=DRAWING)[:12]
        for other in folder.parent.glob("*"):
            if other != folder:
                shutil.rmtree(other)
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def log(self) -> dict[str, Any]:
        """run.json: commit, versions, profile, and what each stage recorded."""
        path = self.path / "run.json"
        try:
            return json.loads(path.read_text()) if path.exists() else {"run": self.name, "stages": {}}
        except ValueError as error:
            raise RunError(f"{path}: {error}: delete it; the stages are then run again from their finished units") from None

    def note(self, **facts: Any) -> None:
        """Merge facts about the run into run.json."""
        self._save(self.log() | facts)

    def record(self, stage: str, **facts: Any) -> None:
        """Merge facts about a stage into run.json."""
        log = self.log()
        log["stages"][stage] = log["stages"].get(stage, {}) | facts
        self._save(log)

    def expect(self, profile: str, seed: int | None) -> None:
        """Raise RunError if the run was made with another profile or seed."""
        found = {"profile": self.profile.name, "seed": self.profile.seed}
        asked = {"profile": profile, "seed": self.profile.seed if seed is None else seed}
        for key in found:
            if found[key] != asked[key]:
                other = f"{asked['profile']}-seed-{asked['seed']}"
                raise RunError(f"run {self.name} has {key} {found[key]}, not {asked[key]}; set {key} = "
                               f"{found[key]!r}, or another run, such as run = {other!r}")

    def _save(self, log: dict[str, Any]) -> None:
        with atomic(self.path / "run.json") as file:
            file.write_text(json.dumps(log, indent=1, default=str) + "\n")


@contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """A scratch file beside `path` that becomes `path` if the block succeeds, and vanishes if it does not."""
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield scratch
        os.replace(scratch, path)
    finally:
        scratch.unlink(missing_ok=True)


def _name(profile: str, sets: Sequence[str]) -> str:
    """laptop with training.epochs=3 is laptop-epochs-3: an experiment leaves alone what it departs from."""
    pairs = [text.partition("=") for text in sets]
    parts = [Path(profile).stem, *(f"{key.split('.')[-1]}-{value.split('/')[-1]}" for key, _, value in pairs)]
    return re.sub(r"[^\w.]+", "-", "-".join(parts)).strip("-")[:80]
