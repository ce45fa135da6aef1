"""A planted key and hostile text: neither leaves a run in a dangerous form, whatever notebook, page or error holds it."""

import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from unittest.mock import patch

import pandas as pd
import pytest
from test_run import write_notebook

from helpers import ROOT, artifacts, fingerprint, report, run, show, side_by_side
from helpers.artifacts import Store, open_run
from helpers.schemas import STAGES, Stage
from tests.browser import Browser

KEY = "sk-planted-0123456789abcdef"
SCRIPT = "<script>window.owned = 1</script><img src=x onerror='window.owned = 2'>${7*7} {{7*7}} ../../etc/passwd"
DANGEROUS = (b"<script>window.owned", b"<img src=x")
SHOWN = """\
from pathlib import Path
import pandas as pd
from IPython.display import HTML, display
from helpers import show
from helpers.artifacts import open_run
store = open_run(profile, run, seed, runs=Path(RUNS))
show.theme(store)
hostile = pd.DataFrame({"persona_id": ["p01"], "name": [TEXT], "tag": ["t"], "axes": [[TEXT]], "categories": [["c"]],
                        "description": [TEXT], "demographics": ["{}"]})
store.write("personas", hostile)
show.records(hostile)
display(hostile, hostile["name"], show.table(hostile, TEXT))
print(TEXT)
store.record("00_show", said=TEXT)"""
ASKED = """\
from pathlib import Path
from helpers import llm
from helpers.artifacts import open_run
store = open_run(profile, run, seed, runs=Path(RUNS))
llm.connect(store).map([llm.Request([{"role": "user", "content": "hello"}])])"""


class Echo(BaseHTTPRequestHandler):
    """A server that answers 401 with the key that it was sent: some proxies do."""

    def do_POST(self) -> None:
        body = b'{"error": {"message": "bad header ' + self.headers["Authorization"].encode() + b'"}}'
        self.send_response(401)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_) -> None:
        pass


@pytest.fixture(scope="module")
def echo():
    server = HTTPServer(("127.0.0.1", 0), Echo)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/v1"
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture(scope="module")
def attacked(tmp_path_factory, echo):
    """A run whose first notebook shows hostile text and whose second is refused by a teacher that repeats the key."""
    folder = tmp_path_factory.mktemp("attacked")
    (folder / "notebooks").mkdir()
    (folder / "helpers").symlink_to(ROOT / "helpers")
    for stem, code in (("00_show", SHOWN), ("01_ask", ASKED)):
        write_notebook(folder, stem, code.replace("RUNS", repr(str(folder / "runs"))).replace("TEXT", repr(SCRIPT)))
    stages = {"00_show": Stage((), ("personas",)), "01_ask": Stage(("personas",), ())}
    with pytest.MonkeyPatch.context() as patched, patch.dict(STAGES, stages, clear=True):
        for module in (run, fingerprint, artifacts):
            patched.setattr(module, "ROOT", folder)
        patched.setattr(artifacts, "RUNS", folder / "runs")
        patched.setenv("OPENAI_API_KEY", KEY)
        sets = [word for value in (f"teacher.base_url={echo}", "teacher.max_retries=0") for word in ("--set", value)]
        code = run.main(["smoke", "--run", "attacked", *sets])
    return code, open_run("smoke", "attacked", runs=folder / "runs")


def pages(store: Store) -> list[Path]:
    """The report, the side-by-side page and the executed notebook, with the hostile text in each."""
    entry = {"name": SCRIPT, "description": SCRIPT, "kind": SCRIPT, "question": SCRIPT, "prefix": SCRIPT,
             "answers": [(SCRIPT, [{"text": SCRIPT, "nats": 1.0, "shade": 0.5}])]}
    return [report.write(store), side_by_side.write([entry], store, SCRIPT), store.path / "notebooks" / "00_show.html"]


def test_the_key_is_nowhere_in_the_run_nor_in_what_was_said(attacked, capfd):
    code, store = attacked
    assert code == 1
    assert KEY not in "".join(capfd.readouterr())
    failed = (store.path / "notebooks" / "01_ask.ipynb").read_text()
    assert "AuthenticationError" in failed  # it did ask, and was refused
    assert "(key)" in failed
    found = [path for path in store.path.rglob("*") if path.is_file() and KEY.encode() in path.read_bytes()]
    assert found == []


def test_hostile_text_is_kept_as_text_in_tables_and_escaped_in_pages(attacked):
    _, store = attacked
    assert store.read("personas")["name"].tolist() == [SCRIPT]  # as data it is whole
    for page in pages(store):
        content = page.read_bytes()
        assert b"window.owned" in content, page
        assert not [bad for bad in DANGEROUS if bad in content], page


def test_a_name_that_looks_like_a_path_makes_no_file(attacked):
    _, store = attacked
    assert not [path for path in store.path.rglob("*") if "passwd" in path.name or "script" in path.name.lower()]


def test_a_table_escapes_values_and_caption():
    html = show.table(pd.DataFrame({SCRIPT: [SCRIPT]}), SCRIPT).to_html()
    assert "&lt;script&gt;" in html
    assert "<script>" not in html


@pytest.mark.slow
def test_a_browser_shows_the_text_and_runs_nothing(attacked, tmp_path):
    _, store = attacked
    (tmp_path / "downloads").mkdir()
    with Browser(tmp_path / "chromium", tmp_path / "downloads") as browser:
        for page in pages(store):
            browser.open(page)
            assert "window.owned = 1" in browser.look("document.documentElement.textContent"), page
            assert browser.look("typeof window.owned") == "undefined", page
            assert browser.look("document.querySelectorAll('img[src=x]').length") == 0, page
