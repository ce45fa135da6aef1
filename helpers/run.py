"""The runner: executes the notebooks in order, skips what is fresh, ends with the claims and the report.

python -m helpers.run PROFILE [--run NAME] [--from NN] [--only NN,NN] [--set key=value]...   (or ./run_all.sh)
"""

import argparse
import os
import platform
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import papermill
import psutil
from ipykernel.kernelspec import write_kernel_spec
from nbclient.exceptions import DeadKernelError

from helpers import DATA, ROOT, kernels, preflight
from helpers.artifacts import RunError, Store, atomic, open_run, run_folder
from helpers.config import ConfigError, flatten, load_profile
from helpers.fingerprint import digest, fingerprint, inputs
from helpers.schemas import STAGES

VERSIONS = ("torch", "transformers", "trl", "peft", "openai", "sentence-transformers", "numpy", "pandas")
ANSI = re.compile(r"\x1b\[[0-9;]*m")


class NotebookFailed(RuntimeError):
    """A notebook that did not finish: says which, in which cell, and the cell's error."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the notebooks that the command line asks for. Returns 0, 1 (a failure) or 2 (usage)."""
    args = _arguments().parse_args(argv)
    try:
        stems, stored = select(args.only, args.start), run_folder(args.profile, args.run, args.set) / "profile.yaml"
        resume = stored.exists() and not args.set
        preflight.check(load_profile(stored if resume else args.profile, args.set))
        store = open_run(args.profile, args.run, sets=args.set)
        announce(store, args.profile if not args.set else None)
        run_stages(store, stems, force=bool(args.only or args.start))
    except (ConfigError, RunError, preflight.InputError) as error:
        print(error, file=sys.stderr)
        return 2
    except OSError as error:
        print(f"\n{error}\nA file of the run could not be written or read: see to it that there is room on the disk, then give "
              "the same command again. What is finished is kept.", file=sys.stderr)
        return 1
    except NotebookFailed as failure:
        print(f"\n{failure}\nTo resume: {_command(store)}", file=sys.stderr)
        return 1
    if "15_claims" in stems:
        conclude(store)
    return 0


def select(only: str = "", start: str = "") -> list[str]:
    """The stages numbered in `only` ("03,05"), or from number `start` on; all of them if both are empty."""
    numbers = {stem[:2]: stem for stem in STAGES}
    asked = [number.strip().zfill(2) for number in (only or start).split(",") if number.strip()]
    unknown = [number for number in asked if number not in numbers]
    if unknown:
        raise RunError(f"no notebook {', '.join(unknown)}; expected one of {', '.join(numbers)}")
    return [stem for n, stem in numbers.items() if not asked or (n in asked if only else n >= asked[0])]


def run_stages(store: Store, stems: Sequence[str], force: bool = False) -> None:
    """Execute the notebooks in order, one line each; a stage that is fresh is skipped unless forced.

    Raises RunError if a notebook is missing or takes none of the parameters, NotebookFailed if one fails.
    """
    stems = _import_pairs(store, stems) if store.profile.data.preferences else stems
    for stem in stems:
        check_parameters(_notebook(stem))
    absent, pages = {table for stem in stems for table in STAGES[stem].makes if not store.has(table)}, []
    with _kernel_environment(store), kernels.Ahead() as ahead, ThreadPoolExecutor(1) as aside:
        for number, stem in enumerate(stems, start=1):
            print(f"[{number:>2}/{len(stems)}] {stem:<22} ", end="", flush=True)
            if not force and is_fresh(store, stem) and not absent & set(STAGES[stem].makes):
                print("fresh, skipped", flush=True)
                continue
            facts = run_stage(store, stem, ahead, "".join(stems[number:number + 1]))
            pages.append(aside.submit(_to_html, store.path / "notebooks" / f"{stem}.ipynb"))
            print(f"{facts['wall_seconds']:7.1f} s {facts['peak_memory_mb']:7.0f} MB", flush=True)
    for page in pages:
        page.result()  # raises what went wrong


