import numpy as np

from helpers import sharing
from helpers.sharing import Asked


def asked(prompt: str, *answers: str, head: int = 0) -> Asked:
    """One token a letter."""
    return Asked([ord(c) for c in prompt], [[ord(c) for c in answer] for answer in answers], 0, 0, head)


def text(ids) -> str:
    return "".join(map(chr, ids))


def test_plan_by_hand():
    # two questions behind the head "aaaa" (4 tokens): one row each without it, and the head once
    plan = sharing.plan([asked("aaaax", "p", "qq", head=4), asked("aaaayz", "p", "r", head=4)])
    assert [text(head) for head in plan.heads] == ["aaaa"]
    assert [(row.head, text(row.prompt), [text(a) for a in row.answers]) for row in plan.rows] == [
        (0, "x", ["p", "qq"]), (0, "yz", ["p", "r"])]
    assert [row.wanted for row in plan.rows] == [[[0], [1]], [[2], [3]]]
    # head 4; x: 0 + 1 + 2; yz: 1 + 1 + 1
    assert plan.tokens == 4 + 3 + 3


def test_a_head_that_saves_little_is_not_taken_off():
    # the rows have 4 + 3 and 5 + 2 tokens, 14 together; the head of 4, read once, saves 4 of them: 2 / 7
    both = [asked("aaaax", "p", "qq", head=4), asked("aaaayz", "p", "r", head=4)]
    assert sharing.plan(both, pays=4 / 14).heads
    assert not sharing.plan(both, pays=0.3).heads
    assert not sharing.plan(both[:1], pays=0).heads  # nobody to share it with


def test_equal_prompts_are_one_row_and_equal_answers_one_score():
    plan = sharing.plan([asked("x", "p", "q"), asked("y", "p", "q"), asked("x", "q", "r")])
    assert [(text(row.prompt), [text(a) for a in row.answers], row.wanted) for row in plan.rows] == [
        ("x", ["p", "q", "r"], [[0], [1, 4], [5]]), ("y", ["p", "q"], [[2], [3]])]


def test_prompts_of_different_keys_share_nothing():
    same = [asked("aaaax", "p", head=4)] * 2
    assert len(sharing.plan(same).rows) == 1
    apart = sharing.plan(same, keys=["one", "two"])
    assert [row.key for row in apart.rows] == ["one", "two"]
    assert not apart.heads


def test_the_last_token_of_a_prompt_belongs_to_its_answers():
    # a prompt that is all head: its last token is not part of what is shared
    plan = sharing.plan([asked("aaaa", "p", head=4), asked("aaaab", "q", head=4)])
    assert [text(row.prompt) for row in plan.rows] == ["aaaa", "aaaab"]
    plan = sharing.plan([asked("aaaa", "p", head=4), asked("aaaa", "q", head=4), asked("aaab", "q", head=3)])
    assert [(text(row.prompt), row.head) for row in plan.rows] == [("a", 0), ("b", 0)]


def test_a_prompt_with_many_answers_is_several_rows():
    letters = [chr(97 + i) for i in range(sharing.MOST + 3)]
    plan = sharing.plan([asked("xyz", *letters, head=2)])
    assert [len(row.answers) for row in plan.rows] == [sharing.MOST, 3]
    assert [slot for row in plan.rows for slots in row.wanted for slot in slots] == list(range(len(letters)))


def test_chunks_hold_every_row_once_and_keep_to_the_budget():
    rng = np.random.default_rng(0)
    letters = [chr(97 + i) * n for i, n in enumerate(rng.integers(3, 30, 12))]
    plan = sharing.plan([asked(f"{head}{n}", "p", "q", head=len(head)) for head in letters for n in range(4)]
                        + [asked("none", "p")], pays=0)
    parts = sharing.chunks(plan, 64)
    assert sorted(i for _, rows in parts for i in rows) == list(range(len(plan.rows)))
    assert parts[0][0] == []
    for heads, rows in parts[1:]:
        lengths = [len(plan.heads[head]) for head in heads]
        assert len(lengths) * max(lengths) <= 64
        assert {plan.rows[i].head for i in rows} == set(heads)
