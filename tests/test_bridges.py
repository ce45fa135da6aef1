"""Four bridges from histories to directions and to words, on four people of the little world."""

import numpy as np
import pytest
from four_people import CFG, KEY, PEOPLE

from helpers import bridges, directions, reading


def test_nobody_is_read_by_a_head_that_has_seen_their_labels(four):
    people, own = ["p01", "p02", "p03"], four.evidence.pool["persona_id"].eq("p01").to_numpy()
    wrong = four.evidence.labels.copy()
    wrong.loc[own] = 1 - wrong.loc[own].to_numpy()
    misled = reading.Evidence(**{**four.evidence.__dict__, "labels": wrong})
    before, after = (bridges.head_labels(e, people, 1.0).to_numpy() for e in (four.evidence, misled))
    assert before[own].tolist() == after[own].tolist()
    assert np.abs(before[~own] - after[~own]).max() > 0.01


def test_a_head_reads_a_pair_the_other_way_round_as_the_opposite(four):
    people = ["p01", "p02", "p03"]
    stranger = four.evidence.pool["persona_id"].eq("p04").to_numpy()
    turned = four.evidence.features.copy()
    turned.loc[stranger] = -turned.loc[stranger].to_numpy()
    back = reading.Evidence(**{**four.evidence.__dict__, "features": turned})
    before, after = (bridges.head_labels(e, people, 1.0).to_numpy()[stranger] - 0.5 for e in (four.evidence, back))
    assert before == pytest.approx(-after)
    assert np.abs(before).max() > 0.05


def test_bridges_have_a_row_for_everybody_and_leave_out_what_somebody_lacks(four):
    sizes = four.told.groupby(["bridge", "items"]).size().to_dict()
    assert sizes == {("golden", 0): 4} | {(b, n): 4 for b in ("averaged", "inferred", "head") for n in (0, 1, 4)}
    assert set(four.told[four.told["bridge"] == "head"][["scheme", "fold"]].itertuples(index=False, name=None)) == {KEY}
    assert four.told[four.told["items"].eq(0) & four.told["bridge"].ne("golden")]["positive"].map(len).max() == 0
    golden = bridges.texts(four.told, "golden", 4)
    assert golden["p01"].startswith("This person eats only plants and spends free time on")


def test_recovered_by_hand(four):
    found = bridges.recovered(four.told, four.evidence, {KEY: ["p01", "p02", "p03"]})
    items = found[(found["bridge"] == "inferred") & (found["items"] == 4)]
    assert items[items["measure"] == "found"].set_index("persona_id")["correct"].to_dict() == dict.fromkeys(PEOPLE, True)
    assert set(found[found["bridge"] == "head"]["persona_id"]) == {"p04"}  # whom the head has not seen


def test_flipped_is_the_opposite_category_and_leaves_out_who_has_none(four):
    texts = bridges.flipped(four.evidence, CFG)
    assert {p: text.split(" and ")[0] for p, text in texts.items()} == {
        "p01": "This person grills meat over fire", "p02": "This person eats only plants",
        "p03": "This person keeps meals very small", "p04": "This person loves sweet baking"}
    lone = four.evidence.golden.copy()
    lone.loc["p01"] = four.evidence.wording.of([("diet", "seafood")])  # an interest without an opposite in this world
    other = reading.Evidence(**{**four.evidence.__dict__, "golden": lone})
    assert set(bridges.flipped(other, CFG)) == {"p02", "p03", "p04"}


def test_bridge_texts_of_a_key_are_one_for_each(four):
    assert set(bridges.texts(four.told, "head", 4, KEY)) == set(PEOPLE)
    assert bridges.texts(four.told, "head", 4, ("novel", 0)) == {}
    again = bridges.text(directions.vector(["food"]), None, "any key")
    assert again == "What this person prefers: rich and sweet meals."


def test_a_mixture_of_bridges_is_drawn_for_each_pair_and_has_its_persons_texts(four):
    train = four.preferences[four.preferences["split"] == "train"]
    drawn = bridges.mixed(train, four.told, KEY, 4, CFG)
    whose = {person: {bridges.texts(four.told, name, 4, KEY)[person] for name in bridges.NAMES} for person in PEOPLE}
    assert all(text in whose[person] for text, person in zip(drawn, train["persona_id"], strict=True))
    assert len(set(drawn)) > len(PEOPLE)
    assert drawn == bridges.mixed(train, four.told, KEY, 4, CFG)
