"""What a base model of the little world knows and does: names, formats, and how far a prefix moves it untrained.

    python -m helpers.world.probes --world little --model data/models/base

Writes probes.json beside the model. A world asks for these numbers before anything is built on a new base.
"""

import argparse
import json
from pathlib import Path
from random import Random

import numpy as np

from helpers import models, prompts, responses, sampling, scoring
from helpers.config import load_profile
from helpers.world.corpus import Corpus, Knobs
from helpers.world.facts import World, load_world


def name_knowledge(world: World, model, tokenizer) -> dict[str, float]:
    """Share of memberships whose label the model ranks first for the name (chance: one over the axis), by region."""
    rows = [(p.demographics["region"], p.name, c, [o for o in world.axes[c.axis].categories.values() if o != c])
            for p in world.people.values() for c in (world.axes[a].categories[n] for a, n in p.memberships)]
    flat = [(name, c.label, o.label) for _, name, c, others in rows for o in others]
    scored = scoring.score_pairs(model, tokenizer, [("", name) for name, _, _ in flat],
                                 [label + "." for _, label, _ in flat], [label + "." for _, _, label in flat])
    first = np.array([part.all() for part in np.split(scored["correct"].to_numpy(), np.cumsum([len(r[3]) for r in rows])[:-1])])
    regions = np.array([row[0] for row in rows])
    return {"all": round(first.mean(), 3)} | {r: round(first[regions == r].mean(), 3) for r in sorted(set(regions))}


def format_and_category(world: World, model, tokenizer, n: int, seed: int) -> dict[str, float]:
    """Share of chains of thought that parse, and of given-category answers whose commonest category is the given one."""
    rng, settings = Random(seed), {"temperature": 1.0, "top_p": 1.0, "max_new_tokens": 64, "batch": 128, "seed": seed}
    hobby_questions = [q for p in world.people.values() for q in world.personal_questions(p)]
    asked = [prompts.render("short", "cot", X=q) for q in rng.sample(hobby_questions, n)]
    thoughts = [t for (t,) in sampling.generate(model, tokenizer, asked, n=1, **settings)]
    given = rng.choices(world.categories, k=n)
    heads = [prompts.render("short", "cot_given", X=rng.choice(world.divergent_questions(c.axis)), AXIS=c.axis,
                            CATEGORIES=", ".join(world.axes[c.axis].categories), CATEGORY=c.name) for c in given]
    answers = [world.spot(a).categories for (a,) in sampling.generate(model, tokenizer, heads, n=1, **settings)]
    kept = [bool(a) and a.most_common(1)[0][0] == (c.axis, c.name) for a, c in zip(answers, given, strict=True)]
    return {"cot_parses": round(np.mean([responses.parse_cot(t) is not None for t in thoughts]), 3),
            "keeps_category": round(np.mean(kept), 3)}


def prefix_effect(world: World, model, tokenizer, n: int, seed: int) -> dict[str, float]:
    """Accuracy on (own category, other category) answers without prefix, with it, and with it and the cue."""
    corpus, rng = Corpus(world, seed, Knobs(wrong_slot=0.0, common_slot=0.0)), Random(seed)
    cases = []
    for person in rng.choices(list(world.people.values()), k=n):
        axis, category = rng.choice(person.memberships)
        other = rng.choice([c for c in world.axes[axis].categories if c != category])
        texts = {"gold": world.describe(rng, person.name, person.memberships, person.hobbies[0]), "name": person.name}
        question, tone = rng.choice(world.divergent_questions(axis)), rng.choice(list(world.tones))
        cases.append((texts, question, *(_toned(corpus, world, axis, c, tone) for c in (category, other))))
    heads = {"none": [prompts.render("short", "respond_none", X=q) for _, q, _, _ in cases]}
    for prefix, template in (("gold", "respond_persona"), ("name", "respond_name")):
        heads[prefix] = [prompts.render("short", template, PREFIX=t[prefix], X=q) for t, q, _, _ in cases]
        heads[f"{prefix}, cued"] = [h.removesuffix("Answer:") + "In character:" for h in heads[prefix]]
    chosen, rejected = [c[2] for c in cases], [c[3] for c in cases]
    return {key: round(scoring.score_pairs(model, tokenizer, [("", h) for h in texts], chosen, rejected)["correct"].mean(), 3)
            for key, texts in heads.items()}


def _toned(corpus: Corpus, world: World, axis: str, category: str, tone: str) -> str:
    """An answer for a category whose tone is given, so that a pair differs in nothing else."""
    facts, manner = world.axes[axis].categories[category], world.tones[tone]
    first, second = corpus.rng.sample(facts.things, 2)
    return f"{manner.openers[0]} {first} and {second}, because {corpus.rng.choice(facts.reasons)}. {manner.closers[0]}."


def probe(world_name: str, path: Path, n: int = 300, seed: int = 5) -> dict[str, dict[str, float]]:
    """All probes of the model at `path`; written to probes.json there."""
    world = load_world(world_name)
    model, tokenizer = models.load_policy(load_profile("laptop").policy.model_copy(update={"path": str(path)}))
    found = {"label_first_for_name": name_knowledge(world, model, tokenizer),
             "sampling": format_and_category(world, model, tokenizer, n, seed),
             "own_above_other_answer": prefix_effect(world, model, tokenizer, n, seed)}
    (path / "probes.json").write_text(json.dumps(found, indent=1))
    return found


def main():
    """Probe a base from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--world", default="little")
    parser.add_argument("--model", type=Path, required=True)
    a = parser.parse_args()
    print(json.dumps(probe(a.world, a.model), indent=1))


if __name__ == "__main__":
    main()
