"""Tiny tokenizers with the chat templates of real families, and tiny models in the layout of the hub's cache."""

import json
from hashlib import sha1
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Dense, Normalize, Pooling, Transformer
from tiny import TEXT
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    LlamaConfig,
    LlamaForSequenceClassification,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
)

from helpers.models import peft_quiet

ZEPHYR = ("{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + eos_token + '\n' }}{% endfor %}"
          "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}")
HEADER = "'<|start_header_id|>' + {} + '<|end_header_id|>\n\n'"
LLAMA3 = ("{% if not date_string is defined %}{% set date_string = strftime_now('%d %b %Y') %}{% endif %}"
          "{{ bos_token + " + HEADER.format("'system'") + " + 'Today Date: ' + date_string + '<|eot_id|>' }}"
          "{% for m in messages %}{{ " + HEADER.format("m.role") + " + m.content | trim + '<|eot_id|>' }}{% endfor %}"
          "{% if add_generation_prompt %}{{ " + HEADER.format("'assistant'") + " }}{% endif %}")
QWEN = ("{% if messages[0].role != 'system' %}{{ '<|im_start|>system\nBe a helpful assistant.<|im_end|>\n' }}{% endif %}"
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")
QWEN3 = ("{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
         "{% if m.role == 'assistant' %}{{ '<think>\n\n</think>\n\n' }}{% endif %}{{ m.content + '<|im_end|>\n' }}{% endfor %}"
         "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
         "{% if enable_thinking is defined and not enable_thinking %}{{ '<think>\n\n</think>\n\n' }}{% endif %}{% endif %}")
GEMMA = ("{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
         "{% for m in messages %}{{ '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\n'"
         " + m.content | trim + '<end_of_turn>\n' }}{% endfor %}"
         "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}")
LLAMA2 = ("{% for m in messages %}{% if m.role == 'user' %}{{ bos_token + '[INST] ' + m.content + ' [/INST]' }}"
          "{% else %}{{ ' ' + m.content + ' ' + eos_token }}{% endif %}{% endfor %}")
HEADERS = ("<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>")
FAMILIES = {  # name -> (template, kind of tokenizer, special tokens, begin, end)
    "zephyr": (ZEPHYR, "legacy", ("<s>", "</s>", "<unk>"), "<s>", "</s>"),
    "llama2": (LLAMA2, "spaces", ("<s>", "</s>", "<unk>"), "<s>", "</s>"),
    "llama3": (LLAMA3, "bytes", HEADERS, "<|begin_of_text|>", "<|eot_id|>"),
    "qwen": (QWEN, "bytes", ("<|im_start|>", "<|im_end|>", "<|endoftext|>"), None, "<|im_end|>"),
    "qwen3": (QWEN3, "bytes", ("<|im_start|>", "<|im_end|>", "<|endoftext|>"), None, "<|im_end|>"),
    "gemma": (GEMMA, "spaces", ("<bos>", "<eos>", "<pad>", "<start_of_turn>", "<end_of_turn>"), "<bos>", "<eos>"),
    "base": (None, "bytes", ("<|begin_of_text|>", "<|end_of_text|>"), "<|begin_of_text|>", "<|end_of_text|>"),
}


def make_tokenizer(family: str) -> PreTrainedTokenizerFast:
    """A tokenizer as that family has it, of 500 tokens; none of them has a token for padding."""
    template, kind, special, begin, end = FAMILIES[family]
    bpe = Tokenizer(models.BPE(byte_fallback=kind != "bytes", unk_token="<unk>" if "<unk>" in special else None))
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    if kind == "bytes":
        bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        bpe.decoder = decoders.ByteLevel()
    elif kind == "legacy":  # a space before every text that is not a special token
        bpe.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
        bpe.pre_tokenizer = pre_tokenizers.Split(Regex(r"\n|\u2581?[^\u2581\n]+"), "isolated")
        bpe.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.Fuse()])
    else:  # before the first text alone
        spaces = pre_tokenizers.Metaspace(prepend_scheme="first")
        bpe.pre_tokenizer = pre_tokenizers.Sequence([spaces, pre_tokenizers.Split("\n", "isolated")])
        bpe.decoder = decoders.Metaspace(prepend_scheme="first")
    letters = sorted({*"".join(TEXT), *"abcdefghijklmnopqrstuvwxyz<>|/[]_\n\u2581", *map(chr, range(33, 127))})
    trainer = trainers.BpeTrainer(vocab_size=500, special_tokens=list(special), show_progress=False,
                                  initial_alphabet=alphabet if kind == "bytes" else letters)
    bpe.train_from_iterator(TEXT, trainer)
    if begin:
        bpe.post_processor = processors.TemplateProcessing(f"{begin} $A", special_tokens=[(begin, bpe.token_to_id(begin))])
    return PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token=begin, eos_token=end, chat_template=template,
                                   unk_token="<unk>" if "<unk>" in special else None,
                                   extra_special_tokens=[t for t in special if t not in (begin, end, "<unk>")])


