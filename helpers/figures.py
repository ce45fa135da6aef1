"""The figures that several notebooks draw: bars with intervals, forests, scatters; one colour per prefix."""

from collections.abc import Mapping

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure
from matplotlib.patches import Patch

PREFIX_COLORS = {  # Okabe and Ito's palette: the same colour for the same prefix everywhere
    "none": "#7F7F7F", "tag": "#CC79A7", "vpl": "#F0E442", "few_shot": "#E69F00", "persona": "#56B4E9",
    "persona_gpt4": "#0072B2", "persona_gold": "#009E73", "name": "#D55E00",
}
PREFIX_ORDER = tuple(PREFIX_COLORS)
COLORS = PREFIX_COLORS | {"untrained": "#C4C4C4"}
SETTINGS = {  # notebook 10: what each asks, and its hatch (wrong prefix: lines, removed: crosses)
    "seen_seen": ("seen person\nsame prefix", ""), "seen_reseed": ("seen person\nother shots", ""),
    "unseen": ("unseen person", ""), "unseen_wrong": ("unseen person\nwrong prefix", "//"),
    "seen_wrong_seen": ("seen person\nwrong, seen", "//"),
    "seen_wrong_unseen": ("seen person\nwrong, unseen", "//"),
    "seen_removed": ("seen person\nremoved", "xx"), "unseen_removed": ("unseen person\nremoved", "xx"),
}
VERDICTS = {  # colour and marker, so that neither is needed alone
    "reproduced": ("#00795C", "o"), "not reproduced": ("#B3401B", "X"), "inconclusive": ("#5F5F5F", "D"),
}
INK, BLUE = "#222222", "#0072B2"


def accuracy_bars(
    summary: pd.DataFrame, x="prefix", hue=None, col="kind", baseline=None, paper=None, color=BLUE, rows=False,
    baseline_label="untrained, no prefix"
) -> Figure:
    """Accuracy per `x` with intervals; chance and baseline dashed, the paper's values hollow.

    summary: rows of stats.cluster_bootstrap with columns `x`, `col` and, if given, `hue`; a row without
    numbers (few="blank") gets its n and no bar. baseline: {value of `col`: accuracy}. paper: the same columns
    and `value`. color: where there is no prefix column. rows: panels below one another.
    """
    panels = _ordered(col, summary[col]) or ["no rows"]
    shape = (len(panels), 1) if rows else (1, len(panels))
    wide = 0.85 + 0.62 * min(7, summary.groupby(col)[x].nunique().max() if len(summary) else 7)
    size = (10.5, 3.1 * len(panels)) if rows else (wide * len(panels), 3.6)
    fig, axes = plt.subplots(*shape, figsize=size, sharey=True, squeeze=False, layout="constrained")
    for ax, panel in zip(axes.flat, panels, strict=True):
        of_panel = summary[summary[col] == panel]
        _bars(ax, of_panel, x, hue, color)
        if paper is not None:
            _paper_marks(ax, paper[paper[col] == panel], of_panel, x, hue)
        _reference_lines(ax, (baseline or {}).get(panel), baseline_label)
        ax.set(title=str(panel).replace("_", " "), ylim=(0, 1), xlabel="")
    for ax in axes[:, 0]:
        ax.set_ylabel("accuracy (fraction of pairs)")
    _legend(fig, axes, hue, summary)
    return fig


def sensitivity(summary: pd.DataFrame, baseline: Mapping[str, float] | None = None) -> Figure:
    """The paper's Figure 15: each sensitivity setting, a bar per prefix; hatched where lower is better."""
    label = "trained without a prefix"
    return accuracy_bars(summary, x="setting", hue="prefix", baseline=baseline, rows=True, baseline_label=label)


def equity_scatter(points: pd.DataFrame, notes: Mapping[str, str] | None = None) -> Figure:
    """Unseen accuracy after training against the untrained one, a dot per person, a panel per prefix.

    points: columns prefix, persona_id, untrained, trained. notes: {prefix: text in its panel}, such as r.
    """
    names = _ordered("prefix", points.prefix)
    grid = sns.relplot(
        points, x="untrained", y="trained", col="prefix", col_order=names, col_wrap=min(4, len(names)), height=2.7,
        hue="prefix", palette=PREFIX_COLORS, legend=False, s=26, facet_kws={"xlim": (0, 1.02), "ylim": (0, 1.02)})
    for name, ax in grid.axes_dict.items():
        ax.axline((0.5, 0.5), slope=1, color=INK, ls="--", lw=1)
        ax.text(0.97, 0.04, (notes or {}).get(name, ""), transform=ax.transAxes, fontsize=8, ha="right")
        ax.set_title(name.replace("_", " "))
    return grid.set_axis_labels("accuracy, untrained", "accuracy, trained").figure


