"""A simulated annotator who rates questions as Appendix A asks, from what is known in the little world.

Where a person's hobby or axis fits the question there is evidence for it, where it does not there is evidence
against it. The annotator finds a piece of evidence with a probability, lower for people of whom less is
documented, and rates 2 ("maybe") where none was found. It is a test of the sheet and no judge of a question.
"""

from random import Random

import pandas as pd

from helpers.world.facts import Person, World
from helpers.world.teacher import SimulatedTeacher


def rate(world: World, sheet: pd.DataFrame, knowledge: float, seed: int) -> pd.DataFrame:
    """The sheet (check_sheet.draw) with validity and verifiable filled in, "1" to "3".

    knowledge: probability of finding the evidence about a person who is fully documented. Validity and
    verifiable each need a piece of their own. Of a person whom the world does not know nothing is found.
    """
    teacher, rows = SimulatedTeacher(world, None, seed), sheet.to_dict("records")
    for row in rows:
        person = world.people.get(row["name"])
        found = knowledge * person.documented if person else 0.0
        for measure in ("validity", "verifiable"):
            lot = Random(f"{seed} {measure} {row['name']} {row['question']}").random()
            row[measure] = "2" if lot >= found else "1" if fits(teacher, person, row["question"]) else "3"
    return pd.DataFrame(rows, columns=sheet.columns)


def fits(teacher: SimulatedTeacher, person: Person, question: str) -> bool:
    """Whether the question is about an axis that the person stands on, or about one of their hobbies."""
    axis = teacher.axis_of.get(question)
    if axis is not None:
        return axis in dict(person.memberships)
    return teacher.hobby_of(question) in person.hobbies
