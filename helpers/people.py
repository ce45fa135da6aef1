"""Steps 1 and 2: who the people are and what they ask (paper section 3, Appendix G.1 and G.2)."""

import json
import re
from collections.abc import Callable, Sequence
from random import Random
from typing import TYPE_CHECKING

import pandas as pd
from pydantic import BaseModel, ConfigDict

from helpers import prompts

if TYPE_CHECKING:
    from helpers.llm import Answer, Request, Teacher

MAX_ASKS = 3
PERSON_LINE = re.compile(r"-\s*([^,]+?)\s*,\s*([^,]+?)\s*,\s*(.+)")
QUESTION_LINE = re.compile(r"^\s*\d+[.)]\s+[\"'“]?(.*?)[\"'”]?\s*$", re.MULTILINE)


class PeopleError(ValueError):
    """The teacher's answer cannot be used, or it runs out of questions; says what came and what to do."""


class Demographics(BaseModel):
    """What the equity notebook groups people by; "unknown" where the teacher is not sure."""

    model_config = ConfigDict(extra="forbid")
    region: str
    age_group: str
    gender: str
    schooling: str


def select_personas(teacher: "Teacher", axes: Sequence[str], per_axis: int) -> pd.DataFrame:
    """The `personas` table: up to `per_axis` people of each axis as named, somebody on two axes once.

    Raises PeopleError for an answer that stays malformed. Source: G.1; demographics: Appendix E.2.
    """
    people: dict[str, dict] = {}
    asked = [prompts.render("teacher", "personas", AXIS=axis, N=per_axis) for axis in axes]
    for axis, lines in zip(axes, _ask(teacher, asked, _parse_people, None, "personas"), strict=True):
        for category, name, about in lines[:per_axis]:
            new = {"name": name, "axes": [], "categories": [], "description": about}
            person = people.setdefault(name, new)
            if axis not in person["axes"]:
                person["axes"].append(axis)
                person["categories"].append(category)
    asked = [prompts.render("teacher", "demographics", NAME=name) for name in people]
    known = _ask(teacher, asked, lambda answer: answer.parsed, Demographics, "demographics")
    table = pd.DataFrame(people.values())
    table.insert(0, "persona_id", [f"p{i:02d}" for i in range(1, len(table) + 1)])
    table.insert(2, "tag", [f"<special_person_tag_{i}>" for i in range(1, len(table) + 1)])
    return table.assign(demographics=[json.dumps(d.model_dump()) for d in known])


