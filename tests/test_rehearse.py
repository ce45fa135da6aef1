"""What a rehearsal refuses, and how."""

import pandas as pd
import pytest

from helpers import rehearse
from helpers.config import load_profile

WHOLE = {"seconds": 60.0, "disk_mb": 1.0, "tokens": 1e6, "cost_usd": 2.0, "memory_mb": 1.0, "gpu_mb": 0.0}


def problems(sets, **more):
    table = pd.DataFrame([{"stage": "all"} | WHOLE | more])
    return rehearse.check(load_profile("smoke", sets), table)


def test_a_run_that_fits_has_no_problem():
    assert problems(["teacher.budget_usd=5"]) == []


@pytest.mark.parametrize(("sets", "more", "complaint"), [
    (["teacher.budget_usd=1"], {}, "money: $2.00 projected, teacher.budget_usd is 1: raise it"),
    ([], {"cost_usd": float("nan")}, "price: none of simulated-teacher"),
    (["teacher.budget_usd=5"], {"disk_mb": 1e12}, "disk: "),
    (["teacher.budget_usd=5"], {"memory_mb": 1e12}, "memory: "),
    (["teacher.budget_usd=5"], {"seconds": 1e9}, "time: 11,574 days on this machine"),
    (["teacher.budget_usd=5", "policy.path=data/models/none"], {}, "policy.path data/models/none: FileNotFoundError"),
])
def test_what_does_not_fit_is_named_with_its_remedy(sets, more, complaint):
    found = problems(sets, **more)
    assert len(found) == 1
    assert found[0].startswith(complaint)


def test_a_missing_key_and_a_vanished_endpoint_are_said_without_the_key(monkeypatch):
    sets = ["teacher.base_url=http://127.0.0.1:9/v1", "teacher.budget_usd=5"]
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    assert "no key in the environment variable OPENAI_API_KEY" in problems(sets)[0]
    monkeypatch.setenv("OPENAI_API_KEY", "sk-planted")
    assert "APIConnectionError" in problems(sets)[0]
    assert "sk-planted" not in problems(sets)[0]


def test_a_policy_of_unknown_shape_is_said_before_anything_is_measured(capsys):
    assert rehearse.main(["smoke", "--set", "policy.path=nobody/nothing-7b"]) == 1
    assert "WILL NOT FIT: policy.path nobody/nothing-7b is not at hand and data/shapes.yaml has no nothing-7b" in \
        capsys.readouterr().out


def test_an_unknown_profile_is_a_matter_of_usage():
    assert rehearse.main(["nothing"]) == 2
