"""What a claim measures: numbers with intervals from resampling people, over the tables of a run."""

import json
from collections.abc import Callable, Sequence
from itertools import combinations

import numpy as np
import pandas as pd

from helpers import directions, stats
from helpers.config import Profile
from helpers.schemas import made_by
from helpers.stats import Estimate

PLANTED = ("region", "isles")  # the base has read less about these people: data/world/little/cast.yaml
SCHEMES = ("small", "leave_axis_out")  # settings that hold other people out than `main` does
TEXTS = ("few_shot", "persona", "persona_gpt4", "persona_gold")  # prefixes of a length worth comparing


class Missing(LookupError):
    """A claim needs rows that this run does not have."""


class Bench:
    """The tables that measures read, and the options of their bootstrap."""

    def __init__(self, scores: pd.DataFrame, personas: pd.DataFrame, cfg: Profile, **tables: pd.DataFrame):
        """tables: winrates, tax, prefixes, preferences, … by name; measures of what is not here raise Missing."""
        self.personas, self.cfg, self.tables = personas, cfg, tables
        names = ["method", "prefix", "variant", "setting", "kind"]
        self.scores = scores.astype(dict.fromkeys(names, "category"))  # compared some hundred times
        self.options = cfg.stats.model_dump() | {"seed": cfg.seed}

    def table(self, name: str) -> pd.DataFrame:
        """The rows of a further table. Raises Missing where the run has none."""
        if not len(self.tables.get(name, ())):
            raise Missing(f"no {name} in a run of imported pairs" if self.cfg.data.preferences else
                          f"no {name}: {' or '.join(made_by(name))} makes them")
        return self.tables[name]

    def cell(self, words: str) -> pd.DataFrame:
        """The scored pairs of "method prefix kind[ setting][ variant=…][ trained=true]" ("*": any).

        Those of people the adapter was not trained on, unless trained=true. `main` scores are of variant main,
        unless a variant is named. Raises Missing without any row.
        """
        plain = [word for word in words.split() if "=" not in word]
        named = dict(word.split("=") for word in words.split() if "=" in word)
        where = dict(zip(("method", "prefix", "kind", "setting"), [*plain, "main"], strict=False))
        if where["setting"] == "main":
            where["variant"] = "main"
        if where["method"] != "prompting":
            where["trained"] = named.pop("trained", "false") == "true"
        kept = [self.scores[column] == value for column, value in (where | named).items() if value != "*"]
        rows = self.scores[np.logical_and.reduce(kept)]
        if rows.empty:
            raise Missing(f"no scores of {words}")
        return rows

    def pair(self, first: str, second: str) -> tuple[pd.DataFrame, pd.DataFrame]:
        """Two cells. Trained alike, only the folds and seeds (with prefix "*": and prefixes) that both have."""
        a, b = self.cell(first), self.cell(second)
        if "prompting" in (_design(first), _design(second)) or _design(first) != _design(second):
            return a, b
        on = ["fold", "seed", "prefix"][: 3 if first.split()[1] == "*" else 2]
        of_a, of_b = (pd.MultiIndex.from_frame(cell[on].astype(str)) for cell in (a, b))
        if not of_a.isin(of_b).any():
            raise Missing(f"{first} and {second} share no {', '.join(on)}")
        return a[of_a.isin(of_b)], b[of_b.isin(of_a)]


def demographics(personas: pd.DataFrame) -> pd.DataFrame:
    """A row per person, attribute and known value ("a/b" counts as both): persona_id, attribute, value."""
    rows = [
        (person.persona_id, attribute, value.strip())
        for person in personas.itertuples()
        for attribute, values in json.loads(person.demographics or "{}").items()
        for value in str(values).split("/")
        if value.strip() != "unknown"
    ]
    return pd.DataFrame(rows, columns=["persona_id", "attribute", "value"])


def level(bench: Bench, cells: Sequence[str]) -> Estimate:
    """Accuracy of the cell."""
    return stats.contrast([bench.cell(cells[0])], lambda a: a[..., 0], **bench.options)


def gap(bench: Bench, cells: Sequence[str]) -> Estimate:
    """Accuracy of the first cell minus that of the second, the same people on both sides."""
    return stats.difference(*bench.pair(*cells), **bench.options)


def gap_of_gaps(bench: Bench, cells: Sequence[str]) -> Estimate:
    """(first minus second) minus (third minus fourth)."""
    four = [*bench.pair(*cells[:2]), *bench.pair(*cells[2:])]
    return stats.contrast(four, lambda a: a @ np.array([1, -1, -1, 1]), **bench.options)


def largest_move(bench: Bench, _: Sequence[str]) -> Estimate:
    """The largest distance of a prompted prefix from none: every prefix's interval has to lie on the side."""
    names = [name for name in bench.cell("prompting * divergent").prefix.unique() if name != "none"]
    none = bench.cell("prompting none divergent")
    cells = [bench.cell(f"prompting {name} divergent") for name in names]
    return _widest([stats.difference(cell, none, **bench.options) for cell in cells])


