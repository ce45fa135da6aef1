"""Fixtures that several test files share: the smallest profile and an empty run folder."""

import pytest

from helpers.artifacts import Store, open_run
from helpers.config import Profile, load_profile


@pytest.fixture(scope="session")
def profile() -> Profile:
    return load_profile("smoke")


@pytest.fixture
def store(tmp_path) -> Store:
    return open_run("smoke", "test", runs=tmp_path)
