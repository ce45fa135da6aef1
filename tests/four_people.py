"""Four people of the little world with ten questions on food each, and what there is to read about them."""

from pathlib import Path
from types import SimpleNamespace

import httpx2
import pandas as pd

from helpers import bridges, llm, reading
from helpers.config import load_profile
from helpers.schemas import TABLES
from helpers.world import teacher as simulated
from helpers.world.corpus import Corpus, Knobs
from helpers.world.facts import load_world

CFG = load_profile("smoke")
PEOPLE = {"p01": "Mara Venn", "p02": "Ilse Corran", "p03": "Doran Pell", "p04": "Wenna Thrale"}
OWN = {"p01": "vegan", "p02": "grill", "p03": "sweets", "p04": "modest"}
TRUTH = {"p01": ("nurturance", 1), "p02": ("nurturance", 0), "p03": ("food", 1), "p04": ("food", 0)}
KEY = ("stratified", 0)


def make_four(folder: Path) -> SimpleNamespace:
    """world, personas, preferences, teacher, evidence, and told: the bridges' table, its head trained on three of them."""
    four = SimpleNamespace(world=load_world("little"))
    four.preferences = _preferences(four.world)
    rows = [(p, name, "", ["diet"], [OWN[p]], four.world.people[name].about, "{}") for p, name in PEOPLE.items()]
    four.personas = pd.DataFrame(rows, columns=list(TABLES["personas"].columns))
    app = simulated.build_app(four.world, CFG.world_knobs, 1)
    four.teacher = llm.Teacher(CFG.teacher, "http://teacher.invalid/x/v1", "no key", folder / "c.sqlite", "r",
                               httpx2.ASGITransport(app=app))
    four.evidence = reading.gather(four.teacher, four.personas, four.preferences, CFG)
    four.told = bridges.table(four.evidence, four.teacher, [0, 1, 4, 99], {KEY: ["p01", "p02", "p03"]}, CFG)
    return four


def _preferences(world) -> pd.DataFrame:
    """Six of the ten are train: the own category, said clearly, against the next person's."""
    corpus, rows = Corpus(world, 3, Knobs(wrong_slot=0, common_slot=0)), []
    for i, person in enumerate(OWN):
        other = OWN[list(OWN)[(i + 1) % 4]]
        for q, question in enumerate(world.divergent_questions("diet")[:10]):
            rows.append((f"{person}:q{q}", person, f"q{q}", "divergent", "diet", "train" if q < 6 else "test", question,
                         corpus.answer("diet", OWN[person]), corpus.answer("diet", other), f"q{q}-{person}", f"q{q}-r"))
    return pd.DataFrame(rows, columns=list(TABLES["preferences"].columns))
