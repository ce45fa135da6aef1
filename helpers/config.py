"""Profiles: load, check and override the sizes and names of a run; every unknown key is an error.

A profile changes sizes and names, never the code path. data/profiles/laptop.yaml lists and explains every
key; the other profiles say `base: laptop` and only what differs from it.
"""

from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model, model_validator

from helpers import DATA, ROOT
from helpers.schemas import MOST_SHOTS

TEACHER_FREE = ("none", "tag", "few_shot")  # prefixes that need nobody who knows the person
DESCRIBED = ("persona_gold", "name")  # and those that need a description of the person: data.people
FILES = {"data.preferences": "JSONL, JSON, CSV or Parquet (user, prompt, chosen, rejected; AlignX; PRISM)",
         "data.people": "a CSV (user, name, description, groups), or the file of data.preferences itself"}
Prefix = Literal["none", "tag", "few_shot", "persona", "persona_gpt4", "persona_gold", "name"]
Count, Whole = Annotated[int, Field(ge=1)], Annotated[int, Field(ge=0)]
Positive, NonNegative = Annotated[float, Field(gt=0)], Annotated[float, Field(ge=0)]
Commit = Annotated[str, Field(pattern=r"^([0-9a-f]{40})?$")]  # of a hub repository, or ""
Share, AboveZero = Annotated[float, Field(ge=0, le=1)], Annotated[float, Field(gt=0, le=1)]


class ConfigError(ValueError):
    """A profile that cannot be used: says which key, what was found and what was expected."""


def load_profile(name_or_path: str | Path, sets: Sequence[str] = ()) -> "Profile":
    """The profile of that name in data/profiles, or in that YAML file, with `key=value` overrides on top.

    sets: for example ["training.epochs=1", "people.axes=[diet, music]"]; values are YAML.
    Raises ConfigError for an unknown profile, an unknown key (naming the closest) or a value out of range.
    """
    path = _find(name_or_path)
    values = {"name": path.stem} | _read(path) | dict(_parse_set(text) for text in sets)
    unknown = [f"{path.name}: unknown key {k}; did you mean {_closest(k)}?" for k in values if k not in KEYS]
    if unknown:
        raise ConfigError("\n".join(unknown))
    if values.get("data.preferences"):
        values |= _for_imported_pairs(values)
    try:
        return Profile.model_validate(_nest(values))
    except ValidationError as error:
        raise ConfigError("\n".join(f"{path.name}: {_explain(e)}" for e in error.errors())) from None


class Section(BaseModel):
    """A group of settings: immutable, nothing unknown, and no defaults (laptop.yaml alone has the values)."""

    model_config = ConfigDict(extra="forbid", frozen=True)


def _section(title: str, /, **kinds: Any) -> type[Section]:
    fields = {key: (kind, ...) for key, kind in kinds.items()}
    return create_model(title, __base__=Section, __module__=__name__, **fields)


Data = _section("Data", preferences=str, people=str, users=Whole, min_pairs=Count)
People = _section("People", axes=tuple[str, ...], per_axis=Count, small=tuple[str, ...])
Questions = _section("Questions", personal=Count, divergent=Count, batch=Count)
Responses = _section(
    "Responses", n_cot=Count, per_cot=Count, span=Count, k=Literal[4], min_chars=Whole, temperature=Positive,
    top_p=AboveZero, max_new_tokens=Count, batch=Count, base_url=str)
Teacher = _section(
    "Teacher", base_url=str, model=str, api_key_env=str, concurrency=Count, max_retries=Whole,
    temperature=NonNegative, budget_usd=NonNegative, cache=str, requests_per_minute=Whole,
    tokens_per_minute=Whole, timeout_seconds=Positive, structured=Literal["schema", "prompt"], batch_api=bool)
WorldKnobs = _section(
    "WorldKnobs", noise=NonNegative, position_bias=float, length_bias=float, tie_below=NonNegative,
    malformed=Share, rate_limited=Share, late_seconds=NonNegative, errors_500=Share, stalled=Share,
    refused=Share, cut=Share, wrong_schema=Share)
