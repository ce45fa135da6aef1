"""What a reader of a notebook sees: figures, records, tables and sources, checked in what they contain."""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import to_hex

from helpers import show, stats

HOSTILE = '<script>alert("1")</script>'


@pytest.fixture(autouse=True)
def close_figures():
    plt.switch_backend("agg")
    show.theme()
    yield
    plt.close("all")


def claim(**values) -> dict:
    row = {"claim_id": "a", "statement": "A statement", "source": "4.1", "rule": "a: interval above 0.00"}
    row |= {"estimate": 0.5, "low": 0.4, "high": 0.6, "n_people": 9, "verdict": "inconclusive"}
    row |= {"paper_value": float("nan")}
    return row | values


def summary(**columns) -> pd.DataFrame:
    frame = pd.DataFrame(columns)
    return frame.assign(accuracy=0.6, low=0.5, high=0.7, n_people=9)


def texts(fig) -> str:
    return "\n".join(text.get_text() for text in fig.findobj(plt.Text))


def bars(fig) -> list:
    return [patch for ax in fig.axes for patch in ax.patches]


def test_every_prefix_has_its_own_colour_and_no_verdict_shares_a_marker():
    assert len(set(show.PREFIX_COLORS.values())) == len(show.PREFIX_ORDER)
    assert len({marker for _, marker in show.VERDICTS.values()}) == 3


def test_bars_keep_the_order_and_the_colour_of_prefixes():
    fig = show.accuracy_bars(summary(prefix=["name", "none", "tag"], kind="divergent"))
    found = sorted((bar.get_x(), to_hex(bar.get_facecolor()).upper()) for bar in bars(fig))
    assert [color for _, color in found] == [show.PREFIX_COLORS[p] for p in ("none", "tag", "name")]


def test_chance_baseline_and_the_papers_values_are_drawn():
    paper = pd.DataFrame({"prefix": ["tag", "vpl"], "kind": "divergent", "value": [0.55, 0.9]})
    ours = summary(prefix=["none", "tag"], kind="divergent")
    fig = show.accuracy_bars(ours, baseline={"divergent": 0.48}, paper=paper)
    lines = {line.get_label(): line for line in fig.axes[0].lines}
    assert list(lines["untrained, no prefix"].get_ydata()) == [0.48, 0.48]
    assert list(lines["chance"].get_ydata()) == [0.5, 0.5]
    # tag stands second, at 1; the paper's vpl has no bar in this run and is left out
    assert lines["paper"].get_xydata().tolist() == [[1.0, 0.55]]
    assert lines["paper"].get_markerfacecolor() == "white"


def test_a_group_that_is_too_small_gets_its_n_and_no_bar():
    groups = summary(value=["isles", "valley"], attribute="region")
    groups.loc[0, ["accuracy", "low", "high"]] = np.nan
    groups.loc[0, "n_people"] = 2
    fig = show.accuracy_bars(groups, x="value", col="attribute")
    assert len(bars(fig)) == 1
    assert "n=2\nno bar" in texts(fig)
    assert "valley\nn=9" in texts(fig)


def test_wrong_and_removed_prefixes_are_hatched():
    settings = ["unseen", "unseen_wrong", "unseen_removed"]
    fig = show.sensitivity(summary(setting=settings, prefix="name", kind="divergent"), {"divergent": 0.5})
    assert [bar.get_hatch() or "" for bar in bars(fig)] == ["", "//", "xx"]
    assert "name" in texts(fig)


def test_the_stamp_says_simulated_world_only_where_it_is_one(store):
    fig = show.stamp(show.accuracy_bars(summary(prefix=["none"], kind="divergent")), store, n=9)
    assert f"simulated world · run {store.name} · n = 9 people" in texts(fig)
    real = type(store)(store.path, store.profile.model_copy(update={"simulated": False}))
    fig = show.stamp(show.accuracy_bars(summary(prefix=["none"], kind="divergent")), real, n=9)
    assert "simulated" not in texts(fig)
    assert "n = 9 people" in texts(fig)
    fig = show.stamp(plt.subplots()[0], real, n="n = 4 questions")
    assert texts(fig).endswith(f"run {store.name} · n = 4 questions")


