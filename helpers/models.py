"""Loading policy, reward model and embedder from a folder or the hub."""

import copy
import importlib.util
import json
import os
import shutil
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import psutil
import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging

from helpers import ROOT, chat, kept, memory
from helpers.fingerprint import digest

if TYPE_CHECKING:  # three seconds that most notebooks and workers do not need: imported where they are used
    from peft import PeftModel

MERGED = ROOT / "data/runs/models"  # policies that are an adapter on a base, merged
WANTED = ("*.json", "*.safetensors", "*.model", "*.txt", "*.jinja")  # of a hub repository: no pickles, no code
SAFE = {"trust_remote_code": False, "use_safetensors": True}
logging.disable_progress_bar()  # a small model is loaded a hundred times in a run


def load_policy(policy, adapter: str | Path = "") -> tuple[torch.nn.Module, PreTrainedTokenizerBase]:
    """The policy of a profile in evaluation mode, with its tokenizer; adapter: a folder that training wrote.

    policy: path and revision (see `resolve`), of a model or of an adapter, which is merged into its base first
    (`policy_folder`); dtype ("auto", "float32", "bfloat16"); load_in_4bit: NF4 with double quantisation, products in
    bfloat16; chat: whether the tokenizer's chat template is used. Attention is torch's "sdpa" throughout: rows of
    several answers need a mask of their own (helpers.dpo), which flash attention does not take.
    """
    path, device = policy_folder(policy.path, policy.revision), _device()
    memory.keep_freed()
    options = SAFE | {"attn_implementation": "sdpa", "dtype": _weights_dtype(policy.dtype, device)}
    if policy.load_in_4bit:
        options["quantization_config"] = _four_bit()
    elif device == "cuda":
        options["device_map"] = {"": int(os.environ.get("LOCAL_RANK", "0"))}  # 0, or as accelerate launch says
    model = AutoModelForCausalLM.from_pretrained(path, **options)
    if policy.load_in_4bit and device == "cpu":
        _keep_gradients_right(model)
    tokenizer = load_tokenizer(path, chat=policy.chat)
    if not adapter:
        return model.eval(), tokenizer
    from peft import PeftModel

    with peft_quiet():
        return PeftModel.from_pretrained(model, str(adapter)).eval(), tokenizer


@lru_cache(maxsize=1)
def base(policy) -> tuple[torch.nn.Module, PreTrainedTokenizerBase]:
    """`load_policy`, once in the life of a process: all that a worker does in turn shares one model, adapters come and go.

    Whoever leaves half an adapter on it calls base.cache_clear().
    """
    return load_policy(policy)


def describe(model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase) -> str:
    """What was loaded, in a line: kind, size, precision, attention, chat template, device."""
    four = getattr(model, "is_loaded_in_4bit", False)
    kind = "NF4, double quantisation" if four else str(next(model.parameters()).dtype).removeprefix("torch.")
    shape = "its chat template" if tokenizer.chat_template else "no chat template"
    return (f"{type(model).__name__}, {model.num_parameters() / 1e6:,.1f} million parameters in {kind}, "
            f"{model.config._attn_implementation} attention, {shape}, on {model.device.type}")


def policy_folder(path: str | Path, revision: str = "") -> Path:
    """The folder of a model; of an adapter, such as zephyr-7b-sft-qlora, that of base and adapter in one.

    An adapter is merged once, in bfloat16, and kept in data/runs/models: merging into 4-bit weights would round
    a second time, and a new adapter on top of an old one would have trl switch off both for the reference.
    """
    folder = Path(resolve(path, revision))
    config = folder / "adapter_config.json"
    if not config.exists() or (folder / "config.json").exists():
        return folder
    target = MERGED / f"{Path(path).name}-{revision[:8] or digest(folder)[:8]}"
    if not target.exists():
        about = json.loads(config.read_text())
        base = policy_folder(about["base_model_name_or_path"], about.get("revision") or "")
        _merge(base, folder, target)
    return target


