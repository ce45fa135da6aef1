"""A person as a learned vector: an encoder reads some of the person's pairs and writes one soft token.

Variational preference learning (Poddar et al., 2024), put in front of a policy as in WikiPersona 3.4 and
Appendix K. helpers.training trains the encoder together with the adapter.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zlib import crc32

import numpy as np
import pandas as pd
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from helpers import dpo, prefixes, scoring

FILE = "encoder.safetensors"  # beside the adapter


@dataclass(frozen=True)
class Reading:
    """How a cell of the grid reads its people.

    pool: file that training.write_pool made; shots: pairs that the encoder reads; config: section vpl of a profile.
    seed: of the shots that are read when scoring, the same for all adapters. released: as the paper's public
    code does it, with an encoder that never trains, no KL, and logvar in place of a standard deviation.
    """

    pool: Path
    shots: int
    config: Any
    seed: int
    released: bool = False


class Encoder(nn.Module):
    """Features of a person's pairs to a Gaussian over z, and z to one soft token.

    A pair goes through one layer, the pairs attend to each other (one head), their mean gives mu and logvar.
    center and spread standardise the features; they are those of the training people's pairs.
    """

    def __init__(self, inputs: int, hidden: int, latent: int, outputs: int, scale: float = 1.0) -> None:
        super().__init__()
        self.sizes = {"inputs": inputs, "hidden": hidden, "latent": latent, "outputs": outputs, "scale": scale}
        self.register_buffer("center", torch.zeros(inputs))
        self.register_buffer("spread", torch.ones(inputs))
        self.pair, self.look = nn.Linear(inputs, hidden), nn.Linear(hidden, 3 * hidden)
        self.mean, self.logvar = nn.Linear(hidden, latent), nn.Linear(hidden, latent)
        self.project = nn.Linear(latent, outputs)

    def forward(self, features: Tensor, read: Tensor) -> tuple[Tensor, Tensor]:
        """mu and logvar [n, latent] of features [n, N, inputs]; read, bool [n, N]: which of the N are pairs."""
        pairs = nn.functional.gelu(self.pair((features - self.center) / self.spread))
        query, key, value = self.look(pairs).chunk(3, dim=-1)
        pairs = pairs + scaled_dot_product_attention(query, key, value, attn_mask=read[:, None])
        person = (pairs * read[:, :, None]).sum(1) / read.sum(1, keepdim=True)
        return self.mean(person), self.logvar(person)

    def soft(self, z: Tensor) -> Tensor:
        """The soft token [n, outputs] of z [n, latent], as long as the policy's own token embeddings are."""
        token = self.project(z)
        return self.sizes["scale"] * token / token.pow(2).mean(-1, keepdim=True).sqrt()


def sample(mean: Tensor, logvar: Tensor, noise: Tensor, released: bool = False) -> Tensor:
    """z [n, latent] with standard normal noise: mean + exp(logvar / 2) noise.

    released: mean + logvar noise, as in the paper's public code, where the exponential is missing.
    """
    return mean + (logvar if released else torch.exp(logvar / 2)) * noise


def kl(mean: Tensor, logvar: Tensor) -> Tensor:
    """KL divergence of N(mean, exp(logvar)) from N(0, 1), summed over the latent dimensions, nats [n]."""
    return (mean.square() + logvar.exp() - 1 - logvar).sum(-1) / 2


def kl_weight(step: int, steps: int, weight: float, warmup: float) -> float:
    """The weight of the KL at an update: it rises linearly from 0 over the first `warmup` of the updates."""
    return weight * min(1.0, step / max(1.0, warmup * steps))


class Pool:
    """Everybody's pairs that may be read: train pairs only, with their features (see `features`)."""

    def __init__(self, path: Path) -> None:
        table = pd.read_parquet(path)
        self.features = torch.from_numpy(np.stack(table["features"].to_numpy()).astype(np.float32))
        self.pair_ids = table["pair_id"].to_numpy()
        self.own = {person: np.array(rows) for person, rows in table.groupby("persona_id").indices.items()}

    def draw(self, persona_id: str, pair_id: str, n: int, rng: np.random.Generator) -> np.ndarray:
        """Rows of n drawn pairs of the person, or of as many as there are, never of `pair_id` itself."""
        own = self.own.get(persona_id, np.array([], dtype=int))
        drawn = [row for row in own[rng.permutation(len(own))] if self.pair_ids[row] != pair_id][:n]
        if not drawn:
            raise ValueError(f"{persona_id} has no train pair that could be read for {pair_id}: ask for more "
                             "questions (questions.personal, .divergent), or leave VPL out with vpl.shots=[]")
        return np.array(drawn)

    def fixed(self, pairs: pd.DataFrame, n: int, seed: int) -> list[np.ndarray]:
        """Rows of the pairs to read for each of `pairs`: for a person always the same draw.

        It is the draw of the few-shot prefix with as many shots (prefixes.draw_shots, variant main).
        """
        asked = zip(pairs["persona_id"], pairs["pair_id"], strict=True)
        return [self.draw(person, pair, n, np.random.default_rng([seed, crc32(person.encode()), n]))
                for person, pair in asked]

    def read(self, drawn: Sequence[np.ndarray]) -> tuple[Tensor, Tensor]:
        """Features [n, N, inputs] of the drawn rows, and bool [n, N]: where there is a pair."""
        longest = max(map(len, drawn))
        rows = np.stack([np.pad(one, (0, longest - len(one))) for one in drawn])
        return self.features[rows], torch.tensor([[i < len(one) for i in range(longest)] for one in drawn])


