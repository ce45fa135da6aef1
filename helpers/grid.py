"""Independent units of work side by side: processes of one thread each, a Ray cluster, or this process."""

import warnings
from collections.abc import Callable, Iterable, Sized
from typing import Any

import joblib
from joblib.externals.loky import get_reusable_executor
from tqdm.auto import tqdm


def run_units(units: Iterable[Callable[[], Any]], workers: int, executor: str = "loky", desc: str = "units",
              unit: str = "unit", finished: int = 0) -> list[Any]:
    """unit() for every unit, `workers` at a time, behind one bar; the results in the order of units.

    units: may be an iterator, which is read as workers come free. executor: "loky" (processes of this
    machine), "threading" (no start, for work that is mostly torch's), "ray" (a cluster; an extra) or
    "sequential" (no other process). Units are started in the order given: put the longest first. finished:
    units done before, for the bar alone. Two workers of one thread do more than one of two threads.
    """
    if executor == "ray":
        from ray.util.joblib import register_ray

        register_ray()
    threads = {"inner_max_num_threads": 1} if executor == "loky" else {}
    results, total = {}, finished + len(units) if isinstance(units, Sized) else None
    with warnings.catch_warnings(), joblib.parallel_config(executor, n_jobs=workers, **threads):
        # a process that has grown is replaced by a new one, and its units are not lost
        warnings.filterwarnings("ignore", "A worker stopped while some jobs were given", UserWarning)
        jobs = (joblib.delayed(_numbered)(i, each) for i, each in enumerate(units))
        done = joblib.Parallel(return_as="generator_unordered", batch_size=1)(jobs)
        with tqdm(total=total, initial=finished, desc=desc, unit=unit) as bar:
            for i, result in done:
                results[i] = result
                bar.update()
    if results and executor == "loky":
        # each worker holds a model, and one that scores and then trains would be taken for leaking memory
        get_reusable_executor().shutdown()
    return [results[i] for i in sorted(results)]


def _numbered(i: int, unit: Callable[[], Any]) -> tuple[int, Any]:
    return i, unit()
