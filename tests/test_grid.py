"""Units side by side: every one once, results in order, whatever ran them."""

import os
from functools import partial

import pytest

from helpers import grid


@pytest.mark.parametrize("executor", ["sequential", "loky"])
def test_results_come_in_the_order_of_the_units(executor, capsys):
    units = [partial(pow, i, 2) for i in (3, 1, 2)]
    assert grid.run_units(units, 2, executor, desc="squares", finished=2) == [9, 1, 4]
    assert "5/5" in capsys.readouterr().err


def test_processes_are_others_of_one_thread_and_end():
    (pid, threads), _ = grid.run_units([_who] * 2, 2)
    assert pid != os.getpid()
    assert threads == "1"
    with pytest.raises(OSError, match="No such process"):
        os.kill(pid, 0)



def test_nothing_to_do_starts_nothing():
    assert grid.run_units([], 2) == []


def test_a_unit_that_fails_says_so():
    with pytest.raises(ZeroDivisionError):
        grid.run_units([partial(divmod, 1, 0)], 1, "sequential")


def _who() -> tuple[int, str]:
    return os.getpid(), os.environ["OMP_NUM_THREADS"]
