"""The page of a run: sound HTML, everything escaped, every item of the paper with its counterpart."""

from html.parser import HTMLParser

import matplotlib.pyplot as plt
import pandas as pd
import pytest
import yaml

from helpers import DATA, ROOT, claims, report

HOSTILE = '<script>alert("1")</script>'
VOID = {"meta", "img", "link", "br", "hr", "input"}
COUNTERPARTS = yaml.safe_load((DATA / "paper" / "counterparts.yaml").read_text())


@pytest.fixture(autouse=True)
def close_figures():
    plt.switch_backend("agg")
    yield
    plt.close("all")


class Page(HTMLParser):
    """The tags of a page: raises on one that is closed out of turn."""

    def __init__(self, text: str):
        super().__init__()
        self.open, self.seen = [], []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.seen.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def of(self, tag: str, attribute: str) -> list[str]:
        return [attrs.get(attribute) for name, attrs in self.seen if name == tag]


def claim(**values) -> dict:
    row = {"claim_id": "gold_level", "statement": "A statement", "source": "4.1", "rule": "a: interval above 0.00"}
    row |= {"estimate": 0.5, "low": 0.4, "high": 0.6, "n_people": 9, "verdict": "inconclusive"}
    row |= {"paper_value": float("nan")}
    return row | values


def test_the_report_escapes_what_models_and_data_say(store):
    store.write("claims", pd.DataFrame([claim(statement=HOSTILE, rule=HOSTILE, source=HOSTILE)]))
    store.record("15_claims", not_applicable=[{"statement": HOSTILE, "reason": HOSTILE}], wall_seconds=2.4)
    store.record(HOSTILE, note={HOSTILE: [HOSTILE]})
    html = report.write(store).read_text()
    assert "<script" not in html
    assert html.count("&lt;script&gt;") >= 8
    assert "15 claims, 2 seconds" in html


def test_the_report_is_one_sound_page(store):
    store.write("claims", pd.DataFrame([claim(verdict="reproduced", paper_value=0.25), claim(claim_id="end_gold_none")]))
    store.figure(plt.figure(), "06_prompting")
    (store.path / "notebooks" / "06_prompting.html").write_text("x")
    (store.path / "notebooks" / "06_prompting.ipynb").write_text("x")
    text = report.write(store).read_text()
    page = Page(text)
    assert page.of("html", "lang") == ["en"]
    assert all(source.startswith("data:image/png;base64,") for source in page.of("img", "src"))
    assert page.of("img", "alt") == ["Figure 06 prompting"]
    ids = set(page.of("h2", "id"))
    links = page.of("a", "href")
    assert {link[1:] for link in links if link.startswith("#")} == ids | {"06_prompting"}  # its figure
    assert {link for link in links if not link.startswith("#")} == {"notebooks/06_prompting.html"}
    assert page.of("link", "href") == []
    assert "simulated world" in text
    assert "<strong>1</strong> reproduced" in text
    assert "0.250" in text


def test_a_report_before_any_result_says_so(store):
    real = type(store)(store.path, store.profile.model_copy(update={"simulated": False}))
    text = report.write(real).read_text()
    Page(text)
    assert "notebook 15_claims makes them" in text
    assert "simulated world" not in text


def test_every_table_and_figure_of_the_paper_is_listed_once():
    items = [entry["item"] for entry in COUNTERPARTS]
    assert items == [f"Table {n}" for n in range(1, 16)] + [f"Figure {n}" for n in range(1, 18)]
    for entry in COUNTERPARTS:
        assert bool(entry.get("why")) != bool(entry.get("notebooks")), f"{entry['item']}: a notebook, or why not"


@pytest.mark.parametrize("entry", COUNTERPARTS, ids=lambda entry: entry["item"])
def test_a_counterparts_notebook_exists_and_draws_its_figures(entry):
    paths = [ROOT / "notebooks" / f"{stem}.ipynb" for stem in entry.get("notebooks", [])]
    assert [path.name for path in paths if not path.exists()] == []
    code = "".join(path.read_text() for path in paths)
    assert [name for name in entry.get("figures", []) if f'\\"{name}\\"' not in code] == []


def test_a_counterpart_is_linked_where_the_run_has_it(store):
    store.figure(plt.figure(), "06_prompting")
    rows = {row["item"]: row for row in report.counterparts(store)}
    assert rows["Figure 3"]["figures"] == [("06_prompting", "#06_prompting")]
    assert rows["Figure 3"]["notebooks"] == [("06_prompting", "")]
    text = report.write(store).read_text()
    page = Page(text)
    assert "06_prompting" in page.of("figure", "id")
    assert '<a href="#06_prompting">06 prompting</a>' in text
    assert "06 prompting (not in this run)" in text  # the notebook
    assert "not made, because it is a drawing" in text


def test_claims_stand_under_their_topics_as_they_were_stated(store):
    rows = [claim(claim_id=name) for name in ("gold_level", "answers_need_prefix", "prompting_moves_little")]
    store.write("claims", pd.DataFrame(rows))
    text = report.write(store).read_text()
    topics = ["Prompting alone", "One model for everybody", "The answers themselves"]
    places = [text.index(topic) for topic in topics]
    assert places == sorted(places)
    assert claims.in_order(pd.DataFrame(rows))["topic"].tolist() == topics
