"""Claims on tiny score tables where the answer is known."""

import json

import pandas as pd
import pytest

from helpers import claims, schemas, stats
from helpers.stats import Estimate


def scored(words: str, rights: list[list[int]], **columns) -> pd.DataFrame:
    """Scores of "method prefix kind[ setting]": one list of right (1) and wrong (0) per person."""
    method, prefix, kind, setting = f"{words} main".split()[:4]
    rows = [
        {"persona_id": f"p{who}", "pair_id": f"p{who}-{kind}-{k}", "correct": bool(right)}
        for who, pairs in enumerate(rights)
        for k, right in enumerate(pairs)
    ]
    fixed = {"method": method, "prefix": prefix, "kind": kind, "setting": setting, "fold": 0, "seed": 0}
    return pd.DataFrame(rows).assign(**fixed, variant="main", trained=False).assign(**columns)


def people(n: int, **demographics) -> pd.DataFrame:
    """n people; each keyword gives one value per person."""
    rows = [json.dumps({key: values[i] for key, values in demographics.items()}) for i in range(n)]
    return pd.DataFrame({"persona_id": [f"p{i}" for i in range(n)], "demographics": rows})


def found(claim_id: str, scores: pd.DataFrame, personas: pd.DataFrame, profile) -> pd.Series:
    table, absent = claims.evaluate(scores, personas, profile)
    assert len(table) + len(absent) == len(claims.CLAIMS)
    return table.set_index("claim_id").loc[claim_id]


@pytest.mark.parametrize(
    ("side", "strict", "interval", "expected"),
    [
        ((0.70, float("inf")), False, (0.70, 0.80), "reproduced"),  # the bound itself counts
        ((0.70, float("inf")), False, (0.69, 0.80), "inconclusive"),
        ((0.70, float("inf")), False, (0.60, 0.69), "not reproduced"),
        ((0.70, float("inf")), False, (0.60, 0.70), "inconclusive"),
        ((0.0, float("inf")), True, (0.0, 0.1), "inconclusive"),  # strict: touching zero is a tie
        ((0.0, float("inf")), True, (0.001, 0.1), "reproduced"),
        ((0.0, float("inf")), True, (-0.1, 0.0), "not reproduced"),
        ((-float("inf"), 0.0), True, (-0.1, -0.01), "reproduced"),
        ((-0.06, 0.06), False, (-0.06, 0.06), "reproduced"),
        ((-0.06, 0.06), False, (-0.07, 0.02), "inconclusive"),
        ((-0.06, 0.06), False, (-0.5, 0.5), "inconclusive"),
        ((-0.06, 0.06), False, (0.07, 0.2), "not reproduced"),
        ((-0.06, 0.06), False, (-0.3, -0.07), "not reproduced"),
    ],
)
def test_verdict_at_the_edges(side, strict, interval, expected):
    claim = claims.Claim("x", "x", "x", "gap", side, strict=strict)
    assert claims.verdict(Estimate(sum(interval) / 2, *interval, 9), claim) == expected


def test_a_tested_claim_needs_its_corrected_p_too():
    claim = claims.Claim("x", "x", "x", "gap", (0.0, float("inf")), strict=True, tested=True)
    assert claims.verdict(Estimate(0.2, 0.1, 0.3, 5), claim, p_holm=0.06) == "inconclusive"
    assert claims.verdict(Estimate(-0.2, -0.3, -0.1, 5), claim, p_holm=0.06) == "not reproduced"


def test_an_end_of_the_order_on_five_and_on_six_people(profile):
    # Everybody is right with gold and half right without: the difference is .5 in every draw. Five people
    # cannot reach p < .05 by swapping (2 of 2^5 = .0625), six can (2 of 2^6 = .031).
    for n, verdict in ((5, "inconclusive"), (6, "reproduced")):
        scores = pd.concat(
            [scored("mt persona_gold divergent", [[1, 1]] * n), scored("mt none divergent", [[1, 0]] * n)]
        )
        row = found("end_gold_none", scores, people(n), profile)
        assert (row.estimate, row.n_people, row.verdict) == (pytest.approx(0.5), n, verdict)


def test_holm_counts_the_tests_at_hand(profile):
    # Six people, gold above none and above few-shot: two tests at p = 2/64, each times 2 = .0625.
    cells = {"persona_gold": [[1, 1]] * 6, "none": [[1, 0]] * 6, "few_shot": [[0, 0]] * 6}
    scores = pd.concat([scored(f"mt {prefix} divergent", rights) for prefix, rights in cells.items()])
    tests = claims.end_tests(scores, people(6), profile)
    assert tests.claim_id.tolist() == ["end_gold_none", "end_gold_few_shot"]
    assert tests.p.tolist() == [0.03125, 0.03125]
    assert tests.p_holm.tolist() == [0.0625, 0.0625]


