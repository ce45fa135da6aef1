"""AlignX on this run's people: raw histories in front of a question (ICA), or directions read out of them (PBA).

In-context alignment puts what somebody wrote, chose and is into the prompt as it is. Preference-bridged alignment
first turns it into directions in the preference space (helpers.directions), and puts those into words. Either way
a person is a text before the question, so training and scoring are those of every other prefix. Source: AlignX
(arXiv 2503.15463); what its text does not say is ours: the mixture of items, and two of the four bridges.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random

import numpy as np
import pandas as pd
from sklearn.linear_model import Ridge
from sklearn.model_selection import GroupKFold, cross_val_predict

from helpers import directions, models, prefixes, prompts, settings
from helpers.config import Profile
from helpers.directions import Directions, Labels, Wording
from helpers.llm import Request, Teacher
from helpers.schemas import TABLES
from helpers.world.facts import load_world

RAW = ("ugc", "pair", "demographics", "all")
BRIDGES = ("averaged", "inferred", "head", "golden")
TEMPLATE = {"ica": "few_shot", "pba": "persona"}  # in front of the question: the templates of these prefixes
ATTEMPTS, PARTS = 3, 5  # for an answer of the teacher that cannot be read; of the head's cross-fitting
PROMPT = ["pair_id", "head"]  # what tells two prompts apart
REFERRED = ("main", "novel")  # settings for which AlignX's rule is applied
SCORES = ["logp_chosen", "logp_rejected", "n_chosen", "n_rejected", "correct"]
KEPT = ["persona_id", "pair_id", "kind", "axis", "prefix", "variant", "setting", "trained", "head", "tail",
        "chosen", "rejected"]


@dataclass(frozen=True)
class Evidence:
    """What there is to read about everybody.

    pool: train pairs fit for shots, all columns of preferences. labels: what each of them says, by pair_id, and
    golden: what is true, by persona_id; both with a column for each dimension, empty without a teacher. features:
    embedding of chosen minus that of rejected, by pair_id. wording: the world's words, None where there is no world.
    """

    personas: pd.DataFrame
    pool: pd.DataFrame
    labels: pd.DataFrame
    golden: pd.DataFrame
    features: pd.DataFrame
    wording: Wording | None


def gather(teacher: Teacher | None, personas: pd.DataFrame, preferences: pd.DataFrame, cfg: Profile) -> Evidence:
    """Label every train pair and every person with the teacher, and embed the pairs' answers.

    teacher: None where nobody knows the people (imported pairs); then there are no directions, and no bridge.
    """
    pool, nobody = prefixes.shot_pool(preferences).sort_values("pair_id", ignore_index=True), _frame([], [])
    labels = label(teacher, pool, cfg.judge.pairs_per_request) if teacher else nobody
    named = [prompts.render("teacher", "directions_name", DIMENSIONS=_listing(), NAME=n) for n in personas["name"]]
    golden = _frame(_ask(teacher, named, Directions, _one), personas["persona_id"]) if teacher else nobody
    embedder = models.load_embedder(cfg.embedder.path)
    both = [embedder.encode(pool[side].tolist(), normalize_embeddings=True) for side in ("chosen", "rejected")]
    features = pd.DataFrame(both[0].astype(float) - both[1], index=pool["pair_id"])
    wording = Wording(load_world(cfg.world)) if cfg.world and cfg.policy.templates == "short" else None
    return Evidence(personas, pool, labels, golden, features, wording)


def label(teacher: Teacher, pairs: pd.DataFrame, per_request: int) -> pd.DataFrame:
    """The direction of each pair, as AlignX labels its data: which poles chosen leans to more than rejected.

    Returns a row per pair, indexed by pair_id, a column per dimension (1, 0.5 or 0).
    """
    parts = [pairs.iloc[i:i + per_request] for i in range(0, len(pairs), per_request)]
    asked = [prompts.render("teacher", "directions_labels", DIMENSIONS=_listing(), SHOTS=_shots(part)) for part in parts]
    sizes = dict(zip(asked, map(len, parts), strict=True))
    found = _ask(teacher, asked, Labels, lambda said, prompt: _several(said, sizes[prompt]))
    return _frame([values for part in found for values in part], pairs["pair_id"])


def infer(teacher: Teacher, shots: Mapping[str, pd.DataFrame]) -> pd.DataFrame:
    """The directions that the teacher reads out of each person's shots, chosen and rejected, in structured output.

    shots: persona_id -> train pairs. Without any shot everything is neutral. Returns a row per person.
    """
    some = {person: rows for person, rows in shots.items() if len(rows)}
    asked = [prompts.render("teacher", "directions_shots", DIMENSIONS=_listing(), SHOTS=_shots(rows))
             for rows in some.values()]
    found = dict(zip(some, _ask(teacher, asked, Directions, _one), strict=True))
    return _frame([found.get(person, directions.vector()) for person in shots], list(shots))


def head_labels(evidence: Evidence, train_people: Sequence[str], alpha: float) -> pd.DataFrame:
    """What a small trained head reads out of every pair of the pool: a ridge regression from features to labels.

    It is trained on the labelled pairs of `train_people`; of these people themselves each is read by a head that
    was trained without them (by parts). The features are differences, so there is no intercept: a pair the other
    way round has the opposite label. Returns values around 0.5, a row per pair_id, a column per dimension.
    """
    person = evidence.pool.set_index("pair_id")["persona_id"]
    known = person.isin(set(train_people)).to_numpy()
    x, y = evidence.features.to_numpy(), evidence.labels.to_numpy() - directions.NEUTRAL
    model, groups = Ridge(alpha=alpha, fit_intercept=False), person[known]
    told = np.zeros_like(y)
    parts = GroupKFold(min(PARTS, groups.nunique()))
    told[known] = cross_val_predict(model, x[known], y[known], groups=groups, cv=parts)
    told[~known] = model.fit(x[known], y[known]).predict(x[~known]) if (~known).any() else 0
    return pd.DataFrame(told + directions.NEUTRAL, index=evidence.labels.index, columns=evidence.labels.columns)


def bridges(evidence: Evidence, teacher: Teacher | None, counts: Sequence[int], heads: Mapping[tuple[str, int], Sequence[str]],
            cfg: Profile) -> pd.DataFrame:
    """The `directions` table: everybody's directions by each bridge, from so many items of the history.

    counts: numbers of items; one that somebody lacks is left out for all. heads: (scheme, fold) -> the people that
    the trained head learns from. Rows of the other bridges have scheme "" and fold -1, and golden has items 0,
    for it reads none.
    """
    rows, people = [], evidence.personas["persona_id"].sort_values().tolist()
    if teacher is None:
        return pd.DataFrame(columns=list(TABLES["directions"].columns))
    read = {key: head_labels(evidence, ids, cfg.alignx.ridge) for key, ids in heads.items()}
    for n in possible(evidence, counts):
        shots = {person: history(evidence, person, n, cfg.seed) for person in people}
        rows += _rows("averaged", n, "", -1, _averaged(evidence.labels, shots), evidence, cfg)
        rows += _rows("inferred", n, "", -1, infer(teacher, shots), evidence, cfg)
        for (scheme, fold), labels in read.items():
            rows += _rows("head", n, scheme, fold, _averaged(labels, shots), evidence, cfg)
    rows += _rows("golden", 0, "", -1, evidence.golden, evidence, cfg)
    return pd.DataFrame(rows, columns=list(TABLES["directions"].columns))


def possible(evidence: Evidence, counts: Sequence[int]) -> list[int]:
    """Those of the numbers of items that everybody has, with one pair to spare (prefixes.draw_shots)."""
    fewest = int(evidence.pool["persona_id"].value_counts().min())
    return [n for n in sorted(set(counts)) if n < fewest]


def history(evidence: Evidence, persona_id: str, n: int, seed: int) -> pd.DataFrame:
    """n items of a person: the same pairs that few-shot prompts, inferred personas and VPL read."""
    return prefixes.draw_shots(evidence.pool, persona_id, n, seed, "main")


def bridge_text(values: np.ndarray, wording: Wording | None, key: str) -> str:
    """Directions in words; what a world's words leave to chance is drawn by the key."""
    return wording.text(values, Random(key)) if wording else directions.plain_text(values)


