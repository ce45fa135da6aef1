"""What a reader of a notebook sees: one theme, stamped figures, raw records, tables, a helper's source."""

import inspect
import textwrap
from html import escape
from pathlib import Path

import numpy as np
import pandas as pd
import seaborn as sns
from IPython.display import HTML
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from pandas.io.formats.style import Styler
from pygments import highlight
from pygments.formatters import HtmlFormatter
from pygments.lexers import PythonLexer

from helpers import ROOT
from helpers.artifacts import Store
from helpers.figures import (
    BLUE,
    INK,
    KIND_COLORS,
    OTHER_COLORS,
    PREFIX_COLORS,
    PREFIX_ORDER,
    SETTINGS,
    VERDICTS,
    accuracy_bars,
    by_items,
    equity_scatter,
    forest,
    sensitivity,
    tax_people,
    tax_prefixes,
)

__all__ = ["BLUE", "INK", "KIND_COLORS", "PREFIX_COLORS", "PREFIX_ORDER", "SETTINGS", "VERDICTS", "accuracy_bars", "by_items",
           "equity_scatter", "forest", "records", "sensitivity", "source", "stamp", "table", "tax_people", "tax_prefixes",
           "theme"]

WORLD = "simulated world"
LEFT = [{"selector": "th, td, caption", "props": "text-align: left"}, {"selector": "caption", "props": "white-space: nowrap"}]
MONO = "font: 0.85em/1.4 ui-monospace, monospace"  # the pages of nbconvert have no such font for what a cell returns
_captions = {"before": ""}  # what `theme` puts before every caption


def theme(store: Store | None = None) -> None:
    """Set the one look of every figure; with a run of the little world, its words go before every table's caption."""
    _captions["before"] = WORLD if store and store.profile.simulated else ""
    look = {"figure.dpi": 96, "axes.spines.top": False, "axes.spines.right": False, "grid.color": "#E6E6E6",
            "axes.edgecolor": "#888888", "hatch.linewidth": 0.6}
    sns.set_theme(style="whitegrid", palette=OTHER_COLORS, font_scale=0.85, rc=look)


def stamp(fig: Figure, store: Store, n: int | str) -> Figure:
    """Write under the figure where it comes from: the simulated world if it is one, the run, n people.

    n: the number of people, or a text such as "n = 40 questions, no intervals".
    """
    world = f"{WORLD} · " if store.profile.simulated else ""
    drawn = f"n = {n} people · intervals {store.profile.stats.confidence:.0%}, people resampled"
    text = f"{world}run {store.name} · {n if isinstance(n, str) else drawn}"
    pad = 0.28 / fig.get_figheight()
    if not isinstance(fig.get_layout_engine(), ConstrainedLayoutEngine):
        fig.set_layout_engine("constrained")
    fig.get_layout_engine().set(rect=(0, pad, 1, 1 - pad))
    fig.text(0.995, 0.25 * pad, text, ha="right", va="bottom", fontsize=8, color="#555555")
    return fig


def records(df: pd.DataFrame, n: int = 2) -> None:
    """Print the first n rows raw, field by field."""
    width = max(map(len, df.columns))
    for _, row in df.head(n).iterrows():
        for field, value in row.items():
            text = ", ".join(map(str, value)) if isinstance(value, list | np.ndarray) else str(value)
            lines = [part for line in text.splitlines() for part in textwrap.wrap(line, 96) or [""]] or ['""']
            print(f"{field:>{width}} | " + f"\n{'':>{width}} | ".join(lines))
        print("-" * (width + 99))


def table(df: pd.DataFrame, caption: str = "", ours: bool = True) -> Styler:
    """The rows as an HTML table with every text escaped; verdicts in their colours.

    ours: False for the paper's own numbers, which do not come from a simulated world.
    """
    caption = " · ".join(filter(None, [_captions["before"] if ours else "", caption]))
    flat = df.map(lambda v: ", ".join(map(str, v)) if isinstance(v, list | np.ndarray) else v)
    styled = flat.style.format(precision=3, escape="html", na_rep="–").format_index(escape="html", axis=1)
    whole = [name for name, of in flat.select_dtypes("float").items() if (of.dropna() % 1 == 0).all() and of.abs().max() > 1]
    long = [name for name, of in flat.items() if any(isinstance(text, str) and len(text) > 60 for text in of)]
    styled = styled.format(precision=0, na_rep="–", subset=whole).set_properties(long, **{"min-width": "14em"})
    styled = styled.hide(axis="index").set_caption(escape(caption)).set_table_styles(LEFT)
    if "verdict" in flat:
        styled = styled.map(lambda v: f"color:{VERDICTS[v][0]};font-weight:600", subset=["verdict"])
    return styled


def source(fn: object) -> HTML:
    """The source of a helper, as it is tested, with its file and line."""
    code, line = inspect.getsource(fn), inspect.getsourcelines(fn)[1]
    where = Path(inspect.getsourcefile(fn)).resolve().relative_to(ROOT)
    body = highlight(code, PythonLexer(), HtmlFormatter(noclasses=True, style="friendly", prestyles=MONO))
    return HTML(f"<div><small>{escape(str(where))}, line {line}</small>{body}</div>")
