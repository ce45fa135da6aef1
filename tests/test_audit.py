"""The audit finds what was planted, exactly; and clean pairs pass."""

import json
from random import Random

import pandas as pd
import pytest

from helpers import audit, imported, stats

PEOPLE, QUESTIONS = 10, 24


def clean(seed=1):
    """Ten people on two axes, 24 shared and 24 own questions each, 40 candidate texts of one length."""
    random, rows = Random(seed), []
    for p in range(PEOPLE):
        for kind in ("personal", "divergent"):
            axis = "personal" if kind == "personal" else f"axis{p % 2}"
            for i in range(QUESTIONS):
                question = f"q-{axis if kind == 'divergent' else f'p{p}'}-{i}"
                won, lost = random.sample(range(4), 2)
                rows.append({
                    "pair_id": f"p{p}:{question}", "persona_id": f"p{p}", "question_id": question, "kind": kind,
                    "axis": axis, "split": "train" if i % 2 else "test", "prompt": f"What about {question}?",
                    "chosen": f"{question} has answer {won} of the four there are", "chosen_id": f"{question}-r{won}",
                    "rejected": f"{question} has answer {lost} of the four there are",
                    "rejected_id": f"{question}-r{lost}"})
    return pd.DataFrame(rows)


def folds():
    return pd.DataFrame([("stratified", p % 2, f"p{p}") for p in range(PEOPLE)],
                        columns=["scheme", "fold", "persona_id"])


def prefixes(pairs):
    own = pairs[pairs["split"] == "train"].groupby("persona_id").head(1)
    return pd.DataFrame({"persona_id": own["persona_id"], "prefix": "few_shot", "variant": "main",
                         "text": own["chosen"], "shots": [[pair] for pair in own["pair_id"]]})


def row(report, check):
    return report.set_index("check").loc[check]


def test_clean_pairs_pass_every_check(capsys):
    pairs = clean()
    trained_on = {("stratified", f): folds().query("fold != @f")["persona_id"] for f in (0, 1)}
    report = audit.audit(pairs, prefixes(pairs), folds(), trained_on, n_boot=400)
    assert report["status"].eq("ok").all(), report[report["status"] != "ok"]
    assert len(report) == 12 + 6
    audit.gate(report)
    assert capsys.readouterr().out == ""


def test_imported_pairs_need_neither_prefixes_nor_folds():
    report = audit.audit(clean().assign(kind="personal", axis="personal"))
    assert not report["check"].str.contains("prefix|held out").any()
    assert row(report, "majority answer wins, divergent test")["of"] == 0
    audit.gate(report)


def test_planted_copies_and_contradictions_are_counted(capsys):
    pairs = clean()
    turned = pairs.iloc[[5]].rename(columns={"chosen": "rejected", "rejected": "chosen"})
    empty = pairs.iloc[[7]].assign(rejected=pairs["chosen"].iloc[7])
    report = audit.audit(pd.concat([pairs, pairs.iloc[:3], turned, empty], ignore_index=True))
    # three copies; the turned row and the one it turns; one pair of equal texts: of 480 + 5 rows
    assert row(report, "row repeated")[["found", "of", "status"]].tolist() == [3, 485, "warn"]
    assert row(report, "contradicted by the same person")["found"] == 2
    assert row(report, "chosen is rejected")["found"] == 1
    audit.gate(report)
    assert "WARNING: row repeated: 3 of 485 (0.01)." in capsys.readouterr().out


def test_a_question_on_both_sides_stops_though_case_and_punctuation_differ():
    pairs = clean()
    own, train = (pairs["persona_id"] == "p3") & (pairs["kind"] == "personal"), pairs["split"] == "train"
    test_question = pairs.loc[own & ~train, "prompt"].iloc[0]
    pairs.loc[pairs.index[own & train][:2], "prompt"] = test_question.upper().replace("?", " !")
    report = audit.audit(pairs)
    # one test pair of p3 has its question among p3's train questions; the axes are as they were
    assert row(report, "test question trained on, same person")[["found", "of", "status"]].tolist() == [1, 240, "stop"]
    assert row(report, "test question trained on, same axis")["found"] == 0
    with pytest.raises(audit.AuditFailed, match="(?s)same person: 1 of 240.*one side"):
        audit.gate(report)


