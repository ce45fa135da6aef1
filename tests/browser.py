"""A headless Chromium driven by key presses alone, over its DevTools protocol."""

import json
import shutil
import subprocess
import time
import urllib.request
from base64 import b64decode
from pathlib import Path

import pytest

KEYS = {"Tab": ("Tab", 9, ""), "Enter": ("Enter", 13, "\r"), " ": ("Space", 32, " "),
        "ArrowDown": ("ArrowDown", 40, ""), "ArrowRight": ("ArrowRight", 39, "")}


def find() -> str:
    """The browser's path; skips the test where there is none."""
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    return found or pytest.skip("no chromium on this machine: apt-get install chromium")


class Browser:
    """One page of a fresh profile. `press` and `type` dispatch key events; `look` only reads."""

    def __init__(self, folder: Path, downloads: Path):
        websocket = pytest.importorskip("websocket")  # comes with jupyterlab
        self.process = subprocess.Popen(
            [find(), "--headless", "--no-sandbox", "--disable-gpu", "--remote-debugging-port=0", "--window-size=1100,900",
             "--disable-dev-shm-usage", f"--user-data-dir={folder}", "about:blank"],
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        port = self._wait(lambda: (folder / "DevToolsActivePort").read_text().split()[0])
        pages = self._wait(lambda: json.load(urllib.request.urlopen(f"http://127.0.0.1:{port}/json")))
        address = next(page["webSocketDebuggerUrl"] for page in pages if page["type"] == "page")
        self.socket, self.sent, self.events = websocket.create_connection(address, suppress_origin=True, timeout=30), 0, []
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.send(f"{domain}.enable")
        self.send("Browser.setDownloadBehavior", behavior="allow", downloadPath=str(downloads))

    def __enter__(self) -> "Browser":
        return self

    def __exit__(self, *_) -> None:
        self.socket.close()
        self.process.terminate()
        self.process.wait(20)

    def send(self, method: str, **params) -> dict:
        """One command; what comes in between is kept in `events`."""
        self.sent += 1
        self.socket.send(json.dumps({"id": self.sent, "method": method, "params": params}))
        while (message := json.loads(self.socket.recv())).get("id") != self.sent:
            self.events.append(message)
        assert "error" not in message, message
        return message["result"]

    def open(self, path: Path) -> None:
        self.send("Page.navigate", url=path.as_uri())
        self._wait(lambda: self.look("document.readyState") == "complete" or 1 / 0)

    def press(self, key: str, times: int = 1) -> None:
        code, number, text = KEYS.get(key, (key, ord(key[0].upper()), key))
        for _ in range(times):
            about = {"key": key, "code": code, "windowsVirtualKeyCode": number}
            self.send("Input.dispatchKeyEvent", type="keyDown" if text else "rawKeyDown", text=text, **about)
            self.send("Input.dispatchKeyEvent", type="keyUp", **about)

    def type(self, text: str) -> None:
        for letter in text:
            self.press(letter)

    def look(self, expression: str):
        """The value of a JavaScript expression: for reading the page, never for moving it."""
        return self.send("Runtime.evaluate", expression=expression, returnByValue=True)["result"].get("value")

    def focused(self) -> str:
        """What has the focus: tag, id or name."""
        return self.look("(e => e.tagName.toLowerCase() + ' ' + (e.id || e.name || e.className))(document.activeElement)")

    def until(self, expression: str):
        return self._wait(lambda: self.look(expression) or 1 / 0)

    def screenshot(self, path: Path, whole: bool = False) -> None:
        path.write_bytes(b64decode(self.send("Page.captureScreenshot", captureBeyondViewport=whole)["data"]))

    @staticmethod
    def _wait(look, seconds: float = 30.0):
        end = time.monotonic() + seconds
        while True:
            try:
                return look()
            except (OSError, ArithmeticError, IndexError):
                if time.monotonic() > end:
                    raise
                time.sleep(0.1)
