"""Loading policy, reward model and embedder from a folder or the hub."""

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path

import numpy as np
import torch
from peft import PeftModel
from sentence_transformers import SentenceTransformer
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging

from helpers import ROOT

SAFE = {"trust_remote_code": False, "use_safetensors": True}
logging.disable_progress_bar()  # a small model is loaded a hundred times in a run


def load_policy(policy, adapter: str | Path = "") -> tuple[torch.nn.Module, PreTrainedTokenizerBase]:
    """The policy of a profile in evaluation mode, with its tokenizer; adapter: a folder that training wrote.

    policy: path (folder or hub name), dtype ("auto", "float32", "bfloat16"), load_in_4bit.
    """
    path, device = resolve(policy.path), _device()
    options = SAFE | {"attn_implementation": "sdpa", "dtype": _weights_dtype(policy.dtype, device)}
    if policy.load_in_4bit:
        options["quantization_config"] = _four_bit()
    elif device == "cuda":
        options["device_map"] = {"": 0}
    model = AutoModelForCausalLM.from_pretrained(path, **options)
    if policy.load_in_4bit and device == "cpu":
        _keep_gradients_right(model)
    tokenizer = _tokenizer(path)
    with peft_quiet():
        return (PeftModel.from_pretrained(model, str(adapter)) if adapter else model).eval(), tokenizer


def load_adapters(policy, adapters: Mapping[str, str | Path]) -> tuple[PeftModel, PreTrainedTokenizerBase]:
    """The policy with several adapters (name -> folder) on one base, and its tokenizer; the first is active.

    `model.set_adapter(name)` switches; a batch is mixed by `model(..., adapter_names=[...])`, a name for each
    row, "__base__" for none.
    """
    (model, tokenizer), names = load_policy(policy), list(adapters)
    with peft_quiet():
        model = PeftModel.from_pretrained(model, str(adapters[names[0]]), adapter_name=names[0])
        for name in names[1:]:
            model.load_adapter(str(adapters[name]), name)
    return model.eval(), tokenizer


@contextmanager
def peft_quiet() -> Iterator[None]:
    """Loading an adapter, peft 0.21 asks transformers 5.23 by a name that is deprecated there; say nothing."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".is_gradient_checkpointing. is deprecated", FutureWarning)
        yield


@contextmanager
def adapted(base: torch.nn.Module, adapter: str | Path = "") -> Iterator[torch.nn.Module]:
    """The base with an adapter on it, or bare if there is none; afterwards the base is as it was.

    One loaded base serves all adapters of a run, one after the other.
    """
    if not adapter:
        yield base
        return
    with peft_quiet():
        model = PeftModel.from_pretrained(base, str(adapter)).eval()
    try:
        yield model
    finally:
        model.unload()


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


def load_embedder(path: str | Path) -> SentenceTransformer:
    """The sentence embedder; `.encode(texts, normalize_embeddings=True)` gives [n, d]."""
    return SentenceTransformer(resolve(path), device=_device(), trust_remote_code=False)


class Reward:
    """A generic judge of answers: a sequence classifier with one output."""

    def __init__(self, path: str | Path) -> None:
        self.tokenizer = _tokenizer(resolve(path))
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


def _tokenizer(path: str) -> PreTrainedTokenizerBase:
    tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _four_bit() -> BitsAndBytesConfig:
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
                              bnb_4bit_compute_dtype=torch.bfloat16)


def _keep_gradients_right(model: torch.nn.Module) -> None:
    """On a CPU bitsandbytes 0.50 repacks weights at the first evaluation, and gradients are wrong after."""
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