def put(hub: Path, name: str, *parts) -> str:
    """Save models and tokenizers as the hub's cache would hold `name`; the commit. parts: have save_pretrained."""
    commit = sha1(name.encode()).hexdigest()
    home = hub / f"models--{name.replace('/', '--')}"
    for part in parts:
        part.save_pretrained(str(home / "snapshots" / commit))
    (home / "refs").mkdir(parents=True)
    (home / "refs/main").write_text(commit)
    return commit


def small(tokenizer, **changes) -> dict:
    """Sizes of a tiny decoder for this tokenizer."""
    ids = {f"{kind}_token_id": getattr(tokenizer, f"{kind}_token_id") for kind in ("bos", "eos")}
    return {"vocab_size": len(tokenizer), "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
            "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 2048,
            "initializer_range": 0.2} | ids | changes


def make_hub(hub: Path, mistral: torch.nn.Module | None = None, tokenizer=None, sft: torch.nn.Module | None = None) -> dict:
    """A tiny Mistral, an SFT adapter on it, a reward model and a sentence embedder; name -> commit.

    As in the paper's list of models: the adapter's repository has tokenizer and Zephyr's chat template, the base
    has neither. mistral, sft: a base, and the same one with an adapter on it, in place of random ones.
    """
    torch.manual_seed(0)
    tokenizer = tokenizer or make_tokenizer("zephyr")
    mistral = mistral or MistralForCausalLM(MistralConfig(**small(tokenizer, sliding_window=24)))
    commits = {"tiny/mistral": put(hub, "tiny/mistral", mistral)}
    lora = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
    with peft_quiet():
        sft = sft or get_peft_model(mistral, lora)
    commits["tiny/zephyr-sft-qlora"] = put(hub, "tiny/zephyr-sft-qlora", sft, tokenizer)
    config = next(hub.glob("models--tiny--zephyr-sft-qlora/snapshots/*/adapter_config.json"))
    config.write_text(json.dumps(json.loads(config.read_text()) | {"base_model_name_or_path": "tiny/mistral"}))
    judge = make_tokenizer("llama3")
    classifier = LlamaForSequenceClassification(LlamaConfig(**small(judge, num_labels=1)))
    commits["tiny/reward"] = put(hub, "tiny/reward", classifier, judge)
    commits["tiny/sentence-t5"] = put(hub, "tiny/sentence-t5", _embedder(hub.parent / "t5"))
    return commits


def _embedder(folder: Path) -> SentenceTransformer:
    """A T5 encoder, mean pooling, a linear layer, length 1: as sentence-t5 is built."""
    words = make_tokenizer("llama2")
    words.chat_template, words.pad_token = None, words.eos_token
    config = T5Config(vocab_size=len(words), d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    T5EncoderModel(config).save_pretrained(folder)
    words.save_pretrained(folder)
    return SentenceTransformer(modules=[Transformer(str(folder)), Pooling(16, "mean"), Dense(16, 8, bias=False), Normalize()])
