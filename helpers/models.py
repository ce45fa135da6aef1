"""Loading policy, reward model and embedder from a folder or the hub."""

import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path

import numpy as np
import torch
from peft import PeftModel
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.lora import LoraLayer
from sentence_transformers import SentenceTransformer
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging

from helpers import ROOT, memory

SAFE = {"trust_remote_code": False, "use_safetensors": True}
logging.disable_progress_bar()  # a small model is loaded a hundred times in a run


def load_policy(policy, adapter: str | Path = "") -> tuple[torch.nn.Module, PreTrainedTokenizerBase]:
    """The policy of a profile in evaluation mode, with its tokenizer; adapter: a folder that training wrote.

    policy: path (folder or hub name), dtype ("auto", "float32", "bfloat16"), load_in_4bit.
    """
    path, device = resolve(policy.path), _device()
    memory.keep_freed()
    options = SAFE | {"attn_implementation": "sdpa", "dtype": _weights_dtype(policy.dtype, device)}
    if policy.load_in_4bit:
        options["quantization_config"] = _four_bit()
    elif device == "cuda":
        options["device_map"] = {"": int(os.environ.get("LOCAL_RANK", "0"))}  # 0, or as accelerate launch says
    model = AutoModelForCausalLM.from_pretrained(path, **options)
    if policy.load_in_4bit and device == "cpu":
        _keep_gradients_right(model)
    tokenizer = load_tokenizer(path)
    with peft_quiet():
        return (PeftModel.from_pretrained(model, str(adapter)) if adapter else model).eval(), tokenizer


def load_adapters(policy, adapters: Mapping[str, str | Path]) -> tuple[PeftModel, PreTrainedTokenizerBase]:
    """The policy with several adapters (name -> folder) on one base, and its tokenizer; the first is active.

    `model.set_adapter(name)` switches; a batch is mixed by `model(..., adapter_names=[...])`, a name for each
    row, "__base__" for none.
    """
    model, tokenizer = load_policy(policy)
    return _with_adapters(model, adapters), tokenizer


def _with_adapters(base: torch.nn.Module, adapters: Mapping[str, str | Path]) -> PeftModel:
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


@contextmanager
def merged(model: torch.nn.Module, wanted: bool = True) -> Iterator[None]:
    """For the while, an adapter is part of the weights it adapts: a pass costs no more than the base's.

    Where weights are float32, that is; in others a small adapter would be rounded away. Afterwards the weights
    are what they were, bit for bit.
    """
    layers = [layer for layer in model.modules() if isinstance(layer, LoraLayer)] if wanted else []
    if not all(type(layer) is LoraLinear and layer.get_base_layer().weight.dtype == torch.float32
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

    layers = [layer for layer in model.modules() if isinstance(layer, LoraLayer)] if names else []
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


def resolve(path: str | Path) -> str:
    """A folder relative to the repository or absolute, or else a hub name ("owner/model").

    Raises FileNotFoundError for what is neither.
    """
    local = ROOT / Path(path).expanduser()
    if local.is_dir():
        return str(local)
    if str(path).count("/") == 1 and not str(path).startswith((".", "/", "data/")):
        return str(path)
    raise FileNotFoundError(f"no model at {path}; expected a folder (relative to {ROOT}) or a hub name, "
                            "owner/model. The shipped models lie in data/models; data/README.md says how to "
                            "make them.")


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


def load_tokenizer(path: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a policy or a reward model, which pads with its end token if it has none for it."""
    tokenizer = AutoTokenizer.from_pretrained(resolve(path), trust_remote_code=False)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_embedder(path: str | Path) -> SentenceTransformer:
    """The sentence embedder; `.encode(texts, normalize_embeddings=True)` gives [n, d]."""
    return SentenceTransformer(resolve(path), device=_device(), trust_remote_code=False)


class Reward:
    """A generic judge of answers: a sequence classifier with one output."""

    def __init__(self, path: str | Path) -> None:
        self.tokenizer = load_tokenizer(path)
        self.model = AutoModelForSequenceClassification.from_pretrained(
            resolve(path), num_labels=1, dtype=_weights_dtype("auto", _device()), **SAFE).to(_device()).eval()
        self.model.config.pad_token_id = self.tokenizer.pad_token_id

    @torch.inference_mode()
    def score(self, questions: Sequence[str], texts: Sequence[str], batch: int = 64) -> np.ndarray:
        """Reward of each answer to its question, float32 [n]; batches hold answers of like length."""
        dialogues = [self._dialogue(q, t) for q, t in zip(questions, texts, strict=True)]
        rewards = np.zeros(len(dialogues), dtype=np.float32)
        order = np.argsort([len(text) for text in dialogues], kind="stable")
        for at in (order[i:i + batch] for i in range(0, len(order), batch)):
            inputs = self.tokenizer([dialogues[i] for i in at], padding=True, padding_side="right",
                                    add_special_tokens=False, return_tensors="pt").to(self.model.device)
            logits = self.model(inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits
            rewards[at] = logits[:, 0].float().cpu().numpy()
        return rewards

    def _dialogue(self, question: str, text: str) -> str:
        if self.tokenizer.chat_template is None:
            return f"Question: {question}\nAnswer: {text}"
        turns = [{"role": "user", "content": question}, {"role": "assistant", "content": text}]
        return self.tokenizer.apply_chat_template(turns, tokenize=False)


def load_reward(path: str | Path) -> Reward:
    """The reward model; `.score(questions, texts)` gives float32 [n]."""
    return Reward(path)


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def _weights_dtype(dtype: str, device: str) -> torch.dtype:
    half = device == "cuda" and (dtype == "bfloat16" or (dtype == "auto" and bf16_available(device)))
    return torch.bfloat16 if half else torch.float32  # on a CPU `autocast` rounds what it multiplies


def _four_bit() -> BitsAndBytesConfig:
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
                              bnb_4bit_compute_dtype=torch.bfloat16)


def _keep_gradients_right(model: torch.nn.Module) -> None:
    """On a CPU bitsandbytes 0.50 repacks weights at the first evaluation, and gradients are wrong after."""
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