def run_stage(store: Store, stem: str, ahead: kernels.Ahead, following: str = "") -> dict[str, Any]:
    """Execute one notebook into the run folder; meanwhile the kernel of the following one starts.

    Returns what is recorded about it.
    """
    before = fingerprint(store, stem)
    store.record(stem, fingerprint="")  # until it has finished, it is not fresh
    (store.path / "notebooks" / f"{stem}.html").unlink(missing_ok=True)  # nor without its page, which is made later
    began, kernel = time.perf_counter(), ahead.take(_notebook(stem))
    if following:
        ahead.start(_notebook(following))
    with _peak_memory(besides=ahead.pid) as peak:
        _execute(store, stem, kernel)
    facts = {
        "fingerprint": before, "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        "wall_seconds": round(time.perf_counter() - began, 1), "peak_memory_mb": round(peak[0] / 2**20),
        "tables": {table: digest(store.file(table)) for table in STAGES[stem].makes}}
    store.record(stem, **facts)
    return facts


def is_fresh(store: Store, stem: str) -> bool:
    """Whether the stage ended well with the code, parameters and inputs of now, and its outputs are there."""
    recorded = store.log()["stages"].get(stem, {}).get("fingerprint")
    page = store.path / "notebooks" / f"{stem}.html"
    return recorded == fingerprint(store, stem) and page.exists() and all(map(store.has, STAGES[stem].makes))


def check_parameters(notebook: Path, given: Sequence[str] = ("profile", "run", "seed")) -> None:
    """Raise RunError if the notebook is missing or does not take a parameter: papermill would only warn."""
    if not notebook.exists():
        raise RunError(f"no notebook {notebook}, though helpers.schemas.STAGES lists it")
    known = papermill.inspect_notebook(notebook)
    unknown = [name for name in given if name not in known]
    if unknown:
        raise RunError(f"{notebook.name} takes no parameter {', '.join(unknown)}, only {', '.join(known)}")


def announce(store: Store, profile: str | None) -> None:
    """Say what runs, and where the run's stored profile differs from `profile`; note the provenance."""
    cfg = store.profile
    print(f"run {store.name} (profile {cfg.name}, seed {cfg.seed}) in {store.path}", flush=True)
    today = flatten((load_profile(profile) if profile else cfg).dump())
    for key, value in flatten(cfg.dump()).items():
        if today[key] != value:
            print(f"  keeps {key} = {value} from its profile.yaml; the profile now says {today[key]}")
    store.note(profile=cfg.dump(), commit=_commit(), python=platform.python_version(),
               machine=f"{platform.machine()} {platform.system()}, {os.cpu_count()} cores",
               versions={name: version(name) for name in VERSIONS}, inputs=inputs(cfg))


def conclude(store: Store) -> None:
    """Print the claims with their verdicts, write the report, and say where it is."""
    from helpers import claims, export, report  # draw: not needed before the end

    stamp = " (simulated world)" if store.profile.simulated else ""
    print(f"\nWhich findings of the paper did this run reproduce?{stamp}")
    for claim in claims.in_order(store.read("claims")).itertuples():
        interval = f"{claim.estimate:6.3f} [{claim.low:.3f}, {claim.high:.3f}] n={claim.n_people}"
        print(f"  {claim.verdict:<15} {interval:<29} {claim.statement}")
    print(f"\nReport: {report.write(store)}")
    print(f"Pairs for datasets.load_dataset: {export.write(store)}; a card stands beside each adapter in models/")


def _arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="./run_all.sh", description=__doc__.split("\n")[0])
    option, chosen = parser.add_argument, parser.add_mutually_exclusive_group()
    option("profile", help="smoke, laptop, gpu, paper, or the path of a .yaml file")
    option("--run", default="", metavar="NAME", help="folder in data/runs (default: named after the profile)")
    option("--set", action="append", default=[], metavar="key=value", help="override a value of the profile")
    chosen.add_argument("--from", dest="start", default="", metavar="NN", help="again from this notebook on")
    chosen.add_argument("--only", default="", metavar="NN,NN", help="these notebooks again, and no others")
    return parser


def _command(store: Store) -> str:
    """What resumes this run: its stored profile is the truth, so overrides need not be repeated."""
    name = store.profile.name
    shipped = (DATA / "profiles" / f"{name}.yaml").exists()
    return f"./run_all.sh {name if shipped else store.path / 'profile.yaml'} --run {store.name}"


