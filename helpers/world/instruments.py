"""Make the offline reward model and sentence embedder: small, real, and blind to who asks.

    python -m helpers.world.instruments --world little --base data/models/base --out data/models

The reward model is a sequence classifier that tells intact answers from damaged ones; it has never seen a preference. The
embedder is a SentenceTransformer whose token vectors come from what occurs together in answers (PPMI and SVD).
"""

import argparse
import json
import shlex
import sys
from pathlib import Path
from random import Random

import numpy as np
import torch
from scipy.sparse import csr_matrix
from sklearn.decomposition import TruncatedSVD
from tqdm.auto import tqdm
from transformers import AutoTokenizer, LlamaConfig, LlamaForSequenceClassification

from helpers.world.corpus import Corpus
from helpers.world.facts import load_world

SIZES = {"hidden_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4,
         "intermediate_size": 256, "max_position_embeddings": 2048}


def damage(text: str, other: str, rng: Random) -> str:
    """The text with one fault a careless writer makes: lost, swapped, doubled or foreign words, or no end."""
    words = text.split()
    i = rng.randrange(len(words) - 3)
    faults = {
        "lost": words[:i] + words[i + rng.randint(1, 3):],
        "swapped": words[:i] + words[i:i + 3][::-1] + words[i + 3:],
        "doubled": words[:i + 2] + words[i:],
        "foreign": words[:i] + rng.sample(other.split(), 3) + words[i + 3:],
        "cut": words[:rng.randrange(len(words) // 3, len(words) - 2)],
        "off topic": other.split(),
    }
    return " ".join(faults[rng.choice(list(faults))])


def fault_pairs(corpus: Corpus, n: int) -> list[tuple[str, str, str]]:
    """n triples (question, intact answer, damaged answer) drawn from the corpus' own answers."""
    triples = []
    while len(triples) < n:
        drawn = [text.partition("\nAnswer: ")[::2] for text in (corpus.question(), corpus.question())]
        (question, answer), (_, other) = drawn
        triples.append((question.removeprefix("Question: "), answer, damage(answer, other, corpus.rng)))
    return triples


def train_reward(world_name: str, base: Path, out: Path, seed: int, steps: int = 1200, batch: int = 32) -> float:
    """Bradley-Terry training on intact against damaged answers; returns accuracy on fresh pairs."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    torch.manual_seed(seed)
    end = tokenizer.eos_token_id
    config = LlamaConfig(vocab_size=len(tokenizer), num_labels=1, **SIZES,
                         bos_token_id=end, eos_token_id=end, pad_token_id=end)
    model = LlamaForSequenceClassification(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=2e-3, total_steps=steps)
    corpus, tokenizer.padding_side = Corpus(load_world(world_name), seed), "right"
    for _ in tqdm(range(steps), desc="reward model", mininterval=10):
        intact, damaged = _rewards(model, tokenizer, fault_pairs(corpus, batch))
        loss = -torch.nn.functional.logsigmoid(intact - damaged).mean()
        loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    with torch.inference_mode():
        intact, damaged = _rewards(model.eval(), tokenizer, fault_pairs(corpus, 500))
    return (intact > damaged).float().mean().item()


def _rewards(model, tokenizer, triples) -> tuple[torch.Tensor, torch.Tensor]:
    """Rewards [n] of the intact and of the damaged answers."""
    questions, intact, damaged = zip(*triples, strict=True)
    texts = [f"Question: {q}\nAnswer: {a}" for q, a in zip(questions * 2, intact + damaged, strict=True)]
    encoded = tokenizer(texts, padding=True, return_tensors="pt", add_special_tokens=False)
    return model(**encoded).logits.squeeze(-1).chunk(2)


def train_embedder(world_name: str, base: Path, out: Path, seed: int, documents: int = 40_000, width: int = 64) -> None:
    """Token vectors from positive pointwise mutual information within answers, weighted by rarity (idf)."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Normalize, StaticEmbedding

    tokenizer = AutoTokenizer.from_pretrained(base)
    corpus = Corpus(load_world(world_name), seed)
    answers = [" " + corpus.question().partition("\nAnswer: ")[2] for _ in range(documents)]
    rows = [sorted(set(ids)) for ids in tokenizer(answers, add_special_tokens=False)["input_ids"]]
    occurs = csr_matrix((np.ones(sum(map(len, rows))), np.concatenate(rows),
                         np.cumsum([0, *map(len, rows)])), shape=(documents, len(tokenizer)))
    counts = np.asarray(occurs.sum(0)).ravel()
    together = (occurs.T @ occurs).tocoo()
    pmi = np.log(together.data * documents / (counts[together.row] * counts[together.col]))
    ppmi = csr_matrix((np.maximum(pmi, 0), (together.row, together.col)), shape=together.shape)
    vectors = TruncatedSVD(width, random_state=seed).fit_transform(ppmi)
    vectors *= np.log((1 + documents) / (1 + counts))[:, None] / (1e-6 + np.linalg.norm(vectors, axis=1, keepdims=True))
    vectors[counts == 0] = 0.0
    static = StaticEmbedding(tokenizer.backend_tokenizer, embedding_weights=vectors.astype(np.float32))
    SentenceTransformer(modules=[static, Normalize()]).save(str(out), create_model_card=False)


def main():
    """Make both models from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--world", default="little")
    parser.add_argument("--base", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=1)
    a = parser.parse_args()
    torch.set_num_threads(1)
    train_embedder(a.world, a.base, a.out / "embedder", a.seed)
    accuracy = train_reward(a.world, a.base, a.out / "reward", a.seed)
    record = {"command": "python -m helpers.world.instruments " + shlex.join(sys.argv[1:]),
              "world_sha256": load_world(a.world).fingerprint(), "intact_above_damaged": round(accuracy, 4)}
    (a.out / "reward" / "training.json").write_text(json.dumps(record, indent=1))
    print(f"intact above damaged on fresh pairs: {accuracy:.3f}")


if __name__ == "__main__":
    main()