def test_the_equity_scatter_has_a_panel_per_prefix_and_a_dot_per_person():
    points = pd.DataFrame({"prefix": ["name", "name", "none"], "untrained": [0.4, 0.5, 0.6], "trained": 0.7})
    fig = show.equity_scatter(points.assign(persona_id=["a", "b", "a"]), {"name": "r = 0.10"})
    shown = [ax for ax in fig.axes if ax.get_visible()]
    dots = [(ax.get_title(), len(ax.collections[0].get_offsets())) for ax in shown]
    assert dots == [("none", 1), ("name", 2)]
    assert "r = 0.10" in texts(fig)


def test_the_forest_shows_estimate_interval_side_and_the_papers_value():
    rows = pd.DataFrame([claim(side_low=0.45, side_high=float("inf"), paper_value=0.55)])
    ax = show.forest(rows, "claim_id", "accuracy").axes[0]
    assert [line.get_xdata()[0] for line in ax.lines if len(line.get_xdata()) == 1] == [0.5, 0.55]
    assert ax.patches[0].get_x() == 0.45
    assert ax.get_yticklabels()[0].get_text() == "a  (n=9)"


def test_a_forest_frames_its_intervals_and_the_dashed_line():
    # lowest .02, highest .04, dashed line at 0: a frame from -.002 to .042, a twentieth beyond both ends
    ax = show.forest(pd.DataFrame([claim(estimate=0.03, low=0.02, high=0.04)]), "claim_id", "difference").axes[0]
    assert ax.get_xlim() == pytest.approx((-0.002, 0.042))


def test_labels_are_words_and_identifiers_stay_as_in_the_tables():
    rows = pd.DataFrame([claim(claim_id="gold_level", prefix="few_shot")])
    written = {name: show.forest(rows, name, "x").axes[0].get_yticklabels()[0].get_text() for name in ("claim_id", "prefix")}
    assert written == {"claim_id": "gold_level  (n=9)", "prefix": "few shot  (n=9)"}


def test_long_labels_are_turned_and_the_legend_fits_its_figure():
    fig = show.accuracy_bars(summary(prefix=["none", "persona_gold"] * 2, kind="divergent", trained=[True, True, False, False]),
                             hue="trained", baseline={"divergent": 0.5})
    assert {tick.get_rotation() for tick in fig.axes[0].get_xticklabels()} == {35.0}
    fig.canvas.draw()
    assert fig.legends[0].get_window_extent().width <= fig.bbox.width
    lights = [bar.get_alpha() for bar in sorted(bars(fig), key=lambda bar: bar.get_x())]
    assert lights == [0.45, 1.0, 0.45, 1.0]  # seen people left of unseen ones, whatever the order of the rows


def test_a_bridge_has_one_colour_in_every_figure():
    rows = pd.DataFrame({"measure": "found", "bridge": ["golden", "inferred"], "items": 1})
    rows = rows.assign(accuracy=0.5, low=0.4, high=0.6)
    for table in (rows, rows[::-1]):
        lines = {line.get_label(): line for line in show.by_items(table, "share", "measure").axes[0].lines}
        assert lines["golden"].get_color() == show.PREFIX_COLORS["persona_gold"]
        assert lines["inferred"].get_color() == show.PREFIX_COLORS["persona_gpt4"]


def test_records_are_printed_raw_and_whole(capsys):
    show.records(pd.DataFrame({"text": ["one\ntwo", "", "never"], "axes": [["diet", "age"], [], []]}), n=2)
    out = capsys.readouterr().out
    assert "text | one\n     | two" in out
    assert "axes | diet, age" in out
    assert 'text | ""' in out
    assert "never" not in out


def test_tables_escape_text_headers_lists_and_captions():
    frame = pd.DataFrame({HOSTILE: [HOSTILE], "list": [[HOSTILE, "b"]], "x": [1.23456], "none": [np.nan]})
    html = show.table(frame, caption=HOSTILE).to_html()
    assert "<script" not in html
    assert html.count("&lt;script&gt;") == 4
    assert "1.235" in html
    assert "–" in html


