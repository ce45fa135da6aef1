"""peft without bitsandbytes until a model is in 4 bits, and with it from then on; in a process that has imported neither."""

import subprocess
import sys

import pytest

from helpers import ROOT

CODE = """
import sys
from helpers import models
from helpers.config import load_profile
from peft import LoraConfig, get_peft_model
from transformers.utils import is_bitsandbytes_available

def layer(four):
    policy = load_profile("smoke").policy.model_copy(update={"load_in_4bit": four})
    with models.peft_quiet():
        model = get_peft_model(models.load_policy(policy)[0], LoraConfig(r=2, target_modules=["q_proj"]))
    found = model.base_model.model.model.layers[0].self_attn.q_proj
    return type(found).__name__, "bitsandbytes" in sys.modules

print(layer(False), is_bitsandbytes_available(), layer(True), layer(False))
"""


def test_bitsandbytes_comes_with_the_first_model_in_4_bits():
    pytest.importorskip("bitsandbytes")
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", CODE], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.stdout == "('Linear', False) True ('Linear4bit', True) ('Linear', True)\n", done.stderr
