"""Every measure of a claim on tiny tables where the answer is known."""


import pandas as pd
import pytest
from scored import people, scored

from helpers import claims
from helpers.measures import MEASURES, Bench, Missing


def found(claim_id: str, scores: pd.DataFrame, personas: pd.DataFrame, profile) -> pd.Series:
    return claims.evaluate(scores, personas, profile)[0].set_index("claim_id").loc[claim_id]


def measure(name: str, cells, profile, scores=None, n: int = 5, **tables):
    scores = scored("mt none divergent", [[1]] * n) if scores is None else scores
    return MEASURES[name](Bench(scores, people(n), profile, **tables), cells)


def test_people_seen_in_training_do_not_count(profile):
    unseen = scored("mt persona_gold divergent", [[1, 0]] * 5)
    seen = scored("mt persona_gold divergent", [[1, 1]] * 5, trained=True)
    assert found("gold_level", pd.concat([unseen, seen]), people(5), profile).estimate == 0.5


def test_the_largest_move_counts_every_prefix(profile):
    # none .5; tag .75 (+.25); name 0 (-.5): the largest move is .5.
    cells = {"none": [1, 0, 1, 0], "tag": [1, 1, 1, 0], "name": [0, 0, 0, 0]}
    scores = pd.concat([scored(f"prompting {name} divergent", [each] * 5) for name, each in cells.items()])
    row = found("prompting_moves_little", scores, people(5), profile)
    assert (row.estimate, row.low, row.high) == pytest.approx((0.5, 0.5, 0.5))
    assert row.verdict == "not reproduced"


def test_two_trainings_are_compared_on_the_seeds_both_have(profile):
    # Seed 0: loser-only .5 against 1.0. Seed 1 exists only without the loser (all wrong) and must not count.
    scores = pd.concat(
        [
            scored("mt_loser persona_gold divergent", [[1, 0]] * 5),
            scored("mt persona_gold divergent", [[1, 1]] * 5),
            scored("mt persona_gold divergent", [[0, 0]] * 5, seed=1),
            scored("mt none divergent", [[0, 0]] * 5),  # no loser-only training of this prefix
        ]
    )
    row = found("loser_only_hurts", scores, people(5), profile)
    assert (row.estimate, row.verdict) == (-0.5, "reproduced")


def test_the_fall_of_r_by_hand(profile):
    # Untrained accuracies 0, .25, .5, .75, 1. Trained without prefix they are the same (r = 1); with gold
    # they are mirrored (r = -1): the fall is 2.
    steps = [[1] * k + [0] * (4 - k) for k in range(5)]
    scores = pd.concat(
        [
            scored("prompting none divergent", steps),
            scored("mt none divergent", steps),
            scored("mt persona_gold divergent", steps[::-1]),
        ]
    )
    row = found("equity_r_falls", scores, people(5), profile)
    assert row.estimate == pytest.approx(2.0)
    assert (row.verdict, row.paper_value) == ("reproduced", 0.45)  # paper .61 - .16


def test_the_demographic_gap_leaves_small_groups_out(profile):
    # Valley (5 people) .5, harbour (5) 1.0, isles (1) 0: the gap is .5 and not 1. One schooling has no gap.
    rights = [[1, 0]] * 5 + [[1, 1]] * 5 + [[0, 0]]
    region = ["valley"] * 5 + ["harbour"] * 5 + ["isles"]
    scores = scored("mt persona_gpt4 divergent", rights)
    row = found("no_demographic_gap", scores, people(11, region=region, schooling=["trade"] * 11), profile)
    assert (row.estimate, row.low, row.high) == pytest.approx((0.5, 0.5, 0.5))
    assert (row.n_people, row.verdict) == (10, "not reproduced")


def test_the_planted_gap_by_hand(profile):
    # Isles: name .5, gold 1 (-.5). Others: name 1, gold 1 (0). Difference of the differences: -.5.
    region = ["isles"] * 5 + ["valley"] * 6
    name = scored("mt name divergent", [[1, 0]] * 5 + [[1, 1]] * 6)
    scores = pd.concat([name, scored("mt persona_gold divergent", [[1, 1]] * 11)])
    row = found("planted_gap_shows", scores, people(11, region=region), profile)
    assert (row.estimate, row.n_people, row.verdict) == (-0.5, 11, "reproduced")
    real = profile.model_copy(update={"simulated": False})
    _, absent = claims.evaluate(scores, people(11, region=region), real)
    assert "only the little world" in absent.set_index("claim_id").reason["planted_gap_shows"]


def test_demographics_come_apart_at_the_slash_and_leave_out_what_nobody_knows():
    long = claims.demographics(people(1, work=["singer/actor"], region=["valley"], age=["unknown"]))
    assert long.values.tolist() == [
        ["p0", "work", "singer"], ["p0", "work", "actor"], ["p0", "region", "valley"]
    ]


