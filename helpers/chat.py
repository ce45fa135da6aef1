"""From texts to token ids: question and answer inside the model's chat template, or plain where it has none.

A template is not trusted to be what it looks like. Two marks are sent through it, and what it puts before, between
and after them is the frame; a template that renders an answered question otherwise than the open one is refused.
"""

from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import NamedTuple

USER, ANSWER = "\u2237question\u2237", "\u2237answer\u2237"  # marks that no template holds
AT_ONCE = 1024  # texts to tokenise: of each more is kept meanwhile than its ids
FIXED = {"date_string": "26 Jul 2024", "enable_thinking": False}  # else Llama 3 writes today's date, Qwen 3 thinks


class TemplateError(ValueError):
    """A chat template that cannot be used for scoring: says what it does, and what to set."""


class Frame(NamedTuple):
    """What stands around a question and its answer, as text."""

    opening: str  # before the question: begin token, a default system turn, the heading of the user's turn
    lead: str  # between question and answer
    space: str  # what of that is white space, and so a part of the answer's first token
    ending: str  # after the answer, up to its end token

    def prompt(self, text: str) -> str:
        """The open question, special tokens included: what a model continues."""
        return self.opening + text + self.lead


class Prompt(NamedTuple):
    """Token ids of one open question. Only the head, which holds the prefix, may be shortened."""

    start: list[int]
    head: list[int]
    tail: list[int]


def frame(tokenizer) -> Frame | None:
    """The frame of the tokenizer's chat template, None if it has none.

    Raises TemplateError if the template lacks the prefix property (question and answer must begin with what the
    question alone is), changes the texts, or does not end an answer.
    """
    template = getattr(tokenizer, "chat_template", None)
    return _frame(tokenizer, template) if template else None


def encode_prompts(tokenizer, prompts: Sequence[tuple[str, str]]) -> list[Prompt]:
    """Token ids of each (head, tail), as from prefixes.prompt.

    In a chat template the whole is tokenised at once, so that ids are what the template gives; a token that
    reaches from one part into the next belongs to the later one, so that no word of the question is cut. Without a
    template each part is tokenised on its own.
    """
    around = frame(tokenizer)
    if around is None:
        heads, tails = (_ids(tokenizer, (prompt[part] for prompt in prompts)) for part in (0, 1))
        begin = [i for i in [tokenizer.bos_token_id] if i is not None]
        return [Prompt(begin, head, tail) for head, tail in zip(heads, tails, strict=True)]
    table: dict[tuple[str, str], Prompt] = {}
    for prompt in prompts:
        if prompt not in table:
            table[prompt] = _framed(tokenizer, around, *prompt)
    return [table[prompt] for prompt in prompts]


def encode_answers(tokenizer, texts: Iterable[str]) -> list[list[int]]:
    """Token ids of each answer with the one token that ends it; without a template " " stands in front."""
    around = frame(tokenizer)
    if around is None:
        return [ids + [tokenizer.eos_token_id] for ids in _ids(tokenizer, (f" {text}" for text in texts))]
    said = [answer_text(tokenizer, text) + around.ending for text in texts]
    before = _last(tokenizer, around.lead)
    (start,), behind = _ids(tokenizer, [before]), _ids(tokenizer, [before + text for text in said])
    alone = _ids(tokenizer, said)
    return [ids[len(start):] if ids[:len(start)] == start else apart for ids, apart in zip(behind, alone, strict=True)]


