"""Kernels for the runner: while one notebook runs, the kernel of the next starts and imports what that one needs.

torch, trl and matplotlib take seconds to import, in which a notebook can do nothing else and a second core is free.
"""

import ast
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from jupyter_client.manager import AsyncKernelManager
from jupyter_core.utils import run_sync
from papermill.clientwrap import PapermillNotebookClient
from papermill.engines import NBClientEngine, papermill_engines
from traitlets.config import Config

from helpers import ROOT
from helpers.fingerprint import digest, notebook_code

CONFIG = Config({"KernelManager": {"transport": "ipc"}})  # not over TCP, where others could listen
RARELY = "import gc; gc.set_threshold(100_000, 50, 100)\n"  # else a tenth of the imports is looking for garbage


class Ahead:
    """At most one kernel that waits for its notebook; on leaving the context none is left."""

    def __init__(self) -> None:
        self.kernel: AsyncKernelManager | None = None
        self.code = ""  # digest of the helpers that it imports
        self.folder = TemporaryDirectory()  # of sockets

    def __enter__(self) -> "Ahead":
        return self

    def __exit__(self, *_: object) -> None:
        self._drop()
        self.folder.cleanup()

    @property
    def pid(self) -> int | None:
        """Of the kernel that waits."""
        return self.kernel and self.kernel.provisioner.pid

    def start(self, notebook: Path) -> None:
        """Let a kernel start for this notebook, unless one waits for a notebook already."""
        if self.kernel:
            return
        where = str(Path(self.folder.name, f"{notebook.stem}.json"))
        self.kernel = AsyncKernelManager(kernel_name="python3", config=CONFIG, connection_file=where)
        self.code = digest(ROOT / "helpers")
        early = f"--IPKernelApp.exec_lines=exec({RARELY + imports(notebook)!r}, {{}})"  # no name gets into the notebook
        run_sync(self.kernel.start_kernel)(
            extra_arguments=["--HistoryManager.hist_file=:memory:", early], cwd=str(notebook.parent))

    def take(self, notebook: Path) -> AsyncKernelManager:
        """The kernel that waits, if it lives and the helpers have not changed since it imported them; else a new one."""
        if self.kernel and (self.code != digest(ROOT / "helpers") or not run_sync(self.kernel.is_alive)()):
            self._drop()
        self.start(notebook)
        kernel, self.kernel = self.kernel, None
        return kernel

    def _drop(self) -> None:
        if self.kernel:
            with suppress(RuntimeError):  # it has ended by itself
                run_sync(self.kernel.shutdown_kernel)(now=True)
            self.kernel = None


def imports(notebook: Path) -> str:
    """The import statements of a notebook's cells, in their order."""
    found = [node for node in ast.parse(notebook_code(notebook)).body if isinstance(node, ast.Import | ast.ImportFrom)]
    return "\n".join(map(ast.unparse, found))


class _Engine(NBClientEngine):
    """papermill's own, but on a kernel that is there already; it ends with the notebook all the same."""

    @classmethod
    def execute_managed_notebook(cls, nb_man: Any, kernel_name: str, km: AsyncKernelManager | None = None,
                                 start_timeout: int = 60, input_path: str = "", **options: Any) -> Any:
        client = PapermillNotebookClient(nb_man, km=km, kernel_name=kernel_name, startup_timeout=start_timeout, **options)
        client.owns_km = True
        return client.execute()


papermill_engines.register("ahead", _Engine)
