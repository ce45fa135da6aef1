"""kill -9 at random moments of a smoke run: the final tables are an undisturbed run's, and nothing was paid for twice.

KILLS=20 (the default) is how often; the moments are drawn by a seed. Slow: a smoke run twice, and what is lost.
"""

import os
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from helpers import ROOT

KILLS = int(os.environ.get("KILLS", "20"))

def start(run: Path) -> subprocess.Popen:
    """The smoke profile as run `run.name`, its output kept apart."""
    return subprocess.Popen([sys.executable, "-B", "-m", "helpers.run", "smoke", "--run", run.name], cwd=ROOT,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
                            env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"})


def kill(process: subprocess.Popen) -> None:
    """-9 for the runner, its kernels and their workers, as when the machine is switched off."""
    everybody = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    for one in everybody:
        try:
            one.send_signal(signal.SIGKILL)
        except psutil.NoSuchProcess:
            continue
    process.wait()
    process.stdout.close()
    psutil.wait_procs(everybody, timeout=30)


def tables(run: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((run / "tables").glob("*.parquet"))}


def paid(run: Path) -> dict[str, tuple]:
    """Answers in the cache, by the fingerprint of the request, with the row number that says when each came."""
    with sqlite3.connect(f"file:{run / 'teacher.sqlite'}?mode=ro", uri=True) as db:
        return {key: (text, row) for key, text, row in db.execute("SELECT key, text, rowid FROM answers")}


@pytest.mark.slow
def test_kill_9_at_random_moments_changes_no_byte_and_pays_for_nothing_twice(tmp_path):
    whole, killed = (ROOT / "data" / "runs" / f"{tmp_path.name}-{name}" for name in ("whole", "killed"))
    began = time.perf_counter()
    first = start(whole)
    said, _ = first.communicate()  # read, or a full pipe would stop it
    assert first.returncode == 0, said[-3000:]
    rng, usual, kept = random.Random(17), time.perf_counter() - began, {}
    for number in range(KILLS):
        process = start(killed)
        try:
            process.communicate(timeout=max(2.0, rng.uniform(0, 2.5 * usual / KILLS) + usual / KILLS))
        except subprocess.TimeoutExpired:
            kill(process)
        if (killed / "teacher.sqlite").exists():
            now = paid(killed)
            # every answer that was there before this start is there still, in its place: it was not asked for again
            assert kept.items() <= now.items(), f"kill {number}"
            kept = now
    last = start(killed)
    said, _ = last.communicate()
    assert last.returncode == 0, said[-3000:]
    assert kept.items() <= paid(killed).items()
    assert tables(killed) == tables(whole)
    assert {key: text for key, (text, _) in paid(killed).items()} == {key: text for key, (text, _) in paid(whole).items()}
    for run in (whole, killed):
        shutil.rmtree(run)
