"""The prompt templates of data/prompts: fill in the slots, and read them back out.

A template is a text file with slots like {NAME}. Where "> " stands before a slot at the beginning of a line,
every line of the value is quoted with "> ", as in a mail: whatever a value says, no line of it can be taken
for a heading, neither by a reader nor by `parse`. All free text in the teacher's prompts is quoted like that.
"""

import re
from dataclasses import dataclass
from functools import cache

from helpers import DATA

FOLDER = DATA / "prompts"
SLOT = re.compile(r"\{([A-Z][A-Z0-9_]*)\}")


class PromptError(ValueError):
    """A template that does not exist, slots that do not fit it, or a text that was not made from it."""


def render(group: str, name: str, **slots: object) -> str:
    """The template data/prompts/<group>/<name>.txt with every slot filled; values are inserted literally."""
    template = load(group, name)
    if slots.keys() != set(template.slots):
        expected = sorted(set(template.slots))
        raise PromptError(f"prompt {group}/{name}: found the slots {sorted(slots)}, expected {expected}")
    parts = [template.literals[0]]
    for slot, quoted, literal in zip(template.slots, template.quoted, template.literals[1:], strict=True):
        value = str(slots[slot])
        parts += (value.replace("\n", "\n> ") if quoted else value, literal)
    return "".join(parts)


def parse(group: str, name: str, text: str) -> dict[str, str]:
    """The slots that `text` was rendered from; the inverse of `render`. Raises PromptError where it was not.

    Exact for quoted slots. A slot without a quote mark ends at the first place where the template can go on.
    """
    template = load(group, name)
    found = template.pattern.fullmatch(text)
    if not found:
        raise PromptError(f"this text was not rendered from the prompt {group}/{name}: {text[:80]!r}…")
    return template.values(found)


def parse_all(group: str, name: str, text: str) -> list[dict[str, str]]:
    """The slots of every place in `text` that was rendered from the template, in order (pairs, shots)."""
    template = load(group, name)
    return [template.values(found) for found in template.pattern.finditer(text)]


@dataclass(frozen=True)
class Template:
    """A template taken apart: literals[0] slots[0] literals[1] slots[1] … literals[n]."""

    literals: tuple[str, ...]
    slots: tuple[str, ...]
    quoted: tuple[bool, ...]
    pattern: re.Pattern

    def values(self, found: re.Match) -> dict[str, str]:
        """Slot -> value of one match, with the quote marks taken off again."""
        pairs = zip(self.slots, self.quoted, strict=True)
        return {slot: found[slot].replace("\n> ", "\n") if quoted else found[slot] for slot, quoted in pairs}


@cache
def load(group: str, name: str) -> Template:
    """Read and take apart one template. Raises PromptError with the names there are."""
    path = FOLDER / group / f"{name}.txt"
    if not path.exists():
        there = sorted(p.stem for p in path.parent.glob("*.txt")) or sorted(p.name for p in FOLDER.iterdir())
        raise PromptError(f"no prompt {group}/{name}; data/prompts has {there}")
    pieces = SLOT.split(path.read_text(encoding="utf-8").removesuffix("\n"))
    literals, slots = tuple(pieces[::2]), tuple(pieces[1::2])
    quoted = tuple(literal == "> " or literal.endswith("\n> ") for literal in literals[:-1])
    pattern, seen = re.escape(literals[0]), set()
    for slot, is_quoted, literal in zip(slots, quoted, literals[1:], strict=True):
        value = r"[^\n]*(?:\n> [^\n]*)*" if is_quoted else r"(?s:.*?)"
        pattern += (f"(?P={slot})" if slot in seen else f"(?P<{slot}>{value})") + re.escape(literal)
        seen.add(slot)
    return Template(literals, slots, quoted, re.compile(pattern))
