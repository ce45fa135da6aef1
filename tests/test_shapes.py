"""Sizes of models that may not be at hand."""

import pytest

from helpers import shapes
from helpers.config import load_profile


def test_sizes_of_models_that_are_not_at_hand():
    # Mistral 7B: 7.24 billion, of which 2 * 32000 * 4096 are embedding and head, the embedding not multiplied with
    assert shapes.parameters("x/zephyr-7b-sft") == pytest.approx(7.24e9, rel=0.001)
    assert shapes.active(shapes.shape_of("x/zephyr-7b-sft")) == pytest.approx(7.24e9 - 32000 * 4096, rel=0.001)
    assert shapes.parameters(load_profile("paper").policy.path) == shapes.parameters("x/zephyr-7b-sft")
    assert shapes.parameters("data/models/base") == pytest.approx(2.2e6, rel=0.05)
