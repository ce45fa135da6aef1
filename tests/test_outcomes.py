"""AlignX's rule and steered answers, by hand and on four people of the little world."""

import pandas as pd
from four_people import CFG

from helpers import outcomes
from helpers.world.corpus import Corpus, Knobs


def test_the_corrected_rule_asks_what_training_moved():
    # chosen +2, rejected +1: right; chosen likelier but moved less: wrong; both moved alike: a tie, wrong
    rows = pd.DataFrame([(-3.0, -5.0, -4.0, -5.0), (-1.0, -9.0, -1.0, -10.0), (-2.0, -4.0, -1.0, -3.0)],
                        columns=["logp_chosen", "ref_chosen", "logp_rejected", "ref_rejected"])
    rows.loc[1, ["ref_chosen", "ref_rejected"]] = [-1.0, -12.0]
    assert outcomes.corrected(rows).tolist() == [True, False, False]


def test_collect_puts_the_base_beside_the_adapter_and_below_it():
    asked = {"persona_id": "a", "pair_id": "1", "kind": "divergent", "axis": "diet", "prefix": "golden", "variant": "main",
             "trained": False, "before": "Likes figs.\n", "n_chosen": 2, "n_rejected": 2}
    scores = pd.DataFrame([asked | {"setting": s, "policy_id": "x", "logp_chosen": -1.0, "logp_rejected": -2.0, "correct": True}
                           for s in ("main", "items")])
    base = pd.DataFrame([{"pair_id": "1", "before": "Likes figs.\n", "logp_chosen": -4.0, "logp_rejected": -3.0, "n_chosen": 2,
                          "n_rejected": 2, "correct": False}])
    made = pd.DataFrame([("x", "pba", 0)], columns=["policy_id", "method", "fold"])
    table = outcomes.collect(scores, made, base, 0)
    assert table[["method", "setting", "logp_chosen", "ref_chosen", "correct"]].values.tolist() == [
        ["pba", "main", -1.0, -4.0, True], ["pba", "items", -1.0, -4.0, True], ["prompting", "main", -4.0, -4.0, False]]


def test_steered_counts_answers_that_lean_as_told(four):
    corpus = Corpus(four.world, 5, Knobs(wrong_slot=0, common_slot=0))
    rows = [("golden", "p01", corpus.answer("diet", "vegan")), ("flipped", "p01", corpus.answer("diet", "grill")),
            ("golden", "p02", corpus.answer("diet", "vegan")), ("flipped", "p02", corpus.answer("diet", "grill")),
            ("golden", "p03", corpus.answer("diet", "seafood")), ("flipped", "p03", corpus.answer("diet", "seafood"))]
    answers = pd.DataFrame([(*row, "q0") for row in rows], columns=["system", "persona_id", "text", "question_id"])
    asked = pd.DataFrame({"persona_id": ["p01", "p02", "p03"], "question_id": "q0",
                          "prompt": four.world.divergent_questions("diet")[0]})
    found = outcomes.steered(four.teacher, answers, asked, four.evidence, CFG).set_index("persona_id")
    assert found["correct"].to_dict() == {"p01": True, "p02": False, "p03": False}
    assert found["against"].to_dict() == {"p01": False, "p02": True, "p03": False}
    assert outcomes.steered(four.teacher, answers[answers["system"] == "golden"], asked, four.evidence, CFG).empty
