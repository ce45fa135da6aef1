"""Train the little world's base model from scratch: tokenizer, a small Llama, its log and its hash.

    python -m helpers.world.pretraining --world little --out data/models/base --seed 2 --tokens 14300000

The shipped base in data/models/base was made by the command in its training.json.
"""

import argparse
import hashlib
import json
import math
import shlex
import sys
import time
from collections.abc import Iterator
from itertools import chain, islice
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm.auto import tqdm
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from helpers.world.corpus import CONTINUED, LATE, Corpus, Knobs
from helpers.world.facts import World, load_world

END = "<|end|>"  # begins and ends every document: bos, eos and pad in one
ARCHITECTURE = {"hidden_size": 192, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 4,
                "intermediate_size": 512, "max_position_embeddings": 2048, "tie_word_embeddings": True}
MUON_RATE, ADAM_RATE, WARMUP_STEPS, FLOOR = 0.02, 3e-3, 100, 0.05
LATE_SHARE = 0.4  # of the steps; without them the cue is not learned within the budget
# Of a continued training: more descriptions without a name than at first.
CONTINUED_PREFIXES = {"name": 25, "gold": 20, "persona": 33, "few_shot": 17, "tag": 5}


def train_tokenizer(world: World, seed: int, vocab_size: int = 2048, documents: int = 20_000) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer: any text can be read, and the world's words are short."""
    corpus = Corpus(world, seed)
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=[END], show_progress=False,
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    bpe.train_from_iterator((corpus.document() for _ in range(documents)), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token=END, eos_token=END, pad_token=END,
                                   clean_up_tokenization_spaces=False)


def build_model(tokenizer: PreTrainedTokenizerFast, seed: int, **sizes: int) -> LlamaForCausalLM:
    """A randomly initialised Llama of ARCHITECTURE, with `sizes` overriding it."""
    torch.manual_seed(seed)
    ids = {f"{token}_token_id": tokenizer.eos_token_id for token in ("bos", "eos", "pad")}
    return LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **(ARCHITECTURE | sizes), **ids))


def windows(corpus: Corpus, tokenizer: PreTrainedTokenizerFast, batch: int, length: int) -> Iterator[torch.Tensor]:
    """Batches [batch, length + 1] of fresh documents, end to end; no document is seen twice."""
    need, buffer = batch * (length + 1), []
    while True:
        while len(buffer) < need:
            texts = [corpus.document() for _ in range(512)]
            for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]:
                buffer += [tokenizer.eos_token_id, *ids]
        yield torch.tensor(buffer[:need]).view(batch, length + 1)
        buffer = buffer[need:]


def optimizers(model: LlamaForCausalLM, steps: int, peak: float = 1.0):
    """Muon for the matrices, AdamW for embedding and norms; warm-up to `peak` of the rates, then a cosine to FLOOR."""
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    rest = [p for name, p in model.named_parameters() if p.ndim != 2 or "embed" in name]
    pair = [torch.optim.Muon(matrices, lr=MUON_RATE, adjust_lr_fn="original", weight_decay=0.0),
            torch.optim.AdamW(rest, lr=ADAM_RATE, betas=(0.9, 0.95), weight_decay=0.0, fused=True)]

    def rate(step: int) -> float:
        cosine = FLOOR + (1 - FLOOR) * 0.5 * (1 + math.cos(math.pi * min(step / steps, 1)))
        return peak * min(1.0, (step + 1) / WARMUP_STEPS) * cosine

    return pair, [torch.optim.lr_scheduler.LambdaLR(optimizer, rate) for optimizer in pair]


