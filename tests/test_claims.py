"""Claims on tiny score tables where the answer is known."""

import pandas as pd
import pytest
from scored import people, scored

from helpers import claims, schemas, stats
from helpers.artifacts import Store, open_run
from helpers.fingerprint import fingerprint
from helpers.stats import Estimate


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
    assert values["answers_beat_untrained"] == 0.64
    assert values["vpl_below_gold"] == pytest.approx(0.5519 - 0.6711)
    assert values["gpt4_overlaps_above_persona"] == pytest.approx(0.29 - 0.23)
    assert values["judge_fits_truth"] == 0.78
    # Figure 7: reasoning behind fifteen personas adds up to 9.118, the untrained model has .679
    assert values["reasoning_falls"] == pytest.approx(9.118 / 15 - 0.679, abs=1e-4)
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


def test_with_labels_tossed_by_a_coin_nothing_that_needs_labels_is_reproduced(profile):
    # Everybody is right in one of two pairs, whoever trained what behind which prefix: every level is .5, every gap
    # and every r is 0 or undefined. What is left "reproduced" are the findings that say "no difference".
    names = ("none", "tag", "few_shot", "persona", "persona_gpt4", "persona_gold", "name")
    settings = ("main", "unseen", "unseen_wrong", "unseen_removed", "small", "leave_axis_out")
    cells = [(f"mt {name} {kind} {setting}", {}) for name in names for setting in settings for kind in schemas.KINDS]
    cells += [(f"mt {name} {kind} {setting}", {"trained": True}) for name in names for kind in schemas.KINDS
              for setting in ("seen_seen", "seen_reseed", "small")]
    cells += [(f"{method} {name} {kind}", {}) for method in ("prompting", "mt_loser") for name in names
              for kind in schemas.KINDS]
    cells += [(f"pm none {kind}{setting}", {"trained": True}) for kind in schemas.KINDS for setting in ("", " data10")]
    cells += [(f"vpl vpl {kind}", {"variant": "shots16"}) for kind in schemas.KINDS]
    scores = pd.concat([scored(words, [[1, 0], [0, 1]] * 4, **columns) for words, columns in cells])
    table, _ = claims.evaluate(scores, people(8), profile)
    sides = {claim.claim_id: claim for claim in claims.CLAIMS}
    needs_labels = [row.claim_id for row in table.itertuples() if not _holds_at_chance(sides[row.claim_id])]
    verdicts = table.set_index("claim_id").verdict
    assert {"gold_level", "gold_above_gpt4", "end_gold_none", "none_lifts_personal", "wrong_gold_hurts",
            "pm_lifts_own_divergent", "pm_more_data", "vpl_below_gold", "axis_out_gold_above_none"} <= set(needs_labels)
    assert set(verdicts[needs_labels]) == {"not reproduced"}
    assert verdicts["removed_gold_reverts"] == "reproduced"


def _holds_at_chance(claim: claims.Claim) -> bool:
    """Whether a level of .5, or no difference, lies on the claim's side."""
    chance = 0.5 if claim.measure == "level" else 0.0
    low, high = claim.side
    return low < chance < high if claim.strict else low <= chance <= high


def test_runs_of_other_seeds_and_shipped_records_lie_beside_this_one(tmp_path):
    def finished(run: str, estimate: float, *sets: str) -> Store:
        store = open_run("smoke", run, runs=tmp_path, sets=sets)
        row = ("gold_level", "Gold", "4.1", estimate, 0.5, 0.8, 9, "inconclusive", 0.67, "rule")
        store.write("claims", pd.DataFrame([row], columns=list(schemas.TABLES["claims"].columns)))
        return store

    mine = finished("mine", 0.71, "seed=17")
    finished("later", 0.73, "seed=19")
    finished("next", 0.72, "seed=18", "training.workers=1")  # how it was executed does not matter
    finished("shuffled", 0.5, "seed=20", "judge.shuffle_labels=true")  # another setting: no match
    open_run("smoke", "empty", runs=tmp_path, sets=["seed=21"])  # no claims yet
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "profile.yaml").write_text("name: smoke\nno.such.key: 1\n")
    records = tmp_path / "claims.csv"
    mine.read("claims").assign(run="laptop", seed=17, estimate=0.74).to_csv(records, index=False)
    beside = claims.across_runs(mine, tmp_path, records)
    assert beside[["run", "estimate"]].values.tolist() == [
        ["this run, seed 17", 0.71], ["next, seed 18", 0.72], ["later, seed 19", 0.73],
        ["shipped laptop, seed 17", 0.74]]
    assert set(beside.claim_id) == {"gold_level"}
    assert len(claims.across_runs(mine, tmp_path, tmp_path / "none.csv")) == 3
    (pairs := tmp_path / "pairs.jsonl").write_text("{}")
    own = finished("own", 0.4, f"data.preferences={pairs}")
    assert claims.across_runs(own, tmp_path, records)["run"].tolist() == ["this run, seed 17"]  # no little world beside it


def test_other_runs_do_not_make_a_run_stale(tmp_path):
    mine = open_run("smoke", "mine", runs=tmp_path)
    for table in ("personas", "scores"):
        mine.file(table).write_bytes(b"as if")
    before = fingerprint(mine, "15_claims")
    other = open_run("smoke", "other", runs=tmp_path, sets=["seed=18"])
    other.file("claims").write_bytes(b"as if")
    assert fingerprint(mine, "15_claims") == before


def test_claims_are_listed_as_they_were_stated():
    stated = ["prompting_moves_little", "gold_level", "wrong_gold_hurts"]
    found = claims.in_order(pd.DataFrame({"claim_id": sorted([*stated, "of_an_older_version"])}))
    assert found["claim_id"].tolist() == stated
    assert found["topic"].tolist() == ["Prompting alone", "One model for everybody", "Wrong and missing prefixes"]


def test_every_claim_says_how_it_is_measured_and_where_it_is_true():
    printed = claims.rules().set_index("claim_id").paper_value
    for claim in claims.CLAIMS:
        assert claim.measure in claims.MEASURES, claim.claim_id
        assert claim.side[0] < claim.side[1], claim.claim_id
        assert claim.topic
        assert (claim.paper == "") == pd.isna(printed[claim.claim_id])
