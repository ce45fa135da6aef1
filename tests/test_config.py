"""Profiles load, override and complain as promised."""

import pickle
import tomllib

import pytest
import yaml

from helpers import DATA, ROOT
from helpers.config import KEYS, ConfigError, flatten, load_profile

SHIPPED = sorted(path.stem for path in (DATA / "profiles").glob("*.yaml"))


def own_profile(folder, text):
    path = folder / "mine.yaml"
    path.write_text(text)
    return path


def test_the_four_profiles_are_there():
    assert SHIPPED == ["gpu", "laptop", "paper", "smoke"]


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_profile_loads_under_its_own_name(name):
    assert load_profile(name).name == name


def test_laptop_lists_every_key():
    text = yaml.safe_load((DATA / "profiles" / "laptop.yaml").read_text())
    assert set(flatten(text)) | {"name"} == set(KEYS)


def test_paper_profile_has_the_numbers_of_table_12_and_appendix_b():
    p = load_profile("paper")
    assert (p.training.learning_rate, p.training.batch_size, p.training.epochs) == (5e-5, 40, 2)
    assert p.training.beta == 0.01
    assert (p.responses.n_cot * p.responses.per_cot, p.responses.span, p.responses.k) == (50, 20, 4)
    assert (p.responses.temperature, p.responses.top_p) == (2.0, 0.8)
    assert len(p.people.axes) == 11


def test_smoke_differs_from_laptop_only_where_it_says_so():
    smoke, laptop = flatten(load_profile("smoke").dump()), flatten(load_profile("laptop").dump())
    named = set(flatten(yaml.safe_load((DATA / "profiles" / "smoke.yaml").read_text()))) - {"base"} | {"name"}
    assert {key for key in laptop if laptop[key] != smoke[key]} == named


@pytest.mark.parametrize(("text", "key", "value"), [
    ("training.epochs=3", "training.epochs", 3),
    ("training.learning_rate=4e-3", "training.learning_rate", 0.004),  # YAML reads 4e-3 as a string
    ("judge.shuffle_labels=true", "judge.shuffle_labels", True),
    ("people.axes=[diet, music]", "people.axes", ["diet", "music"]),
    ("teacher.cache=", "teacher.cache", ""),
    ("teacher.base_url=http://host:1/v1?a=b", "teacher.base_url", "http://host:1/v1?a=b"),
])
def test_set_values_are_yaml(text, key, value):
    assert flatten(load_profile("smoke", [text]).dump())[key] == value


@pytest.mark.parametrize(("text", "closest"), [
    ("training.epoch=1", "training.epochs"),
    ("judge.noise=0.2", "world_knobs.noise"),  # the right leaf in the wrong section
    ("sede=3", "seed"),
])
def test_unknown_key_names_the_closest(text, closest):
    with pytest.raises(ConfigError, match=f"unknown key {text.split('=')[0]}; did you mean {closest}"):
        load_profile("smoke", [text])


@pytest.mark.parametrize(("text", "complaint"), [
    ("training.folds=1", "training.folds is 1: .*greater than or equal to 2"),
    ("responses.top_p=1.5", "responses.top_p is 1.5"),
    ("judge.rejected=worst", "'random' or 'finalist'"),
    ("prefixes.names=[none, tga]", "prefixes.names.1 is 'tga'"),
    ("prefixes.names=[tag, tag]", "prefixes.names repeats"),
    ("responses.span=11", "responses.span is 11; expected 4 .k. to 10"),  # smoke samples 2 x 5
    ("responses.span=3", "responses.span is 3; expected 4"),
    ("training.epochs=many", "training.epochs is 'many'"),
    ("training.epochs", "expected key=value"),
])
def test_bad_value_is_named(text, complaint):
    with pytest.raises(ConfigError, match=complaint):
        load_profile("smoke", [text])


def test_unknown_profile_lists_the_known_ones():
    with pytest.raises(ConfigError, match="no profile labtop; expected gpu, laptop, paper, smoke"):
        load_profile("labtop")


def test_own_profile_builds_on_another(tmp_path):
    mine = load_profile(own_profile(tmp_path, "base: smoke\nseed: 3\n"))
    assert (mine.name, mine.seed, mine.training.epochs) == ("mine", 3, 1)


def test_own_profile_with_a_key_missing_says_which(tmp_path):
    with pytest.raises(ConfigError, match="mine.yaml: training is missing"):
        load_profile(own_profile(tmp_path, "seed: 3\n"))


def test_a_dumped_profile_loads_to_the_same(tmp_path):
    profile = load_profile("laptop", ["training.seeds=[0, 1]", "judge.pairs_per_request=4"])
    assert load_profile(own_profile(tmp_path, yaml.safe_dump(profile.dump()))) == profile


def test_profile_is_frozen_and_travels_to_worker_processes(profile):
    with pytest.raises(ValueError, match="frozen"):
        profile.training.epochs = 9
    assert pickle.loads(pickle.dumps(profile)) == profile


def test_own_pairs_leave_no_simulated_world_and_no_prefix_that_needs_a_teacher(tmp_path):
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text("{}\n")
    profile = load_profile("smoke", [f"data.preferences={pairs}"])
    assert (profile.simulated, profile.prefixes.names) == (False, ("none", "tag", "few_shot"))
    assert not profile.training.drop_uncontested  # made for answers that recur
    assert profile.data.preferences == str(pairs)
    with pytest.raises(ConfigError, match="data.preferences: no absent.jsonl; expected JSONL"):
        load_profile("smoke", ["data.preferences=absent.jsonl"])


def test_the_lock_pins_what_pyproject_asks_for_and_no_cuda_package():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    asked = project["dependencies"] + sum(project["optional-dependencies"].values(), [])
    lines = (ROOT / "requirements.lock").read_text().splitlines()
    pinned = {line for line in lines if not line.startswith("#")}
    assert set(asked) <= pinned
    assert [pin for pin in pinned if "nvidia" in pin or "cuda" in pin or "://" in pin] == []