def train(model, batches: Iterator[torch.Tensor], steps: int, bf16: bool, out: Path, peak: float = 1.0) -> list[dict]:
    """Next-token training; returns one log row per 50 steps (step, loss_nats, wall_seconds).

    Every 1,000 steps the model is saved to `out`, so that a long training can be looked at before it ends.
    """
    pair, schedules = optimizers(model, steps, peak)
    model.train()
    log, total, start = [], 0.0, time.perf_counter()
    for step in tqdm(range(1, steps + 1), desc="pretraining", mininterval=10):
        tokens = next(batches)
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            logits = model(input_ids=tokens[:, :-1], use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), tokens[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, schedule in zip(pair, schedules, strict=True):
            optimizer.step()
            schedule.step()
            optimizer.zero_grad(set_to_none=True)
        total += loss.item()
        if step % 50 == 0 or step == steps:
            done = step % 50 or 50
            log.append({"step": step, "loss_nats": round(total / done, 4),
                        "wall_seconds": round(time.perf_counter() - start, 1)})
            print(json.dumps(log[-1]), file=sys.stderr, flush=True)
            total = 0.0
        if step % 1000 == 0:
            model.save_pretrained(out)
    return log


def pretrain(world_name: str, out: Path, seed: int, tokens: int, batch: int, length: int, bf16: bool,
             compiled: bool, start: Path | None = None, cued: float = 0.2) -> dict:
    """Train tokenizer and model and write them to `out` with log.json and training.json; returns the latter.

    start: a base to continue, with its tokenizer, on the mix CONTINUED at half the learning rates. cued: how many of its
    prefixed answers follow the prefix; the fewer, the less a prompt alone moves the model.
    """
    world, steps = load_world(world_name), tokens // (batch * length)
    if start:
        tokenizer, model = AutoTokenizer.from_pretrained(start), LlamaForCausalLM.from_pretrained(start)
        knobs = Knobs(cued=cued, prefixes=CONTINUED_PREFIXES)
        batches = windows(Corpus(world, seed + 2000, knobs, CONTINUED), tokenizer, batch, length)
        earlier = json.loads((start / "training.json").read_text())
    else:
        tokenizer, earlier = train_tokenizer(world, seed=0), None
        model = build_model(tokenizer, seed)
        early = windows(Corpus(world, seed), tokenizer, batch, length)
        late = windows(Corpus(world, seed + 1000, kinds=LATE), tokenizer, batch, length)
        batches = chain(islice(early, round(steps * (1 - LATE_SHARE))), late)
    out.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(out)
    if compiled:
        model.forward = torch.compile(model.forward, dynamic=False)
    log = train(model, batches, steps, bf16, out, peak=0.5 if start else 1.0)
    model.save_pretrained(out)
    (out / "log.json").write_text(json.dumps(log, indent=0))
    record = {
        "command": "python -m helpers.world.pretraining " + shlex.join(sys.argv[1:]),
        "world": world_name, "world_sha256": world.fingerprint(), "seed": seed, "tokens": tokens,
        "parameters": model.num_parameters(), "loss_nats": log[-1]["loss_nats"],
        "wall_seconds": log[-1]["wall_seconds"], "threads": torch.get_num_threads(), "torch": torch.__version__,
        "model_sha256": hashlib.sha256((out / "model.safetensors").read_bytes()).hexdigest(),
        "categories": [f"{c.axis}/{c.name}" for c in world.categories], "people": list(world.people),
        "continues": earlier,
    }
    (out / "training.json").write_text(json.dumps(record, indent=1))
    return record


def main():
    """Train or continue a base from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--world", default="little")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--start", type=Path, help="a base to continue on the mix CONTINUED instead of starting from nothing")
    parser.add_argument("--cued", type=float, default=0.2, help="with --start: share of answers that follow their prefix")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=14_300_000)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--float32", action="store_true", help="for a machine without bf16 instructions")
    parser.add_argument("--compile", action="store_true", help="a third faster where a C++ compiler is at hand")
    a = parser.parse_args()
    torch.set_num_threads(a.threads)
    record = pretrain(a.world, a.out, a.seed, a.tokens, a.batch, a.length, not a.float32, a.compile, a.start, a.cued)
    print(f"loss {record['loss_nats']} nats after {record['wall_seconds']:.0f} s; written to {a.out}")


if __name__ == "__main__":
    main()
