import math
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from tiny import Training

from helpers import dpo, models, prefixes, scoring, training, vpl

# peft 0.21 asks transformers 5.23 by a name that is deprecated there; nothing here can be said otherwise
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
WORDS = ["lentil", "stew", "slow", "roast", "herbs", "rainy", "Sunday", "fox", "quick", "brown", "lazy"]


@dataclass(frozen=True)
class Config:
    """As the vpl section of a profile."""

    hidden: int = 16
    latent: int = 6
    kl_weight: float = 0.1
    kl_warmup: float = 0.5


def make_preferences(people: int = 3, train: int = 5, test: int = 2) -> pd.DataFrame:
    """Pairs with head and tail, prefix none, as settings.ask returns them."""
    rng, rows = np.random.default_rng(3), []
    for person in range(people):
        for i in range(train + test):
            question, chosen, rejected = (" ".join(rng.choice(WORDS, rng.integers(2, 7))) for _ in range(3))
            rows.append((f"p{person}", f"p{person}-q{i}", "train" if i < train else "test", question, "",
                         f"Question: {question}?\nAnswer:", chosen, rejected))
    return pd.DataFrame(rows, columns=["persona_id", "pair_id", "split", "prompt", "head", "tail", "chosen",
                                       "rejected"])


@pytest.fixture(scope="module")
def asked(loaded):
    rows = make_preferences()
    found = scoring.score_pairs(*loaded, list(zip(rows["head"], rows["tail"], strict=True)), rows["chosen"],
                                rows["rejected"], dtype="float32")
    return rows.assign(ref_chosen_logps=found["logp_chosen"], ref_rejected_logps=found["logp_rejected"])


@pytest.fixture(scope="module")
def pool_file(policy, asked, tmp_path_factory) -> Path:
    return training.write_pool(asked, policy, "left", tmp_path_factory.mktemp("pool") / "pool.parquet")


@pytest.fixture
def cell(policy, asked, pool_file, tmp_path):
    """p0 and p1 train, p2 is unseen; ten pairs in batches of 4, 4 and 2."""
    known = asked["persona_id"] != "p2"
    return training.Cell(
        policy_id="v", out=tmp_path / "v", policy=policy, training=Training(), seed=1, learning_rate=5e-3,
        train=asked[known & (asked["split"] == "train")].reset_index(drop=True),
        score=asked[asked["split"] == "test"].reset_index(drop=True),
        reading=vpl.Reading(pool_file, 3, Config(), seed=17))


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return vpl.load(folder).state_dict()


def fresh(cell) -> dict[str, torch.Tensor]:
    """The encoder's weights before training."""
    model, pool = models.load_policy(cell.policy)[0], vpl.Pool(cell.reading.pool)
    return vpl.make_encoder(model, pool, cell.train["persona_id"], Config(), cell.seed).state_dict()


def moved(cell) -> set[str]:
    """Names of the encoder's tensors that training changed."""
    before, after = fresh(cell), weights(cell.out)
    assert before.keys() == after.keys()
    return {name for name in before if not torch.equal(before[name], after[name])}


def test_kl_by_hand():
    # N(1, 1): (1 + 1 - 1 - 0) / 2 = .5; N(0, 4): (0 + 4 - 1 - log 4) / 2 = .806853; N(0, 1): 0
    mean, logvar = torch.tensor([[1.0, 0.0], [0.0, 0.0]]), torch.tensor([[0.0, math.log(4)], [0.0, 0.0]])
    assert vpl.kl(mean, logvar).tolist() == pytest.approx([0.5 + 0.806853, 0.0], abs=1e-6)


def test_z_by_hand():
    # logvar log 4 is a standard deviation of 2: 1 + 2 * .5 = 2; as released 1 + 1.386294 * .5 = 1.693147
    numbers = torch.tensor([[1.0]]), torch.tensor([[math.log(4)]]), torch.tensor([[0.5]])
    assert vpl.sample(*numbers).item() == pytest.approx(2.0)
    assert vpl.sample(*numbers, released=True).item() == pytest.approx(1.693147, abs=1e-6)


def test_warm_up_by_hand():
    # over the first 30 % of 100 updates: none at 0, half at 15, all from 30 on
    assert [vpl.kl_weight(step, 100, 0.2, 0.3) for step in (0, 15, 30, 99)] == pytest.approx([0, 0.1, 0.2, 0.2])
    assert vpl.kl_weight(1, 10, 0.2, 0.0) == 0.2


def test_features_are_the_mean_states_of_each_answer(loaded, asked, pool_file):
    model, tokenizer = loaded
    table, row = pd.read_parquet(pool_file), asked.iloc[0]
    assert set(table["pair_id"]) == set(asked.loc[asked["split"] == "train", "pair_id"])  # never a test pair
    mine = np.stack(table["features"])[table["pair_id"].tolist().index(row["pair_id"])]
    [pair] = scoring.encode_pairs(tokenizer, [("", row["tail"])], [row["chosen"]], [row["rejected"]], 512)
    for part, answer in zip(np.split(mine, 2), pair[1:3], strict=True):
        ids = torch.tensor([pair.prompt + answer[:-1]])
        with torch.no_grad():
            states = model.model(input_ids=ids).last_hidden_state[0, len(pair.prompt) - 1:]
        np.testing.assert_allclose(part, states.mean(0), rtol=1e-4, atol=1e-5)