Judge = _section(
    "Judge", pairs_per_request=Count, rejected=Literal["random", "finalist"], max_asks=Count,
    shuffle_labels=bool)
Prefixes = _section(
    "Prefixes", names=tuple[Prefix, ...], few_shot_shots=Count, persona_shots=Count,
    shot_counts=tuple[Annotated[int, Field(ge=1, le=MOST_SHOTS)], ...], retrieval=tuple[Literal["tfidf", "embedding"], ...],
    side=Literal["left", "right"])
Policy = _section(
    "Policy", path=str, templates=Literal["short", "full"], max_length=Count, max_prompt=Whole,
    dtype=Literal["auto", "float32", "bfloat16"], load_in_4bit=bool, revision=Commit, chat=bool)
Reward, Embedder = _section("Reward", path=str, revision=Commit), _section("Embedder", path=str, revision=Commit)
Training = _section(
    "Training", lora_r=Count, lora_alpha=Count, lora_dropout=Share, beta=Positive, learning_rate=Positive,
    learning_rate_grid=tuple[Positive, ...], epochs=Count, batch_size=Count, warmup=Share,
    folds=Annotated[int, Field(ge=2)], seeds=Annotated[tuple[Whole, ...], Field(min_length=1)],
    pairs_per_person=Whole, validation=Annotated[float, Field(ge=0, lt=1)], drop_uncontested=bool,
    loser_ablation=bool, label_noise=tuple[Share, ...], workers=Count, checkpoint_steps=Whole,
    executor=Literal["loky", "ray", "sequential"], report_to=Literal["none", "tensorboard", "trackio"])
Personal = _section(
    "Personal", seeds=Annotated[tuple[Whole, ...], Field(min_length=1)], shares=tuple[AboveZero, ...],
    epochs=Count, batch_size=Count, learning_rate=Positive)
Schemes = _section(
    "Schemes", names=tuple[Literal["small", "leave_axis_out"], ...], small_epochs=Count,
    axis_folds=Whole, axis_pairs_per_person=Whole, prefixes=tuple[str, ...])
Vpl = _section(
    "Vpl", shots=tuple[Count, ...], hidden=Count, latent=Count, kl_weight=NonNegative, kl_warmup=Share,
    learning_rate=Positive, as_released=bool)
Generation = _section(
    "Generation", prefixes=tuple[Prefix, ...], rivals=tuple[Prefix, ...], people=Whole,
    temperature=NonNegative, max_new_tokens=Count, shown=Whole)
Tax = _section(
    "Tax", tasks=tuple[str, ...], prefixes=tuple[Prefix, ...], people=Count, limit=Whole)
Alignx = _section(
    "Alignx", folds=Count, raw_folds=Count, most=Count, counts=tuple[Whole, ...], ridge=Positive, dial=tuple[NonNegative, ...],
    people=Whole)
Stats = _section("Stats", n_boot=Count, confidence=Annotated[float, Field(gt=0.5, lt=1)], min_people=Count)
SECTIONS = {
    "data": Data, "people": People, "questions": Questions, "responses": Responses, "teacher": Teacher,
    "world_knobs": WorldKnobs, "judge": Judge, "prefixes": Prefixes, "policy": Policy, "reward": Reward,
    "embedder": Embedder, "training": Training, "personal": Personal, "schemes": Schemes, "vpl": Vpl,
    "generation": Generation, "tax": Tax, "alignx": Alignx, "stats": Stats}
KEYS = sorted(f"{name}.{key}" for name, section in SECTIONS.items() for key in section.model_fields)
KEYS += ["name", "seed", "simulated", "world"]