def load_adapters(policy, adapters: Mapping[str, str | Path]) -> tuple["PeftModel", PreTrainedTokenizerBase]:
    """The policy with several adapters (name -> folder) on one base, and its tokenizer; the first is active.

    `model.set_adapter(name)` switches; a batch is mixed by `model(..., adapter_names=[...])`, a name for each
    row, "__base__" for none.
    """
    model, tokenizer = load_policy(policy)
    return _with_adapters(model, adapters), tokenizer


def _with_adapters(base: torch.nn.Module, adapters: Mapping[str, str | Path]) -> "PeftModel":
    from peft import PeftModel

    (first, folder), *others = adapters.items()
    with peft_quiet():
        model = PeftModel.from_pretrained(base, str(folder), adapter_name=first)
        for name, folder in others:
            model.load_adapter(str(folder), name)
    return model.eval()


@contextmanager
def peft_quiet() -> Iterator[None]:
    """Loading an adapter, peft 0.21 asks transformers 5.23 by a name that is deprecated there; say nothing."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".is_gradient_checkpointing. is deprecated", FutureWarning)
        yield


@contextmanager
def adapted(base: torch.nn.Module,
            adapter: str | Path | Mapping[str, str | Path] = "") -> Iterator[torch.nn.Module]:
    """The base with an adapter on it, or several (name -> folder), or bare if there is none; afterwards as before.

    One loaded base serves all adapters of a run, one after the other.
    """
    if not adapter:
        yield base
        return
    model = _with_adapters(base, adapter if isinstance(adapter, Mapping) else {"default": adapter})
    try:
        yield model
    finally:
        model.unload()


def merged_copy(model: torch.nn.Module) -> torch.nn.Module:
    """A copy in evaluation mode, its adapter (if it has one) merged into the weights: for small models on a CPU.

    There the two thin products of an adapter take as long as the product that they correct.
    """
    light = copy.deepcopy(model)
    return (light.merge_and_unload() if hasattr(light, "merge_and_unload") else light).eval()


@contextmanager
def merged(model: torch.nn.Module, wanted: bool = True) -> Iterator[None]:
    """For the while, an adapter is part of the weights it adapts: a pass costs no more than the base's.

    Where weights are float32, that is; in others a small adapter would be rounded away. Afterwards the weights
    are what they were, bit for bit.
    """
    if not wanted or not hasattr(model, "peft_config"):  # peft takes long to import
        yield
        return
    from peft.tuners.lora import Linear, LoraLayer

    layers = [layer for layer in model.modules() if isinstance(layer, LoraLayer)]
    if not all(type(layer) is Linear and layer.get_base_layer().weight.dtype == torch.float32
               and not layer.disable_adapters and not layer.merged for layer in layers):
        layers = []
    weights = [layer.get_base_layer().weight for layer in layers]
    before = [weight.data for weight in weights]
    try:
        with torch.inference_mode(False), torch.no_grad():  # else they could not be trained on again
            for layer, weight in zip(layers, weights, strict=True):
                weight.data = weight.data.clone()
                layer.merge()
        yield
    finally:
        for layer, weight, data in zip(layers, weights, before, strict=True):
            weight.data = data
            layer.merged_adapters.clear()


@contextmanager
def mixed(model: torch.nn.Module, names: Sequence[str] | None) -> Iterator[None]:
    """For the while, the i-th row of a batch goes through the adapter names[i], "__base__": none; None: as it is.

    What peft does for `model(..., adapter_names=names)`, for passes that do not start at its own forward.
    """
    def named(layer, args, kwargs):
        return args, kwargs | {"adapter_names": names}

    if not names:
        yield
        return
    from peft.tuners.lora import LoraLayer

    layers = [layer for layer in model.modules() if isinstance(layer, LoraLayer)]
    hooks = [layer.register_forward_pre_hook(named, with_kwargs=True) for layer in layers]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def one_thread() -> Iterator[None]:
    """So that a result does not depend on where it is computed."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@cache
