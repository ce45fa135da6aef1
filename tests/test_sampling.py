"""Sampling: what transformers would write, whatever shares the batch; the distribution by hand; other rules."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny import make_tokenizer
from transformers import MistralConfig, MistralForCausalLM

from helpers import models, sampling

PROMPTS = ["Question: a fox?\nAnswer:", "The", "Question: what should I cook on a rainy Sunday?\nAnswer:", "a"]


def sample(loaded, prompts, seed=1, batch=8, **changes) -> list[list[str]]:
    settings = {"n": 2, "temperature": 1.0, "top_p": 1.0, "max_new_tokens": 8, "dtype": "float32"} | changes
    return sampling.generate(*loaded, prompts, seed=seed, batch=batch, **settings)


def plain(model, tokenizer, prompt: str, new: int) -> str:
    """transformers' own greedy text."""
    ids = tokenizer((tokenizer.bos_token or "") + prompt, add_special_tokens=False, return_tensors="pt")["input_ids"]
    whole = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=new,
                           pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id)
    return tokenizer.decode(whole[0, ids.shape[1]:], skip_special_tokens=True)


@pytest.fixture(scope="module")
def windowed():
    """A random Mistral with grouped-query attention that sees ten tokens back."""
    torch.manual_seed(0)
    tokenizer = make_tokenizer()
    config = MistralConfig(vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                           num_attention_heads=4, num_key_value_heads=2, sliding_window=10, initializer_range=0.3,
                           bos_token_id=0, eos_token_id=0, pad_token_id=0)
    return MistralForCausalLM(config).eval(), tokenizer


@pytest.mark.parametrize("kind", ["loaded", "windowed"])
def test_greedy_is_that_of_transformers(kind, request):
    loaded = request.getfixturevalue(kind)
    texts = sample(loaded, PROMPTS, n=1, temperature=0, max_new_tokens=45)  # the store of keys has to grow
    assert texts == [[plain(*loaded, prompt, 45)] for prompt in PROMPTS]
    assert all(text for (text,) in texts)


@pytest.mark.parametrize("kind", ["loaded", "windowed"])
def test_plain_attention_of_one_token_is_the_fused_one(kind, request, monkeypatch):
    """The attention of the light copy, in float32: the same greedy texts, with padding and shared keys."""
    loaded = request.getfixturevalue(kind)
    monkeypatch.setattr(loaded[0].config, "_attn_implementation", "one_query")
    texts = sample(loaded, PROMPTS, n=1, temperature=0, max_new_tokens=45)
    monkeypatch.undo()
    assert texts == sample(loaded, PROMPTS, n=1, temperature=0, max_new_tokens=45)


def test_special_tokens_do_not_show(loaded):
    texts = sample(loaded, ["Question: a fox?\nAnswer:", "The", "Question"], max_new_tokens=30)
    assert [len(own) for own in texts] == [2, 2, 2]
    assert not any("<|end|>" in text for own in texts for text in own)


@pytest.mark.parametrize("batch", [1, 3, 16])
def test_a_text_does_not_depend_on_what_is_computed_beside_it(loaded, batch):
    """Not on the size of batches, on other prompts, on their order, on torch's generator."""
    torch.manual_seed(batch)
    state = torch.get_rng_state()
    texts = sample(loaded, PROMPTS, n=3, max_new_tokens=40, batch=batch)
    assert torch.equal(torch.get_rng_state(), state)
    assert texts == sample(loaded, PROMPTS, n=3, max_new_tokens=40, batch=1000)
    assert sample(loaded, ["other", *PROMPTS[::-1]], n=3, max_new_tokens=40, batch=5)[:0:-1] == texts
    assert sample(loaded, PROMPTS, n=3, max_new_tokens=40, seed=2) != texts


def test_a_prompt_asked_again_is_answered_anew(loaded):
    """Twice with one sample each is once with two; the first of more samples stay what they are."""
    two = sample(loaded, PROMPTS[:1], n=2)
    assert sample(loaded, [PROMPTS[0]] * 2, n=1) == [two[0][:1], two[0][1:]]
    assert sample(loaded, PROMPTS[:1], n=5)[0][:2] == two[0]
    assert len(set(sample(loaded, PROMPTS[:1], n=5)[0])) > 1


def test_rows_that_have_ended_leave_the_batch(loaded, monkeypatch):
    """Texts are cut at the first end token, and no row is computed long after it."""
    sizes, forward = [], sampling._Batch._forward
    monkeypatch.setattr(sampling._Batch, "_forward", lambda self, ids, at: sizes.append(len(ids)) or forward(self, ids, at))
    end = loaded[1].eos_token_id

    def choose(logits, draws, rows):
        return torch.where((rows % 2 == 0) & (len(sizes) > 3), end, 40 + rows)

    texts = sampling.decode(*loaded, [(p,) for p in PROMPTS], choose, 1, 24, 0, 8, dtype="float32")
    letters = [loaded[1].decode([40 + i]) for i in range(4)]
    assert [own[0] for own in texts] == [letters[0] * 3, letters[1] * 24, letters[2] * 3, letters[3] * 24]
    assert sizes == [4] * 4 + [2] * 20  # they end with their fourth token, after which one looks


def test_stop_strings(loaded):
    drawn = [text for own in sample(loaded, ["a"] * 12, n=4, max_new_tokens=30) for text in own]
    stopped = [text for own in sample(loaded, ["a"] * 12, n=4, max_new_tokens=30, stop="e") for text in own]
    assert any("e" in text for text in drawn)
    assert stopped == [text.split("e")[0] for text in drawn]


