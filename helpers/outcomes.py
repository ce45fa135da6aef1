"""What came out of histories and directions: scores by AlignX's rule, steered answers, and costs."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from helpers import directions
from helpers.alignx import REFERRED
from helpers.config import Profile
from helpers.llm import Teacher
from helpers.reading import Evidence, label, poles
from helpers.schemas import TABLES

SCORES = ["logp_chosen", "logp_rejected", "n_chosen", "n_rejected", "correct"]


def corrected(scores: pd.DataFrame) -> pd.Series:
    """AlignX's rule: the policy moves chosen up by more than rejected, in summed log-probabilities; a tie is wrong.

    scores: logp_chosen, logp_rejected, ref_chosen, ref_rejected (nats). Source: the released eval/acc.py.
    """
    return scores["logp_chosen"] - scores["ref_chosen"] > scores["logp_rejected"] - scores["ref_rejected"]


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
    both = answers.pivot(index=["persona_id", "question_id"], columns="system", values="text")
    both = both.reindex(columns=["golden", "flipped"]).dropna().reset_index()  # nobody may have an opposite
    both = both.merge(asked[["persona_id", "question_id", "prompt"]])
    both = both.rename(columns={"golden": "chosen", "flipped": "rejected"})
    both = both.assign(pair_id=both["persona_id"] + ":" + both["question_id"])
    said, rows = label(teacher, both, cfg.judge.pairs_per_request), []
    for person, values in zip(both["persona_id"], said.to_numpy(), strict=True):
        golden = poles(evidence, *directions.poles(evidence.golden.loc[person].to_numpy()))
        leans = poles(evidence, *directions.poles(values))
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
