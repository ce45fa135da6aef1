import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from huggingface_hub import constants
from peft import LoraConfig, PeftModel, get_peft_model
from tiny import Policy, make_adapter, make_tokenizer
from tinyhub import make_hub
from tinyhub import make_tokenizer as make_chat_tokenizer
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForSequenceClassification

from helpers import ROOT, chat, models, scoring


def test_load_policy(loaded):
    model, tokenizer = loaded
    assert model.config._attn_implementation == "sdpa"
    assert not model.training
    assert tokenizer.pad_token == tokenizer.eos_token == "<|end|>"
    assert next(model.parameters()).dtype == (torch.bfloat16 if torch.cuda.is_available() else torch.float32)


def test_paths():
    assert models.resolve("data/models") == str(ROOT / "data/models")
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
            torch.testing.assert_close(models.merged_copy(adapted)(ids).logits, adapted(ids).logits, rtol=1e-4, atol=1e-4)
        assert torch.equal(model(ids).logits, plain)
        with models.adapted(model) as bare:
            assert bare is model


@pytest.fixture(scope="module")
def adapters(policy, tmp_path_factory) -> dict:
    """Three random adapters, name -> folder."""
    return {name: make_adapter(policy, tmp_path_factory.mktemp(name), seed) for seed, name in enumerate("abc")}


def test_a_merged_adapter_computes_the_same_and_leaves_the_weights_alone(policy, adapters):
    model, _ = models.load_adapters(policy, {"a": adapters["a"]})
    ids = torch.arange(12)[None]
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    with torch.inference_mode():
        plain = model(input_ids=ids).logits
        with models.merged(model):
            together = model(input_ids=ids).logits
    torch.testing.assert_close(together, plain, rtol=1e-4, atol=1e-4)
    assert not torch.equal(together, plain)  # it was merged
    for name, weight in model.named_parameters():
        assert torch.equal(weight, before[name]), name
    model.get_input_embeddings().requires_grad_(True)
    model(input_ids=ids, labels=ids).loss.backward()  # no weight has become one of inference mode
    with model.disable_adapter(), torch.inference_mode():
        bare = model(input_ids=ids).logits
        with models.merged(model):
            assert torch.equal(model(input_ids=ids).logits, bare)


def test_an_adapter_is_not_merged_into_half_weights(policy, adapters):
    model, _ = models.load_adapters(policy, {"a": adapters["a"]})
    model.get_base_model().to(torch.bfloat16)
    with models.merged(model):
        assert not any(getattr(layer, "merged", False) for layer in model.modules())


def test_mixed_rows_go_through_their_own_adapters(policy, adapters):
    model, _ = models.load_adapters(policy, adapters)
    ids, names = torch.arange(12)[None], ["b", "__base__", "a", "b"]
    with torch.inference_mode():
        with models.mixed(model, names):
            found = model.get_base_model()(input_ids=ids.expand(4, -1)).logits
        expected = model(input_ids=ids.expand(4, -1), adapter_names=names).logits
    assert torch.equal(found, expected)
    assert not torch.allclose(found[0], found[1])


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
def test_four_bit_gradients_are_those_of_the_rounded_weights(policy):
    """Before and after an evaluation: bitsandbytes 0.50 alone changes them where the CPU has avx512_bf16.

    The reference has the same weights, rounded to NF4 and unpacked, as ordinary float32 layers; the products of
    the one are in bfloat16 (8 bits of fraction: 0.4 %), so sums differ by a little more.
    """
    pytest.importorskip("bitsandbytes")
    four, exact = (get_peft_model(models.load_policy(replace(policy, load_in_4bit=on))[0], LoraConfig(
        r=4, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=True)) for on in (True, False))
    unpack(four, exact)
    exact.load_state_dict({name: values for name, values in four.state_dict().items() if "lora_" in name}, strict=False)
    ids = torch.arange(12)[None]

    def gradients(model) -> list[torch.Tensor]:
        model.train().zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        return [p.grad.clone() for p in model.parameters() if p.requires_grad]

    fresh, expected = gradients(four), gradients(exact)
    with torch.inference_mode():
        four.eval()(input_ids=ids)
    assert all(torch.equal(a, b) for a, b in zip(gradients(four), fresh, strict=True))
    assert sum(b.norm() > 0 for b in expected) == len(expected) / 2  # the B matrices; A's are 0 while B is
    for a, b in zip(fresh, expected, strict=True):
        assert (a - b).norm() <= 0.06 * b.norm()  # products in bfloat16; unguarded, the norms were a third to a half