def tax_people(people: pd.DataFrame, others: pd.DataFrame, paper: pd.DataFrame, titles: Mapping[str, str]) -> Figure:
    """The paper's Figure 7 as changes: a dot per person, sorted, beside the same adapters without a prefix.

    people: group, persona_id, prefix, change, low, high. others: group, label, prefix, change, low, high. paper:
    group, label ("" for a person) and change, drawn hollow. titles: {group: text}, a panel each.
    """
    size = {"figsize": (4.2 * len(titles), 3.6), "squeeze": False, "layout": "constrained"}
    fig, axes = plt.subplots(1, len(titles), sharey=True, **size)
    for ax, (group, title) in zip(axes.flat, titles.items(), strict=True):
        dots, left, theirs = (rows[rows["group"] == group] for rows in (people, others, paper))
        dots = dots.sort_values(["change", "persona_id"])
        places = [*range(-1 - len(left), -1), *range(len(dots))]
        for at, row in zip(places, pd.concat([left, dots]).to_dict("records"), strict=True):
            look = {"color": PREFIX_COLORS[row["prefix"]], "marker": "s" if at < 0 else "o"}
            ax.plot([at, at], [row["low"], row["high"]], color=look["color"], lw=1.2)
            ax.plot(at, row["change"], ls="", ms=6, **look)
        _paper_people(ax, theirs, list(left["label"]), len(dots))
        ax.axhline(0, color=INK, ls=(0, (6, 3)), lw=1.2, label="untrained, no prefix")
        ax.set_xticks(places, [*left["label"], *dots["persona_id"]], rotation=90, fontsize=7)
        ax.set(title=title, ylabel="change of accuracy" if ax is axes[0, 0] else "")
        ax.grid(False, axis="x")
    for marker, label in (("o", "trained, an unseen person's prefix"), ("s", "trained, no prefix in front")):
        axes[0, 0].plot([], [], marker, color="#555555", ls="", label=label)
    fig.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=4, frameon=False)
    return fig


def tax_prefixes(rows: pd.DataFrame, titles: Mapping[str, str]) -> Figure:
    """The paper's Figure 17 as changes: by the prefix in training, with it in front and with it taken away.

    rows: group, prefix, what (a marker each), change, low, high. titles: {group: text}, a panel each.
    """
    names, kinds = _ordered("prefix", rows["prefix"]), list(dict.fromkeys(rows["what"]))
    size = {"figsize": (4.2 * len(titles), 3.6), "squeeze": False, "layout": "constrained"}
    fig, axes = plt.subplots(1, len(titles), sharey=True, **size)
    for ax, (group, title) in zip(axes.flat, titles.items(), strict=True):
        for row in rows[rows["group"] == group].to_dict("records"):
            at = names.index(row["prefix"]) + 0.22 * (kinds.index(row["what"]) - (len(kinds) - 1) / 2)
            color, marker = PREFIX_COLORS.get(row["prefix"], INK), "soD^"[kinds.index(row["what"])]
            ax.plot([at, at], [row["low"], row["high"]], color=color, lw=1.4)
            ax.plot(at, row["change"], marker, color=color, ms=6)
        ax.axhline(0, color=INK, ls=(0, (6, 3)), lw=1.2, label="untrained, no prefix")
        ax.set_xticks(range(len(names)), [_label("prefix", name) for name in names], rotation=35, ha="right", fontsize=8)
        ax.set(title=title, xlim=(-0.6, len(names) - 0.4), ylabel="change of accuracy" if ax is axes[0, 0] else "")
        ax.grid(False, axis="x")
    for marker, kind in zip("soD^", kinds, strict=False):
        axes[0, 0].plot([], [], marker, color="#555555", ls="", label=kind)
    fig.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=4, frameon=False)
    return fig


def forest(table: pd.DataFrame, label: str, xlabel: str, zero: float | None = 0.0, hue: str | None = None) -> Figure:
    """One line a row: estimate and interval, the paper's value hollow, the claim's side shaded.

    table: `label`, estimate, low, high; optional n_people, verdict (colour and marker), prefix (colour),
    paper_value, side_low, side_high. zero: where the dashed line stands. hue: a column, such as the run, whose
    values lie close together below one label.
    """
    labels, hues = list(dict.fromkeys(table[label])), (_ordered(hue, table[hue]) if hue else []) or [None]
    step = 0.8 / len(hues)
    fig, ax = plt.subplots(figsize=(9, max(2.4, 1.5 + (0.21 + 0.12 * len(hues)) * len(labels))), layout="constrained")
    drawn = table[["low", "high", *({"paper_value"} & set(table))]].to_numpy(dtype=float).ravel()
    drawn = drawn[~np.isnan(drawn)]
    left, right = min(drawn, default=0) - 0.05, max(drawn, default=1) + 0.05
    for row in table.to_dict("records"):
        y = labels.index(row[label])
        _side(ax, y, row, left, right)
        _forest_line(ax, y + (hues.index(row.get(hue)) - (len(hues) - 1) / 2) * step, y, row, 5 if hue else 7)
    if zero is not None:
        ax.axvline(zero, color=INK, ls="--", lw=1)
    counts = table.groupby(label)["n_people"].max().to_dict() if "n_people" in table else {}
    ticks = [str(text) + (f"  (n={counts[text]})" if counts else "") for text in labels]
    ax.set_yticks(range(len(labels)), ticks)
    ax.set(xlabel=xlabel, xlim=(left, right), ylim=(len(labels) - 0.4, -0.6))
    ax.grid(False, axis="y")
    _forest_legend(fig, ax, table, hue)
    return fig


