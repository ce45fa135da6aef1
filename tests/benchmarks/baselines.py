"""What people use today, on the same rows: RewardBench's way of scoring, and trl's DPOTrainer as it comes."""

from pathlib import Path

import pandas as pd
import torch
from datasets import Dataset
from torch.nn.functional import log_softmax
from torch.nn.utils.rnn import pad_sequence
from trl import DPOConfig, DPOTrainer

from helpers import models, training

STOCK = {  # nothing set, or all the flags that help
    "trl, defaults": {},
    "trl, best flags": {"precompute_ref_log_probs": True, "activation_checkpointing": False},
}


@torch.inference_mode()
def rewardbench(model: torch.nn.Module, tokenizer, rows: pd.DataFrame, answers: list[str], batch: int = 6,
                half: bool = False) -> torch.Tensor:
    """Mean log-probability of each answer's tokens [n, K], by RewardBench's procedure for DPO models.

    Batches of 6 rows in the order of arrival (Appendix H), a sequence for every answer with the prompt in front
    of it, padded to the longest, one log-softmax over all positions and the whole vocabulary, then the average
    over the answer's tokens (`avg`, which the paper uses). In the precision of the loaded weights, which on a CPU is
    float32; half: in bfloat16 as the kit, so that the procedure alone makes the difference.
    """
    found = []
    for start in range(0, len(rows), batch):
        part, sequences, lengths = rows.iloc[start:start + batch], [], []
        for answer in answers:
            for head, tail, text in zip(part["head"], part["tail"], part[answer], strict=True):
                pieces = [tokenizer(piece, add_special_tokens=False)["input_ids"] for piece in (head, tail, f" {text}")]
                prompt = [tokenizer.bos_token_id, *pieces[0], *pieces[1]]
                sequences.append(torch.tensor(prompt + pieces[2] + [tokenizer.eos_token_id]))
                lengths.append(len(prompt))
        ids = pad_sequence(sequences, batch_first=True, padding_value=tokenizer.pad_token_id).to(model.device)
        mask = pad_sequence([torch.ones_like(s) for s in sequences], batch_first=True).to(model.device)
        with models.autocast(model, "auto" if half else "float32"):
            logits = model(input_ids=ids, attention_mask=mask).logits
        logps = log_softmax(logits[:, :-1].float(), -1).gather(2, ids[:, 1:, None])[:, :, 0]
        at = torch.arange(1, ids.shape[1], device=ids.device)
        own = mask[:, 1:].bool() & (at >= torch.tensor(lengths, device=ids.device)[:, None])
        found.append(((logps * own).sum(1) / own.sum(1)).view(len(answers), -1).T.cpu())
    return torch.cat(found)


def stock_trl(model: torch.nn.Module, tokenizer, rows: pd.DataFrame, t, out: Path, flags: dict) -> None:
    """DPO with trl's own trainer and an adapter of ours; reference passes included."""
    begin = tokenizer.bos_token
    data = Dataset.from_dict({"prompt": (begin + rows["head"] + rows["tail"]).tolist(),
                              "chosen": (" " + rows["chosen"]).tolist(),
                              "rejected": (" " + rows["rejected"]).tolist()})
    gpu = torch.cuda.is_available()
    args = DPOConfig(output_dir=str(out), beta=t.beta, learning_rate=t.learning_rate, num_train_epochs=t.epochs,
                     per_device_train_batch_size=t.batch_size, warmup_steps=t.warmup, save_strategy="no",
                     lr_scheduler_type="linear", report_to="none", disable_tqdm=True, max_length=None,
                     bf16=models.bf16_available(), use_cpu=not gpu, dataloader_pin_memory=gpu, **flags)
    DPOTrainer(model=model, args=args, processing_class=tokenizer, train_dataset=data,
               peft_config=training.lora(t)).train()
