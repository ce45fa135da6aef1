"""Fixtures that several test files share: the smallest profile and an empty run folder."""

from types import SimpleNamespace

import pytest
from tiny import Policy, make_policy

from helpers import models
from helpers.artifacts import Store, open_run
from helpers.config import Profile, load_profile


@pytest.fixture(scope="session")
def profile() -> Profile:
    return load_profile("smoke")


@pytest.fixture
def store(tmp_path) -> Store:
    return open_run("smoke", "test", runs=tmp_path)


@pytest.fixture(scope="module")
def policy(tmp_path_factory) -> Policy:
    """A random tiny policy in a folder."""
    return make_policy(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def loaded(policy):
    """The same policy with its tokenizer, in memory."""
    return models.load_policy(policy)


@pytest.fixture(scope="session")
def four(tmp_path_factory) -> SimpleNamespace:
    """Four people, what they prefer, and all that is read out of it (see four_people.make_four)."""
    from four_people import make_four  # seconds that no other test needs

    return make_four(tmp_path_factory.mktemp("four"))
