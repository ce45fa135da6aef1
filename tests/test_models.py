from dataclasses import replace

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny import make_tokenizer
from transformers import LlamaConfig, LlamaForSequenceClassification

from helpers import ROOT, models


def test_load_policy(loaded):
    model, tokenizer = loaded
    assert model.config._attn_implementation == "sdpa"
    assert not model.training
    assert tokenizer.pad_token == tokenizer.eos_token == "<|end|>"
    assert next(model.parameters()).dtype == (torch.bfloat16 if torch.cuda.is_available() else torch.float32)


def test_paths():
    assert models.resolve("data/models") == str(ROOT / "data/models")
    assert models.resolve("owner/model") == "owner/model"
    with pytest.raises(FileNotFoundError, match="no model at data/models/nowhere"):
        models.resolve("data/models/nowhere")


def test_autocast_follows_the_profile(loaded):
    for dtype, expected in (("float32", False), ("bfloat16", True), ("auto", models.bf16_available())):
        with models.autocast(loaded[0], dtype):
            assert torch.is_autocast_enabled(loaded[0].device.type) is expected


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # peft's
def test_an_adapter_comes_and_goes(policy, tmp_path):
    model, _ = models.load_policy(policy)
    lora = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
    get_peft_model(models.load_policy(policy)[0], lora).save_pretrained(tmp_path)
    ids, fresh = torch.arange(12)[None], models.load_policy(policy)[0]
    with torch.inference_mode():
        plain = fresh(ids).logits
        with models.adapted(model, tmp_path) as adapted:
            assert not adapted.training
            assert not torch.allclose(adapted(ids).logits, plain)
        assert torch.equal(model(ids).logits, plain)
        with models.adapted(model) as bare:
            assert bare is model


def test_reward_reads_question_and_answer(tmp_path):
    torch.manual_seed(0)
    tokenizer, end = make_tokenizer(), 0
    model = LlamaForSequenceClassification(LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_labels=1,
        num_attention_heads=2, initializer_range=0.2, pad_token_id=end)).eval()
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    questions, texts = ["a fox?", "where?", "a fox?"], ["lentil stew", "a slow roast with herbs", "stew"]
    found = models.load_reward(tmp_path).score(questions, texts)
    with torch.inference_mode():
        rows = [tokenizer(f"Question: {q}\nAnswer: {t}", return_tensors="pt")["input_ids"]
                for q, t in zip(questions, texts, strict=True)]
        plain = [model(row).logits.item() for row in rows]
    np.testing.assert_allclose(found, plain, rtol=1e-4, atol=1e-5)
    assert found.dtype == np.float32
    assert len(set(found.tolist())) == 3


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # peft's
def test_four_bit_keeps_gradients_right_on_a_cpu(policy):
    """bitsandbytes 0.50 alone gives other gradients after an evaluation, where the CPU has avx512_bf16."""
    pytest.importorskip("bitsandbytes")
    model, _ = models.load_policy(replace(policy, load_in_4bit=True))
    model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    ids = torch.arange(12)[None]

    def gradients() -> list[torch.Tensor]:
        model.train().zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        return [p.grad.clone() for p in model.parameters() if p.requires_grad]

    fresh = gradients()
    with torch.inference_mode():
        model.eval()(input_ids=ids)
    assert all(torch.equal(a, b) for a, b in zip(gradients(), fresh, strict=True))