def test_a_shared_question_on_both_sides_leaks_to_everybody_on_the_axis():
    pairs = clean()
    shared = pairs["question_id"] == "q-axis0-0"  # a test question of the five people on axis0
    pairs.loc[shared & (pairs["persona_id"] == "p0"), "split"] = "train"
    report = audit.audit(pairs)
    assert row(report, "test question trained on, same axis")[["found", "of"]].tolist() == [4, 119]
    assert row(report, "test question trained on, same person")["found"] == 0


def test_a_test_answer_in_a_prefix_and_a_test_pair_as_shot_stop():
    pairs = clean()
    told = prefixes(pairs)
    test = pairs[pairs["split"] == "test"]
    told.loc[told.index[0], "text"] = f"Somebody who said: {test['rejected'].iloc[30]}. So there."
    told.at[told.index[1], "shots"] = [test["pair_id"].iloc[0]]
    report = audit.audit(pairs, pd.concat([told, told.iloc[[0]].assign(variant="shuffled")]))
    assert row(report, "test answer inside a prefix")[["found", "of", "status"]].tolist() == [2, 11, "stop"]
    assert row(report, "prefix made from other than train pairs")[["found", "status"]].tolist() == [1, "stop"]


def test_a_held_out_person_in_training_stops():
    trained_on = {("stratified", 0): ["p1", "p3", "p4"], ("stratified", 1): ["p0"]}
    report = audit.audit(clean(), folds=folds(), trained_on=trained_on)
    found = row(report, "held-out person trained on")  # p4 is held out in fold 0
    assert found[["found", "status"]].tolist() == [1, "stop"]
    with pytest.raises(ValueError, match="no fold .*'small', 0"):
        audit.audit(clean(), folds=folds(), trained_on={("small", 0): []})


def test_who_is_held_out_never_or_twice_stops():
    twice = pd.concat([folds().iloc[1:], pd.DataFrame([("stratified", 0, "p5")], columns=folds().columns)])
    found = row(audit.audit(clean(), folds=twice), "person not held out exactly once")
    assert found[["found", "of", "status"]].tolist() == [2, 10, "stop"]  # p0 never, p5 twice


def test_a_planted_length_shortcut_is_found_exactly(capsys):
    pairs = clean()
    lots = Random(2)
    longer = pd.Series([lots.random() < 0.75 for _ in range(len(pairs))])
    pairs["chosen"] += [" indeed" * is_longer for is_longer in longer]
    pairs["rejected"] += [" indeed" * (not is_longer) for is_longer in longer]
    report = audit.audit(pairs, n_boot=400)
    for kind in ("personal", "divergent"):
        for unit in ("characters", "words"):
            found = row(report, f"longer answer wins ({unit}), {kind}")
            assert found[["found", "of"]].tolist() == [longer[pairs["kind"] == kind].sum(), 240]
            assert found["low"] < found["share"] < found["high"]
            assert found["status"] == "warn"
    audit.gate(report)
    assert capsys.readouterr().out.count("WARNING: longer answer wins") == 4
    assert audit.audit(pairs, margin=0.4)["status"].eq("ok").all()


def test_a_shorter_answer_that_wins_is_a_shortcut_too():
    pairs = clean()
    pairs["rejected"] += " indeed"
    found = row(audit.audit(pairs), "longer answer wins (words), divergent")
    assert found[["found", "share", "status"]].tolist() == [0, 0.0, "warn"]


def test_the_majority_by_hand():
    # one question: a, b, c chose X over Y; d chose Y over X; e chose Z over Y. Without the own vote X leads Y for
    # a, b, c by 2 to 1 (right), for d by 3 to 0 (wrong); for e nobody else chose Z and one Y (wrong)
    votes = [("a", "X", "Y"), ("b", "X", "Y"), ("c", "X", "Y"), ("d", "Y", "X"), ("e", "Z", "Y")]
    rows = [(p, "q", "divergent", "diet", "test", "Q?", c, r, c, r, f"{p}:q") for p, c, r in votes]
    pairs = pd.DataFrame(rows, columns=["persona_id", "question_id", "kind", "axis", "split", "prompt", "chosen",
                                        "rejected", "chosen_id", "rejected_id", "pair_id"])
    found = row(audit.audit(pairs), "majority answer wins, divergent test")
    assert found[["found", "of"]].tolist() == [3, 5]
    # without d: a, b, c lead by 2 to 0; e has nobody for Z and nobody for Y, and is not decided
    found = row(audit.audit(pairs.drop(index=3)), "majority answer wins, divergent test")
    assert found[["found", "of"]].tolist() == [3, 3]
    assert found["to_do"] == "3 people: too few for an interval"