def test_counts_have_no_decimals_and_shares_keep_theirs():
    # mean tokens and a missing count are floats to pandas; a share of exactly 1 stays 1.000
    html = show.table(pd.DataFrame({"tokens": [10.0, np.nan], "share": [1.0, 0.0], "mean": [2.5, 3.0]})).to_html()
    found = [cell.split("<")[0] for cell in html.split('class="data ')[1:] for cell in [cell.split(">")[1]]]
    assert found == ["10", "1.000", "2.500", "–", "0.000", "3.000"]


def test_captions_of_a_simulated_run_say_so_and_the_papers_numbers_do_not(store):
    show.theme(store)
    frame = pd.DataFrame({"a": [1]})
    assert "<caption>simulated world · people</caption>" in show.table(frame, "people").to_html()
    assert "<caption>simulated world</caption>" in show.table(frame).to_html()
    assert "<caption>Table 13</caption>" in show.table(frame, "Table 13", ours=False).to_html()
    show.theme(type(store)(store.path, store.profile.model_copy(update={"simulated": False})))
    assert "<caption>people</caption>" in show.table(frame, "people").to_html()


def test_a_forest_of_two_runs_has_both_under_one_label():
    # Two runs of claim a, .5 and .3: one tick, the first run above (y -.2), the second below (y +.2).
    rows = pd.DataFrame([claim(run="one"), claim(run="two", estimate=0.3, low=0.2, verdict="reproduced")])
    fig = show.forest(rows, "claim_id", "accuracy", hue="run")
    points = [line.get_xydata()[0].tolist() for line in fig.axes[0].lines if len(line.get_xdata()) == 1]
    assert [[round(x, 6), round(y, 6)] for x, y in points if x == x] == [[0.5, -0.2], [0.3, 0.2]]
    assert [tick.get_text() for tick in fig.axes[0].get_yticklabels()] == ["a  (n=9)"]


def test_bars_of_untrained_and_trained_groups_have_their_own_colours():
    groups = summary(value=["isles", "isles"], model=["untrained", "persona_gpt4"], attribute="region")
    fig = show.accuracy_bars(groups, x="value", hue="model", col="attribute")
    assert [to_hex(bar.get_facecolor()).upper() for bar in bars(fig)] == ["#C4C4C4", show.PREFIX_COLORS["persona_gpt4"]]


def test_a_source_is_the_tested_code_with_its_place():
    html = show.source(stats.holm).data
    assert "helpers/stats.py, line" in html
    assert "accumulate" in html
    assert "<script" not in html


def taxed(**columns) -> pd.DataFrame:
    return pd.DataFrame(columns).assign(low=-0.2, high=0.2)


def test_tax_by_person_is_sorted_beside_the_marks_without_a_prefix():
    people = taxed(group="safety", persona_id=["p1", "p2"], prefix="name", change=[0.1, -0.1])
    others = taxed(group="safety", label=["trained without"], prefix="none", change=[0.05])
    paper = pd.DataFrame({"group": "safety", "label": ["", "", "trained without", "baseline"],
                          "change": [0.3, 0.2, 0.01, 0.0]})
    fig = show.tax_people(people, others, paper, {"safety": "safety (untrained 0.50)"})
    (ax,) = fig.axes
    assert [tick.get_text() for tick in ax.get_xticklabels()] == ["trained without", "p2", "p1"]
    (hollow,) = [line for line in ax.lines if line.get_label() == "paper"]
    assert list(zip(*hollow.get_data(), strict=True)) == [(0, 0.2), (1, 0.3), (-2, 0.01)]


def test_tax_by_prefix_has_a_marker_for_each_kind():
    rows = taxed(group=["safety", "safety", "reasoning"], prefix=["name", "none", "name"],
                 what=["removed", "removed", "in front"], change=0.1)
    fig = show.tax_prefixes(rows, {"safety": "safety", "reasoning": "reasoning"})
    assert [tick.get_text() for tick in fig.axes[0].get_xticklabels()] == ["none", "name"]
    assert {"removed", "in front", "untrained, no prefix"} <= set(texts(fig).splitlines())