class Profile(_section("Everything", name=str, simulated=bool, seed=Whole, world=str, **SECTIONS)):
    """All settings of one run, nested: profile.training.beta."""

    def dump(self) -> dict[str, Any]:
        """Plain dicts, lists and scalars, as in a run's profile.yaml."""
        return self.model_dump(mode="json")

    @model_validator(mode="after")
    def _sizes_fit(self) -> "Profile":
        r, sampled = self.responses, self.responses.n_cot * self.responses.per_cot
        if not r.k <= r.span <= sampled:
            raise ValueError(f"responses.span is {r.span}; expected {r.k} (k) to {sampled} (n_cot x per_cot)")
        if len(set(self.prefixes.names)) < len(self.prefixes.names):
            raise ValueError(f"prefixes.names repeats a name: {', '.join(self.prefixes.names)}")
        return self


def _find(name_or_path: str | Path) -> Path:
    known = {path.stem: path for path in sorted((DATA / "profiles").glob("*.yaml"))}
    path = known.get(str(name_or_path), Path(name_or_path))
    if path.suffix != ".yaml" or not path.is_file():
        raise ConfigError(f"no profile {name_or_path}; expected {', '.join(known)} or a path to a .yaml file")
    return path


def _read(path: Path, above: tuple[Path, ...] = ()) -> dict[str, Any]:
    """The file's values by dotted key, on top of those of the profile that it names as `base`."""
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: no YAML: {error}; mend that line, or see data/profiles/laptop.yaml") from None
    if not isinstance(tree, Mapping):
        raise ConfigError(f"{path}: found a {type(tree).__name__}, expected keys and values; see data/profiles/laptop.yaml")
    values = flatten(tree)
    base = values.pop("base", None)
    if base and _find(base) in (path, *above):
        raise ConfigError(f"{path}: base: {base} leads back to itself; write `base: laptop`")
    return (_read(_find(base), (path, *above)) if base else {}) | values


def flatten(tree: Mapping[str, Any]) -> dict[str, Any]:
    """{"a": {"b": 1}} as {"a.b": 1}: every setting by its dotted key."""
    values: dict[str, Any] = {}
    for key, value in tree.items():
        inner = flatten(value) if isinstance(value, Mapping) else None
        values |= {key: value} if inner is None else {f"{key}.{leaf}": v for leaf, v in inner.items()}
    return values


def _nest(values: Mapping[str, Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for key, value in values.items():
        section, _, leaf = key.rpartition(".")
        (tree.setdefault(section, {}) if section else tree)[leaf] = value
    return tree


def _parse_set(text: str) -> tuple[str, Any]:
    key, equals, value = text.partition("=")
    if not equals:
        raise ConfigError(f"--set {text}: expected key=value, for example training.epochs=1")
    try:
        return key.strip(), yaml.safe_load(value) if value else ""
    except yaml.YAMLError as error:
        raise ConfigError(f"--set {text}: the value is no YAML: {str(error).splitlines()[0]}; quote it") from None


def _for_imported_pairs(values: Mapping[str, Any]) -> dict[str, Any]:
    """Pairs that nobody here wrote: no simulated world, and no teacher who knows the people.

    Answers are rarely anybody else's: drop_uncontested, made for a few categories that recur, would drop most pairs.
    """
    files = {key: values[key] for key in ("data.preferences", "data.people") if values.get(key)}
    for key, text in files.items():
        given = Path(text).expanduser()
        found = [path.resolve() for path in (given, ROOT / given) if path.is_file()]
        if not found:
            raise ConfigError(f"{key}: no {given}; expected {FILES[key]}")
        files[key] = str(found[0])
    known = TEACHER_FREE + DESCRIBED * ("data.people" in files)
    free = [name for name in values.get("prefixes.names", ()) if name in known]
    return files | {"prefixes.names": free, "simulated": False, "training.drop_uncontested": False}


def _closest(key: str) -> str:
    same_leaf = [known for known in KEYS if known.split(".")[-1] == key.split(".")[-1]]
    return (same_leaf or get_close_matches(key, KEYS, n=1, cutoff=0))[0]


def _explain(error: Mapping[str, Any]) -> str:
    where = ".".join(str(part) for part in error["loc"])
    if error["type"] == "missing":
        return f"{where} is missing; put `base: laptop` in the profile, or see data/profiles/laptop.yaml"
    message = error["msg"].removeprefix("Value error, ")
    return f"{where} is {error['input']!r}: {message}" if where else message
