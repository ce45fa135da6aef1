"""One hash of all that a notebook's result depends on, so that what is fresh is not computed again.

That is: its code and that of the helpers it imports, profile, tables it reads, world, prompts, models.
"""

import ast
import hashlib
import json
import re
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from helpers import ROOT
from helpers.config import Profile, flatten
from helpers.schemas import STAGES

if TYPE_CHECKING:
    from helpers.artifacts import Store

# How a run is executed, not what it computes: a change of these makes nothing stale.
EXECUTION_ONLY = {
    "name", "training.workers", "training.executor", "training.checkpoint_steps", "training.report_to",
    "teacher.concurrency", "teacher.max_retries", "teacher.api_key_env", "teacher.budget_usd", "teacher.cache",
    "teacher.requests_per_minute", "teacher.tokens_per_minute", "teacher.timeout_seconds", "teacher.batch_api"}
BIG_FILE = 64 * 2**20  # bytes; a larger file is known by its size and time of change, not by its content


def fingerprint(store: "Store", stage: str, without: Iterable[str] = ()) -> str:
    """sha256 of all that a stage's result depends on; helper modules named in `without` are left out."""
    code = notebook_code(ROOT / "notebooks" / f"{stage}.ipynb")
    profile, helpers = flatten(store.profile.dump()), modules(code)
    parts = {
        "code": code,
        "helpers": {name: digest(ROOT / path) for name, path in helpers.items() if name not in without},
        "profile": {key: value for key, value in profile.items() if key not in EXECUTION_ONLY},
        "tables": {table: digest(store.file(table)) for table in STAGES[stage].reads},
        "data": inputs(store.profile),
    }
    if "helpers.tax" in helpers:
        parts["tasks"] = digest(ROOT / "data/tasks")
    if "helpers.bridges" in helpers:
        parts["alignx"] = digest(ROOT / "data/alignx")
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def inputs(profile: Profile) -> dict[str, str]:
    """Digests of what a run reads beside its tables; "" for what is not here, such as a model on the hub."""
    paths = {
        "world": profile.world and f"data/world/{profile.world}", "prompts": "data/prompts",
        "paper": "data/paper", "preferences": profile.data.preferences, "people": profile.data.people,
        "policy": profile.policy.path,
        "reward": profile.reward.path, "embedder": profile.embedder.path}
    return {name: digest(ROOT / path) for name, path in paths.items() if path}


def digest(path: Path) -> str:
    """sha256 of a file, or of all files of a folder with their names; "" if there is none."""
    files = sorted(path.rglob("*")) if path.is_dir() else [path]
    found = [(file, file.stat()) for file in files if file.is_file() and "__pycache__" not in file.parts]
    known = tuple((file, stat.st_size, stat.st_mtime_ns) for file, stat in found)
    return _digest(path, known) if known else ""


def notebook_code(path: Path) -> str:
    """The notebook's code, without the parameters that the run gives it and without magics."""
    cells = json.loads(path.read_text())["cells"]
    lines = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code").splitlines()
    return "\n".join(line for line in lines if not re.match(r"\s*[%!]|(profile|run|seed)\s*=", line))


def modules(code: str) -> dict[str, str]:
    """The helper modules that the code imports, and those that they import: dotted name -> path from ROOT."""
    found: dict[str, str] = {}
    waiting = [code]
    while waiting:
        for name in _imports(waiting.pop()) - found.keys():
            stem = name.replace(".", "/")
            for path in (f"{stem}.py", f"{stem}/__init__.py"):
                if (ROOT / path).exists():
                    found[name] = path
                    waiting.append((ROOT / path).read_text())
    return found


@lru_cache(maxsize=256)
def _digest(path: Path, files: tuple[tuple[Path, int, int], ...]) -> str:
    total = hashlib.sha256()
    for file, size, changed in files:
        content = f"{size} {changed}".encode() if size > BIG_FILE else file.read_bytes()
        total.update(f"{file.relative_to(path)} {hashlib.sha256(content).hexdigest()}\n".encode())
    return total.hexdigest()


def _imports(code: str) -> set[str]:
    """Every dotted name under helpers that the code may import; y of `from helpers import y` included."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return {name for name in names if name.startswith("helpers")}
