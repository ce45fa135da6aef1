"""peft without bitsandbytes, which takes as long to import and is wanted only by a model in 4 bits.

Wherever bitsandbytes is installed, peft imports it: at once, and again to ask of every layer that gets an adapter
whether it is in 4 bits. With `install` it looks absent while peft is imported, whoever imports that, and layers are
asked only where something has imported it: no 4-bit model can be loaded without.
"""

import sys
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType

HEAVY = "bitsandbytes"


class _Finder(MetaPathFinder):
    """Finds peft where it is, and nothing else."""

    def find_spec(self, name: str, path=None, target=None) -> ModuleSpec | None:
        spec = PathFinder.find_spec(name) if name == "peft" and HEAVY not in sys.modules else None
        if spec:
            execute = spec.loader.exec_module
            spec.loader.exec_module = lambda module: _import(execute, module)
        return spec


def install() -> None:
    """From now on, in this process."""
    sys.meta_path.insert(0, _Finder())


def _import(execute, module: ModuleType) -> None:
    import transformers  # noqa: F401 - looks for bitsandbytes itself, and must find it

    sys.modules[HEAVY] = None  # to import it is an ImportError
    try:
        execute(module)
    finally:
        del sys.modules[HEAVY]
    lora = sys.modules["peft.tuners.lora.model"]
    lora.is_bnb_available = lora.is_bnb_4bit_available = lambda: HEAVY in sys.modules
