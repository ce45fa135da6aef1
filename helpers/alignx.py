"""AlignX on this run's people: raw histories in front of a question (ICA), or directions read out of them (PBA).

In-context alignment puts what somebody wrote, chose and is into the prompt as it is (helpers.histories).
Preference-bridged alignment first turns it into directions in the preference space, and those into words
(helpers.bridges). Either way a person is a text before the question, so training and scoring are those of every
other prefix. Source: AlignX (arXiv 2503.15463).
"""

from collections.abc import Mapping, Sequence

import pandas as pd

from helpers import bridges, histories, prefixes, settings
from helpers.config import Profile
from helpers.reading import Evidence, history, possible

TEMPLATE = {"ica": "few_shot", "pba": "persona"}  # in front of the question: the templates of these prefixes
PROMPT = ["pair_id", "head"]  # what tells two prompts apart
REFERRED = ("main", "novel")  # settings for which AlignX's rule is applied
KEPT = ["persona_id", "pair_id", "kind", "axis", "prefix", "variant", "setting", "trained", "head", "tail",
        "chosen", "rejected"]


def ask(pairs: pd.DataFrame, texts: Mapping[str, str] | Sequence[str], method: str, prefix: str, variant: str,
        cfg: Profile) -> pd.DataFrame:
    """The pairs behind a text, as settings.ask has them behind a prefix. texts: by persona_id, or one for each pair."""
    each = [texts[p] for p in pairs["persona_id"]] if isinstance(texts, Mapping) else list(texts)
    asked = [prefixes.prompt(cfg.policy.templates, TEMPLATE[method] if text else "none", text, x)
             for text, x in zip(each, pairs["prompt"], strict=True)]
    heads, tails = zip(*asked, strict=True) if asked else ((), ())
    return pairs.assign(method=method, prefix=prefix, variant=variant, head=list(heads), tail=list(tails))


def asked_in_training(method: str, pairs: pd.DataFrame, evidence: Evidence, table: pd.DataFrame, key: tuple[str, int],
                      n: int, cfg: Profile) -> pd.DataFrame:
    """Train or validation pairs behind what their adapter learns from: mixed items (ica) or mixed bridges (pba)."""
    texts = histories.mixed(pairs, evidence, cfg) if method == "ica" else bridges.mixed(pairs, table, key, n, cfg)
    return ask(pairs, texts, method, "mixed", "train", cfg)


def asked_in_main(method: str, test: pd.DataFrame, evidence: Evidence, table: pd.DataFrame, folds: pd.DataFrame,
                  key: tuple[str, int], n: int, cfg: Profile) -> pd.DataFrame:
    """Test pairs of a cell behind each representation of the method, from n items, and behind none at all.

    In a fold: its unseen and seen people, setting main, and removed for none. For the axes left out: those of `test`.
    """
    parts = []
    for name, texts in representations(method, evidence, table, key, n, cfg).items():
        rows = ask(test[test["persona_id"].isin(set(texts))], texts, method, name, "main", cfg)
        if key[0] == "stratified":
            rows = settings.main(rows, folds, key[1]).assign(prefix=name)
            rows["setting"] = "removed" if name == "none" else "main"
        else:
            rows = rows.assign(setting=key[0], trained=False)
        parts.append(rows[KEPT])
    return pd.concat(parts, ignore_index=True)


def asked_with_items(method: str, test: pd.DataFrame, evidence: Evidence, table: pd.DataFrame, key: tuple[str, int],
                     cfg: Profile) -> pd.DataFrame:
    """Divergent pairs of `test` behind 0, 1, 2, … items: raw pairs (ica), or each bridge that reads items (pba)."""
    parts, rows = [], test[test["kind"] == "divergent"]
    for n in possible(evidence, cfg.alignx.counts):
        made = {"pair": histories.texts(evidence, "pair", n, cfg)} if method == "ica" else {
            name: bridges.texts(table, name, n, key) for name in bridges.NAMES if name != "golden"}
        parts += [ask(rows, texts, method, name, f"items{n}", cfg) for name, texts in made.items()]
    return pd.concat(parts, ignore_index=True).assign(setting="items", trained=False)[KEPT]