def ask_questions(teacher: "Teacher", personas: pd.DataFrame, cfg, seed: int) -> pd.DataFrame:
    """Whatever came back when asking for `questions.batch` at a time until everybody has enough.

    Returns kind, axis ("personal" or the axis), persona_id ("" for divergent), ask, text, duplicate (of an
    earlier text of the same person or axis). Raises PeopleError where the teacher runs dry. Source: G.2.
    """
    sources, rows = _sources(personas), []
    wanted = [getattr(cfg.questions, source["kind"]) for source, _ in sources]
    seen: list[set[str]] = [set() for _ in sources]
    short = list(range(len(sources)))
    for ask in range(MAX_ASKS + 2 * max(wanted) // cfg.questions.batch):
        asked = [prompts.render("teacher", f"{sources[i][0]['kind']}_questions", **sources[i][1],
                                N=min(cfg.questions.batch, wanted[i])) for i in short]
        requests = [_user(prompt, None, "questions", 1000 * seed + ask) for prompt in asked]
        for i, answer in zip(short, teacher.map(requests, "questions"), strict=True):
            for text in QUESTION_LINE.findall(answer.text):
                known = normalised(text) in seen[i]
                rows.append({**sources[i][0], "ask": ask, "text": text, "duplicate": known})
                seen[i].add(normalised(text))
        short = [i for i in short if len(seen[i]) < wanted[i]]
        if not short:
            return pd.DataFrame(rows)
    who = sources[short[0]][1]
    raise PeopleError(f"asked {ask + 1} times, the teacher has {len(seen[short[0]])} different questions of "
                      f"{wanted[short[0]]} for {who.get('NAME') or who['AXIS']}: lower questions.personal or "
                      "questions.divergent, or use a teacher (a world) that knows more")


def make_questions(teacher: "Teacher", personas: pd.DataFrame, cfg, seed: int) -> pd.DataFrame:
    """The `questions` table: the first different ones of `ask_questions`, half train, half test by a draw.

    Everybody on an axis shares the halves of its divergent questions. Ids: q-<person or axis>-<number>.
    """
    asked = ask_questions(teacher, personas, cfg, seed)
    kept = asked[~asked["duplicate"]]
    kept = kept.assign(whose=kept["persona_id"].where(kept["persona_id"] != "", kept["axis"]))
    parts = []
    for whose, part in kept.groupby("whose", sort=False):
        part = part.head(getattr(cfg.questions, part["kind"].iloc[0]))
        slug, splits = re.sub(r"[^a-z0-9]+", "_", whose.lower()), ["train", "test"] * len(part)
        split = Random(f"{seed} split {whose}").sample(splits[:len(part)], len(part))
        ids = [f"q-{slug}-{i:03d}" for i in range(1, len(part) + 1)]
        parts.append(part.assign(question_id=ids, split=split))
    return pd.concat(parts, ignore_index=True)[["question_id", "kind", "axis", "persona_id", "split", "text"]]


def traits(personas: pd.DataFrame) -> pd.DataFrame:
    """A row per person, attribute and group, as the teacher says: persona_id, attribute, group.

    "a/b" counts as both; "unknown" is a group of its own.
    """
    rows = [(person.persona_id, attribute, group.strip()) for person in personas.itertuples()
            for attribute, said in json.loads(person.demographics or "{}").items()
            for group in str(said).split("/")]
    return pd.DataFrame(rows, columns=["persona_id", "attribute", "group"])


def majorities(personas: pd.DataFrame) -> pd.DataFrame:
    """The paper's Table 8: groups to which more than half of an axis' people belong.

    Returns attribute, group, a column per axis, named "axis (n = people)", with the share of its people
    (fraction; NaN where there is no majority), and axes, in how many of them it is one. The most frequent
    first; rows without any majority are left out. The last row, "majorities", counts them by axis.
    Source: Appendix E.3, which empties cells under 50 %; of five people a majority is three.
    """
    members = personas[["persona_id", "axes"]].explode("axes")
    sizes = members["axes"].value_counts(sort=False)
    counts = members.merge(traits(personas)).groupby(["attribute", "group", "axes"]).size().unstack(fill_value=0)
    shares = (counts.reindex(columns=sizes.index, fill_value=0) / sizes).rename(
        columns={axis: f"{axis} (n = {n})" for axis, n in sizes.items()})
    shares = shares.where(shares > 0.5).dropna(how="all")
    total = pd.Series(shares.notna().sum(), dtype=float, name=("majorities", ""))
    found = shares.assign(axes=shares.notna().sum(axis=1)).sort_index()
    found = found.sort_values("axes", ascending=False, kind="stable")
    found.loc[("majorities", ""), :] = [*total, total.sum()]
    return found.astype({"axes": int}).reset_index().rename_axis(columns=None)


def normalised(text: str) -> str:
    """Lower-cased words: questions that differ in nothing else are the same."""
    return " ".join(re.findall(r"\w+", text.casefold()))


def _sources(personas: pd.DataFrame) -> list[tuple[dict, dict]]:
    """For every person and then every axis: the columns of its questions, the slots of its prompt."""
    members = personas.explode(["axes", "categories"])
    axes = ", ".join(dict.fromkeys(members["axes"]))
    sources = [({"kind": "personal", "axis": "personal", "persona_id": p.persona_id},
                {"NAME": p.name, "AXES": axes}) for p in personas.itertuples()]
    for axis, on in members.groupby("axes", sort=False):
        where = ", ".join(f"{p.name} ({p.categories})" for p in on.itertuples())
        sources.append(({"kind": "divergent", "axis": axis, "persona_id": ""},
                        {"AXIS": axis, "NAMES": ", ".join(on["name"]), "PERSON_CATEGORIES": where}))
    return sources


def _ask(teacher: "Teacher", asked: list[str], parse: Callable[["Answer"], object], schema, tag: str) -> list:
    """parse(answer) for each prompt; where that is None, the prompt is asked again with another seed."""
    results: list = [None] * len(asked)
    for ask in range(MAX_ASKS):
        open_ = [i for i, result in enumerate(results) if result is None]
        if not open_:
            break
        answers = teacher.map([_user(asked[i], schema, tag, ask) for i in open_], tag)
        for i, answer in zip(open_, answers, strict=True):
            results[i] = parse(answer)
    if None in results:
        raise PeopleError(f"{tag}: asked {MAX_ASKS} times, and still not in the form asked for: "
                          f"{answers[-1].text[:300]!r}. Try another teacher.model, or mend the prompt")
    return results


def _user(prompt: str, schema, tag: str, seed: int) -> "Request":
    from helpers.llm import Request  # slow to import, by way of openai

    return Request([{"role": "user", "content": prompt}], schema, tag, seed)


def _parse_people(answer: "Answer") -> list[tuple[str, str, str]] | None:
    """(category, name, description) of each line "- …"; None if there is none or one is malformed."""
    lines = [line.strip() for line in answer.text.splitlines() if line.strip().startswith("-")]
    found = [PERSON_LINE.fullmatch(line) for line in lines]
    return [match.groups() for match in found] if found and all(found) else None
