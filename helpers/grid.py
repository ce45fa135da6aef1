"""Independent units of work side by side: processes of one thread each, a Ray cluster, or this process."""

import gc
import os
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sized
from multiprocessing import current_process
from threading import Thread
from typing import Any

import joblib
from joblib.externals.loky import get_reusable_executor, process_executor
from tqdm.auto import tqdm

Unit = Callable[[], Any]


def run_units(units: Iterable[Unit], workers: int, executor: str = "loky", desc: str = "units",
              unit: str = "unit", finished: int = 0) -> list[Any]:
    """unit() for every unit, `workers` at a time, behind one bar; the results in the order of units.

    units: may be an iterator, which is read as workers come free. executor: "loky" (processes of this machine,
    which stay for the next grid), "threading" (no start, for work that is mostly torch's), "ray" (a cluster, as
    many at a time as it has GPUs or else cores; an extra) or "sequential" (no other process). Units are started
    in the order given: put the longest first. finished: units done before, for the bar alone. Two workers of one
    thread do more than one of two threads.
    """
    results, total = {}, finished + len(units) if isinstance(units, Sized) else None
    with tqdm(total=total, initial=finished, desc=desc, unit=unit) as bar:
        for i, result in EXECUTORS[executor](units, workers) if total != finished else ():
            results[i] = result
            bar.update()
    return [results[i] for i in sorted(results)]


def _threads(units: Iterable[Unit], workers: int) -> Iterator[tuple[int, Any]]:
    jobs = (joblib.delayed(_numbered)(i, unit) for i, unit in enumerate(units))
    with joblib.parallel_config("threading", n_jobs=workers):
        yield from joblib.Parallel(return_as="generator_unordered", batch_size=1)(jobs)


def _sequential(units: Iterable[Unit], _: int) -> Iterator[tuple[int, Any]]:
    return (_numbered(i, unit) for i, unit in enumerate(units))


def _loky(units: Iterable[Unit], workers: int) -> Iterator[tuple[int, Any]]:
    """Workers have imported torch and loaded a model: the next grid of the same notebook begins at once.

    One worker is this process.
    """
    options = {"inner_max_num_threads": 1, "initializer": _settle_in, "initargs": (workers >= _cores(),)}
    with warnings.catch_warnings(), joblib.parallel_config("loky", n_jobs=workers, **options):
        # who has waited for five minutes while others work on ends; no unit is lost
        warnings.filterwarnings("ignore", "A worker stopped while some jobs were given", UserWarning)
        jobs = (joblib.delayed(_numbered)(i, unit) for i, unit in enumerate(units))
        yield from joblib.Parallel(return_as="generator_unordered", batch_size=1)(jobs)
    from torch import cuda  # slow to import, and nothing else here needs it

    if cuda.is_available():  # where what a waiting worker holds is missing elsewhere
        get_reusable_executor().shutdown()


def _ray(units: Iterable[Unit], _: int) -> Iterator[tuple[int, Any]]:
    """Ray tasks with a GPU each if the cluster has any, else with a core; RAY_ADDRESS names a cluster, or one starts here.

    Nodes need this kit installed, and the run folder at the same path.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # a run tells nobody about itself
    import ray

    if not ray.is_initialized():
        ray.init(log_to_driver=False)
    need = {"num_gpus": 1} if ray.cluster_resources().get("GPU") else {"num_cpus": 1}
    # max_calls 0: a process is used again, and keeps its model; Ray would end it after one unit on a GPU
    task = ray.remote(max_calls=0, max_retries=2, **need)(_numbered)
    waiting = [task.remote(i, unit) for i, unit in enumerate(units)]
    while waiting:
        ready, waiting = ray.wait(waiting)
        yield from ray.get(ready)


EXECUTORS = {"loky": _loky, "threading": _threads, "ray": _ray, "sequential": _sequential}


def _settle_in(pinned: bool) -> None:
    """In a new worker: a core of its own, if workers fill the machine, and no end for having grown; it starts sooner.

    loky ends a worker that holds 300 MB more than after its first unit, as one does that scores and then trains.
    """
    process_executor._USE_PSUTIL = False
    gc.set_threshold(100_000, 50, 100)  # else a tenth of the imports is looking for garbage
    Thread(target=_outlive_nobody, args=(os.getppid(),), daemon=True).start()
    if pinned and hasattr(os, "sched_setaffinity"):
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {cores[current_process()._identity[-1] % len(cores)]})


def _outlive_nobody(parent: int) -> None:
    """Ends this worker, and the memory of its model, if the process that started it was killed."""
    while os.getppid() == parent:
        time.sleep(5)
    os._exit(1)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _numbered(i: int, unit: Unit) -> tuple[int, Any]:
    return i, unit()
