"""A random tiny policy on disk; as in the shipped base, one special token begins, ends and pads."""

from dataclasses import dataclass
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import helpers.models

END = "<|end|>"
TEXT = ["The quick brown fox asks a question.\nAnswer: lentil stew, because it spares the animals. Good.",
        "Question: what should I cook on a rainy Sunday?\nThe user is Ada Lind. Preferred: a slow roast."]


@dataclass(frozen=True)
class Policy:
    """As the policy section of a profile."""

    path: str
    max_length: int = 512
    max_prompt: int = 0
    dtype: str = "float32"
    load_in_4bit: bool = False
    revision: str = ""
    chat: bool = True


@dataclass(frozen=True)
class Training:
    """As the training section of a profile."""

    lora_r: int = 4
    lora_alpha: int = 8
    lora_dropout: float = 0.0
    beta: float = 0.1
    learning_rate: float = 5e-3
    epochs: int = 2
    batch_size: int = 4
    warmup: float = 0.1
    checkpoint_steps: int = 0
    report_to: str = "none"


def make_tokenizer() -> PreTrainedTokenizerFast:
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=320, special_tokens=[END], show_progress=False,
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    bpe.train_from_iterator(TEXT, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token=END, eos_token=END, pad_token=END)


def make_policy(folder: Path, **sizes: int) -> Policy:
    """A random Llama with grouped-query attention, saved with its tokenizer."""
    torch.manual_seed(0)
    tokenizer = make_tokenizer()
    config = {"vocab_size": len(tokenizer), "hidden_size": 64, "intermediate_size": 96,
              "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
              "max_position_embeddings": 512, "tie_word_embeddings": True, "initializer_range": 0.2}
    ids = {f"{token}_token_id": tokenizer.eos_token_id for token in ("bos", "eos", "pad")}
    LlamaForCausalLM(LlamaConfig(**config | ids | sizes)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return Policy(str(folder))


def make_adapter(policy: Policy, folder: Path, seed: int) -> Path:
    """A random LoRA adapter of the policy, saved."""
    torch.manual_seed(seed)
    base = LlamaForCausalLM.from_pretrained(policy.path)
    lora = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
    with helpers.models.peft_quiet():
        get_peft_model(base, lora).save_pretrained(folder)
    return folder
