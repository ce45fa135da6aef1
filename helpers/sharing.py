"""Which rows a model has to read to score many answers: no prompt twice, and a head once for all its questions."""

from collections import defaultdict
from collections.abc import Hashable, Sequence
from typing import NamedTuple

from helpers import dpo

PAYS = 0.08  # share of its rows' tokens from which on a head is worth a pass of its own
MOST = 8  # answers in a row: each more is a longer row, and every token's attention spans its row


class Asked(NamedTuple):
    """Token ids of a prompt and its answers, and how many tokens had to be left out."""

    prompt: list[int]
    answers: list[list[int]]
    lost: int  # of the prefix
    cut: int  # of question and answers that are too long even without a prefix
    head: int  # how many tokens of the prompt come before the question: the begin token and the prefix


class Row(NamedTuple):
    """What the model reads at once: a prompt, or the rest of it behind a head, and answers to it."""

    head: int  # which of Plan.heads stands in front; -1: none
    prompt: tuple[int, ...]
    answers: list[tuple[int, ...]]
    wanted: list[list[int]]  # for each answer the slots that its score goes to
    key: Hashable

    @property
    def length(self) -> int:
        """Tokens of the packed row (helpers.dpo.pack)."""
        return dpo.row_length(self.prompt, self.answers)


class Plan(NamedTuple):
    """Rows to read, and the heads that stand in front of them; keys: of each head (see `plan`)."""

    heads: list[tuple[int, ...]]
    keys: list[Hashable]
    rows: list[Row]

    @property
    def tokens(self) -> int:
        """All that the model has to read, without padding."""
        return sum(map(len, self.heads)) + sum(row.length for row in self.rows)


def plan(asked: Sequence[Asked], keys: Sequence[Hashable] | None = None, pays: float = PAYS) -> Plan:
    """Rows that give every answer's score once.

    An answer's slot is its place when all answers are counted through, in order. Equal prompts share a row,
    equal answers to it a score. Rows with a head in common leave it to the cache where that saves at least
    the share `pays` of their tokens. keys: of each prompt; only prompts of the same key share anything.
    """
    groups = defaultdict(list)
    for row, head in _merge(asked, keys or [None] * len(asked)):
        groups[row.key, row.prompt[:head]].append(row)
    made = Plan([], [], [])
    for (key, head), rows in groups.items():
        saved, whole = len(head) * (len(rows) - 1), sum(row.length for row in rows)
        if saved and saved >= pays * whole:
            made.heads.append(head)
            made.keys.append(key)
            rows = [row._replace(head=len(made.heads) - 1, prompt=row.prompt[len(head):]) for row in rows]
        made.rows.extend(rows)
    return made


def chunks(plan: Plan, token_budget: int) -> list[tuple[list[int], list[int]]]:
    """Parts of the work, each (heads to keep in the cache, rows to read): first the rows that have no head.

    Neighbours in length share a part; a part's heads have at most token_budget tokens, padded, or are one.
    """
    behind = defaultdict(list)
    for i, row in enumerate(plan.rows):
        behind[row.head].append(i)
    parts = [([], behind[-1])] if behind[-1] else []
    for heads in dpo.budget_batches([len(head) for head in plan.heads], token_budget):
        parts.append((heads.tolist(), [i for head in heads for i in behind[head]]))
    return parts


def _merge(asked: Sequence[Asked], keys: Sequence[Hashable]) -> list[tuple[Row, int]]:
    """A row for each distinct prompt and MOST of its answers, and the tokens of its head."""
    found: dict[tuple, tuple[int, dict]] = {}
    slot = 0
    for one, key in zip(asked, keys, strict=True):
        # an answer starts behind the prompt's last token, so that one is never part of the head
        head = min(one.head, len(one.prompt) - 1)
        _, answers = found.setdefault((key, tuple(one.prompt)), (head, {}))
        for answer in one.answers:
            answers.setdefault(tuple(answer), []).append(slot)
            slot += 1
    return [(Row(-1, prompt, part, [answers[answer] for answer in part], key), head)
            for (key, prompt), (head, answers) in found.items()
            for part in (list(answers)[i:i + MOST] for i in range(0, len(answers), MOST))]