def test_shared_taste_warns_and_disagreement_does_not():
    pairs = clean()
    shared = pairs["kind"] == "divergent"
    best = pairs["question_id"] + "-r0"
    agreed = pairs.assign(chosen_id=best.where(shared, pairs["chosen_id"]),
                          rejected_id=(pairs["question_id"] + "-r1").where(shared, pairs["rejected_id"]))
    found = row(audit.audit(agreed), "majority answer wins, divergent test")
    assert found[["share", "status"]].tolist() == [1.0, "warn"]
    # everybody has an own favourite and rejects that of the next one on the axis: the others' choice always loses
    at = pairs["persona_id"].str[1:].astype(int) // 2
    apart = pairs.assign(chosen_id=pairs["question_id"] + at.astype(str),
                         rejected_id=pairs["question_id"] + ((at + 1) % 5).astype(str))
    found = row(audit.audit(apart), "majority answer wins, divergent test")
    assert found[["share", "status"]].tolist() == [0.0, "ok"]


def test_ids_that_tell_the_winner_warn():
    pairs = clean()
    named = pairs.assign(chosen_id=pairs["question_id"] + "-r0", rejected_id=pairs["question_id"] + "-r1")
    assert row(audit.audit(named), "chosen has the earlier id")[["share", "status"]].tolist() == [1.0, "warn"]


def test_empty_texts_one_sided_people_and_a_trained_answer_are_counted():
    pairs = clean()
    pairs.loc[3, "rejected"] = "  "
    sided = pairs["persona_id"] == "p4"
    pairs.loc[sided, "chosen"] += " indeed"
    test, train = (pairs.index[(pairs["persona_id"] == who) & (pairs["split"] == split) & (pairs["kind"] == "personal")][0]
                   for who, split in (("p1", "test"), ("p2", "train")))
    pairs.loc[train, ["prompt", "chosen"]] = pairs.loc[test, ["prompt", "chosen"]].to_numpy()
    report = audit.audit(pairs)
    assert row(report, "empty text")[["found", "of", "status"]].tolist() == [1, 480, "warn"]
    always = row(report, "person who always takes the longer or always the shorter")
    assert always[["found", "of", "status"]].tolist() == [1, 10, "warn"]
    assert row(report, "test prompt with answer trained on, anybody")[["found", "of"]].tolist() == [1, 240]


def file_of(tmp_path, users):
    """users: user -> for each pair whether the chosen answer is the longer one."""
    path = tmp_path / "pairs.jsonl"
    rows = [{"user": user, "prompt": f"{user} {i}?", "chosen": "Yes, it is." if won else "No.",
             "rejected": "No." if won else "Yes, it is."} for user, pairs in users.items() for i, won in enumerate(pairs)]
    path.write_text("\n".join(map(json.dumps, rows)) + "\noops")
    return imported.scan(path, min_pairs=2)


def test_the_audit_of_a_file_by_hand(tmp_path):
    # a: 3 of 4, b: 1 of 2; c always (8 of 8), d has one pair only, which is left out: 12 of 14
    report = audit.of_file(file_of(tmp_path, {"a": [1, 1, 1, 0], "b": [1, 0], "c": [1] * 8, "d": [1]}))
    assert row(report, "can't be read: not JSON")[["found", "of", "status"]].tolist() == [1, 16, "left out"]
    assert row(report, "user with too few pairs")[["found", "status"]].tolist() == [1, "left out"]
    assert row(report, "user who always takes the longer or always the shorter")[["found", "of"]].tolist() == [1, 3]
    last = row(report, "longer answer wins (characters)")
    assert last[["found", "of"]].tolist() == [12, 14]
    assert last["share"] == pytest.approx(12 / 14)


def test_the_interval_of_a_file_is_that_of_resampled_people(tmp_path):
    lots = Random(4)
    users = {f"u{i}": [lots.random() < (0.9 if i % 2 else 0.4) for _ in range(2 + i % 7)] for i in range(300)}
    last = row(audit.of_file(file_of(tmp_path, users)), "longer answer wins (characters)")
    pairs = pd.DataFrame([(user, won, "") for user, wins in users.items() for won in wins],
                         columns=["persona_id", "correct", "all"])
    drawn = stats.cluster_bootstrap(pairs, "all", n_boot=4000).iloc[0]
    assert last["share"] == pytest.approx(drawn["accuracy"])
    assert [last["low"], last["high"]] == pytest.approx([drawn["low"], drawn["high"]], abs=0.004)