def test_a_leaking_pair_is_not_read(policy, asked, tmp_path):
    test = asked.index[asked["split"] == "test"][0]
    told = asked.copy()
    told.loc[test, "chosen"] = told.loc[0, "chosen"] = " ".join(WORDS)  # eleven words, the same in train and test
    table = pd.read_parquet(training.write_pool(told, policy, "left", tmp_path / "pool.parquet"))
    assert set(asked.loc[asked["split"] == "train", "pair_id"]) - set(table["pair_id"]) == {"p0-q0"}


def test_shots_are_own_train_pairs_and_never_the_pair_itself(pool_file):
    pool, rng = vpl.Pool(pool_file), np.random.default_rng(0)
    for n in (1, 4, 16):
        for _ in range(20):
            drawn = pool.pair_ids[pool.draw("p1", "p1-q2", n, rng)].tolist()
            assert set(drawn) <= {"p1-q0", "p1-q1", "p1-q3", "p1-q4"}
            assert len(set(drawn)) == len(drawn) == min(n, 4)
    with pytest.raises(ValueError, match="p9 has no train pair"):
        pool.draw("p9", "p9-q0", 2, rng)


def test_the_fixed_draw_is_that_of_the_few_shot_prefix(asked, pool_file):
    pool, test = vpl.Pool(pool_file), asked[asked["split"] == "test"]
    fixed = pool.fixed(test, 2, seed=17)
    train = asked[asked["split"] == "train"]
    for person, rows in zip(test["persona_id"], fixed, strict=True):
        shots = prefixes.draw_shots(train, person, 2, 17, "main")["pair_id"].tolist()
        assert pool.pair_ids[rows].tolist() == shots


def test_pairs_that_are_not_there_change_nothing(pool_file):
    pool = vpl.Pool(pool_file)
    torch.manual_seed(0)
    encoder = vpl.Encoder(pool.features.shape[1], 16, 6, 8)
    alone = encoder(*pool.read([np.array([3, 5])]))
    padded = encoder(*pool.read([np.array([3, 5]), np.array([1, 2, 4, 6])]))
    turned = encoder(*pool.read([np.array([5, 3])]))
    for one, beside, other_order in zip(alone, padded, turned, strict=True):
        torch.testing.assert_close(one[0], beside[0])
        torch.testing.assert_close(one[0], other_order[0])
    assert not torch.allclose(padded[0][0], padded[0][1])


@pytest.mark.parametrize("tail", [1, 12])  # a prompt of the begin token alone, or a longer one
def test_a_soft_row_equals_plain_rows_of_embeddings(loaded, tail):
    model, rng = loaded[0], np.random.default_rng(tail)
    prompts = [[0, dpo.SOFT, *rng.integers(0, 257, rng.integers(0, tail)).tolist()] for _ in range(5)]
    answers = [[rng.integers(0, 257, rng.integers(1, 9)).tolist() for _ in range(2)] for _ in range(5)]
    soft = torch.randn(5, 64, generator=torch.Generator().manual_seed(0))
    embed = model.get_input_embeddings()
    with torch.no_grad():
        found = dpo.answer_logps(model, dpo.pack(prompts, answers) | {"soft": soft})
        for i, (prompt, row) in enumerate(zip(prompts, answers, strict=True)):
            for k, answer in enumerate(row):
                words = embed(torch.tensor(prompt[:1] + prompt[2:] + answer))
                given = torch.cat([words[:1], soft[i:i + 1], words[1:]])[None]
                logps = model(inputs_embeds=given).logits[0].log_softmax(-1)[len(prompt) - 1:-1]
                plain = logps.gather(1, torch.tensor(answer)[:, None]).sum()
                torch.testing.assert_close(found[i, k], plain, rtol=1e-5, atol=1e-5)


def test_scores_depend_on_the_soft_token_of_their_own_row(loaded, asked):
    rows = asked.iloc[:6]
    prompts = list(zip(rows["head"], rows["tail"], strict=True))

    def score(soft):
        return scoring.score_pairs(*loaded, prompts, rows["chosen"], rows["rejected"], dtype="float32", soft=soft)

    soft = torch.randn(6, 64, generator=torch.Generator().manual_seed(1))
    other = soft.clone()
    other[2] = -soft[2]
    same = np.isclose(score(soft)["logp_chosen"], score(other)["logp_chosen"], rtol=1e-6)
    assert same.tolist() == [True, True, False, True, True, True]


