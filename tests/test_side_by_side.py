import numpy as np
import pandas as pd
import pytest

from helpers import scoring
from helpers import side_by_side as page

HEAD, TAIL = "The user is Ada Lind. Preferred: a slow roast.\n", "Question: what should I cook?\nAnswer:"
ANSWER = "lentil stew,  because it\nspares the animals."


def moved(loaded, policy, text, head=HEAD):
    return page.word_deltas(*loaded, (head, TAIL), ("", TAIL), text, policy)


@pytest.mark.parametrize("text", [ANSWER, "stew", "", "ünïcödé ✓ 日本語 \U0001f955"])
def test_the_words_add_up_to_the_difference_of_the_scored_answers(loaded, policy, text):
    scored = scoring.score_pairs(*loaded, [(HEAD, TAIL), ("", TAIL)], [text] * 2, [text] * 2, dtype="float32")
    words = moved(loaded, policy, text)
    difference = scored["logp_chosen"][0] - scored["logp_chosen"][1]
    assert abs(difference) > 1e-3
    assert sum(nats for _, nats in words) == pytest.approx(difference, abs=1e-4)
    assert [word for word, _ in words] == [*text.split(), page.END]


def test_without_a_prefix_nothing_moves(loaded, policy):
    assert [nats for _, nats in moved(loaded, policy, ANSWER, head="")] == [0.0] * 8


def test_a_word_is_the_sum_of_its_tokens(loaded, policy):
    """The tokens of "stew slow" one by one: those before the space make the first word."""
    tokenizer = loaded[1]
    ids = tokenizer(" stew slow", add_special_tokens=False)["input_ids"]
    first = len(tokenizer(" stew", add_special_tokens=False)["input_ids"])
    assert tokenizer.decode(ids[first:]) == " slow"
    told, untold = (page.token_logps(*loaded, (head, TAIL), "stew slow", policy) for head in (HEAD, ""))
    by_hand = [(told - untold)[:first].sum(), (told - untold)[first:-1].sum(), (told - untold)[-1]]
    np.testing.assert_allclose([nats for _, nats in moved(loaded, policy, "stew slow")], by_hand, atol=1e-6)


def test_an_answer_that_leaves_no_room_for_a_prefix_is_unmarked(loaded, policy):
    """Scored, such an answer is cut and its prefix lost altogether: the two readings are the same."""
    words = moved(loaded, policy, "stew " * 400)
    assert len(words) == 401
    assert {nats for _, nats in words} == {0.0}


def told(words) -> pd.DataFrame:
    return pd.DataFrame([("p01", "q1", "divergent", "<b>What?</b>", system, words) for system in ("s1", "s2")],
                        columns=["persona_id", "question_id", "kind", "prompt", "system", "words"])


def shown(words):
    personas = pd.DataFrame([("p01", "Ada", "a <i>person</i>")], columns=["persona_id", "name", "description"])
    prefixes = pd.DataFrame([("p01", "persona", "main", "Likes <stew>.")],
                            columns=["persona_id", "prefix", "variant", "text"])
    return page.entries(told(words), "persona", prefixes, personas, {"s2": "second", "s1": "first"})


def test_entries_keep_the_order_of_the_labels_and_the_shade_its_limits():
    (entry,) = shown([("stew", 2.0), ("end", -9.0)])
    assert [label for label, _ in entry["answers"]] == ["second", "first"]
    assert [word["shade"] for word in entry["answers"][0][1]] == [0.5, 1.0]  # 2 of 4 nats; and no more than full
    assert entry["prefix"] == "Likes <stew>."


def test_the_page_escapes_what_the_model_wrote_and_needs_no_other_file(store):
    entries = shown([("<script>alert(1)</script>", 2.0), (page.END, 0.1)])
    path = page.write(entries, store, "persona")
    html = path.read_text()
    assert path == store.path / "side_by_side.html"
    assert html.startswith("<!doctype html>")
    assert "<script" not in html
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in html
    for text in ("&lt;b&gt;What?", "a &lt;i&gt;person", "Likes &lt;stew&gt;.", "simulated world", "+2.00 nats"):
        assert text in html
    assert "src=" not in html
    assert "href=" not in html
    part = page.inline(entries, store, "persona").data
    assert "<html" not in part
    assert "&lt;script&gt;" in part
    assert html.count('class="far"') == 3  # the legend and a word of two nats in each answer
