"""kill -9 at random moments of a smoke run: not a byte of a table changes, and nothing is paid for twice.

The teacher is a server in a process of its own, with books of its own, and the cache has to agree with them; it honours
idempotency keys, so what was on the wire at a kill is given again and not billed again. KILLS=20 is how
often: two in five while the teacher is asked, the others while pairs are scored and adapters trained. The moments are
drawn by a seed, from what an undisturbed run did when. Slow: a smoke run twice, and what is lost; KILL_STAGES=01,02,… and
KILL_SETS="key=value …" make it shorter.
"""

import json
import os
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from hashlib import sha256
from pathlib import Path

import psutil
import pytest
from test_llm_server import KEY, Server

from helpers import ROOT
from helpers.config import load_profile

KILLS = int(os.environ.get("KILLS", "20"))
STAGES, SETS = os.environ.get("KILL_STAGES", ""), os.environ.get("KILL_SETS", "").split()
LATE_SECONDS = 0.2  # of every answer, so that there is something on the wire to be lost
PATIENCE_SECONDS = 120.0  # a moment that was passed before its run began comes after so long
COMPUTED = ("06_prompting", "08_personal_models", "09_multitask", "10_prefix_sensitivity", "14_alignx")  # score and train
WORKERS = load_profile("smoke").training.workers
CONCURRENCY = load_profile("smoke").teacher.concurrency


PART = """
import sys
from helpers import run
from helpers.artifacts import open_run
name, stages, *sets = sys.argv[1:]
run.run_stages(open_run("smoke", name, sets=sets), run.select(stages))
"""


def start(run: Path, url: str) -> subprocess.Popen:
    """The smoke profile as run `run.name`, asking the server at `url`; what it says goes to a file beside the run."""
    sets = [f"teacher.base_url={url}", "teacher.model=gpt-4.1", "teacher.budget_usd=100", *SETS]
    words = ["-m", "helpers.run", "smoke", "--run", run.name, *(word for value in sets for word in ("--set", value))]
    words = ["-c", PART, run.name, STAGES, *sets] if STAGES else words
    with said(run).open("a") as log:
        return subprocess.Popen([sys.executable, "-B", *words], cwd=ROOT, stdout=log, stderr=log, start_new_session=True,
                                env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "OPENAI_API_KEY": KEY})


def said(run: Path) -> Path:
    return run.with_name(f"{run.name}.log")


def kill(process: subprocess.Popen) -> None:
    """-9 for the runner, its kernels and their workers, as when the machine is switched off."""
    everybody = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    for one in everybody:
        try:
            one.send_signal(signal.SIGKILL)
        except psutil.NoSuchProcess:
            continue
    process.wait()
    psutil.wait_procs(everybody, timeout=30)


def watch(process: subprocess.Popen, enough: Callable[[], bool]) -> bool:
    """Wait until it is enough; False where the process ends before."""
    while process.poll() is None:
        if enough():
            return True
        time.sleep(0.1)
    return False


def tables(run: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((run / "tables").glob("*.parquet"))}


def rows(run: Path, sql: str) -> list[tuple]:
    """Of the cache; none where the run has not made it yet."""
    try:
        with sqlite3.connect(f"file:{run / 'teacher.sqlite'}?mode=ro", uri=True) as db:
            return db.execute(sql).fetchall()
    except sqlite3.OperationalError:
        return []


def stored(run: Path) -> dict[str, tuple[str, str]]:
    """What the server calls a request -> key and text of its answer in the cache."""
    bodies = ((key, json.loads(request), text) for key, request, text in rows(run, "SELECT key, request, text FROM answers"))
    return {sha256(json.dumps([body["messages"], body["seed"]], sort_keys=True).encode()).hexdigest(): (key, text)
            for key, body, text in bodies}


def units(run: Path) -> dict[str, int]:
    """Finished units of work of all stages -> time of change, in nanoseconds."""
    found = (path for kind in ("*.parquet", "*.json", "*/done.json") for path in (run / "work").glob(f"*/*/{kind}"))
    return {str(path.relative_to(run / "work")): path.stat().st_mtime_ns for path in found if ".part" not in str(path)}


def progress(run: Path) -> tuple[int, int]:
    """(answers in the cache, units of scoring and training finished)."""
    answers = sum(n for (n,) in rows(run, "SELECT COUNT(*) FROM answers"))
    return answers, sum(name.startswith(COMPUTED) for name in units(run))