def by_items(table: pd.DataFrame, ylabel: str, col: str, ends: Mapping[str, float] | None = None,
             xlabel: str = "items of a person's history") -> Figure:
    """Accuracy against `items`, a line with intervals for each `bridge`, a panel for each value of `col`.

    table: `col`, bridge, items, accuracy, low, high. ends: dashed lines with their labels.
    """
    panels, names = list(dict.fromkeys(table[col])), list(dict.fromkeys(table["bridge"]))
    places = {x: i for i, x in enumerate(sorted(table["items"].unique()))}
    size = {"figsize": (1.2 + 4.3 * len(panels), 3.6), "sharey": True, "squeeze": False, "layout": "constrained"}
    fig, axes = plt.subplots(1, len(panels), **size)
    for ax, panel in zip(axes.flat, panels, strict=True):
        for k, name in enumerate(names):
            rows = table[(table[col] == panel) & (table["bridge"] == name)].sort_values("items")
            at = rows["items"].map(places) + 0.06 * (k - (len(names) - 1) / 2)
            color = list(PREFIX_COLORS.values())[3 + k]
            ax.plot(at, rows["accuracy"], "osD^v"[k % 5], ls="-", color=color, ms=5, label=name)
            ax.vlines(at, rows["low"], rows["high"], color=color, lw=1.4)
        for (name, level), style in zip((ends or {}).items(), ("--", ":"), strict=False):
            ax.axhline(level, color=INK, ls=style, lw=1.2, label=name)
        ax.set_xticks(list(places.values()), [f"{x:g}" for x in places])
        ax.set(title=str(panel), xlabel=xlabel, ylabel=ylabel if ax is axes[0, 0] else "")
    handles = axes[0, 0].get_legend_handles_labels()
    fig.legend(*handles, loc="outside upper center", ncols=min(3 if len(panels) == 1 else 5, len(handles[1])), frameon=False)
    return fig


def _ordered(column: str, values: pd.Series) -> list:
    """The column's values in the order in which they are always drawn."""
    orders = {"prefix": PREFIX_ORDER, "setting": tuple(SETTINGS), "kind": ("personal", "divergent")}
    known = orders.get(column, ())
    found = list(dict.fromkeys(values))
    return [value for value in known if value in found] + [value for value in found if value not in known]


def _side(ax: plt.Axes, y: int, row: dict, left: float, right: float) -> None:
    """The shade of a claim's side, which ends at the frame."""
    if "side_low" in row:
        low, high = max(row["side_low"], left), min(row["side_high"], right)
        ax.barh(y, high - low, left=low, height=0.8, color="#DDEFE8", lw=0, zorder=0.5)


def _forest_line(ax: plt.Axes, y: float, paper_y: float, row: dict, size: int) -> None:
    """One row of a forest: the interval with its estimate, and the paper's value."""
    color, marker = VERDICTS.get(row.get("verdict"), (PREFIX_COLORS.get(row.get("prefix"), INK), "o"))
    ax.plot([row["low"], row["high"]], [y, y], color=color, lw=2)
    ax.plot(row["estimate"], y, marker, color=color, ms=size)
    ax.plot(row.get("paper_value", np.nan), paper_y, "o", mfc="white", mec=INK, ms=6, zorder=3)


def _forest_legend(fig: Figure, ax: plt.Axes, table: pd.DataFrame, hue: str | None) -> None:
    for verdict, (color, marker) in VERDICTS.items() if "verdict" in table else ():
        ax.plot([], [], marker, color=color, ls="", label=verdict)
    for prefix in _ordered(hue, table[hue]) if hue == "prefix" else ():
        ax.plot([], [], "o", color=PREFIX_COLORS[prefix], ls="", label=_label(hue, prefix))
    if "paper_value" in table:
        ax.plot([], [], "o", mfc="white", mec=INK, ls="", label="paper")
    if named := ax.get_legend_handles_labels()[1]:
        fig.legend(loc="outside upper center", ncols=min(6, len(named)), frameon=False)


