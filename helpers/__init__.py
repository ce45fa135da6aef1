"""The thin, tested module behind the notebooks."""

import logging
from pathlib import Path

from helpers import light

ROOT = Path(__file__).resolve().parent.parent
DATA = ROOT / "data"

# every process that imports peft would print that an optional kernel is not there, and how to download it
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
light.install()