def stage(run: Path) -> str:
    """The notebook under way: it is recorded as not fresh until it has finished."""
    log = json.loads((run / "run.json").read_text())["stages"] if (run / "run.json").exists() else {}
    return next((stem for stem, facts in reversed(log.items()) if facts.get("fingerprint") == ""), "")


def moments(seen: list[tuple[int, int]], rng: random.Random) -> list[tuple[int, int, float]]:
    """(0: answers or 1: units, how many, seconds after them) of every kill, in the order in which a run gets there."""
    kinds = [int(number >= 2 * KILLS / 5) for number in range(KILLS)]
    drawn = [(kind, rng.randint(1, seen[-1][kind] - 1), rng.uniform(0, (LATE_SECONDS, 2.0)[kind])) for kind in kinds]
    return sorted(drawn, key=lambda moment: next(i for i, now in enumerate(seen) if now[moment[0]] >= moment[1]))


def due(run: Path, kind: int, count: int) -> Callable[[], bool]:
    """Says when so much is there and something new, answer or unit, has come since now."""
    before, end = progress(run), time.monotonic() + PATIENCE_SECONDS
    return lambda: (now := progress(run))[kind] >= count and (now != before or time.monotonic() > end)


@pytest.fixture
def server(tmp_path) -> Iterator[Server]:
    one = Server(tmp_path, late_seconds=LATE_SECONDS)
    yield one
    one.stop()


@pytest.fixture
def runs(tmp_path) -> Iterator[tuple[Path, Path]]:
    (ROOT / "data" / "runs").mkdir(exist_ok=True)
    two = tuple(ROOT / "data" / "runs" / f"{tmp_path.name}-{name}" for name in ("whole", "killed"))
    yield two
    for run in two:
        shutil.rmtree(run, ignore_errors=True)
        said(run).unlink(missing_ok=True)


@pytest.mark.slow
def test_kill_9_at_random_moments_changes_no_byte_and_pays_for_nothing_twice(server, runs):
    (whole, killed), seen = runs, []
    process = start(whole, server.url)
    watch(process, lambda: seen.append(progress(whole)))
    assert process.wait() == 0, said(whole).read_text()[-3000:]
    assert set(server.billed().values()) == {1}
    assert set(server.billed()) == set(stored(whole))
    print(f"undisturbed: {seen[-1]} answers and units", flush=True)
    opened, fell, had, done = len(server.books()), Counter(), {}, {}
    for kind, count, seconds in moments([*seen, progress(whole)], random.Random(17)):
        process, mark = start(killed, server.url), len(server.books())
        if not watch(process, due(killed, kind, count)):
            break  # it came to its end before the last moments did
        time.sleep(seconds)
        kill(process)
        fell[stage(killed)] += 1
        print(f"kill {sum(fell.values())} in {stage(killed)}: {progress(killed)}", flush=True)
        time.sleep(2 * LATE_SECONDS)  # the server answers those whose client is gone, too
        lost(killed, had, done, server.billed(mark))
        had, done = stored(killed), units(killed)
    process, mark = start(killed, server.url), len(server.books())
    assert process.wait() == 0, said(killed).read_text()[-3000:]
    lost(killed, had, done, server.billed(mark))
    bills, again = server.billed(opened), sum("replayed" in line for line in server.books()[opened:])
    print(f"{sum(fell.values())} kills: {dict(fell)}; {len(stored(killed))} answers, {again} of them given again; "
          f"{len(units(killed))} units")
    assert set(bills.values()) == {1}
    assert set(bills) == set(stored(killed))
    assert again <= CONCURRENCY * KILLS
    assert sum(fell[stem] for stem in COMPUTED) >= KILLS // 2
    assert tables(killed) == tables(whole)
    assert {asked: text for asked, (_, text) in stored(killed).items()} == {a: text for a, (_, text) in stored(whole).items()}


def lost(run: Path, had: dict, done: dict, asked: Counter) -> None:
    """Asserts that a kill took only what was under way, and that the start after it asked for nothing that was there."""
    assert had.items() <= stored(run).items()
    assert not had.keys() & asked.keys()
    assert done.items() <= units(run).items()  # with their times of change: nothing was computed again
    for grid in (run / "work").glob("*/*"):
        assert len([*grid.glob("*.part"), *grid.glob(".*")]) <= WORKERS