def asked_on_trial(prefix: str, texts: Mapping[str, str], train: pd.DataFrame, evidence: Evidence, n: int,
                   cfg: Profile) -> pd.DataFrame:
    """Train pairs that a text from n items was *not* made of, behind it and behind none: what a check may look at."""
    used = {pair for p in train["persona_id"].unique() for pair in history(evidence, p, n, cfg.seed)["pair_id"]}
    rest = train[~train["pair_id"].isin(used)]
    parts = [ask(rest, made, "pba", name, "main", cfg) for name, made in
             ((prefix, texts), ("none", dict.fromkeys(texts, "")))]
    return pd.concat(parts, ignore_index=True).assign(setting="trial", trained=False)[KEPT]


def asked_turned(test: pd.DataFrame, evidence: Evidence, folds: pd.DataFrame, fold: int, cfg: Profile) -> pd.DataFrame:
    """Test pairs of a fold's people behind golden directions flipped, and behind the same ones reworded."""
    parts, flipped = [], bridges.flipped(evidence, cfg)
    for setting, texts in (("flipped", flipped), ("reworded", bridges.reworded(evidence, cfg))):
        rows = ask(test[test["persona_id"].isin(set(flipped))], texts, "pba", "golden", "main", cfg)
        parts.append(settings.main(rows, folds, fold).assign(prefix="golden", setting=setting))
    return pd.concat(parts, ignore_index=True)[KEPT]


def representations(method: str, evidence: Evidence, table: pd.DataFrame, key: tuple[str, int], n: int,
                    cfg: Profile) -> dict[str, dict[str, str]]:
    """name -> persona_id -> text: the raw histories, or the bridges, and none; a name without any text is left out."""
    made = ({name: histories.texts(evidence, name, n, cfg) for name in histories.NAMES} if method == "ica" else
            {name: bridges.texts(table, name, n, key) for name in bridges.NAMES})
    people = evidence.personas["persona_id"]
    return {name: texts for name, texts in made.items() if any(texts.values())} | {"none": dict.fromkeys(people, "")}


def novel_people(personas: pd.DataFrame) -> tuple[list[str], list[str], list[str]]:
    """Half of the axes left out, every second in order: the axes, who trains (none of them), who is asked (only them)."""
    axes = sorted({axis for of in personas["axes"] for axis in of})
    left = axes[::2] if len(axes) > 1 else []
    on = {p: {a in left for a in of} for p, of in zip(personas["persona_id"], personas["axes"], strict=True)}
    return left, sorted(p for p in on if on[p] == {False}), sorted(p for p in on if on[p] == {True})


def to_refer(in_training: Sequence[Sequence[pd.DataFrame]], to_score: Sequence[pd.DataFrame]) -> pd.DataFrame:
    """Every prompt that the untrained policy has to score, once: all of the training, and settings main and novel."""
    rows = [part for both in in_training for part in both]
    rows += [part[part["setting"].isin(REFERRED)] for part in to_score]
    once = pd.concat(rows, ignore_index=True)[[*PROMPT, "tail", "chosen", "rejected"]]
    return once.drop_duplicates(PROMPT, ignore_index=True).assign(before=lambda made: made["head"])


def referred(base: pd.DataFrame) -> pd.DataFrame:
    """The untrained policy's sums for DPO, by PROMPT. base: scores of `to_refer`."""
    names = {"before": "head", "logp_chosen": "ref_chosen_logps", "logp_rejected": "ref_rejected_logps"}
    return base.rename(columns=names)[[*PROMPT, "ref_chosen_logps", "ref_rejected_logps"]]
