"""The page of a run: claims, the paper's tables and figures beside ours, figures, notebooks, provenance."""

import base64
from collections.abc import Mapping
from itertools import groupby
from pathlib import Path

import jinja2
import yaml

from helpers import DATA
from helpers.artifacts import Store, atomic
from helpers.claims import in_order
from helpers.figures import VERDICTS


def write(store: Store) -> Path:
    """Write report.html, one file that needs no other; its links lead to the notebooks beside it."""
    facts = store.log()
    stages = facts.pop("stages")
    facts.pop("profile", None)  # shown from the store
    loader = jinja2.FileSystemLoader(DATA / "templates")
    page = jinja2.Environment(loader=loader, autoescape=True, undefined=jinja2.StrictUndefined)
    page.filters["flat"] = _flat
    html = page.get_template("report.html.j2").render(
        run=store.name,
        profile=store.profile,
        topics=_topics(store),
        counterparts=counterparts(store),
        absent=stages.get("15_claims", {}).get("not_applicable", []),
        verdicts=VERDICTS,
        figures=_figures(store.path),
        notebooks=_notebooks(store.path),
        stages=stages,
        facts=facts,
    )
    path = store.path / "report.html"
    with atomic(path) as file:
        file.write_text(html, encoding="utf-8")
    return path


def counterparts(store: Store) -> list[dict]:
    """Every table and figure of the paper, what it shows, and where this run has its counterpart.

    A row per item of data/paper/counterparts.yaml: item, shows, why (it is not made), note, and notebooks and
    figures as (name, address in the run folder); an address is empty where this run has not made it.
    """
    pages = dict(_notebooks(store.path))
    drawn = {path.stem: f"#{path.stem}" for path in (store.path / "figures").glob("*.png")}
    rows = []
    for entry in yaml.safe_load((DATA / "paper" / "counterparts.yaml").read_text()):
        links = {key: [(name, where.get(name, "")) for name in entry.get(key, [])]
                 for key, where in (("notebooks", pages), ("figures", drawn))}
        rows.append({"shows": "", "why": "", "note": ""} | entry | links)
    return rows


def _topics(store: Store) -> list[tuple[str, list[dict]]]:
    """The claims by topic, in the order in which they were stated."""
    rows = in_order(store.read("claims")).to_dict("records") if store.has("claims") else []
    return [(topic, list(claims)) for topic, claims in groupby(rows, key=lambda row: row["topic"])]


def _figures(run: Path) -> list[tuple[str, list[tuple[str, str]]]]:
    """The figures, each as (name, data address), by the notebook that drew them (its number opens the name)."""
    stems = {stem[:2]: stem for stem, _ in _notebooks(run)}
    paths = sorted((run / "figures").glob("*.png"))
    by = groupby(paths, key=lambda path: stems.get(path.stem[:2], ""))
    return [(stem, [(path.stem, _embedded(path)) for path in group]) for stem, group in by]


def _embedded(path: Path) -> str:
    return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()


def _notebooks(run: Path) -> list[tuple[str, str]]:
    """(stem, link relative to the report) of the executed notebooks, as HTML where there is one."""
    files = [path for suffix in ("ipynb", "html") for path in (run / "notebooks").glob(f"*.{suffix}")]
    found = {path.stem: path for path in files}
    return [(stem, path.relative_to(run).as_posix()) for stem, path in sorted(found.items())]


def _flat(value: object, above: str = "") -> list[tuple[str, str]]:
    """Nested facts as (dotted name, text) rows."""
    if not isinstance(value, Mapping):
        return [(above, ", ".join(map(str, value)) if isinstance(value, list) else str(value))]
    return [row for key, inner in value.items() for row in _flat(inner, f"{above}.{key}".strip("."))]