def raw_text(ugc: pd.DataFrame, pairs: pd.DataFrame, about: str, templates: str) -> str:
    """A history as it is: who somebody is, what they wrote (here: preferred), and what they chose over what."""
    parts = [prompts.render(templates, "demographics", ABOUT=about)] if about else []
    parts += [prefixes.few_shot_text(ugc, templates)] if len(ugc) else []
    parts += [prefixes.few_shot_text(pairs, templates, rejected=True)] if len(pairs) else []
    return prefixes.SHOT_BREAK[templates].join(parts)


def raw_texts(evidence: Evidence, name: str, n: int, cfg: Profile) -> dict[str, str]:
    """persona_id -> the text of a raw representation of n items: ugc, pair, demographics (no items) or all.

    all: the description, and half of the items of each kind. Whoever has no description has none.
    """
    texts, about = {}, evidence.personas.set_index("persona_id")["description"]
    for person in about.index:
        items = history(evidence, person, 0 if name == "demographics" else n, cfg.seed)
        first = {"ugc": n, "pair": 0, "demographics": 0, "all": n // 2}[name]
        texts[person] = raw_text(items.iloc[:first], items.iloc[first:],
                                 about[person] if name in ("demographics", "all") else "", cfg.policy.templates)
    return texts


def mixed_raw(pairs: pd.DataFrame, evidence: Evidence, cfg: Profile) -> list[str]:
    """For each train pair another mixture of its person's items, never the pair itself.

    None to alignx.most items of each kind, and the description half of the time, all drawn by a seed of the pair.
    The released code carries items over from the previous user where a draw is empty; here it stays empty.
    """
    own, texts = dict(list(evidence.pool.groupby("persona_id"))), []
    about = evidence.personas.set_index("persona_id")["description"]
    for person, pair_id in zip(pairs["persona_id"], pairs["pair_id"], strict=True):
        random = Random(f"{cfg.seed} mixture {pair_id}")
        n_ugc, n_pairs, told = random.randint(0, cfg.alignx.most), random.randint(0, cfg.alignx.most), random.random() < 0.5
        others = own[person][own[person]["pair_id"] != pair_id]
        items = others.iloc[random.sample(range(len(others)), min(n_ugc + n_pairs, len(others)))]
        texts.append(raw_text(items.iloc[:n_ugc], items.iloc[n_ugc:], about[person] if told else "", cfg.policy.templates))
    return texts


def mixed_bridges(pairs: pd.DataFrame, table: pd.DataFrame, key: tuple[str, int], n: int, cfg: Profile) -> list[str]:
    """For each train pair the text of a bridge drawn by a seed of the pair: one adapter then serves all four."""
    texts = {name: bridge_texts(table, name, n, key) for name in BRIDGES}
    drawn = [Random(f"{cfg.seed} bridge {pair_id}").choice(BRIDGES) for pair_id in pairs["pair_id"]]
    return [texts[name][person] for name, person in zip(drawn, pairs["persona_id"], strict=True)]


def bridge_texts(table: pd.DataFrame, name: str, n: int, key: tuple[str, int] = ("", -1)) -> dict[str, str]:
    """persona_id -> text of a bridge from n items; key: (scheme, fold) of the trained head."""
    scheme, fold = key if name == "head" else ("", -1)
    rows = table[(table["bridge"] == name) & (table["items"] == (0 if name == "golden" else n))
                 & (table["scheme"] == scheme) & (table["fold"] == fold)]
    return dict(zip(rows["persona_id"], rows["text"], strict=True))


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
    texts = (mixed_raw(pairs, evidence, cfg) if method == "ica" else mixed_bridges(pairs, table, key, n, cfg))
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
        made = {"pair": raw_texts(evidence, "pair", n, cfg)} if method == "ica" else {
            name: bridge_texts(table, name, n, key) for name in BRIDGES if name != "golden"}
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
    parts = []
    for setting, texts in (("flipped", flipped(evidence, cfg)), ("reworded", reworded(evidence, cfg))):
        rows = ask(test[test["persona_id"].isin(set(flipped(evidence, cfg)))], texts, "pba", "golden", "main", cfg)
        parts.append(settings.main(rows, folds, fold).assign(prefix="golden", setting=setting))
    return pd.concat(parts, ignore_index=True)[KEPT]


def representations(method: str, evidence: Evidence, table: pd.DataFrame, key: tuple[str, int], n: int,
                    cfg: Profile) -> dict[str, dict[str, str]]:
    """name -> persona_id -> text: the raw histories, or the bridges, and none; a name without any text is left out."""
    made = ({name: raw_texts(evidence, name, n, cfg) for name in RAW} if method == "ica" else
            {name: bridge_texts(table, name, n, key) for name in BRIDGES})
    people = evidence.personas["persona_id"]
    return {name: texts for name, texts in made.items() if any(texts.values())} | {"none": dict.fromkeys(people, "")}


def flipped(evidence: Evidence, cfg: Profile) -> dict[str, str]:
    """persona_id -> golden text with the poles swapped of all dimensions on which people of an axis differ.

    Left out is who has such a pole without an opposite that the world's words could name.
    """
    wording, texts = evidence.wording, {}
    for person, values in evidence.golden.iterrows():
        own = np.array(values, dtype=float)
        leaning = {name for name, _ in _poles(evidence, *directions.poles(own))}
        other = directions.flip(own, sorted(leaning))
        if leaning and (wording is None or len(wording.memberships(other)) == len(leaning)):
            texts[str(person)] = bridge_text(other, wording, f"{cfg.seed} flipped {person}")
    return texts


def reworded(evidence: Evidence, cfg: Profile) -> dict[str, str]:
    """persona_id -> golden text of the same directions with other examples drawn: what a mere change of words does."""
    return {str(person): bridge_text(np.array(values, dtype=float), evidence.wording, f"{cfg.seed} reworded {person}")
            for person, values in evidence.golden.iterrows()}


def novel_people(personas: pd.DataFrame) -> tuple[list[str], list[str], list[str]]:
    """Half of the axes left out, every second in order: the axes, who trains (none of them), who is asked (only them)."""
    axes = sorted({axis for of in personas["axes"] for axis in of})
    left = axes[::2] if len(axes) > 1 else []
    on = {p: {a in left for a in of} for p, of in zip(personas["persona_id"], personas["axes"], strict=True)}
    return left, sorted(p for p in on if on[p] == {False}), sorted(p for p in on if on[p] == {True})


def corrected(scores: pd.DataFrame) -> pd.Series:
    """AlignX's rule: the policy moves chosen up by more than rejected, in summed log-probabilities; a tie is wrong.

    scores: logp_chosen, logp_rejected, ref_chosen, ref_rejected (nats). Source: the released eval/acc.py.
    """
    return scores["logp_chosen"] - scores["ref_chosen"] > scores["logp_rejected"] - scores["ref_rejected"]


def recovered(told: pd.DataFrame, evidence: Evidence, heads: Mapping[tuple[str, int], Sequence[str]]) -> pd.DataFrame:
    """How much of the golden directions each bridge finds, interests aside: a row per person and pole, with `correct`.

    measure "found": of the golden poles, is it named? "true": of the poles named, is it golden? A head counts in the
    stratified folds only, for the people it was not trained on. Returns measure, bridge, items, persona_id, correct.
    """
    rows, truth = [], {p: _poles(evidence, *directions.poles(v.to_numpy())) for p, v in evidence.golden.iterrows()}
    for r in told[(told["bridge"] != "golden") & (told["items"] > 0) & (told["scheme"] != "novel")].itertuples():
        if r.bridge != "head" or r.persona_id not in heads[r.scheme, r.fold]:
            named, true = _poles(evidence, r.positive, r.negative), truth[r.persona_id]
            for measure, asked, answer in (("found", true, named), ("true", named, true)):
                rows += [(measure, r.bridge, r.items, r.persona_id, pole in answer) for pole in sorted(asked)]
    return pd.DataFrame(rows, columns=["measure", "bridge", "items", "persona_id", "correct"])


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


def collect(scores: pd.DataFrame, made: pd.DataFrame, base: pd.DataFrame, seed: int) -> pd.DataFrame:
    """The `alignx` table: all scores with the untrained policy's sums beside them, and its own scores as "prompting".

    scores: of the cells, with `before`, what stood before the question. made: policy_id, method, fold of each cell.
    base: scores of `to_refer`. ref_chosen and ref_rejected are NaN where the base was not asked.
    """
    columns, on = list(TABLES["alignx"].columns), ["pair_id", "before"]
    sums = base[[*on, "logp_chosen", "logp_rejected"]].set_axis([*on, "ref_chosen", "ref_rejected"], axis=1)
    trained = scores.merge(made, on="policy_id").assign(seed=seed).merge(sums, how="left", on=on)
    asked = scores[scores["setting"].isin(REFERRED)].drop_duplicates(["prefix", "variant", "setting", "pair_id"])
    plain = asked.drop(columns=[*SCORES, "policy_id", "trained"]).merge(base[[*on, *SCORES]], on=on)
    plain = plain.assign(policy_id="base", method="prompting", fold=-1, seed=-1, trained=False,
                         ref_chosen=plain["logp_chosen"], ref_rejected=plain["logp_rejected"])
    return pd.concat([trained[columns], plain[columns]], ignore_index=True)


def wikipersona(scores: pd.DataFrame, folds: Sequence[int], seed: int, n: int) -> pd.DataFrame:
    """Notebook 09's scores of these folds and this seed, as rows of the table `alignx`.

    Their reference is the untrained policy behind the same prefix, from notebook 06; for vpl, of n shots, whose soft
    token that policy cannot read, the one behind none.
    """
    main = scores[(scores["setting"] == "main")]
    rows = main[main["method"].isin(["mt", "vpl"]) & main["fold"].isin(folds) & (main["seed"] == seed)]
    rows = rows[(rows["method"] == "mt") | (rows["variant"] == f"shots{n}")]
    base = main[main["method"] == "prompting"]
    sums = base[["prefix", "pair_id", "logp_chosen", "logp_rejected"]].set_axis(
        ["refers", "pair_id", "ref_chosen", "ref_rejected"], axis=1)
    rows = rows.assign(refers=rows["prefix"].replace("vpl", "none")).merge(sums, how="left", on=["refers", "pair_id"])
    return rows[list(TABLES["alignx"].columns)]


def steered(teacher: Teacher, answers: pd.DataFrame, asked: pd.DataFrame, evidence: Evidence, cfg: Profile) -> pd.DataFrame:
    """Whether an answer behind golden directions leans to them more than the one behind flipped ones, by the teacher.

    answers: rows of generation.answer for the systems golden and flipped; asked: persona_id, question_id, prompt.
    Returns persona_id, correct (on some turned dimension as told, on none against it) and against (the reverse).
    """
    both = answers.pivot(index=["persona_id", "question_id"], columns="system", values="text").dropna().reset_index()
    both = both.merge(asked[["persona_id", "question_id", "prompt"]])
    both = both.rename(columns={"golden": "chosen", "flipped": "rejected"})
    both = both.assign(pair_id=both["persona_id"] + ":" + both["question_id"])
    said, rows = label(teacher, both, cfg.judge.pairs_per_request), []
    for person, values in zip(both["persona_id"], said.to_numpy(), strict=True):
        golden = _poles(evidence, *directions.poles(evidence.golden.loc[person].to_numpy()))
        leans = _poles(evidence, *directions.poles(values))
        opposite = {(name, 1 - value) for name, value in golden}
        rows.append((person, bool(golden & leans) and not opposite & leans, bool(opposite & leans) and not golden & leans))
    return pd.DataFrame(rows, columns=["persona_id", "correct", "against"])


def units(evidence: Evidence, told: pd.DataFrame, prefix_texts: pd.DataFrame, policies: pd.DataFrame, run: Path,
          n: int, tokenizer, parameters: int, cfg: Profile) -> pd.DataFrame:
    """What one user costs, measured: method, bytes_each, flops_each, bytes_shared, flops_shared.

    Training takes 6 operations per parameter and token, reading 2. An adapter is trained on a person's train pairs;
    a prefix or directions are read once from n items; both need one adapter for everybody, which counts once.
    """
    pool, rows = evidence.pool, []
    tokens = [len(ids) for ids in tokenizer([f"{r.prompt} {r.chosen} {r.rejected}" for r in pool.itertuples()])["input_ids"]]
    own, each = len(pool) / pool["persona_id"].nunique(), float(np.mean(tokens))
    size = {path: (run / path / "adapter_model.safetensors").stat().st_size for path in policies["path"]}
    files = policies.assign(size=policies["path"].map(size)).groupby("method")["size"].mean()
    shared = (files.get("mt", 0.0), 6 * parameters * each * len(pool) * cfg.training.epochs)
    if "pm" in files:
        rows.append(("personal adapter", files["pm"], 6 * parameters * each * own * cfg.personal.epochs, 0.0, 0.0))
    main = prefix_texts[prefix_texts["variant"] == "main"]
    for name in [name for name in ("few_shot", "persona", "persona_gpt4") if name in set(main["prefix"])]:
        text = main.loc[main["prefix"] == name, "text"].str.encode("utf-8").str.len().mean()
        rows.append((f"prefix {name}", text, 0.0 if name == "few_shot" else 2 * parameters * each * n, *shared))
    if len(told):
        rows.append(("directions", -(-len(directions.space()) * 2 // 8), 2 * parameters * each * n, *shared))
    return pd.DataFrame(rows, columns=["method", "bytes_each", "flops_each", "bytes_shared", "flops_shared"])


def _poles(evidence: Evidence, positive: Sequence[str], negative: Sequence[str]) -> set[tuple[str, int]]:
    """(dimension, value) of the poles on which people of an axis may differ: a world's own, else all but interests."""
    named = {name for name, _ in evidence.wording.category} if evidence.wording else {
        d.name for d in directions.space() if d.group != "interests"}
    return {(name, 1) for name in positive if name in named} | {(name, 0) for name in negative if name in named}


def _averaged(labels: pd.DataFrame, shots: Mapping[str, pd.DataFrame]) -> pd.DataFrame:
    rows = [directions.average(labels.loc[items["pair_id"]].to_numpy()) for items in shots.values()]
    return _frame(rows, list(shots))


def _rows(bridge: str, n: int, scheme: str, fold: int, found: pd.DataFrame, evidence: Evidence,
          cfg: Profile) -> list[tuple]:
    """Rows of the table `directions`, in the order of its columns."""
    rows = []
    for person, values in found.iterrows():
        values = np.array(values, dtype=float)
        text = bridge_text(values, evidence.wording, f"{cfg.seed} {bridge} {n} {scheme} {fold} {person}")
        rows.append((bridge, n, scheme, fold, person, *directions.poles(values), text))
    return rows


def _frame(rows: Sequence[np.ndarray], ids: Sequence[str]) -> pd.DataFrame:
    names = [dimension.name for dimension in directions.space()]
    return pd.DataFrame(np.array(rows, dtype=float).reshape(-1, len(names)), index=list(ids), columns=names)


def _listing() -> str:
    return directions.listing()


def _shots(rows: pd.DataFrame) -> str:
    return prefixes.few_shot_text(rows, "teacher", rejected=True)


def _one(said: Directions, _: str) -> np.ndarray:
    return directions.vector(said.positive, said.negative)


def _several(said: Labels, n: int) -> list[np.ndarray] | None:
    return [_one(each, "") for each in said.labels] if len(said.labels) == n else None


def _ask(teacher: Teacher, asked: Sequence[str], schema: type, take: Callable) -> list:
    """What `take` makes of each answer; one that cannot be read is asked for again, ATTEMPTS times in all."""
    found: dict[int, object] = {}
    for attempt in range(ATTEMPTS):
        todo = [i for i in range(len(asked)) if i not in found]
        requests = [Request([{"role": "user", "content": asked[i]}], schema, "directions", attempt) for i in todo]
        for i, answer in zip(todo, teacher.map(requests, "directions") if todo else [], strict=True):
            made = take(answer.parsed, asked[i]) if answer.outcome == "ok" else None
            if made is not None:
                found[i] = made
    if len(found) < len(asked):
        raise ValueError(f"{teacher.model} gave no usable directions for {len(asked) - len(found)} of {len(asked)} "
                         f"prompts, asked {ATTEMPTS} times: take another teacher.model")
    return [found[i] for i in range(len(asked))]