def _notebook(stem: str) -> Path:
    return ROOT / "notebooks" / f"{stem}.ipynb"


def _import_pairs(store: Store, stems: Sequence[str]) -> list[str]:
    """Bring in the user's own pairs in place of notebooks 01 to 04. Returns the notebooks that remain."""
    from helpers import imported

    replaced = ("01_personas", "02_questions", "03_responses", "04_preferences")
    if any(stem > "01" for stem in stems):
        imported.import_into(store)
    return [stem for stem in stems if stem not in replaced]


def _execute(store: Store, stem: str, kernel: Any) -> None:
    """papermill, on this kernel, with a bar over the cells where somebody watches. Raises NotebookFailed."""
    target = store.path / "notebooks" / f"{stem}.ipynb"
    given = {"profile": store.profile.name, "run": store.name, "seed": store.profile.seed}
    bar = {"desc": stem, "leave": False} if sys.stderr.isatty() else False
    try:
        papermill.execute_notebook(
            _notebook(stem), target, given, kernel_name="python3", cwd=ROOT / "notebooks", progress_bar=bar,
            engine_name="ahead", km=kernel,
            shutdown_kernel="immediate")  # asked politely, ipykernel complains of its own pending tasks
    except papermill.PapermillExecutionError as error:
        trace = ANSI.sub("", "\n".join(error.traceback)).splitlines()[-12:]
        raise NotebookFailed("\n  | ".join([
            f"{stem} failed in cell [{error.exec_count}]: {error.ename}: {error.evalue}", *trace,
            f"The notebook up to there: {target}"])) from error
    except DeadKernelError as error:
        raise NotebookFailed(f"{stem} failed: its kernel died, most likely for want of memory") from error


def _to_html(notebook: Path) -> None:
    from nbconvert import HTMLExporter  # slow to import, and not needed when everything is fresh

    body, _ = HTMLExporter().from_filename(str(notebook))
    with atomic(notebook.with_suffix(".html")) as file:
        file.write_text(body, encoding="utf-8")


@contextmanager
def _kernel_environment(store: Store) -> Iterator[None]:
    """Kernels get this interpreter and these helpers, whatever else is installed on the machine."""
    models = (store.profile.policy.path, store.profile.reward.path, store.profile.embedder.path)
    settings = {"PYTHONHASHSEED": "0", "TQDM_MININTERVAL": "5",
                "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))}
    if all((ROOT / path).exists() for path in models):
        settings["HF_HUB_OFFLINE"] = "1"  # nothing to fetch: do not wait for a network that may not be there
    before = {key: os.environ.get(key) for key in (*settings, "JUPYTER_PATH")}
    with tempfile.TemporaryDirectory() as folder:
        write_kernel_spec(Path(folder) / "kernels" / "python3")
        os.environ.update(settings, JUPYTER_PATH=folder)
        try:
            yield
        finally:
            for key, value in before.items():
                os.environ.pop(key) if value is None else os.environ.update({key: value})


@contextmanager
def _peak_memory(besides: int | None, every_seconds: float = 0.5) -> Iterator[list[int]]:
    """Largest sum of resident bytes over the child processes but one; pages that they share count once for each."""
    peak, done = [0], threading.Event()

    def watch() -> None:
        while not done.wait(every_seconds):
            total = 0
            for child in psutil.Process().children(recursive=True):
                if child.pid == besides:
                    continue
                with suppress(psutil.NoSuchProcess):  # it may have ended since it was listed
                    total += child.memory_info().rss
            peak[0] = max(peak[0], total)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield peak
    finally:
        done.set()
        watcher.join()


def _commit() -> str:
    """The commit of this clone, with + for uncommitted changes; "" outside git."""
    try:
        head, changes = (
            subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=True).stdout
            for words in (["rev-parse", "HEAD"], ["status", "--porcelain"]))
    except (OSError, subprocess.CalledProcessError):
        return ""
    return head.strip() + ("+" if changes else "")


if __name__ == "__main__":
    sys.exit(main())