def fall_of_r(bench: Bench, cells: Sequence[str]) -> Estimate:
    """r(untrained, first cell) minus r(untrained, second cell): a point per person, all of their pairs."""
    three = map(bench.cell, ("prompting none *", *cells))
    points = pd.concat(map(stats.person_means, three), axis=1, join="inner").to_numpy()
    return stats.resample(points, lambda p: _r(p, 0, 1) - _r(p, 0, 2), **bench.options)


def demographic_gap(bench: Bench, cells: Sequence[str]) -> Estimate:
    """The largest distance between two groups of one attribute, groups under `min_people` left out."""
    scored = bench.cell(cells[0]).merge(demographics(bench.personas), on="persona_id")
    gaps = []
    for _, rows in scored.groupby("attribute"):
        groups = [group for _, group in rows.groupby("value")]
        large = [group for group in groups if group.persona_id.nunique() >= bench.options["min_people"]]
        for two in combinations(large, 2):
            gaps.append(stats.contrast(two, _minus, paired=False, **bench.options))
    return _widest(gaps)


def planted_gap(bench: Bench, cells: Sequence[str]) -> Estimate:
    """First cell minus second of the people the base has read less about, minus the same of everybody else."""
    if not bench.cfg.simulated:
        raise Missing("only the little world has a planted imbalance")
    groups, least = demographics(bench.personas), bench.options["min_people"]
    ids = set(groups[(groups.attribute == PLANTED[0]) & (groups.value == PLANTED[1])].persona_id)
    both = [bench.cell(cell) for cell in cells]
    four = [rows[rows.persona_id.isin(ids) == inside] for inside in (True, False) for rows in both]
    fewest = min(cell.persona_id.nunique() for cell in four)
    if fewest < least:
        raise Missing(f"{fewest} people on one side of {' '.join(PLANTED)}, at least {least} needed")
    return stats.contrast(four, lambda a: a @ np.array([1, -1, -1, 1]), paired=False, **bench.options)


def wins(bench: Bench, cells: Sequence[str]) -> Estimate:
    """Share of the first system's answers that won against the second's; an unresolved one counts half."""
    rows, (ours, other) = bench.table("winrates"), cells
    met = rows[(rows.system_a.isin(cells)) & (rows.system_b.isin(cells)) & (rows.system_a != rows.system_b)]
    if met.empty:
        raise Missing(f"no answers of {ours} were judged against {other}")
    won = met.assign(correct=(met.winner == ours) + 0.5 * ~met.winner.isin(cells))
    return stats.contrast([won], lambda a: a[..., 0], **bench.options)


def tax_gap(bench: Bench, cells: Sequence[str]) -> Estimate:
    """Accuracy on a group of tasks, first system minus second; a point per person."""
    a, b = (_taxed(bench, *cell.split()) for cell in cells)
    return _over_people(a - b, bench)


def tax_nearer(bench: Bench, cells: Sequence[str]) -> Estimate:
    """How much nearer to the third the second is than the first: |first - third| - |second - third|."""
    a, b, base = (_taxed(bench, *cell.split()) for cell in cells)
    return _over_people((a - base).abs() - (b - base).abs(), bench)


def prefix_overlap(bench: Bench, cells: Sequence[str]) -> Estimate:
    """ROUGE-1 of the first prefix with the person's gold persona minus that of the second."""
    from rouge_score.rouge_scorer import RougeScorer  # slow to import, by way of nltk and sklearn

    texts = bench.table("prefixes").query("variant == 'main'").pivot(index="persona_id", columns="prefix", values="text")
    if absent := [name for name in (*cells, "persona_gold") if name not in texts]:
        raise Missing(f"no prefix {', '.join(absent)}")
    texts, score = texts[[*cells, "persona_gold"]].dropna(), RougeScorer(["rouge1"]).score
    first, second = ([score(gold, text)["rouge1"].fmeasure for gold, text in texts[["persona_gold", name]].to_numpy()]
                     for name in cells)
    return _over_people(pd.Series(first) - pd.Series(second), bench)


def length_r(bench: Bench, _: Sequence[str]) -> Estimate:
    """r over the text prefixes between mean length (tokens) and accuracy on unseen people's divergent questions."""
    texts = bench.table("prefixes").query("variant == 'main'")
    tokens = texts.pivot(index="persona_id", columns="prefix", values="n_tokens")
    names = [name for name in TEXTS if name in tokens and ((bench.scores.prefix == name) & ~bench.scores.trained).any()]
    if len(names) < 3:
        raise Missing(f"{len(names)} prefixes made of text, three needed for a correlation")
    right = [stats.person_means(bench.cell(f"mt {name} divergent")) for name in names]
    points = pd.concat([tokens[names], *right], axis=1, join="inner").dropna().to_numpy(dtype=float)
    n = len(names)
    return stats.resample(points, lambda p: stats.correlate(p[..., :n].mean(-2), p[..., n:].mean(-2)), **bench.options)


