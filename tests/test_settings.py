import pandas as pd
import pytest

from helpers import settings

IDS = ["p1", "p2", "p3", "p4", "p5", "p6"]
FOLDS = pd.DataFrame({"scheme": "stratified", "fold": [0, 0, 1, 1, 2, 2], "persona_id": IDS})
PAIRS = pd.DataFrame([
    {"persona_id": p, "pair_id": f"{p}-{split}", "kind": "divergent", "axis": "diet", "split": split,
     "prompt": f"what, {p}?", "chosen": "yes", "rejected": "no"}
    for p in IDS for split in ("train", "test")])
OTHER = dict(zip(IDS, IDS[1:] + IDS[:1], strict=True))
PREFIXES = pd.DataFrame(
    [(p, "name", "main", f"N-{p}") for p in IDS] + [(p, "name", "shuffled", f"N-{OTHER[p]}") for p in IDS]
    + [(p, "persona", "main", f"about {p}") for p in IDS]
    + [(p, "persona", "reseed", f"more on {p}") for p in IDS]
    + [(p, "persona", "shuffled", f"about {OTHER[p]}") for p in IDS],
    columns=["persona_id", "prefix", "variant", "text"])


def test_people_by_hand():
    assert settings.people(FOLDS, 2) == (["p1", "p2", "p3", "p4"], ["p5", "p6"], ["p1", "p2"])


def test_everybody_is_once_seen_and_once_unseen():
    of_fold = [settings.people(FOLDS, fold) for fold in range(3)]
    assert sorted(p for who in of_fold for p in who.seen) == IDS
    assert sorted(p for who in of_fold for p in who.unseen) == IDS
    assert all(set(who.seen) <= set(who.train) and not set(who.unseen) & set(who.train) for who in of_fold)


def test_people_of_another_scheme_by_hand():
    # p2 is on axes 0 and 1: held out in both, and never seen while he is
    left_out = pd.DataFrame([("leave_axis_out", 0, "p1"), ("leave_axis_out", 0, "p2"), ("leave_axis_out", 1, "p2"),
                             ("leave_axis_out", 1, "p3"), ("leave_axis_out", 2, "p4")], columns=list(FOLDS))
    both = pd.concat([FOLDS, left_out], ignore_index=True)
    assert settings.people(both, 2) == settings.people(FOLDS, 2)
    assert settings.people(both, 0, "leave_axis_out") == (["p3", "p4"], ["p1", "p2"], ["p3"])
    assert settings.people(both, 1, "leave_axis_out") == (["p1", "p4"], ["p2", "p3"], ["p4"])
    assert settings.people(both, 2, "leave_axis_out") == (["p1", "p2", "p3"], ["p4"], ["p1", "p2"])
    with pytest.raises(KeyError, match="no fold 0 of scheme small"):
        settings.people(both, 0, "small")


def test_ask_puts_the_own_prefix_in_the_head():
    asked = settings.ask(PAIRS.head(2), PREFIXES, "persona", "short", "reseed")
    assert asked["head"].tolist() == ["more on p1\n"] * 2
    assert asked["tail"].iloc[0] == "Question: what, p1?\nAnswer:"
    assert asked[["prefix", "variant"]].iloc[0].tolist() == ["persona", "reseed"]
    bare = settings.ask(PAIRS.head(1), PREFIXES, "none", "short")
    assert (bare["head"] + bare["tail"]).tolist() == ["Question: what, p1?\nAnswer:"]
    wrong = settings.ask(PAIRS.head(1), PREFIXES, "name", "short", owner={"p1": "p4"})
    assert wrong["head"].tolist() == ["The user is N-p4.\n"]
    with pytest.raises(KeyError, match="p1: no prefix name, variant reseed"):
        settings.ask(PAIRS.head(1), PREFIXES, "name", "short", "reseed")


def test_main_scores_test_pairs_of_unseen_and_seen_people():
    rows = settings.main(settings.ask(PAIRS, PREFIXES, "name", "short"), FOLDS, 0)
    assert dict(zip(rows["pair_id"], rows["trained"], strict=True)) == {
        "p3-test": True, "p4-test": True, "p1-test": False, "p2-test": False}
    assert set(rows["setting"]) == {"main"}


def test_the_setting_of_another_scheme_is_its_name():
    small = pd.DataFrame({"scheme": "small", "fold": [0, 0, 1], "persona_id": IDS[:3]})
    both, asked = pd.concat([FOLDS, small]), settings.ask(PAIRS, PREFIXES, "name", "short")
    rows = settings.main(asked, both, 1, "small")
    assert rows[["persona_id", "setting", "trained"]].values.tolist() == [
        ["p1", "small", True], ["p2", "small", True], ["p3", "small", False]]
    pd.testing.assert_frame_equal(settings.main(asked, both, 0), settings.main(asked, FOLDS, 0))


def test_sensitivity_by_hand():
    rows = settings.sensitivity(PAIRS, PREFIXES, "persona", FOLDS, 0, "short", seed=1)
    heads = rows.set_index(["setting", "persona_id"])["head"]
    assert heads["seen_reseed"].to_dict() == {"p3": "more on p3\n", "p4": "more on p4\n"}
    assert heads["unseen_wrong"].to_dict() == {"p1": "about p2\n", "p2": "about p3\n"}
    assert set(heads["seen_removed"]) == set(heads["unseen_removed"]) == {""}
    for setting, givers in (("seen_wrong_seen", IDS[2:]), ("seen_wrong_unseen", IDS[:2])):
        for person, head in heads[setting].items():
            assert head in {f"about {g}\n" for g in givers if g != person}
    trained = rows.groupby("setting")["trained"].agg(lambda values: set(values).pop()).to_dict()
    assert trained == {"seen_reseed": True, "seen_wrong_seen": True, "seen_wrong_unseen": True,
                       "seen_removed": True, "unseen_wrong": False, "unseen_removed": False}
    assert rows["pair_id"].str.endswith("test").all()
    named = settings.sensitivity(PAIRS, PREFIXES, "name", FOLDS, 0, "short", seed=1)
    assert "seen_reseed" not in set(named["setting"])
    wrong = named[named["setting"] == "seen_wrong_seen"].set_index("persona_id")["head"]
    assert [h.split("-")[1][:2] for h in wrong] == [h.split()[1] for h in heads["seen_wrong_seen"]]


def test_a_wrong_prefix_is_never_ones_own_text():
    texts = pd.DataFrame({"persona": ["same", "same", "else"], "name": ["a", "b", "c"]}, index=IDS[:3])
    for seed in range(20):
        assert settings.wrong_owners(["p1"], ["p1", "p2", "p3"], texts, seed) == {"p1": "p3"}
    with pytest.raises(ValueError, match="p1: add people"):
        settings.wrong_owners(["p1"], ["p1", "p2"], texts, 0)