def answer_offsets(tokenizer, text: str) -> list[tuple[int, int]]:
    """Where in `answer_text` the tokens of an answer begin and stop, as encode_answers has them, the end left out."""
    said, around = answer_text(tokenizer, text), frame(tokenizer)
    before = _last(tokenizer, around.lead) if around else ""
    coded, start = (tokenizer(part, add_special_tokens=False, return_offsets_mapping=True) for part in (before + said, before))
    skip = len(start["input_ids"])
    if coded["input_ids"][:skip] != start["input_ids"]:
        return tokenizer(said, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    return [(max(0, a - len(before)), b - len(before)) for a, b in coded["offset_mapping"][skip:]]


def answer_text(tokenizer, text: str) -> str:
    """An answer as it is tokenised, without what ends it."""
    around = frame(tokenizer)
    return f" {text}" if around is None else around.space + _harmless(tokenizer, text.strip())


def as_prompt(tokenizer, text: str) -> str:
    """What a policy is given to continue, begin token included: tokenise it without adding special tokens."""
    around = frame(tokenizer)
    return around.prompt(_harmless(tokenizer, text.strip())) if around else (tokenizer.bos_token or "") + text


def stop_ids(tokenizer) -> list[int]:
    """The tokens at which sampling ends: the end token, and what the template ends an answer with."""
    around = frame(tokenizer)
    last = [] if around is None else _ids(tokenizer, [around.ending])[0][-1:]
    return sorted({tokenizer.eos_token_id, *last})


def shorten(tokenizer, head: str, lost: int, side: str = "left") -> str:
    """The head without the `lost` tokens at that end, cut where a token begins or ends."""
    spans = tokenizer(head, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    if lost >= len(spans):
        return ""
    return head[spans[lost][0]:] if side == "left" else head[:spans[len(spans) - lost - 1][1]]


@lru_cache(maxsize=8)
def _frame(tokenizer, template: str) -> Frame:
    """See `frame`; template is there for the cache alone."""
    turns = [{"role": "user", "content": USER}, {"role": "assistant", "content": ANSWER}]
    asked = tokenizer.apply_chat_template(turns[:1], tokenize=False, add_generation_prompt=True, **FIXED)
    whole = tokenizer.apply_chat_template(turns, tokenize=False, **FIXED)
    opening, found, rest = whole.partition(USER)
    lead, closed, ending = rest.partition(ANSWER)
    if not found or not closed or not (opening + USER + lead).startswith(asked):
        raise TemplateError(
            f"the chat template has no prefix property: a question is {asked[-80:]!r}, with its answer "
            f"{whole[-160:]!r}. Set policy.chat=false to do without it, or give the model another one")
    bare = lead.rstrip(" ")
    return Frame(_begin(tokenizer, opening), bare, lead[len(bare):], _one_end(tokenizer, ending))


def _begin(tokenizer, opening: str) -> str:
    """The opening with a begin token, where the tokenizer would put one and the template (Zephyr's) has none."""
    begins = tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]
    return tokenizer.bos_token + opening if begins and not opening.startswith(tokenizer.bos_token) else opening


def _one_end(tokenizer, ending: str) -> str:
    """The ending up to its first special token; the tokenizer's end token where the template writes none."""
    found = [ending.index(token) + len(token) for token in _special(tokenizer) if token in ending]
    if not found and ending.strip():
        raise TemplateError(f"after an answer the chat template writes {ending!r}, with no special token in it; "
                            "expected one that ends the turn. Set policy.chat=false, or give the model another one")
    return ending[:min(found)] if found else tokenizer.eos_token


def _special(tokenizer) -> list[str]:
    """The special tokens as text, the longest first."""
    added = (str(token) for token in tokenizer.added_tokens_decoder.values() if token.special)
    return sorted({*tokenizer.all_special_tokens, *added}, key=len, reverse=True)


def _harmless(tokenizer, text: str) -> str:
    """The text with a space in every special token that somebody wrote into it: words end no turn."""
    for token in _special(tokenizer):
        text = text.replace(token, f"{token[0]} {token[1:]}")
    return text


def _last(tokenizer, lead: str) -> str:
    """What an answer is tokenised behind: alone, some tokenizers would put a space before its first word."""
    return next((token for token in _special(tokenizer) if lead.endswith(token)), lead[-1:])


def _framed(tokenizer, around: Frame, head: str, tail: str) -> Prompt:
    """Which tokens of the whole belong to which part, by where in the text they end."""
    head, tail = (head.lstrip(), tail.rstrip()) if head else ("", tail.strip())
    head, tail = _harmless(tokenizer, head), _harmless(tokenizer, tail)
    coded = tokenizer(around.prompt(head + tail), add_special_tokens=False, return_offsets_mapping=True)
    stops = [stop for _, stop in coded["offset_mapping"]]
    one = sum(stop <= len(around.opening) for stop in stops)
    two = max(one, sum(stop <= len(around.opening) + len(head) for stop in stops)) if head else one
    ids = coded["input_ids"]
    return Prompt(ids[:one], ids[one:two], ids[two:])


def _ids(tokenizer, texts: Iterable[str]) -> list[list[int]]:
    """Token ids of each text; one that occurs often, as prefixes do, is tokenised once."""
    texts = list(texts)
    known = list(dict.fromkeys(texts))
    parts = (known[i:i + AT_ONCE] for i in range(0, len(known), AT_ONCE))
    ids = (one for part in parts for one in tokenizer(part, add_special_tokens=False)["input_ids"])
    table = dict(zip(known, ids, strict=True))
    return [table[text] for text in texts]
