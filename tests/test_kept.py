import numpy as np
import pytest

from helpers import kept

TEXTS = ["ccc", "a", "bb", "a", "dddd", "eeeee"]


class Counting:
    """Length and batch size of each text: a value that shows in whose company it was computed."""

    def __init__(self, fail_at: int = 0) -> None:
        self.batches, self.fail_at = [], fail_at

    def __call__(self, texts: list[str]) -> np.ndarray:
        self.batches.append(texts)
        if len(self.batches) == self.fail_at:
            raise KeyboardInterrupt
        return np.array([[len(text), len(texts)] for text in texts])


def test_each_text_once_in_batches_of_like_length():
    compute = Counting()
    found = kept.vectors(TEXTS, compute, batch=2)
    assert compute.batches == [["a", "bb"], ["ccc", "dddd"], ["eeeee"]]
    assert found.tolist() == [[3, 2], [1, 2], [2, 2], [1, 2], [4, 2], [5, 1]]
    assert found.dtype == np.float32
    assert kept.vectors([], compute, batch=2).shape == (0, 0)


def test_an_interrupted_computation_goes_on_and_ends_alike(tmp_path):
    file, whole = tmp_path / "kept.sqlite", kept.vectors(TEXTS, Counting(), batch=2)
    interrupted = Counting(fail_at=2)
    with pytest.raises(KeyboardInterrupt):
        kept.vectors(TEXTS, interrupted, 2, file)
    again = Counting()
    assert np.array_equal(kept.vectors(TEXTS, again, 2, file), whole)
    assert again.batches == [["ccc", "dddd"], ["eeeee"]]
    third = Counting()
    assert np.array_equal(kept.vectors(TEXTS, third, 2, file), whole)
    assert third.batches == []
    other = Counting()
    kept.vectors(TEXTS, other, 2, file, of="another model")
    assert len(other.batches) == 3