def test_probabilities_by_hand():
    logits = torch.tensor([[2.0, 0.0, 1.0, -1.0]])
    e = np.exp([2.0, 0.0, 1.0, -1.0])
    np.testing.assert_allclose(sampling.probabilities(logits, 1.0)[0], e / e.sum(), rtol=1e-6)
    hot = np.exp([1.0, 0.0, 0.5, -0.5])  # temperature 2
    np.testing.assert_allclose(sampling.probabilities(logits, 2.0)[0], hot / hot.sum(), rtol=1e-6)
    # of the mass .644 .087 .237 .032 the first two in order, .644 + .237 = .881, are the least that hold .8
    kept = np.array([e[0], 0, e[2], 0]) / (e[0] + e[2])
    np.testing.assert_allclose(sampling.probabilities(logits, 1.0, 0.8)[0], kept, rtol=1e-6)
    assert sampling.probabilities(logits, 1.0, 0.1)[0].tolist() == [1, 0, 0, 0]


def test_draws_fall_as_the_probabilities_say():
    """Of 1000 evenly spread draws, 100 x p of each token; a token without probability never."""
    probs = torch.tensor([0.25, 0.0, 0.5, 0.25]).expand(1000, 4)
    found = sampling.pick(probs, torch.arange(1000) / 1000)
    assert found.bincount(minlength=4).tolist() == [250, 0, 500, 250]
    assert sampling.pick(torch.tensor([[0.0, 1.0, 0.0]]), torch.tensor([1 - 2.0**-24])).tolist() == [1]


def test_one_step_is_distributed_as_the_softmax(loaded):
    """4,000 first tokens against softmax(logits / T) by hand: no count beyond five standard deviations."""
    model, tokenizer = loaded
    ids = tokenizer(tokenizer.bos_token + "The", add_special_tokens=False, return_tensors="pt")["input_ids"]
    with torch.inference_mode():
        expected = torch.softmax(model(ids).logits[0, -1] / 0.7, -1).numpy()
    seen = []
    rule = sampling.sampler(0.7)

    def choose(logits, draws, rows):
        seen.append(rule(logits, draws, rows))
        return seen[-1]

    sampling.decode(model, tokenizer, [("The",)], choose, 4000, 1, 3, 512, dtype="float32")
    counts = torch.cat(seen).bincount(minlength=len(expected)).numpy()
    assert counts.sum() == 4000
    assert (np.abs(counts - 4000 * expected) <= 5 * np.sqrt(4000 * expected * (1 - expected)) + 1).all()
    assert (counts > 0).sum() > 20


def test_branches_grow_by_the_same_tokens(loaded):
    """The dial at 1 writes what the first prompt alone does, at 0 greedily what the second does."""
    pairs = [(f"The user is kind.\n{p}", p) for p in PROMPTS]
    alone = sample(loaded, [a for a, _ in pairs], n=2, max_new_tokens=30)
    rule = sampling.sampler(1.0, combine=sampling.dial(1.0))
    assert sampling.decode(*loaded, pairs, rule, 2, 30, 1, 6, dtype="float32") == alone
    rule = sampling.sampler(0, combine=sampling.dial(0.0))
    second = sample(loaded, [b for _, b in pairs], n=1, temperature=0, max_new_tokens=30)
    assert sampling.decode(*loaded, pairs, rule, 1, 30, 1, 6, dtype="float32") == second
    half = sampling.sampler(0, combine=sampling.dial(0.5))
    assert sampling.decode(*loaded, pairs, half, 1, 30, 1, 6, dtype="float32") == [
        [_by_hand(*loaded, *pair, 30)] for pair in pairs]


def _by_hand(model, tokenizer, first: str, second: str, new: int) -> str:
    """Greedy over the mean of two log-probabilities, every token computed from scratch."""
    both = [tokenizer(tokenizer.bos_token + p, add_special_tokens=False)["input_ids"] for p in (first, second)]
    said = []
    for _ in range(new):
        with torch.inference_mode():
            a, b = (model(torch.tensor([ids + said])).logits[0, -1].log_softmax(-1) for ids in both)
        said.append(int((a + b).argmax()))
        if said[-1] == tokenizer.eos_token_id:
            break
    return tokenizer.decode(said, skip_special_tokens=True)


def test_begin_token_is_not_doubled(loaded):
    tokenizer = loaded[1]
    assert sampling._encode(tokenizer, "The") == sampling._encode(tokenizer, "<|end|>The")
    assert sampling._encode(tokenizer, "The").count(tokenizer.bos_token_id) == 1


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # peft's
def test_a_light_copy_holds_the_adapter_and_leaves_the_model_alone(policy):
    model, _ = models.load_policy(policy)
    lora = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
    model = get_peft_model(model, lora).eval()
    before = {name: p.clone() for name, p in model.named_parameters()}
    ids = torch.arange(12)[None]
    light, _ = sampling._fast(model, "bfloat16")
    assert next(light.parameters()).dtype == torch.bfloat16
    assert light.model.rotary_emb.inv_freq.dtype == torch.float32
    with torch.inference_mode():
        gap = (light(ids).logits.float() - model(ids).logits).abs().max()
    assert gap < 0.1 * model(ids).logits.std()
    assert sampling._fast(model, "float32")[0] is model
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_every_end_token_counts(loaded):
    model, tokenizer = loaded
    named = SimpleNamespace(generation_config=SimpleNamespace(eos_token_id=[7, 0]))
    assert sampling._ends(named, tokenizer).tolist() == [0, 7]
    assert sampling._ends(model, tokenizer).tolist() == [0]