def unpack(four: torch.nn.Module, plain: torch.nn.Module) -> None:
    """Give the plain model the weights that the 4-bit one computes with."""
    import bitsandbytes as bnb

    rounded = {name: module for name, module in four.named_modules() if isinstance(module, bnb.nn.Linear4bit)}
    assert rounded
    for name, module in rounded.items():
        weight = bnb.functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
        before = plain.get_submodule(name).weight
        # about .09; bitsandbytes 0.50 on a CPU errs more in rows that are no multiple of a block, 64 weights, long
        assert 0.03 < (weight.float() - before).norm() / before.norm() < 0.3
        before.data = weight.float()


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """The hub's cache with tiny models in it, and no way to the hub itself; name -> commit."""
    folder = tmp_path_factory.mktemp("hf") / "hub"
    folder.mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(constants, "HF_HUB_CACHE", str(folder))
        patch.setattr(constants, "HF_HUB_OFFLINE", True)
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setattr(models, "MERGED", tmp_path_factory.mktemp("merged"))
        models.resolve.cache_clear()
        yield make_hub(folder)
        models.resolve.cache_clear()


def test_an_adapter_by_hub_name_is_merged_once(hub):
    policy = Policy("tiny/zephyr-sft-qlora", revision=hub["tiny/zephyr-sft-qlora"])
    (models.MERGED / f".zephyr-sft-qlora-{policy.revision[:8]}.999999999").mkdir()  # what a killed merge leaves
    model, tokenizer = models.load_policy(policy)
    assert (type(model).__name__, model.config.sliding_window) == ("MistralForCausalLM", 24)
    (folder,) = models.MERGED.iterdir()
    written = (folder / "model.safetensors").stat().st_mtime_ns
    assert chat.frame(models.load_policy(policy)[1]).opening == "<s><|user|>\n"
    assert (folder / "model.safetensors").stat().st_mtime_ns == written
    base = AutoModelForCausalLM.from_pretrained(models.resolve("tiny/mistral"), dtype=torch.float32).eval()
    ids = torch.arange(20, 50)[None]
    with torch.inference_mode(), models.peft_quiet():
        plain = base(ids).logits
        stacked = PeftModel.from_pretrained(base, models.resolve("tiny/zephyr-sft-qlora")).eval()(ids).logits
        found = model(ids).logits
    assert (found - stacked).norm() < 0.03 * stacked.norm()  # bfloat16
    assert (plain - stacked).norm() > 0.3 * stacked.norm()
    assert models.load_policy(replace(policy, chat=False))[1].chat_template is None


def test_what_the_hub_does_not_have(hub):
    with pytest.raises(FileNotFoundError, match="cannot get tiny/nowhere: .*HF_TOKEN"):
        models.resolve("tiny/nowhere")
    with pytest.raises(FileNotFoundError, match="cannot get tiny/reward at revision 0000000"):
        models.resolve("tiny/reward", "0" * 40)


def test_pickles_are_not_loaded(hub, tmp_path):
    folder = tmp_path / "pickled"
    shutil.copytree(models.resolve("tiny/mistral"), folder)
    (folder / "model.safetensors").unlink()
    torch.save({}, folder / "pytorch_model.bin")
    with pytest.raises(OSError, match="safetensors"):
        models.load_policy(Policy(str(folder)))


def test_what_was_loaded_is_said(hub, policy):
    said = models.describe(*models.load_policy(policy))
    assert said.startswith("LlamaForCausalLM, 0.1 million parameters in float32, sdpa attention, no chat template, on c")
    assert "sdpa attention, its chat template, on c" in models.describe(*models.load_policy(Policy("tiny/zephyr-sft-qlora")))


