import pytest
import torch

from helpers import memory


def test_kept_bytes_by_hand():
    # x w: autograd keeps x [5, 4] and w [4, 3] in float32, 80 and 48 bytes; exp keeps its result [5, 3], 60 bytes
    x, w = torch.randn(5, 4), torch.randn(4, 3, requires_grad=True)
    assert memory.kept_bytes(lambda: (x @ w).exp()) == 60 + 80  # w's gradient alone is wanted: w is not kept
    x.requires_grad_()
    assert memory.kept_bytes(lambda: (x @ w).exp()) == 60 + 80 + 48
    assert memory.kept_bytes(lambda: x * x) == 80  # one tensor, kept twice, is there once
    with torch.no_grad():
        assert memory.kept_bytes(lambda: (x @ w).exp()) == 0


@pytest.mark.parametrize(("free", "expected"), [
    (10_000, (64, False)),  # a hundred rows would fit; the device's budget is enough
    (350, (30, False)),     # three rows of ten tokens fit
    (199, (10, False)),     # one
    (99, (10, True)),       # not even one
])
def test_fit_by_hand(free, expected):
    assert memory.fit(row_bytes=100, longest=10, budget=64, free=free) == expected


def test_some_memory_is_free():
    assert 0 < memory.free_bytes(torch.device("cpu")) < 2**50


def test_the_peak_is_this_programs_and_stays():
    before = memory.peak_mb()
    block = torch.ones(max(2**26, int((before + 64) * 2**20)), dtype=torch.uint8)  # more than it ever had
    high = memory.peak_mb()
    assert high >= before + 63
    del block
    assert memory.peak_mb() > high - 1  # the kernel counts some pages late