def _bars(ax: plt.Axes, rows: pd.DataFrame, x: str, hue: str | None, color: str) -> None:
    """Bars with intervals; a group without numbers gets only its n. Tick labels carry n where it differs."""
    places, width = _places(rows, x, hue)
    for row in rows.to_dict("records"):
        at = places[row[x], row.get(hue)]
        if np.isnan(row["accuracy"]):
            turn = {"rotation": 90} if hue else {}
            ax.text(at, 0.02, f"n={row['n_people']}\nno bar", ha="center", fontsize=7, color="#777777", **turn)
            continue
        prefix = row[x] if x == "prefix" else row.get("prefix", row.get(hue))
        hatch = SETTINGS.get(row.get("setting"), ("", ""))[1]
        alpha = 0.45 if row.get("trained") is True else 1.0
        look = {"color": COLORS.get(prefix, color), "alpha": alpha}
        ax.bar(at, row["accuracy"], width * 0.9, hatch=hatch, edgecolor="white", lw=0, **look)
        ax.plot([at, at], [row["low"], row["high"]], color=INK, lw=1.3)
    ticks, differ = _ordered(x, rows[x]), rows.n_people.nunique() > 1 and not hue
    counts = {row[x]: f"\nn={row['n_people']}" if differ else "" for row in rows.to_dict("records")}
    turn = {"rotation": 35, "ha": "right"} if len(ticks) > 4 and x != "setting" else {}
    ax.set_xticks(range(len(ticks)), [_label(x, tick) + counts[tick] for tick in ticks], fontsize=8, **turn)
    ax.set_xlim(-0.6, len(ticks) - 0.4)
    ax.grid(False, axis="x")


def _legend(fig: Figure, axes: np.ndarray, hue: str | None, summary: pd.DataFrame) -> None:
    """Lines and marks as drawn, and a plain patch for each value of `hue`."""
    named = [pair for ax in axes.flat for pair in zip(*ax.get_legend_handles_labels(), strict=True)]
    handles = {label: handle for handle, label in named}
    for value in _ordered(hue, summary[hue]) if hue else []:
        alpha = 0.45 if hue == "trained" and value else 1.0
        handles[_label(hue, value)] = Patch(color=COLORS.get(value, "#555555"), alpha=alpha)
    columns = -(-len(handles) // -(-len(handles) // 6))
    fig.legend(handles.values(), handles, loc="outside upper center", ncols=columns, frameon=False)


def _paper_marks(ax: plt.Axes, paper: pd.DataFrame, rows: pd.DataFrame, x: str, hue: str | None) -> None:
    places, _ = _places(rows, x, hue)
    marks = [(places.get((row[x], row.get(hue))), row["value"]) for row in paper.to_dict("records")]
    marks = [(at, value) for at, value in marks if at is not None]
    if marks:
        ax.plot(*zip(*marks, strict=True), "o", mfc="white", mec=INK, ms=6, ls="", label="paper", zorder=3)


def _paper_people(ax: plt.Axes, paper: pd.DataFrame, labels: list[str], n: int) -> None:
    """The paper's people, sorted, spread over the n places of ours, and its other marks under our labels."""
    theirs = np.sort(paper.loc[paper["label"] == "", "change"])
    marks = list(zip(np.linspace(0, max(n - 1, 0), len(theirs)), theirs, strict=True)) if n else []
    of_label = paper[paper["label"].isin(labels)]
    marks += [(labels.index(row.label) - 1 - len(labels), row.change) for row in of_label.itertuples()]
    if marks:
        ax.plot(*zip(*marks, strict=True), "o", mfc="none", mec=INK, ms=5, ls="", label="paper", zorder=3)


def _reference_lines(ax: plt.Axes, baseline: float | None, label: str) -> None:
    ax.axhline(0.5, color="#999999", ls="--", lw=1, label="chance")
    if baseline is not None:
        ax.axhline(baseline, color=INK, ls=(0, (6, 3)), lw=1.2, label=label)


def _places(rows: pd.DataFrame, x: str, hue: str | None) -> tuple[dict, float]:
    """Where each (x, hue) stands, and the width of a bar."""
    hues = (_ordered(hue, rows[hue]) if hue else []) or [None]
    width = 0.84 / len(hues)
    shift = {value: (i - (len(hues) - 1) / 2) * width for i, value in enumerate(hues)}
    return {(v, h): i + shift[h] for i, v in enumerate(_ordered(x, rows[x])) for h in hues}, width


def _label(column: str, value: object) -> str:
    if column == "trained":
        return "person seen in training" if value else "unseen person"
    return SETTINGS[value][0] if column == "setting" and value in SETTINGS else str(value).replace("_", " ")