def test_four_bit_from_the_hub(hub):
    pytest.importorskip("bitsandbytes")
    four = models.load_policy(Policy("tiny/zephyr-sft-qlora", load_in_4bit=True))
    assert "in NF4, double quantisation, sdpa attention, its chat template" in models.describe(*four)


def test_a_template_says_the_same_every_day(tmp_path):
    """Applied as others apply it, with no word about date or thinking."""
    turns = [{"role": "user", "content": "Why?"}]
    said = {}
    for family in ("llama3", "qwen3"):
        make_chat_tokenizer(family).save_pretrained(tmp_path / family)
        tokenizer = models.load_tokenizer(tmp_path / family)
        said[family] = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        assert tokenizer.chat_template.endswith(make_chat_tokenizer(family).chat_template)
    assert "Today Date: 26 Jul 2024" in said["llama3"]
    assert said["qwen3"].endswith("<think>\n\n</think>\n\n")
    make_chat_tokenizer("base").save_pretrained(tmp_path / "base")
    assert models.load_tokenizer(tmp_path / "base").chat_template is None


def test_four_bit_without_bitsandbytes_says_what_to_do(policy, monkeypatch):
    monkeypatch.setattr(models.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match="policy.load_in_4bit=false"):
        models.load_policy(replace(policy, load_in_4bit=True))


def test_a_chat_model_is_scored_in_its_template(hub):
    """By hand: begin, the user's turn, the assistant's heading, and the answer with its one end."""
    model, tokenizer = models.load_policy(Policy("tiny/zephyr-sft-qlora"))
    found = scoring.score_pairs(model, tokenizer, [("You like stew.\n", "Why?")], ["Good food."], ["No."], dtype="float32")
    prompt, answer = "<s><|user|>\nYou like stew.\nWhy?</s>\n<|assistant|>\n", "Good food.</s>"
    ids = tokenizer(prompt + answer, add_special_tokens=False, return_tensors="pt")["input_ids"]
    n = len(tokenizer(prompt, add_special_tokens=False)["input_ids"])
    with torch.inference_mode():
        logps = model(ids).logits[0].log_softmax(-1)[n - 1:-1].gather(1, ids[0, n:, None])
    assert found["logp_chosen"].item() == pytest.approx(logps.sum().item(), rel=1e-4)
    assert found["n_chosen"].item() == len(logps)


def test_a_reward_model_with_a_chat_template_reads_the_end(hub, tmp_path):
    """The last token is read, though it is the end token and the tokenizer has no other one to pad with."""
    judge = models.load_reward("tiny/reward", hub["tiny/reward"], tmp_path / "kept.sqlite")
    questions, texts = ["Why?", "Where shall I go?"], ["Good.", "A slow roast, because it spares the animals."]
    found = judge.score(questions, texts)
    with torch.inference_mode():
        for question, text, reward in zip(questions, texts, found, strict=True):
            dialogue = judge._dialogue(question, text)
            assert dialogue.endswith("<|eot_id|>")
            row = judge.tokenizer(dialogue, add_special_tokens=False, return_tensors="pt")["input_ids"]
            hidden = judge.model.model(row).last_hidden_state[0, -1]
            assert reward == pytest.approx(judge.model.score(hidden).item(), rel=1e-4)
    judge.model = None  # a second time nothing is computed
    assert np.array_equal(judge.score(questions, texts), found)


def test_an_embedder_from_the_hub(hub, tmp_path):
    embedder = models.load_embedder("tiny/sentence-t5", file=tmp_path / "kept.sqlite")
    texts = ["lentil stew", "a slow roast", "lentil stew"]
    found = embedder.encode(texts)
    assert found.shape == (3, 8)
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, rtol=1e-5)
    np.testing.assert_allclose(found[1], embedder.model.encode(texts[1], normalize_embeddings=True), rtol=1e-4, atol=1e-6)
    embedder.model = None
    assert np.array_equal(embedder.encode(texts), found)