def resolve(path: str | Path, revision: str = "") -> str:
    """A local folder: the one at path, relative to the repository or absolute, or what the hub has by that name.

    revision: a commit of the hub's repository; "": whatever its main branch is. No pickles and no code are fetched.
    Raises FileNotFoundError for what is neither, or cannot be had.
    """
    local = ROOT / Path(path).expanduser()
    if local.is_dir():
        return str(local)
    if str(path).count("/") != 1 or str(path).startswith((".", "/", "data/")):
        raise FileNotFoundError(f"no model at {path}; expected a folder (relative to {ROOT}) or a hub name, "
                                "owner/model. The shipped models lie in data/models; data/README.md says how to "
                                "make them.")
    try:
        return snapshot_download(str(path), revision=revision or None, allow_patterns=list(WANTED))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError) as error:
        at = f" at revision {revision}" if revision else ""
        why = str(error).strip().splitlines()[0]
        raise FileNotFoundError(f"cannot get {path}{at}: {why} Expected it on the hub, or in its cache where "
                                "HF_HUB_OFFLINE=1. A gated model needs a licence accepted there and HF_TOKEN; "
                                "or name a folder instead.") from error


def bf16_available(device: str = "") -> bool:
    """Whether the device computes in bfloat16: elsewhere it is emulated, and slower than float32."""
    if (device or _device()) == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return any(torch.cpu.get_capabilities().get(name) for name in ("avx512_bf16", "amx_bf16", "sve_bf16"))


def autocast(model: torch.nn.Module, dtype: str = "auto") -> AbstractContextManager:
    """Mixed precision for a pass through the model: bfloat16 where the device has it or dtype says so."""
    device = next(model.parameters()).device.type
    wanted = dtype == "bfloat16" or (dtype == "auto" and bf16_available(device))
    return torch.autocast(device, torch.bfloat16) if wanted else nullcontext()


def load_tokenizer(path: str | Path, revision: str = "", chat: bool = True) -> PreTrainedTokenizerBase:
    """The tokenizer of a policy or a reward model, which pads with its end token if it has none for it.

    chat: as policy.chat; False takes its chat template away.
    """
    tokenizer = AutoTokenizer.from_pretrained(policy_folder(path, revision), trust_remote_code=False)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.chat_template = _settled(tokenizer.chat_template) if chat else None
    return tokenizer


class Embedder:
    """A SentenceTransformer; a text's vector is computed once, and kept in a file if one is given."""

    def __init__(self, path: str | Path, revision: str = "", file: Path | None = None) -> None:
        self.name, self.file = f"{path}@{revision}", file
        from sentence_transformers import SentenceTransformer

        self.model = SentenceTransformer(resolve(path, revision), device=_device(), trust_remote_code=False,
                                         model_kwargs={"use_safetensors": True, "dtype": _weights_dtype("auto", _device())})

    def encode(self, texts: Sequence[str], normalize_embeddings: bool = True) -> np.ndarray:
        """Vectors of the texts, float32 [n, d]; of length 1 if normalised."""
        def compute(part: list[str]) -> np.ndarray:
            found = self.model.encode(part, show_progress_bar=False, convert_to_tensor=True).float().cpu().numpy()
            return found / np.linalg.norm(found, axis=1, keepdims=True) if normalize_embeddings else found

        return kept.vectors(list(texts), compute, 256, self.file, f"{self.name} {normalize_embeddings}", "embedding")


def load_embedder(path: str | Path, revision: str = "", file: Path | None = None) -> Embedder:
    """The sentence embedder; `.encode(texts, normalize_embeddings=True)` gives [n, d]. file: what is computed stays there."""
    return Embedder(path, revision, file)


