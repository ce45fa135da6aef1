"""Will a step of training fit into memory? What a forward pass keeps for its way back is counted, not guessed."""

import ctypes
import os
import re
import resource
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import torch

SHARE = {"cuda": 0.8, "cpu": 0.25}  # of what is free: gradients and workspace need some, on a CPU other workers too
KERNELS = 256  # of matrix products on a CPU, two thirds of a megabyte each; oneDNN would keep 1,024
TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3  # of glibc's mallopt


def keep_freed() -> None:
    """Keep up to 256 MB of what tensors leave behind for the next ones, on Linux; and KERNELS kernels, before the first.

    Otherwise every step gives it back and asks for it again, thousands of pages: a sixth of a small model's step.
    """
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", str(KERNELS))
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(MMAP_THRESHOLD, 2**25)
        libc.mallopt(TRIM_THRESHOLD, 2**28)


def give_back() -> None:
    """Return what `keep_freed` has kept to the system; what is left of a worker is what it uses."""
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)


def peak_mb() -> float:
    """The most memory that this program had. On Linux not getrusage's: that begins with what its parent had."""
    status = Path("/proc/self/status")
    if status.exists():
        return int(re.search(r"VmHWM:\s+(\d+) kB", status.read_text())[1]) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 1024)


def kept_bytes(forward: Callable[[], Any]) -> int:
    """Bytes of all tensors that autograd keeps while `forward()` runs, weights too; each counts once.

    The difference between two batches is what the rows of the larger one cost.
    """
    kept: dict[int, int] = {}

    def count(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor.detach()  # itself, an operation's result would keep the operation alive, and that the result

    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        result = forward()  # alive until all is counted, so that no address is used twice
    del result
    return sum(kept.values())


def free_bytes(device: torch.device) -> int:
    """Bytes that training may use on this device now: SHARE of what is free."""
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
        free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    else:
        free = psutil.virtual_memory().available
    return int(SHARE[device.type] * free)


def fit(row_bytes: int, longest: int, budget: int, free: int) -> tuple[int, bool]:
    """Padded tokens of a micro-batch, and whether activations must be recomputed on the way back.

    row_bytes: kept for one row of `longest` tokens, the longest there is; budget: tokens that suit the device; free:
    bytes. Smaller micro-batches cost little, so they are tried first; recomputing, which costs a third more
    arithmetic, is for rows that do not fit even one at a time. Then a micro-batch is one such row.
    """
    rows = free // max(1, row_bytes)
    return (min(budget, rows * longest), False) if rows else (longest, True)