def test_the_encoder_trains_with_the_adapter_and_loads_back_equal(cell):
    facts = training.run_cell(cell)
    assert sorted(f.name for f in cell.out.iterdir()) == [
        "adapter_config.json", "adapter_model.safetensors", "done.json", "encoder.safetensors",
        "scores.parquet"]
    names = set(fresh(cell))
    assert moved(cell) == names - {"center", "spread"}  # the standardisation is measured, not trained
    assert facts["steps"] == 6
    again = replace(cell, out=cell.out.with_name("again"), train=None, adapter=cell.out)
    twice = replace(cell, out=cell.out.with_name("twice"))
    for other in (again, twice):  # loaded and scored; trained anew with the same seed
        training.run_cell(other)
        pd.testing.assert_frame_equal(training.read_scores([other]), training.read_scores([cell]),
                                      check_exact=other is twice)
    assert all(torch.equal(a, b) for a, b in zip(weights(cell.out).values(), weights(twice.out).values(), strict=True))
    changed = replace(cell, out=cell.out.with_name("seed"), seed=2)
    training.run_cell(changed)
    assert not np.allclose(training.read_scores([changed])["logp_chosen"],
                           training.read_scores([cell])["logp_chosen"])


def test_a_resumed_encoder_equals_an_uninterrupted_one(cell, monkeypatch):
    training.run_cell(cell)
    kept = replace(cell, out=cell.out.with_name("kept"), training=Training(checkpoint_steps=2))
    step = training.VplTrainer.training_step
    with monkeypatch.context() as patched:
        patched.setattr(training.VplTrainer, "training_step", lambda trainer, *a: interrupt(trainer, 5, step, *a))
        with pytest.raises(KeyboardInterrupt):
            training.run_cell(kept)
    training.run_grid([kept], workers=1, executor="sequential")
    for name in ("adapter_model.safetensors", "scores.parquet"):
        assert (kept.out / name).read_bytes() == (cell.out / name).read_bytes()
    assert all(torch.equal(a, b) for a, b in zip(weights(cell.out).values(), weights(kept.out).values(), strict=True))


def interrupt(trainer, at: int, step, *args):
    """trainer's training_step, until update `at` is due."""
    if trainer.state.global_step == at:
        raise KeyboardInterrupt
    return step(trainer, *args)


def test_as_released_the_encoder_never_trains(cell):
    released = replace(cell, reading=replace(cell.reading, released=True))
    facts = training.run_cell(released)
    assert moved(released) == set()
    assert facts["history"][-1]["loss"] < facts["history"][0]["loss"]  # the adapter does


def test_the_loss_is_dpo_plus_weighted_kl(cell, loaded):
    model, tokenizer = models.load_policy(cell.policy)
    trainer = training.VplTrainer(
        model=model, args=training.training_args(cell, cell.out), processing_class=tokenizer, dtype="float32",
        train_dataset=training.dataset(tokenizer, cell), peft_config=training.lora(Training()), cell=cell)
    rows = [trainer.train_dataset[i] for i in range(4)]
    [part] = trainer._collate(rows)["parts"]
    trainer.state.max_steps, trainer.state.global_step = 6, 3  # past the warm-up: the whole weight of .1
    loss = trainer.compute_loss(trainer.model, part)
    mean, logvar = trainer.model.vpl(part["features"], part["read"])
    soft = trainer.model.vpl.soft(vpl.sample(mean, logvar, part["noise"]))
    chosen, rejected, _, _ = dpo.pair_logps(trainer.model, part | {"soft": soft})
    dpo_part = dpo.dpo_loss(chosen, rejected, *(part[name] for name in training.REFERENCE), 0.1).mean()
    torch.testing.assert_close(loss, dpo_part + 0.1 * vpl.kl(mean, logvar).mean())
    trainer.state.global_step = 0
    torch.testing.assert_close(trainer.compute_loss(trainer.model, part), dpo_part)
    dpo_part.backward()  # without any KL the gradient reaches every layer of the encoder
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in trainer.model.vpl.parameters())
    again = trainer._collate(rows)["parts"][0]
    assert torch.equal(again["noise"], part["noise"])
    trainer.state.epoch = 1.0
    other = trainer._collate(rows)["parts"][0]
    assert not torch.equal(other["noise"], part["noise"])  # drawn anew in each epoch


def test_what_the_features_hold_by_hand(tmp_path):
    # p0 chose +1 and rejected -1 in three pairs, and the reverse in the fourth: read by the majority, the three
    # are right and the fourth is wrong
    sides = {"a": 1.0, "b": 1.0, "c": 1.0, "d": -1.0}
    rows = [(f"{person}-{name}", person, [x, -x]) for person in ("p0", "p1") for name, x in sides.items()]
    pd.DataFrame(rows, columns=["pair_id", "persona_id", "features"]).to_parquet(tmp_path / "pool.parquet")
    asked = pd.DataFrame(rows, columns=["pair_id", "persona_id", "_"]).drop(columns="_")
    found = vpl.told_by_shots(vpl.Pool(tmp_path / "pool.parquet"), asked, 3, seed=17)
    assert found["correct"].tolist() == 2 * [True, True, True, False]