def test_a_cell_names_setting_variant_and_who_was_trained_on(profile):
    scores = pd.concat([
        scored("pm none divergent", [[1, 1]] * 5, trained=True), scored("pm none divergent", [[0, 0]] * 5),
        scored("vpl vpl divergent", [[1, 0]] * 5, variant="shots4"),
        scored("vpl vpl divergent", [[1, 1]] * 5, variant="shots16"),
        scored("mt name divergent", [[1, 1]] * 5),
        scored("mt name divergent", [[0, 0]] * 5, variant="of another kind"),
        scored("prompting few_shot divergent shots", [[1, 0]] * 5, variant="shots8")])
    for cell, right in {"pm none divergent trained=true": 1.0, "pm none divergent": 0.0, "mt name divergent": 1.0,
                        "vpl vpl divergent variant=shots4": 0.5, "vpl vpl * variant=shots16": 1.0,
                        "prompting few_shot divergent shots variant=shots8": 0.5}.items():
        assert measure("level", [cell], profile, scores).estimate == right, cell
    with pytest.raises(Missing, match="no scores of vpl vpl divergent"):
        measure("level", ["vpl vpl divergent"], profile, scores)


def test_cells_that_were_trained_on_other_folds_are_compared_over_their_people(profile):
    # A personal model has no fold (-1), a shared one has: everybody's .5 against 1.0, whatever fold.
    scores = pd.concat([scored("pm none divergent", [[1, 0]] * 5, fold=-1, trained=True),
                        scored("mt none divergent small", [[1, 1]] * 5, trained=True),
                        scored("mt none divergent", [[1, 1]] * 5, fold=3)])
    cells = ["pm none divergent trained=true", "mt none divergent small trained=true"]
    assert measure("gap", cells, profile, scores).estimate == -0.5
    assert measure("gap", ["mt none divergent", "mt none divergent small trained=true"], profile, scores).estimate == 0.0
    rest = pd.concat([scores, scored("mt tag divergent", [[1]] * 5)])
    with pytest.raises(Missing, match="share no fold, seed"):
        measure("gap", ["mt none divergent", "mt tag divergent"], profile, rest)


def test_a_gap_of_gaps_by_hand(profile):
    # gold: seen 1, unseen .5; few_shot: seen .5, unseen .5: (.5) - (0) = .5.
    scores = pd.concat([scored("mt persona_gold divergent seen_seen", [[1, 1]] * 5, trained=True),
                        scored("mt persona_gold divergent unseen", [[1, 0]] * 5),
                        scored("mt few_shot divergent seen_seen", [[0, 1]] * 5, trained=True),
                        scored("mt few_shot divergent unseen", [[1, 0]] * 5)])
    cells = [f"mt {name} divergent {who}" for name in ("persona_gold", "few_shot")
             for who in ("seen_seen trained=true", "unseen")]
    assert measure("gap_of_gaps", cells, profile, scores) == (0.5, 0.5, 0.5, 5)


def test_wins_count_both_orders_and_an_open_one_half(profile):
    # Each of five people, four judgements of mt against base: won, won, open, lost: (2 + .5) / 4 = .625.
    rows = [(f"p{i}", a, b, winner) for i in range(5) for a, b, winner in
            (("mt", "base", "mt"), ("base", "mt", "mt"), ("mt", "base", ""), ("mt", "base", "base"), ("mt", "x", "x"))]
    wins = pd.DataFrame(rows, columns=["persona_id", "system_a", "system_b", "winner"])
    assert measure("wins", ["mt", "base"], profile, winrates=wins).estimate == 0.625
    assert measure("wins", ["base", "mt"], profile, winrates=wins).estimate == 0.375
    with pytest.raises(Missing, match="no answers of mt were judged against nobody"):
        measure("wins", ["mt", "nobody"], profile, winrates=wins)
    with pytest.raises(Missing, match="no winrates: 12_generation makes them"):
        measure("wins", ["mt", "base"], profile)