def label_length(bench: Bench, cells: Sequence[str]) -> Estimate:
    """Words of chosen over words of rejected answers of a kind, minus 1, the same people on both sides."""
    pairs = bench.table("preferences").query("kind == @cells[0]")
    words = pairs[["chosen", "rejected"]].map(lambda text: len(text.split())).groupby(pairs.persona_id).sum()
    return stats.resample(words.to_numpy(), lambda w: w[..., 0].sum(-1) / w[..., 1].sum(-1) - 1, **bench.options)


def shown_first(bench: Bench, _: Sequence[str]) -> Estimate:
    """Share of the judge's decided comparisons that the answer shown first won."""
    decided = bench.table("comparisons").query("winner != ''")
    won = decided.assign(correct=decided.winner == decided.shown_first)
    return stats.contrast([won], lambda a: a[..., 0], **bench.options)


def judge_truth(bench: Bench, _: Sequence[str]) -> Estimate:
    """Share of the judge's decided comparisons that the better answer won, by the utility nobody else reads."""
    if not bench.cfg.simulated:
        raise Missing("only the little world knows the truth about its people")
    from helpers.world import facts, teacher

    decided, tables = bench.table("comparisons").query("winner != ''"), map(bench.table, ("questions", "responses"))
    utility = teacher.truth(facts.load_world(bench.cfg.world), bench.personas, *tables)
    of = utility.set_index(["persona_id", "question_id", "response_id"])["utility"].to_dict()
    better = [max((a, b), key=lambda r: of[person, question, r]) for person, question, a, b
              in decided[["persona_id", "question_id", "response_a", "response_b"]].itertuples(index=False)]
    return stats.contrast([decided.assign(correct=decided.winner == better)], lambda a: a[..., 0], **bench.options)


def bridge_gap(bench: Bench, cells: Sequence[str]) -> Estimate:
    """As gap, over the scores of notebook 14."""
    return gap(Bench(bench.table("alignx"), bench.personas, bench.cfg), cells)


def turned_gap(bench: Bench, cells: Sequence[str]) -> Estimate:
    """Share of rankings that turn with the directions, first "setting kind" minus second (notebook 14)."""
    rows = directions.turned(bench.table("alignx"))
    first, second = (rows[(rows["setting"] == s) & (rows["kind"] == k)] for s, k in (cell.split() for cell in cells))
    if first.empty or second.empty:
        raise Missing(f"no directions were turned for {' or '.join(cells)}")
    return stats.difference(first, second, **bench.options)


def _design(words: str) -> str:
    """Which people were held out of a cell's training: only cells of one design have folds and seeds in common."""
    of_scheme = [scheme for scheme in SCHEMES if scheme in words.split()]
    return (words.split()[0] if words.split()[0] in ("prompting", "pm") else (of_scheme or ["stratified"])[0])


def _r(points: np.ndarray, i: int, j: int) -> np.ndarray:
    return stats.correlate(points[..., i], points[..., j])


def _minus(accuracies: np.ndarray) -> np.ndarray:
    return accuracies[..., 0] - accuracies[..., 1]


def _widest(gaps: list[Estimate]) -> Estimate:
    """Of several differences the largest size: estimate, low and high are each the largest of their kind."""
    if not gaps:
        raise Missing("nothing to compare: fewer than two groups or prefixes")
    sizes = [(abs(g.estimate), max(0.0, g.low, -g.high), max(-g.low, g.high), g.n_people) for g in gaps]
    return Estimate(*(max(column) for column in zip(*sizes, strict=True)))


def _taxed(bench: Bench, system: str, trained: str, prefix: str, group: str) -> pd.Series:
    """Accuracy per person, the mean over the group's tasks; without a person in front one number for everybody."""
    tax = bench.table("tax")
    rows = tax[(tax.system == system) & (tax.prefix == prefix) & (tax.group == group)]
    rows = rows[(rows.system == "base") | (rows.trained_prefix == trained)]
    if rows.empty:
        raise Missing(f"no {group} tasks of {system} trained with {trained}, prefix {prefix}")
    of_person = rows.groupby(["persona_id", "task"])["accuracy"].mean().groupby("persona_id").mean()
    people = sorted(set(tax.persona_id) - {""})
    return of_person if "" not in of_person else pd.Series(of_person[""], index=people)


def _over_people(values: pd.Series, bench: Bench) -> Estimate:
    points = values.dropna().to_numpy(dtype=float)[:, None]
    return stats.resample(points, lambda p: p[..., 0].mean(-1), **bench.options)


MEASURES: dict[str, Callable[[Bench, Sequence[str]], Estimate]] = {each.__name__: each for each in (
    level, gap, gap_of_gaps, largest_move, fall_of_r, demographic_gap, planted_gap, wins, tax_gap, tax_nearer,
    prefix_overlap, length_r, label_length, shown_first, judge_truth, bridge_gap, turned_gap)}
