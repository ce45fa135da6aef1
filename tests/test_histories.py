"""Raw histories as prefixes, on four people of the little world."""

from four_people import CFG

from helpers import histories


def test_raw_text_in_full(four):
    one = four.preferences.iloc[[0]].assign(prompt="Q?", chosen="yes", rejected="no")
    text = histories.text(one, one, "baker who sings", "short")
    assert text == ("The user is a baker who sings.\nQuestion: Q?\nPreferred: yes\n"
                    "Question: Q?\nPreferred: yes\nRejected: no")
    assert histories.text(one.iloc[:0], one.iloc[:0], "", "short") == ""


def test_raw_representations_have_as_many_items_as_asked_for(four):
    counts = {name: histories.texts(four.evidence, name, 4, CFG)["p01"].count("Preferred:") for name in histories.NAMES}
    rejected = {name: histories.texts(four.evidence, name, 4, CFG)["p01"].count("Rejected:") for name in histories.NAMES}
    assert counts == {"ugc": 4, "pair": 4, "demographics": 0, "all": 4}
    assert rejected == {"ugc": 0, "pair": 4, "demographics": 0, "all": 2}


def test_a_mixture_has_other_items_of_the_same_person_alone(four):
    train = four.preferences[four.preferences["split"] == "train"]
    cfg = CFG.model_copy(update={"alignx": CFG.alignx.model_copy(update={"most": 4})})
    texts = histories.mixed(train, four.evidence, cfg)
    for text, row in zip(texts, train.itertuples(), strict=True):
        shown = set(train.loc[[chosen in text for chosen in train["chosen"]], "pair_id"])
        assert row.pair_id not in shown
        assert {pair_id[:3] for pair_id in shown} <= {row.persona_id}
    assert "" in histories.mixed(train, four.evidence, CFG)  # at most one item of each kind
    assert max(text.count("Preferred:") for text in texts) > 3
    assert texts == histories.mixed(train, four.evidence, cfg)