def test_the_tax_by_hand(profile):
    # Reasoning is two tasks: base .6 and .8 (mean .7); each person .5 and .7 (mean .6); without prefix .7 and .7 (.7) in
    # one fold and .6 and .8 (.7) in the other. Gap -.1; distance to the base .1 behind a prefix and 0 without: nearer by .1.
    keys = ["system", "trained_prefix", "prefix", "persona_id", "policy_id", "task", "accuracy"]
    rows = [("base", "", "none", "", "base", *x) for x in (("a", 0.6), ("b", 0.8))]
    rows += [("mt", "g", "g", f"p{i}", "f0", *x) for i in range(5) for x in (("a", 0.5), ("b", 0.7))]
    rows += [("mt", "g", "none", "", fold, task, accuracy)
             for fold, task, accuracy in (("f0", "a", 0.7), ("f0", "b", 0.7), ("f1", "a", 0.6), ("f1", "b", 0.8))]
    tax = pd.DataFrame(rows, columns=keys).assign(group="reasoning")
    cells = ["mt g g reasoning", "mt g none reasoning", "base - none reasoning"]
    assert measure("tax_gap", [cells[0], cells[2]], profile, tax=tax) == pytest.approx((-0.1, -0.1, -0.1, 5))
    assert measure("tax_nearer", cells, profile, tax=tax).estimate == pytest.approx(0.1)
    with pytest.raises(Missing, match="no safety tasks"):
        measure("tax_gap", ["mt g g safety", cells[2]], profile, tax=tax)


def prefix_rows(texts: dict[str, str], n_tokens: dict[str, int] | None = None) -> pd.DataFrame:
    rows = [(f"p{i}", name, "main", text, (n_tokens or {}).get(name, 1)) for i in range(5) for name, text in texts.items()]
    return pd.DataFrame(rows, columns=["persona_id", "prefix", "variant", "text", "n_tokens"])


def test_the_overlap_of_prefixes_by_hand(profile):
    # Gold has four words. persona_gpt4 is two of them: precision 1, recall .5, F1 2/3. persona is other words: 0.
    made = prefix_rows({"persona_gold": "red green blue black", "persona_gpt4": "green red", "persona": "white grey"})
    found = measure("prefix_overlap", ["persona_gpt4", "persona"], profile, prefixes=made)
    assert (found.estimate, found.n_people) == (pytest.approx(2 / 3), 5)
    with pytest.raises(Missing, match="no prefix few_shot"):
        measure("prefix_overlap", ["persona", "few_shot"], profile, prefixes=made)


def test_length_against_accuracy_by_hand(profile):
    # Lengths 30, 20, 10 and accuracies 0, .5, 1 lie on a falling line: r = -1 in every draw.
    rights = {"few_shot": [0, 0], "persona": [1, 0], "persona_gold": [1, 1]}
    tokens = {"few_shot": 30, "persona": 20, "persona_gold": 10}
    scores = pd.concat([scored(f"mt {name} divergent", [each] * 5) for name, each in rights.items()])
    made = prefix_rows(dict.fromkeys(tokens, "x"), tokens)
    assert measure("length_r", [], profile, scores, prefixes=made) == pytest.approx((-1, -1, -1, 5))
    with pytest.raises(Missing, match="2 prefixes made of text"):
        measure("length_r", [], profile, scores[scores.prefix != "persona"], prefixes=made)


def test_lengths_of_chosen_and_rejected_by_hand(profile):
    # Six words chosen over four rejected: 6/4 - 1 = .5. The pair of the other kind does not count.
    pairs = pd.DataFrame([(f"p{i}", kind, chosen, "one two three four") for i in range(5)
                          for kind, chosen in (("divergent", "a b c d e f"), ("personal", "a"))],
                         columns=["persona_id", "kind", "chosen", "rejected"])
    assert measure("label_length", ["divergent"], profile, preferences=pairs).estimate == 0.5


def test_the_answer_shown_first_by_hand(profile):
    # Two of three decided comparisons are won by the one shown first; the open one does not count.
    rows = [(f"p{i}", "a", w) for i in range(5) for w in ("a", "a", "b", "")]
    judged = pd.DataFrame(rows, columns=["persona_id", "shown_first", "winner"])
    assert measure("shown_first", [], profile, comparisons=judged).estimate == pytest.approx(2 / 3)


def test_only_the_little_world_can_check_the_judge(profile):
    real = profile.model_copy(update={"simulated": False})
    with pytest.raises(Missing, match="knows the truth"):
        measure("judge_truth", [], real)


def test_the_judges_decisions_against_the_truth(profile, monkeypatch):
    # r1 is worth more than r2 to everybody: r1 won twice of three times.
    from helpers.world import teacher

    worth = [(f"p{i}", "q", r, u) for i in range(5) for r, u in (("r1", 0.9), ("r2", 0.1))]
    worth = pd.DataFrame(worth, columns=["persona_id", "question_id", "response_id", "utility"])
    monkeypatch.setattr(teacher, "truth", lambda *_: worth)
    rows = [(f"p{i}", "q", *judged) for i in range(5)
            for judged in (("r1", "r2", "r1"), ("r2", "r1", "r1"), ("r1", "r2", "r2"))]
    judged = pd.DataFrame(rows, columns=["persona_id", "question_id", "response_a", "response_b", "winner"])
    some = pd.DataFrame({"x": [1]})
    found = measure("judge_truth", [], profile, comparisons=judged, questions=some, responses=some)
    assert found.estimate == pytest.approx(2 / 3)
