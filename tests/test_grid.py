"""Units side by side: every one once, results in order, whatever ran them."""

import os
import subprocess
import sys
import time
from functools import partial

import numpy as np
import psutil
import pytest

from helpers import ROOT, grid

HELD = []


@pytest.mark.parametrize("executor", ["sequential", "loky"])
def test_results_come_in_the_order_of_the_units(executor, capsys):
    units = [partial(pow, i, 2) for i in (3, 1, 2)]
    assert grid.run_units(units, 2, executor, desc="squares", finished=2) == [9, 1, 4]
    assert "5/5" in capsys.readouterr().err


def test_processes_are_others_of_one_thread_and_stay_for_the_next_grid():
    first, second = (grid.run_units([_who] * 4, 2) for _ in range(2))
    pids = {pid for pid, _, _ in first + second}
    assert os.getpid() not in pids
    assert len(pids) <= 2
    assert {threads for _, threads, _ in first + second} == {"1"}


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="no affinity here")
def test_workers_that_fill_the_machine_have_a_core_each():
    cores = grid._cores()
    pinned = {pid: allowed for pid, _, allowed in grid.run_units([_who] * 4 * cores, cores)}
    assert {len(allowed) for allowed in pinned.values()} == {1}
    assert len(set(pinned.values())) == len(pinned)
    more = grid.run_units([_who] * 4, cores + 1)
    assert {len(allowed) for _, _, allowed in more} == {1}


def test_fewer_workers_than_cores_are_free(monkeypatch):
    monkeypatch.setattr(grid, "_cores", lambda: 99)
    allowed = {allowed for _, _, allowed in grid.run_units([_who] * 4, 2)}
    assert len(allowed) == 1


def test_a_worker_that_has_grown_goes_on():
    """loky would end it: it holds 400 MB more after its second unit than after its first."""
    pids = grid.run_units([partial(_grow, megabytes) for megabytes in (1, 1, 400, 400, 1, 1)], 2)
    assert len(set(pids)) == 2


@pytest.mark.skipif(not hasattr(os, "killpg"), reason="no process groups here")
def test_workers_end_with_the_notebook():
    """A kernel leads a process group, which is killed as a whole: no worker stays behind with its memory."""
    code = ("import os; from tests.test_grid import _who; from helpers import grid\n"
            "print(*{unit[0] for unit in grid.run_units([_who] * 4, 2)}, flush=True); os.killpg(0, 9)")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False,
                          start_new_session=True)
    assert done.returncode == -9
    assert done.stdout, done.stderr
    time.sleep(0.2)
    left = [psutil.Process(pid) for pid in map(int, done.stdout.split()) if psutil.pid_exists(pid)]
    assert {process.status() for process in left} <= {psutil.STATUS_ZOMBIE}  # dead, if not yet cleared away


def test_nothing_to_do_starts_nothing():
    assert grid.run_units([], 2) == []


@pytest.mark.parametrize("executor", ["sequential", "loky"])
def test_a_unit_that_fails_says_so(executor):
    with pytest.raises(ZeroDivisionError):
        grid.run_units([partial(divmod, 1, 0)], 1, executor)


@pytest.mark.slow
def test_a_local_ray_cluster():
    """The same call, results in order, one thread each; in a process of its own, whose warnings are Ray's affair."""
    pytest.importorskip("ray")
    code = ("from tests.test_grid import _who; from functools import partial; from helpers import grid\n"
            "found = grid.run_units([partial(pow, i, 2) for i in range(5)] + [_who], 2, 'ray')\n"
            "import os; print(found[:5], found[5][0] != os.getpid(), found[5][1])")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False,
                          env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert done.stdout == "[0, 1, 4, 9, 16] True 1\n", done.stderr


def _who() -> tuple[int, str, tuple[int, ...]]:
    allowed = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else ()
    return os.getpid(), os.environ["OMP_NUM_THREADS"], tuple(sorted(allowed))


def _grow(megabytes: int) -> int:
    HELD.append(np.ones(megabytes * 2**17))
    time.sleep(1.1)  # loky looks at most once a second
    return os.getpid()
