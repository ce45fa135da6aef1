import numpy as np
import pandas as pd
import pytest
import torch

from helpers import nf4
from helpers.config import load_profile

# as printed in QLoRA, Appendix E, to four digits
PRINTED = [-1.0, -0.6962, -0.5251, -0.3949, -0.2844, -0.1848, -0.0911, 0.0,
           0.0796, 0.1609, 0.2461, 0.3379, 0.4407, 0.5626, 0.7230, 1.0]


def test_the_levels_are_the_papers():
    np.testing.assert_allclose(nf4.levels(), PRINTED, atol=6e-5)


def test_rounding_by_hand():
    # one block of four: the largest is 2, so 2 -> 1 x 2; 0.9 / 2 = .45 -> .4407 x 2; -0.1 / 2 = -.05 -> -.0911 x 2 (the
    # middle between it and 0 is -.0455); 0 stays; the fifth value is alone in its block, its own scale
    found = nf4.rounded(torch.tensor([2.0, 0.9, -0.1, 0.0, -7.0]), block=4)
    np.testing.assert_allclose(found, [2.0, 0.8814, -0.1821, 0.0, -7.0], atol=1e-4)
    assert torch.equal(nf4.rounded(found, block=4), found)
    assert torch.equal(nf4.rounded(torch.zeros(3)), torch.zeros(3))


def test_rounding_is_that_of_bitsandbytes():
    functional = pytest.importorskip("bitsandbytes.functional")
    weight = torch.randn(48, 64, generator=torch.Generator().manual_seed(0))
    packed = functional.quantize_4bit(weight, blocksize=64, quant_type="nf4")
    torch.testing.assert_close(nf4.rounded(weight), functional.dequantize_4bit(*packed), rtol=1e-3, atol=1e-4)
    twice = functional.quantize_4bit(weight, blocksize=64, quant_type="nf4", compress_statistics=True)
    gap = (functional.dequantize_4bit(*twice) - nf4.rounded(weight)).norm() / (weight - nf4.rounded(weight)).norm()
    assert gap < 0.2


def test_margins_move_little_by_half_and_more_by_a_quarter(policy):
    words = ["lentil stew", "a slow roast", "herbs", "rainy Sunday", "quick brown fox", "lazy"]
    pairs = pd.DataFrame({"persona_id": ["a", "b"] * 3, "pair_id": list("uvwxyz"), "policy_id": "base", "head": "",
                          "tail": "Question: a fox?\nAnswer:", "chosen": words, "rejected": words[::-1]})
    section = load_profile("smoke").policy.model_copy(update={"path": policy.path, "load_in_4bit": True})
    found = nf4.margins(pairs, {}, section).pivot(index="pair_id", columns="precision", values="margin")
    np.testing.assert_allclose(found.loc[list("uvw")], -found.loc[list("zyx")].to_numpy(), atol=0.02)  # chosen and
    half, four = ((found[column] - found["as loaded"]).abs().mean() for column in ("bfloat16", "NF4"))  # rejected swap
    assert 0 < half < four / 2