class Reward:
    """A generic judge of answers: a sequence classifier with one output."""

    def __init__(self, path: str | Path, revision: str = "", file: Path | None = None) -> None:
        self.name, self.file, folder = f"{path}@{revision}", file, resolve(path, revision)
        self.tokenizer = load_tokenizer(folder)
        self.model = AutoModelForSequenceClassification.from_pretrained(
            folder, num_labels=1, dtype=_weights_dtype("auto", _device()), **SAFE).to(_device()).eval()

    def score(self, questions: Sequence[str], texts: Sequence[str], batch: int = 64) -> np.ndarray:
        """Reward of each answer to its question, float32 [n]; batches hold dialogues of like length."""
        dialogues = [self._dialogue(q, t) for q, t in zip(questions, texts, strict=True)]
        return kept.vectors(dialogues, self._rewards, batch, self.file, self.name, "rewards").reshape(-1)

    @torch.inference_mode()
    def _rewards(self, dialogues: list[str]) -> np.ndarray:
        rows = self.tokenizer(dialogues, add_special_tokens=False)["input_ids"]
        # the classifier reads the last token that is no padding: padding must be a token that no text ends with
        free = min(set(range(self.model.config.vocab_size)) - {row[-1] for row in rows})
        self.model.config.get_text_config().pad_token_id = free
        ids = torch.full((len(rows), max(map(len, rows))), free)
        mask = torch.zeros_like(ids)
        for i, row in enumerate(rows):
            ids[i, :len(row)], mask[i, :len(row)] = torch.tensor(row), 1
        logits = self.model(ids.to(self.model.device), attention_mask=mask.to(self.model.device)).logits
        return logits[:, 0].float().cpu().numpy()

    def _dialogue(self, question: str, text: str) -> str:
        if self.tokenizer.chat_template is None:
            return f"Question: {question}\nAnswer: {text}"
        turns = [{"role": "user", "content": question}, {"role": "assistant", "content": text}]
        return self.tokenizer.apply_chat_template(turns, tokenize=False, **chat.FIXED)


def load_reward(path: str | Path, revision: str = "", file: Path | None = None) -> Reward:
    """The reward model; `.score(questions, texts)` gives float32 [n]. file: what is computed stays there."""
    return Reward(path, revision, file)


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def _weights_dtype(dtype: str, device: str) -> torch.dtype:
    half = device == "cuda" and (dtype == "bfloat16" or (dtype == "auto" and bf16_available(device)))
    return torch.bfloat16 if half else torch.float32  # on a CPU `autocast` rounds what it multiplies


def _settled(template: str | dict | None) -> str | None:
    """A chat template that says the same tomorrow, whoever applies it (the harness of notebook 13 does too)."""
    template = template.get("default") if isinstance(template, dict) else template
    values = {True: "true", False: "false"}
    fixed = "".join(f"{{% set {name} = {values.get(value, repr(value))} %}}" for name, value in chat.FIXED.items())
    return fixed + template if template else None


def _merge(base: Path, adapter: Path, target: Path) -> None:
    """Write base and adapter as one model to target, which appears when it is whole."""
    for left in target.parent.glob(f".{target.name}.*"):  # by a merge that was killed: as large as the model
        if not psutil.pid_exists(int(left.suffix[1:])):
            shutil.rmtree(left)
    has_own = any((adapter / name).exists() for name in ("tokenizer.json", "tokenizer.model"))
    scratch = target.with_name(f".{target.name}.{os.getpid()}")
    from peft import PeftModel

    with peft_quiet():
        model = AutoModelForCausalLM.from_pretrained(str(base), dtype=torch.bfloat16, **SAFE)
        model = PeftModel.from_pretrained(model, str(adapter)).merge_and_unload(safe_merge=True)
    model.save_pretrained(scratch)
    AutoTokenizer.from_pretrained(str(adapter if has_own else base), trust_remote_code=False).save_pretrained(scratch)
    try:
        scratch.rename(target)
    except OSError:  # another process was first
        shutil.rmtree(scratch)


def _four_bit() -> BitsAndBytesConfig:
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ImportError("policy.load_in_4bit is true, and bitsandbytes is not installed: pip install 'bitsandbytes==0.50.2', "
                          "or compute in bfloat16 with --set policy.load_in_4bit=false")
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
                              bnb_4bit_compute_dtype=torch.bfloat16)


def _keep_gradients_right(model: torch.nn.Module) -> None:
    """On a CPU bitsandbytes 0.50 repacks weights at the first evaluation, and gradients are wrong after."""
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
