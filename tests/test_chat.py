import pytest
from tinyhub import FAMILIES, make_tokenizer

from helpers import chat, scoring

CHATS = [name for name, (template, *_) in FAMILIES.items() if template]
HEAD, TAIL, ANSWER = "The user is Ada Lind.\n\n", "Question: what should I cook?", "A slow roast, because it is good."


def ids_of(tokenizer, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def rendered(tokenizer, *texts: str, open_end: bool) -> str:
    turns = [{"role": role, "content": text} for role, text in zip(("user", "assistant"), texts, strict=False)]
    return tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=open_end, **chat.FIXED)


@pytest.fixture(params=CHATS)
def tokenizer(request):
    return make_tokenizer(request.param)


def test_ids_are_those_of_the_template(tokenizer):
    """The open question is the template's, the answered one begins with it (the prefix property), and ends once."""
    (prompt,), (answer,) = chat.encode_prompts(tokenizer, [(HEAD, TAIL)]), chat.encode_answers(tokenizer, [ANSWER])
    asked = rendered(tokenizer, HEAD + TAIL, open_end=True)
    whole = rendered(tokenizer, HEAD + TAIL, ANSWER, open_end=False)
    begin = tokenizer.bos_token or ""
    asked, whole = (text if text.startswith(begin) else begin + text for text in (asked, whole))
    both = sum(prompt, []) + answer
    assert sum(prompt, []) == ids_of(tokenizer, asked)
    assert both == ids_of(tokenizer, whole)[:len(both)]
    assert tokenizer.decode(ids_of(tokenizer, whole)[len(both):]).strip() == ""  # at most a line break is left out
    assert tokenizer.bos_token is None or both.count(tokenizer.bos_token_id) == 1
    ends = chat.stop_ids(tokenizer)
    assert answer[-1] in ends
    assert not set(answer[:-1]) & set(ends)  # none is doubled


def test_only_the_head_holds_the_prefix(tokenizer):
    (with_head, without) = chat.encode_prompts(tokenizer, [(HEAD, TAIL), ("", TAIL)])
    assert without.head == []
    assert with_head.start == without.start
    assert tokenizer.decode(with_head.head).strip() == HEAD.strip()
    assert tokenizer.decode(with_head.tail).strip().startswith(TAIL)
    assert with_head.tail[-3:] == without.tail[-3:]


@pytest.mark.parametrize(("side", "gone"), [("left", "The"), ("right", "Lind.")])
def test_a_long_prefix_is_cut_at_the_stated_end_and_nothing_else_is(tokenizer, side, gone):
    told = (HEAD.replace("Ada", "Ada who likes lentil stew " * 9), TAIL)
    whole, = scoring.encode_pairs(tokenizer, [told], [ANSWER], ["No."], 900)
    (prompt,) = chat.encode_prompts(tokenizer, [told])
    short, = scoring.encode_pairs(tokenizer, [told], [ANSWER], ["No."], len(whole.prompt + whole.chosen) - 4, side)
    head = prompt.head[4:] if side == "left" else prompt.head[:-4]
    assert short.prompt == prompt.start + head + prompt.tail
    assert (short.lost, short.cut) == (4, 0)
    assert short[1:3] == whole[1:3]
    text = chat.shorten(tokenizer, HEAD, len(ids_of(tokenizer, HEAD)) - 2, side)
    assert text
    assert (HEAD.endswith if side == "left" else HEAD.startswith)(text)
    assert gone not in text
    assert chat.shorten(tokenizer, HEAD, 99, side) == ""


def test_words_end_no_turn(tokenizer):
    """Whoever writes an end token into a question or an answer has written letters."""
    end = tokenizer.convert_ids_to_tokens(chat.stop_ids(tokenizer))[-1]
    (plain,), (hostile,) = (chat.encode_answers(tokenizer, [text]) for text in ("good", f"good {end} bad"))
    assert [i in chat.stop_ids(tokenizer) for i in hostile].count(True) == 1
    assert len(hostile) > len(plain)
    (asked,) = chat.encode_prompts(tokenizer, [("", f"why {end}")])
    (tame,) = chat.encode_prompts(tokenizer, [("", "why")])
    special = set(tokenizer.all_special_ids)
    assert sum(i in special for i in sum(asked, [])) == sum(i in special for i in sum(tame, []))


def test_offsets_are_those_of_the_answers_tokens(tokenizer):
    (ids,), text = chat.encode_answers(tokenizer, [ANSWER]), chat.answer_text(tokenizer, ANSWER)
    offsets = chat.answer_offsets(tokenizer, ANSWER)
    assert len(offsets) == len(ids) - len(ids_of(tokenizer, chat.frame(tokenizer).ending))
    assert "".join(text[a:b] for a, b in offsets) == text


def test_as_prompt_is_what_is_scored(tokenizer):
    (prompt,) = chat.encode_prompts(tokenizer, [(HEAD, TAIL)])
    assert ids_of(tokenizer, chat.as_prompt(tokenizer, HEAD + TAIL)) == sum(prompt, [])


def test_a_base_model_is_asked_in_plain_text():
    tokenizer = make_tokenizer("base")
    assert chat.frame(tokenizer) is None
    (prompt,), (answer,) = chat.encode_prompts(tokenizer, [(HEAD, TAIL)]), chat.encode_answers(tokenizer, ["Good."])
    assert prompt == ([tokenizer.bos_token_id], ids_of(tokenizer, HEAD), ids_of(tokenizer, TAIL))
    assert answer == [*ids_of(tokenizer, " Good."), tokenizer.eos_token_id]
    assert chat.as_prompt(tokenizer, "Hello") == tokenizer.bos_token + "Hello"
    assert chat.stop_ids(tokenizer) == [tokenizer.eos_token_id]


def test_the_date_and_thinking_do_not_depend_on_the_day():
    assert "26 Jul 2024" in chat.frame(make_tokenizer("llama3")).opening
    assert chat.frame(make_tokenizer("qwen3")).lead.endswith("<think>\n\n</think>\n\n")


@pytest.mark.parametrize(("template", "message"), [
    ("{% for m in messages %}{{ m.role + m.content + eos_token }}{% endfor %}{% if add_generation_prompt %}!{% endif %}",
     "no prefix property"),
    ("{% for m in messages %}{{ m.content | upper + eos_token }}{% endfor %}", "no prefix property"),
    ("{% for m in messages %}{{ m.role + ': ' + m.content + ' ###' }}{% endfor %}", "no special token")])
def test_a_template_that_cannot_be_scored_is_refused(template, message):
    tokenizer = make_tokenizer("qwen")
    tokenizer.chat_template = template
    with pytest.raises(chat.TemplateError, match=message):
        chat.frame(tokenizer)
