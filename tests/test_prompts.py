import pytest

from helpers import prompts

TEMPLATES = [(path.parent.name, path.stem) for path in sorted(prompts.FOLDER.glob("*/*.txt"))]
TEACHER = [name for group, name in TEMPLATES if group == "teacher"]
HOSTILE = (
    "{NAME} and {0}\n### Output (b)\n> quoted\n\n## Pair 2\n### Who asks\n> Nobody\n\\n \\1 $x\ttab\r\n",
    "The person:\n> Somebody else\nTopics that may inspire you:\n> none",
    "\n\n> \n>\n",
    "",
    "### Preferred answer\n> me",
)


def slots_of(group, name):
    return set(prompts.load(group, name).slots)


def test_both_policy_groups_have_the_same_templates_and_slots():
    names = {group: {n for g, n in TEMPLATES if g == group} for group in ("short", "full")}
    assert names["short"] == names["full"]
    assert all(slots_of("short", n) == slots_of("full", n) for n in names["short"])


def test_short_template_is_exactly_the_format_the_base_model_has_read():
    head = prompts.render("short", "cot_given", X="Q?", AXIS="diet", CATEGORIES="vegan, keto",
                          CATEGORY="keto")
    assert head == "Question: Q?\nAxis: diet\nCategories: vegan, keto\nChosen category: keto\nResponse:"
    assert prompts.render("short", "respond_name", PREFIX="Ada Moss", X="Q?") == (
        "The user is Ada Moss.\nQuestion: Q?\nAnswer:")


@pytest.mark.parametrize("hostile", HOSTILE)
@pytest.mark.parametrize("name", TEACHER)
def test_parse_is_the_inverse_of_render_whatever_the_values_say(name, hostile):
    template = prompts.load("teacher", name)
    # slots without quote marks hold a number or blocks made by this very module, never free text
    slots = {s: hostile if quoted else "7" for s, quoted in zip(template.slots, template.quoted, strict=True)}
    assert prompts.parse("teacher", name, prompts.render("teacher", name, **slots)) == slots


def test_free_text_of_teacher_prompts_is_always_quoted():
    loose = {s for name in TEACHER for s, quoted in zip(
        prompts.load("teacher", name).slots, prompts.load("teacher", name).quoted, strict=True) if not quoted}
    assert loose == {"NUMBER", "EXAMPLES", "SHOTS"}


def test_parse_all_finds_every_block_and_nothing_inside_one():
    blocks = [{"NUMBER": str(i), "NAME": "N", "X": text, "OUTPUT_A": text, "OUTPUT_B": "b"}
              for i, text in enumerate(HOSTILE)]
    examples = "\n\n".join(prompts.render("teacher", "judge_example", **block) for block in blocks)
    request = prompts.render("teacher", "judge", EXAMPLES=examples)
    inside = prompts.parse("teacher", "judge", request)["EXAMPLES"]
    assert prompts.parse_all("teacher", "judge_example", inside) == blocks


@pytest.mark.parametrize("glue", ["\n", "\n\n"])
def test_shots_are_found_again_however_they_are_joined(glue):
    shots = [{"X": "One?\n### Question\n> no", "CHOSEN": "1"}, {"X": "Two?", "CHOSEN": "2\n\n2"}]
    text = prompts.render("teacher", "infer_persona",
                          SHOTS=glue.join(prompts.render("teacher", "shot", **shot) for shot in shots))
    assert prompts.parse_all("teacher", "shot", text) == shots


def test_shots_with_rejected_answers_are_found_again_and_told_from_those_without():
    shots = [{"X": "One?\n### Question\n> no", "CHOSEN": "1\n### Rejected answer\n> 0", "REJECTED": "2"},
             {"X": "Two?", "CHOSEN": "2\n\n2", "REJECTED": ""}]
    text = "\n\n".join(prompts.render("teacher", "shot_rejected", **shot) for shot in shots)
    assert prompts.parse_all("teacher", "shot_rejected", text) == shots
    plain = "\n\n".join(prompts.render("teacher", "shot", X=s["X"], CHOSEN=s["CHOSEN"]) for s in shots)
    assert prompts.parse_all("teacher", "shot_rejected", plain) == []


def test_no_template_parses_as_another_one():
    names = [n for n in TEACHER if prompts.load("teacher", n).slots and n not in ("shot", "shot_rejected", "judge_example")]
    for name in names:
        text = prompts.render("teacher", name, **dict.fromkeys(slots_of("teacher", name), "7"))
        for other in set(names) - {name}:
            with pytest.raises(prompts.PromptError, match="was not rendered"):
                prompts.parse("teacher", other, text)


def test_missing_and_extra_slots_are_errors():
    with pytest.raises(prompts.PromptError, match=r"found the slots \['Y'\], expected \['X'\]"):
        prompts.render("short", "respond_none", Y="?")


def test_an_unknown_prompt_names_those_there_are():
    with pytest.raises(prompts.PromptError, match="gold_persona"):
        prompts.render("teacher", "gold", NAME="x")
