"""Score tables and people in which every number is known."""

import json

import pandas as pd


def scored(words: str, rights: list[list[int]], **columns) -> pd.DataFrame:
    """Scores of "method prefix kind[ setting]": one list of right (1) and wrong (0) per person."""
    method, prefix, kind, setting = f"{words} main".split()[:4]
    rows = [
        {"persona_id": f"p{who}", "pair_id": f"p{who}-{kind}-{k}", "correct": bool(right)}
        for who, pairs in enumerate(rights)
        for k, right in enumerate(pairs)
    ]
    fixed = {"method": method, "prefix": prefix, "kind": kind, "setting": setting, "fold": 0, "seed": 0}
    return pd.DataFrame(rows).assign(**fixed, variant="main", trained=False).assign(**columns)


def people(n: int, **demographics) -> pd.DataFrame:
    """n people; each keyword gives one value per person."""
    rows = [json.dumps({key: values[i] for key, values in demographics.items()}) for i in range(n)]
    return pd.DataFrame({"persona_id": [f"p{i}" for i in range(n)], "demographics": rows})
