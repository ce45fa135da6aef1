"""What is read of people: labels, golden and inferred directions, histories, on four people of the little world."""

from four_people import CFG, PEOPLE, TRUTH

from helpers import bridges, directions, prefixes, reading


def test_golden_directions_are_the_category_and_the_pastimes(four):
    for person, (name, value) in TRUTH.items():
        assert four.evidence.golden.loc[person, name] == value
        hobbies = {four.evidence.wording.interest[h] for h in four.world.people[PEOPLE[person]].hobbies}
        assert hobbies <= set(directions.poles(four.evidence.golden.loc[person].to_numpy())[0])


def test_a_pair_is_labelled_by_what_chosen_says_and_rejected_does_not(four):
    # vegan against grill, the two poles of one dimension; sweets against modest likewise; grill against sweets: both
    said = {p: directions.poles(four.evidence.labels.loc[f"{p}:q0"].to_numpy()) for p in ("p01", "p02", "p03")}
    assert said == {"p01": (["nurturance"], []), "p02": ([], ["food", "nurturance"]), "p03": (["food"], [])}
    assert list(four.evidence.labels.index) == list(four.evidence.pool["pair_id"]) == list(four.evidence.features.index)


def test_inferred_from_nothing_is_neutral_and_from_four_clear_shots_is_the_truth(four):
    shots = {p: reading.history(four.evidence, p, n, 17) for p, n in (("p01", 4), ("p03", 4), ("p04", 0))}
    found = reading.infer(four.teacher, shots)
    assert found.loc["p01", "nurturance"] == 1
    assert found.loc["p03", "food"] == 1
    assert (found.loc["p04"] == 0.5).all()


def test_the_history_is_that_of_every_other_prefix(four):
    drawn = prefixes.draw_shots(prefixes.shot_pool(four.preferences), "p02", 4, 17, "main")["pair_id"].tolist()
    assert reading.history(four.evidence, "p02", 4, 17)["pair_id"].tolist() == drawn
    assert reading.possible(four.evidence, [16, 4, 0, 5, 6]) == [0, 4, 5]  # six train pairs, one to spare


def test_without_a_teacher_there_are_no_directions(four):
    alone = reading.gather(None, four.personas, four.preferences, CFG)
    assert alone.golden.empty
    assert alone.labels.empty
    assert bridges.table(alone, None, [1], {}, CFG).empty
