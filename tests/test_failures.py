"""What fails half-way ends in one clear message and leaves what is finished: full disk, no memory, NaN."""

import errno
import resource
import signal
import subprocess
import sys
import textwrap
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from tiny import Training

from helpers import ROOT, decoder, dpo, models, scoring
from helpers.training import REFERENCE, Cell, train_adapter

FOLDS = 'pd.DataFrame({"scheme": "stratified", "fold": range(%d), "persona_id": [f"p{i}" for i in range(%d)]})'


def limited(code: str, size: int) -> subprocess.CompletedProcess:
    """Python code in a process that may write no file larger than `size` bytes: what a full disk is to a program."""
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))  # noqa: E731
    return subprocess.run([sys.executable, "-B", "-c", textwrap.dedent(code)], cwd=ROOT, text=True, capture_output=True,
                          preexec_fn=limit, env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"})


def test_a_full_disk_leaves_the_old_table_whole_and_no_scratch_file(store):
    small, large = FOLDS % (3, 3), FOLDS % (20_000, 20_000)
    done = limited(f"""
        from pathlib import Path
        import pandas as pd
        from helpers.artifacts import open_run
        store = open_run("smoke", "test", runs=Path({str(store.path.parent)!r}))
        store.write("folds", {small})
        try:
            store.write("folds", {large})
        except OSError as error:
            print(error.errno, store.read("folds").shape)
        """, 8192)
    assert done.stdout.split() == [str(errno.EFBIG), "(3,", "3)"], done.stderr
    assert [path.name for path in (store.path / "tables").iterdir()] == ["folds.parquet"]


def test_a_full_disk_ends_the_runner_with_one_message_and_no_traceback(tmp_path):
    done = limited(f"""
        from pathlib import Path
        from helpers import artifacts, run
        artifacts.RUNS = Path({str(tmp_path)!r})
        raise SystemExit(run.main(["smoke", "--only", "11"]))
        """, 10)
    assert done.returncode == 1
    assert "see to it that there is room on the disk, then give the same command again" in done.stderr
    assert "Traceback" not in done.stderr
    assert [path.name for path in (tmp_path / "smoke").iterdir() if path.is_file()] == []


def test_death_in_the_middle_of_a_write_leaves_no_half_of_what_vpl_reads(policy, tmp_path):
    """SIGXFSZ ends the process at the byte that no longer fits, and nothing of Python's cleans up after it."""
    done = limited(f"""
        import signal, sys
        from pathlib import Path
        from helpers import training
        sys.path[:0] = ["tests"]
        from test_vpl import make_preferences
        from tiny import Policy
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
        training.write_pool(make_preferences(), Policy({policy.path!r}), "left", Path({str(tmp_path / "pool.parquet")!r}))
        """, 1000)
    assert done.returncode == -signal.SIGXFSZ, done.stderr
    (left,) = tmp_path.iterdir()
    assert left.name.startswith(".pool.parquet.")  # a scratch file: it was writing
    assert left.stat().st_size <= 1000


class Small:
    """A device with little memory: a decoder, transformers' or ours, raises what CUDA raises above so many tokens a batch."""

    def __init__(self, monkeypatch, model: torch.nn.Module, most: int, ours: bool) -> None:
        self.most, self.seen, self.refused = most, [], 0
        whole, call = model.model.forward, decoder.Decoder.__call__
        if ours:
            monkeypatch.setattr(decoder.Decoder, "__call__",
                                lambda self, batch, mask, past=None: limit(mask) or call(self, batch, mask, past))
        else:  # and ours leaves a decoder with a forward of its own alone
            model.model.forward = lambda *args, **kwargs: limit(kwargs["attention_mask"]) or whole(*args, **kwargs)

        def limit(mask: torch.Tensor) -> None:
            tokens = mask.shape[0] * mask.shape[-1]
            if tokens > self.most:
                self.refused += 1
                raise torch.OutOfMemoryError(f"CUDA out of memory: {tokens} tokens")
            self.seen.append(tokens)


@pytest.fixture
def fresh(policy):
    return models.load_policy(policy)


PROMPTS = [("", f"Question {i}: what shall I cook?\nAnswer:") for i in range(8)]
ONE, OTHER = [f"stew number {i}" for i in range(8)], [f"roast {i}" for i in range(8)]


@pytest.mark.parametrize("ours", [False, True])
def test_scoring_halves_the_batch_until_it_fits_says_so_and_finds_the_same(fresh, capsys, monkeypatch, ours):
    model, tokenizer = fresh
    whole = scoring.score_pairs(model, tokenizer, PROMPTS, ONE, OTHER, token_budget=4096)
    device = Small(monkeypatch, model, 200, ours)
    found = scoring.score_pairs(model, tokenizer, PROMPTS, ONE, OTHER, token_budget=4096)
    assert device.refused > 0
    assert max(device.seen) <= 200
    assert "out of memory on the cpu with 4096 tokens a batch: going on with 2048" in capsys.readouterr().out
    np.testing.assert_allclose(found[["logp_chosen", "logp_rejected"]], whole[["logp_chosen", "logp_rejected"]], atol=1e-4)


@pytest.mark.parametrize("ours", [False, True])
def test_a_single_row_that_does_not_fit_is_still_an_error(fresh, monkeypatch, ours):
    model, tokenizer = fresh
    Small(monkeypatch, model, 10, ours)
    with pytest.raises(torch.OutOfMemoryError, match="tokens"):
        scoring.score_pairs(model, tokenizer, PROMPTS[:2], ONE[:2], OTHER[:2])


@pytest.fixture
def cell(policy, tmp_path):
    rows = pd.DataFrame({"head": "", "tail": [tail for _, tail in PROMPTS], "chosen": ONE, "rejected": OTHER,
                         "pair_id": [f"p01:q{i}" for i in range(8)]}).assign(**dict.fromkeys(REFERENCE, -20.0))
    (tmp_path / "out").mkdir()
    return Cell("mt", tmp_path / "out", policy, Training(epochs=1, batch_size=8), 0, rows, rows)


def trained(model, tokenizer, cell, out):
    with models.peft_quiet():
        return train_adapter(model, tokenizer, cell, out)


def weights(model) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for n, p in model.named_parameters() if "lora" in n])