def features(model: nn.Module, tokenizer, asked: pd.DataFrame, max_length: int, dtype: str = "auto",
             side: str = "left") -> pd.DataFrame:
    """pair_id, persona_id and features of the train pairs among `asked`, computed once for all cells.

    asked: the preferences with head and tail, prefix none. A pair's features are the untrained policy's last
    hidden states, averaged over the chosen answer and over the rejected one: [2 hidden]. As for the few-shot
    prefix, pairs that happen to hold an answer to a test question are left out.
    """
    train = asked[asked["split"] == "train"].sort_values("pair_id")
    told = prefixes.leaks(train.assign(text=train["prompt"] + "\n" + train["chosen"]), asked)
    train = train.drop(told.index).reset_index(drop=True)
    prompts = list(zip(train["head"], train["tail"], strict=True))
    answers = list(zip(train["chosen"], train["rejected"], strict=True))
    asked = scoring.encode(tokenizer, prompts, answers, max_length, side)
    means = scoring.of_answers(model, asked, dpo.answer_means, dtype=dtype)
    both = zip(means[::2], means[1::2], strict=True)
    return train[["pair_id", "persona_id"]].assign(features=[np.concatenate(two) for two in both])


def told_by_shots(pool: Pool, pairs: pd.DataFrame, shots: int, seed: int) -> pd.DataFrame:
    """Whether the features alone tell chosen from rejected, without any training: `pairs` with `correct`.

    pairs: of the pool. Right where chosen minus rejected points the way of the mean difference of the person's
    drawn shots (which are never the pair itself), features counted in their own spread.
    """
    chosen, rejected = pool.features.chunk(2, dim=1)
    difference = (chosen - rejected) / (chosen - rejected).std(0, correction=0).clamp(min=1e-6)
    row_of = {pair_id: row for row, pair_id in enumerate(pool.pair_ids)}
    drawn = pool.fixed(pairs, shots, seed)
    way = torch.stack([difference[rows].mean(0) for rows in drawn])
    right = (way * difference[[row_of[pair_id] for pair_id in pairs["pair_id"]]]).sum(1) > 0
    return pairs.assign(correct=right.numpy())


def make_encoder(model: nn.Module, pool: Pool, people: Sequence[str], config: Any, seed: int) -> Encoder:
    """A new encoder for this policy, standardised on the pairs of `people`, who train."""
    known = pool.features[np.concatenate([pool.own[person] for person in sorted(set(people))])]
    embeddings = model.get_input_embeddings().weight.detach()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        encoder = Encoder(known.shape[1], config.hidden, config.latent, embeddings.shape[1],
                          float(embeddings.float().pow(2).mean().sqrt()))
    encoder.center.copy_(known.mean(0))
    encoder.spread.copy_(known.std(0, correction=0).clamp(min=1e-6))
    return encoder.to(embeddings.device)


@torch.inference_mode()
def soft_tokens(encoder: Encoder, pool: Pool, pairs: pd.DataFrame, reading: Reading) -> Tensor:
    """The soft token of each pair's person, from the mean of z [n, outputs]: twice the same when asked twice.

    With the fixed draw of shots this is where we depart from the public code, which draws eight of the
    sixteen shots and a z anew at each evaluation; for released too.
    """
    features, read = pool.read(pool.fixed(pairs, reading.shots, reading.seed))
    device = encoder.center.device
    return encoder.soft(encoder(features.to(device), read.to(device))[0])


def save(encoder: Encoder, folder: Path) -> None:
    """Weights and sizes beside the adapter."""
    weights = {name: values.contiguous().cpu() for name, values in encoder.state_dict().items()}
    save_file(weights, folder / FILE, metadata={"format": "pt", "sizes": json.dumps(encoder.sizes)})


def load(folder: Path) -> Encoder:
    """The encoder that `save` left in the folder of an adapter."""
    with safe_open(folder / FILE, framework="pt") as file:
        encoder = Encoder(**json.loads(file.metadata()["sizes"]))
    encoder.load_state_dict(load_file(folder / FILE))
    return encoder
