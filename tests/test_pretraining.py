"""Pretraining: the tokenizer reads any text, batches are fresh and whole, and a few steps learn something."""

import torch

from helpers.world import pretraining
from helpers.world.corpus import Corpus
from helpers.world.facts import load_world

SIZES = {"hidden_size": 32, "num_hidden_layers": 1, "intermediate_size": 64}


def test_the_tokenizer_reads_any_text_back():
    tokenizer = pretraining.train_tokenizer(load_world("little"), seed=0, vocab_size=512, documents=300)
    text = "Grüße, 世界! <special_person_tag_3>\n\tlentil stew"
    assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text
    assert tokenizer.bos_token_id == tokenizer.eos_token_id == tokenizer.pad_token_id == 0


def test_a_few_steps_lower_the_loss_and_the_seed_decides(tmp_path):
    world = load_world("little")
    tokenizer = pretraining.train_tokenizer(world, seed=0, vocab_size=512, documents=300)
    finals = []
    for _ in range(2):
        model = pretraining.build_model(tokenizer, seed=3, **SIZES)
        batches = pretraining.windows(Corpus(world, 3), tokenizer, batch=4, length=64)
        log = pretraining.train(model, batches, steps=60, bf16=False, out=tmp_path)
        finals.append(model.model.embed_tokens.weight.detach().clone())
    assert [row["step"] for row in log] == [50, 60]
    assert log[-1]["loss_nats"] < log[0]["loss_nats"] < 6.3  # log 512 = 6.24 where nothing is known
    assert torch.equal(*finals)


def test_windows_are_documents_end_to_end():
    world = load_world("little")
    tokenizer = pretraining.train_tokenizer(world, seed=0, vocab_size=512, documents=300)
    batches = pretraining.windows(Corpus(world, 9), tokenizer, batch=2, length=50)
    stream = torch.cat([next(batches).flatten() for _ in range(20)]).tolist()
    corpus = Corpus(world, 9)
    expected = [token for _ in range(40) for token in
                [tokenizer.eos_token_id, *tokenizer(corpus.document(), add_special_tokens=False)["input_ids"]]]
    assert stream[:1000] == expected[:1000]


def test_a_continued_training_keeps_the_tokenizer_and_says_what_it_continues(tmp_path):
    size = {"batch": 2, "length": 32, "bf16": False, "compiled": False}
    first = pretraining.pretrain("little", tmp_path / "a", seed=1, tokens=128, **size)
    second = pretraining.pretrain("little", tmp_path / "b", seed=2, tokens=128, start=tmp_path / "a", cued=0.0, **size)
    assert second["continues"] == first
    assert first["continues"] is None
    assert second["model_sha256"] != first["model_sha256"]
    assert (tmp_path / "b" / "tokenizer.json").read_text() == (tmp_path / "a" / "tokenizer.json").read_text()