@pytest.mark.parametrize("ours", [False, True])
def test_training_halves_too_and_learns_the_same(cell, policy, capsys, monkeypatch, ours):
    plain, _ = trained(*models.load_policy(policy), cell, cell.out)
    base, tokenizer = models.load_policy(policy)
    device = Small(monkeypatch, base, 200, ours)
    halved, _ = trained(base, tokenizer, cell, cell.out)
    assert device.refused > 0
    assert "going on with" in capsys.readouterr().out
    torch.testing.assert_close(weights(halved), weights(plain), atol=2e-3, rtol=0)


def test_halves_keep_every_row_once_and_what_has_no_row_twice():
    batch = dpo.pack([[1, 2], [3, 4], [5, 6]], [[[7], [8]]] * 3) | {"of": torch.tensor(3), "ids": ["a", "b", "c"]}
    one, two = dpo.halves(batch)
    assert (one["ids"], two["ids"]) == (["a", "b"], ["c"])
    torch.testing.assert_close(torch.cat([one["input_ids"], two["input_ids"]]), batch["input_ids"])
    assert one["of"] == two["of"] == 3


def test_a_nan_loss_stops_with_the_pairs_and_what_to_do(cell, policy):
    broken = cell.train.assign(ref_chosen_logps=[-20.0] * 7 + [float("nan")])
    with pytest.raises(FloatingPointError, match=r"the loss is nan at update 0 for the pairs .*p01:q7") as error:
        trained(*models.load_policy(policy), replace(cell, train=broken), cell.out)
    assert "lower training.learning_rate" in str(error.value)
    assert not list(cell.out.glob("adapter_model*"))


def test_a_nan_score_is_refused_not_counted_as_wrong(fresh):
    model, tokenizer = fresh
    with torch.no_grad():
        model.model.norm.weight.fill_(float("nan"))
    with pytest.raises(FloatingPointError, match=r"pair 0 of 8 \(chosen: 'stew number 0'\).*not finite"):
        scoring.score_pairs(model, tokenizer, PROMPTS, ONE, OTHER)