def test_what_a_run_lacks_is_listed_with_its_reason(profile):
    scores = pd.concat(
        [scored("mt none divergent", [[1, 0]] * 6), scored("prompting none divergent", [[1, 0]] * 6)]
    )
    table, absent = claims.evaluate(scores, people(6), profile)
    assert table.claim_id.tolist() == ["none_leaves_divergent"]
    assert table.verdict.tolist() == ["reproduced"]
    reasons = absent.set_index("claim_id").reason
    assert reasons["gold_level"] == "no scores of mt persona_gold divergent"
    assert "nothing to compare" in reasons["prompting_moves_little"]


def test_a_finding_in_words_has_its_n_interval_and_the_papers_number(profile):
    table, absent = claims.evaluate(scored("mt persona_gold divergent", [[1, 0]] * 5), people(5), profile)
    words = claims.sentence("gold_level", table, absent)
    assert words.startswith("NOT REPRODUCED: With the gold persona")
    assert "0.500 [0.500, 0.500], n = 5 people; the paper: 0.671." in words
    assert claims.sentence("end_gold_none", table, absent) == (
        "NOT IN THIS RUN: end_gold_none, no scores of mt none divergent.")


def test_too_few_people_make_a_claim_not_applicable(profile):
    scores = scored("mt persona_gold divergent", [[1]] * 4)
    table, absent = claims.evaluate(scores, people(4), profile)
    assert table.empty
    assert "4 people, at least 5" in absent.set_index("claim_id").reason["gold_level"]


def test_the_table_fits_its_schema(profile):
    table, _ = claims.evaluate(scored("mt persona_gold divergent", [[1, 1]] * 5), people(5), profile)
    assert schemas.check("claims", table).verdict.tolist() == ["reproduced"]


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
            scored("mt_loser none divergent", [[1, 0]] * 5),
            scored("mt none divergent", [[1, 1]] * 5),
            scored("mt none divergent", [[0, 0]] * 5, seed=1),
            scored("mt persona_gold divergent", [[0, 0]] * 5),  # no loser-only training of this prefix
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


def test_rules_say_what_decides():
    rules = claims.rules().set_index("claim_id")
    assert rules.index.is_unique
    assert rules.rule["gold_level"] == "mt persona_gold divergent: interval at least 0.70"
    assert rules.rule["end_gold_none"].endswith("interval above 0.00 and p < .05 after Holm")
    assert rules.rule["removed_gold_reverts"].endswith("from -0.06 to 0.06")
    assert rules.rule["loser_only_hurts"].endswith("interval below 0.00")


def test_paper_values_are_computed_from_the_papers_table():
    values = claims.rules().set_index("claim_id").paper_value
    assert values["gold_above_gpt4"] == pytest.approx(0.6711 - 0.6250)
    assert values["none_lifts_personal"] == pytest.approx(0.5584 - 0.484)
    assert values["name_above_gpt4"] == pytest.approx(0.6640 - 0.6606)
    assert pd.isna(values["wrong_gold_hurts"])
    with pytest.raises(claims.Missing, match="no Table 99"):
        claims.paper("Table 99")


def test_the_papers_table_agrees_with_itself():
    wins = claims.paper("Table 3").query("against_model != 'average'").set_index(
        ["model", "prefix", "against_model", "against_prefix"]
    ).value
    for (model, prefix, other, against), value in wins.items():
        assert value + wins[other, against, model, prefix] == 100
    kappas = claims.paper("Table 6").query("measure == 'kappa_human_human'")
    alone = kappas[kappas.person != "average"].value
    assert (round(alone.mean(), 2), round(alone.std(), 2)) == (0.49, 0.28)
    assert len(claims.paper("Table 8").query("measure == 'majority_percent'")) == 81
    unseen = claims.paper("Figure 5").query("kind == 'divergent' and trained == False")
    gold = unseen[unseen.prefix == "persona_gold"]
    assert (gold.value.item(), gold.spread.item(), gold.key.item()) == (0.6711, 0.02, "digitised")


def test_the_same_seed_gives_the_same_table(profile):
    scores = scored("mt persona_gold divergent", [[1] * k + [0] * (7 - k) for k in range(7)])
    first, again = (claims.evaluate(scores, people(7), profile)[0] for _ in range(2))
    assert first.equals(again)
    other, _ = claims.evaluate(scores, people(7), profile.model_copy(update={"seed": 18}))
    assert other.estimate.equals(first.estimate)
    assert profile.stats.min_people == stats.MIN_PEOPLE
