"""How fast, against what people use today: scoring, training, growth, distance from the limit, memory, where time goes.

    ./run_all.sh bench                         # laptop shapes, about half an hour; updates the README's table
    ./run_all.sh bench --shape 7b              # on a GPU: random weights of a 7B model, in bfloat16 and in 4-bit
    ./run_all.sh bench --shape tiny            # the same command's rehearsal on any CPU
    ./run_all.sh bench --parts growth memory   # a part alone; the README keeps its table (--out FILE keeps the numbers)

All methods run in one process on the same rows, in turns; ratios are medians over the repetitions. Memory and growth
are measured in a process of their own each, because a peak never goes down again; growth in seconds of processor, which
others on the machine leave as they are.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pandas as pd
import torch
from tqdm.auto import tqdm

from helpers import ROOT, models, scoring, training
from helpers.config import load_profile
from helpers.memory import peak_mb

sys.path.insert(0, str(Path(__file__).parent))
import baselines  # noqa: E402  (they lie beside this file, which is run as a script)
import rows as made  # noqa: E402

OUT = ROOT / "data/reference/benchmarks.csv"
PREFIXES = ("persona_gold", "few_shot")
MARKS = ("<!-- benchmarks -->", "<!-- end of benchmarks -->")
GROWTH = {"scoring": (1000, 4000, 16000), "training": (128, 512, 2048)}
PARTS = ("scoring", "training", "profile", "growth", "memory")
PRODUCTS = {f"aten::{name}" for name in ("mm", "addmm", "addmm_", "bmm", "baddbmm")}
HOURS_OF_PAPER = 12.0  # GPU hours of a model (Appendix H)


def main() -> None:
    args = _arguments()
    torch.set_num_threads(args.threads)
    os.environ["ONEDNN_PRIMITIVE_CACHE_CAPACITY"] = "1024"  # oneDNN's own: others are not to suffer from the kit's
    if args.one and "this kit" in json.loads(args.one):
        del os.environ["ONEDNN_PRIMITIVE_CACHE_CAPACITY"]
    if args.one:
        print(json.dumps(alone(*json.loads(args.one), args)))
        return
    found = []
    with tempfile.TemporaryDirectory() as folder:
        for cfg in policies(args, Path(folder)):
            found += [part(cfg, args) for name, part in SPEEDS.items() if name in args.parts]
    if args.shape == "laptop":
        found += [part(args) for name, part in (("growth", growth), ("memory", memory)) if name in args.parts]
    table = pd.concat(found, ignore_index=True).assign(**made.machine())
    print(table.drop(columns=list(made.machine())).to_string(index=False))
    print(made.describe())
    if args.shape == "7b" and "training" in args.parts:
        print(projection(table))
    if set(args.parts) < set(PARTS) and args.out == OUT:
        return
    args.out.parent.mkdir(parents=True, exist_ok=True)
    table.to_csv(args.out, index=False)
    print(f"wrote {args.out}")
    if args.out == OUT:
        into_readme(table)


def into_readme(table: pd.DataFrame) -> None:
    """Put the ratios between README's two marks, with the machine named."""
    readme = ROOT / "README.md"
    before, rest = readme.read_text().split(MARKS[0])
    behind = rest.split(MARKS[1])[1]
    rows = table[table["ratio"].notna() & (table["method"] != "this kit")]
    kit = table[table["benchmark"].isin(rows["benchmark"]) & (table["method"] == "this kit")]
    kit = kit.set_index(["benchmark", "prefix"])["per_second"]
    about = made.machine()
    lines = ["| | prefix | against | its pairs or questions a second | ours | times as fast |", "|---|---|---|---|---|---|"]
    lines += [f"| {r.benchmark} | {r.prefix} | {r.method} | {r.per_second:.0f} | {kit[r.benchmark, r.prefix]:.0f} | "
              f"{r.ratio:.1f} |" for r in rows.itertuples()]
    told = f"Medians on {about['machine']}, {about['threads']} threads, torch {about['torch']}; seconds of wall, one process."
    told = [told, *told_profile(table), *told_growth(table)]
    readme.write_text("\n".join([before + MARKS[0], *lines, "", *told, MARKS[1]]) + behind)


def told_profile(table: pd.DataFrame) -> list[str]:
    """Where the seconds of a training go, in a sentence for each prefix."""
    lines = []
    for prefix, rows in table[table["benchmark"] == "training, where time goes"].groupby("prefix", sort=False):
        share = (rows.set_index("method")["seconds"] / rows["seconds"].sum()).map("{:.0%}".format)
        lines.append(f"Of a training's seconds behind {prefix}, {share['matrix products']} are matrix products, at "
                     f"{rows['of_machine'].iloc[0]:.0%} of the speed of a large one; {share['other operations']} other "
                     f"operations, and {share['around them']} Python around them.")
    return lines


def told_growth(table: pd.DataFrame) -> list[str]:
    """What a pair costs among many pairs, in sentences."""
    lines = []
    for what in ("scoring", "training"):
        rows = table[(table["benchmark"] == f"{what}, growth") & table["prefix"].str.endswith(" x1")]
        if len(rows):
            lines.append(f"A pair's {what} among {rows['n'].max():.0f} pairs costs {rows['ratio'].iloc[-1]:.2f} times what it "
                         f"costs among {rows['n'].min():.0f}, and the process peaks at {rows['peak_mb'].iloc[-1]:.0f} MB "
                         f"against {rows['peak_mb'].iloc[0]:.0f} MB.")
    return lines


def policies(args: argparse.Namespace, folder: Path) -> list:
    """The profile whose policy is timed; for another shape one for each precision it is timed in."""
    cfg = load_profile("laptop")
    if args.shape == "laptop":
        return [cfg]
    path = made.make_policy(args.shape, folder)
    bits = [False, True] if torch.cuda.is_available() else [False]
    t = cfg.training.model_copy(update={"batch_size": 40, "epochs": 1})  # the paper's batch
    at = [cfg.policy.model_copy(update={"path": path, "dtype": "bfloat16", "load_in_4bit": four, "max_length": 1024})
          for four in bits]
    return [cfg.model_copy(update={"policy": policy, "training": t}) for policy in at]


def scoring_speed(cfg, args: argparse.Namespace) -> pd.DataFrame:
    """(a) and (d): pairs, and questions with four answers, through RewardBench's procedure and through ours."""
    model, tokenizer = models.load_policy(cfg.policy)
    peak, size, tables = matrix_product(model.device), _weights(model), []
    for prefix in PREFIXES:
        for k, name in ((2, "scoring, pairs"), (4, "scoring, four answers")):
            rows = made.make_rows(prefix, args.pairs, seed=k, times=args.times)
            plain = partial(baselines.rewardbench, model, tokenizer, rows, made.ANSWERS[:k])
            ways = {"RewardBench": plain, "RewardBench in bfloat16": partial(plain, half=True),
                    "this kit": partial(ours, model, tokenizer, rows, made.ANSWERS[:k], cfg)}
            _check_equal(ways)
            table = compare(ways, len(rows), args.repeats)
            need = 2 * size * needed_tokens(tokenizer, rows, made.ANSWERS[:k])
            table["of_machine"] = (need / table["seconds"] / peak).round(3)
            tables.append(table.assign(benchmark=name, prefix=prefix, **_precision(cfg)))
    return pd.concat(tables)


def ours(model, tokenizer, rows: pd.DataFrame, answers: list[str], cfg) -> torch.Tensor:
    """Mean log-probabilities [n, K] as the kit computes them."""
    prompts = list(zip(rows["head"], rows["tail"], strict=True))
    asked = scoring.encode(tokenizer, prompts, rows[answers].to_numpy().tolist(), cfg.policy.max_length)
    sums = torch.from_numpy(scoring.answer_sums(model, asked)).view(len(rows), -1)
    return sums / torch.tensor([[len(answer) for answer in one.answers] for one in asked])


def training_speed(cfg, args: argparse.Namespace) -> pd.DataFrame:
    """(b) and (d): the same pairs through trl's trainer, as it comes and at its best, and through ours.

    On a CPU with one thread too, as in the kit's grid, which trains an adapter on every core.
    """
    counts = [args.threads] if torch.cuda.is_available() else dict.fromkeys((args.threads, 1))
    tables = [_training_speed(cfg, args, threads) for threads in counts]
    torch.set_num_threads(args.threads)
    return pd.concat(tables)


def _training_speed(cfg, args: argparse.Namespace, threads: int) -> pd.DataFrame:
    torch.set_num_threads(threads)
    name, tables = "training" if threads == args.threads else "training, one thread", []
    for prefix in PREFIXES:
        with tempfile.TemporaryDirectory() as folder:
            rows, out = made.make_rows(prefix, args.pairs, seed=1, times=args.times), Path(folder)
            ways = {name: partial(_stock, rows, cfg, out, flags) for name, flags in baselines.STOCK.items()}
            ways["this kit"] = partial(_train, rows, cfg, out)
            table = compare(ways, len(rows) * cfg.training.epochs, args.repeats)
        model, tokenizer = models.load_policy(cfg.policy)
        need = _weights(model) * needed_tokens(tokenizer, rows, made.ANSWERS[:2]) * (4 * cfg.training.epochs + 2)
        table["of_machine"] = (need / table["seconds"] / matrix_product(model.device)).round(3)
        tables.append(table.assign(benchmark=name, prefix=prefix, **_precision(cfg)))
    return pd.concat(tables)


def where_time_goes(cfg, args: argparse.Namespace) -> pd.DataFrame:
    """Seconds of a training in matrix products, in torch's other operations, and around them; on a CPU.

    of_machine: of the products, what share of the operations a second they reach that a large product reaches here.
    """
    if torch.cuda.is_available():
        return pd.DataFrame()
    from torch.profiler import ProfilerActivity, profile

    prefix, peak = PREFIXES[0], matrix_product(torch.device("cpu"))  # no other: a process that was profiled stays slower
    rows = made.make_rows(prefix, args.pairs, seed=1, times=args.times)
    with tempfile.TemporaryDirectory() as folder:
        train = partial(_train, rows, cfg, Path(folder))
        train()
        whole = min(timed(train) for _ in range(3))
        with profile(activities=[ProfilerActivity.CPU], with_flops=True) as seen:
            train()
    events = [(event.key in PRODUCTS, event.self_cpu_time_total / 1e6, event.flops)
              for event in seen.key_averages() if event.key.startswith("aten::")]
    products, others = (sum(seconds for is_one, seconds, _ in events if is_one == kind) for kind in (True, False))
    parts = {"matrix products": products, "other operations": others, "around them": max(0.0, whole - products - others)}
    table = pd.DataFrame({"method": list(parts), "seconds": [round(seconds, 3) for seconds in parts.values()]})
    flops = sum(flops for is_one, _, flops in events if is_one)
    table["of_machine"] = [round(flops / products / peak, 3), float("nan"), float("nan")]
    return table.assign(benchmark="training, where time goes", prefix=prefix, **_precision(cfg))


SPEEDS = {"scoring": scoring_speed, "training": training_speed, "profile": where_time_goes}  # the last one slows the process


def compare(ways: dict[str, Callable], n: int, repeats: int) -> pd.DataFrame:
    """Seconds (median), what is done in a second, and how many times slower than the last of `ways` (median).

    The ways take turns; the first round warms up and is left out.
    """
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in tqdm(range(repeats + 1), desc="rounds"):
        for name, way in ways.items():
            seconds[name].append(timed(way))
    table = pd.DataFrame(seconds).iloc[1:]
    ratio = table.div(table.iloc[:, -1], axis=0).median()
    return pd.DataFrame({"method": list(ways), "seconds": table.median().round(3).tolist(),
                         "per_second": (n / table.median()).round(1).tolist(), "ratio": ratio.round(2).tolist()})


def growth(args: argparse.Namespace) -> pd.DataFrame:
    """(c): does a pair cost the same among more pairs, and how does it grow with the prefix? ratio: of the first row's cost.

    From the smallest to the largest and back, so that a machine that slows down meanwhile does not count; means of the two.
    """
    sizes = {what: [(n, 1) for n in many] + [(many[0], 4)] for what, many in GROWTH.items()}
    tables = []
    for what, many in sizes.items():
        both = pd.DataFrame([_in_a_process(what, "this kit", "persona_gold", n, times, args)
                             for n, times in (*many, *reversed(many))])
        table = both.groupby(["method", "prefix", "n"], sort=False, as_index=False)[["seconds", "peak_mb"]].mean().round(3)
        table["per_second"] = (table["n"] / table["seconds"]).round(1)
        tables.append(table.assign(benchmark=f"{what}, growth", ratio=(table["per_second"][0] / table["per_second"]).round(2)))
    return pd.concat(tables)


def memory(args: argparse.Namespace) -> pd.DataFrame:
    """(e): the highest memory of each way, with its model, in a process of its own."""
    ways = [("scoring", name) for name in ("RewardBench", "this kit")]
    ways += [("training", name) for name in (*baselines.STOCK, "this kit")]
    found = [_in_a_process(what, name, "few_shot", args.pairs, 1, args) for what, name in ways]
    return pd.DataFrame(found).assign(benchmark=lambda t: t["benchmark"] + ", memory")


def alone(what: str, method: str, prefix: str, n: int, times: int, args: argparse.Namespace) -> dict:
    """One way once, after a warm-up, in this process: seconds of processor (of a GPU: of wall), peak memory."""
    cfg = load_profile("laptop")
    rows = made.make_rows(prefix, n, seed=1, times=times)
    with tempfile.TemporaryDirectory() as folder:
        way = _way(what, method, cfg, Path(folder))
        way(rows.head(32))
        seconds = timed(partial(way, rows), time.perf_counter if torch.cuda.is_available() else time.process_time)
    peak = torch.cuda.max_memory_allocated() / 2**20 if torch.cuda.is_available() else peak_mb()
    return {"benchmark": what, "method": method, "prefix": f"{prefix} x{times}", "n": n, "seconds": round(seconds, 3),
            "per_second": round(n / seconds, 1), "peak_mb": round(peak)}


def needed_tokens(tokenizer, rows: pd.DataFrame, answers: list[str]) -> int:
    """Tokens that have to go through the model at least: each different prefix once, each question, each answer."""
    texts = [*rows["head"].unique(), *rows["tail"], *(text for name in answers for text in rows[name])]
    return sum(map(len, tokenizer(texts, add_special_tokens=False)["input_ids"])) + len(rows) * (len(answers) + 1)


def matrix_product(device: torch.device, n: int = 2048) -> float:
    """Operations a second of a large matrix product here, in the precision the models compute in."""
    dtype = torch.bfloat16 if models.bf16_available() else torch.float32
    a = torch.randn(n, n, device=device, dtype=dtype)
    a @ a
    return 2 * n**3 * 5 / timed(lambda: [a @ a for _ in range(5)])


def projection(table: pd.DataFrame) -> str:
    """Hours of the paper's grid (5 folds x 8 prefixes) at the measured pace, beside what the paper reports."""
    t, cfg = table[(table["benchmark"] == "training") & (table["method"] == "this kit")], load_profile("paper")
    pairs = 40 * 100 * cfg.training.epochs  # forty of fifty people, a hundred train pairs each
    lines = [f"{row.precision}, {row.prefix}: {pairs / row.per_second / 3600:.1f} hours a model, "
             f"{40 * pairs / row.per_second / 3600:.0f} for 5 x 8 (the paper: {HOURS_OF_PAPER:.0f} GPU hours a model)"
             for row in t.itertuples()]
    return "\n".join(lines)


def timed(work: Callable[[], object], clock: Callable[[], float] = time.perf_counter) -> float:
    """Seconds by the clock; on a GPU until all of its work is done."""
    sync = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    sync()
    start = clock()
    work()
    sync()
    return clock() - start


def _way(what: str, method: str, cfg, out: Path) -> Callable[[pd.DataFrame], object]:
    if what == "training":
        flags = baselines.STOCK.get(method)
        return lambda rows: _train(rows, cfg, out) if flags is None else _stock(rows, cfg, out, flags)
    model, tokenizer = models.load_policy(cfg.policy)
    if method == "RewardBench":
        return lambda rows: baselines.rewardbench(model, tokenizer, rows, made.ANSWERS[:2])
    return lambda rows: _score(model, tokenizer, rows, cfg)


def _stock(rows: pd.DataFrame, cfg, out: Path, flags: dict) -> None:
    baselines.stock_trl(*models.load_policy(cfg.policy), rows, cfg.training, out, flags)


def _train(rows: pd.DataFrame, cfg, out: Path) -> None:
    model, tokenizer = models.load_policy(cfg.policy)
    found = _score(model, tokenizer, rows, cfg)
    train = rows.assign(ref_chosen_logps=found["logp_chosen"], ref_rejected_logps=found["logp_rejected"])
    train = train.assign(pair_id=[f"pair{i}" for i in range(len(train))])
    cell = training.Cell("bench", out, cfg.policy, cfg.training, seed=0, score=rows.head(0), train=train)
    training.train_adapter(model, tokenizer, cell, out)


def _score(model, tokenizer, rows: pd.DataFrame, cfg) -> pd.DataFrame:
    return scoring.score_pairs(model, tokenizer, zip(rows["head"], rows["tail"], strict=True), rows["chosen"],
                               rows["rejected"], max_length=cfg.policy.max_length)


def _check_equal(ways: dict[str, Callable]) -> None:
    """Fast and different would be no achievement: all ways have to give the same scores."""
    first, *others = (way().float() for way in ways.values())
    worst = max((first - other).abs().max().item() for other in others)
    if worst > (0.1 if models.bf16_available() else 1e-4):
        raise SystemExit(f"the ways disagree by {worst:.4f} nats a token; nothing was timed")


def _in_a_process(*one: str | int | argparse.Namespace) -> dict:
    *what, args = one
    words = [sys.executable, __file__, "--one", json.dumps(what), "--threads", str(args.threads)]
    done = subprocess.run(words, capture_output=True, text=True, cwd=ROOT)
    if done.returncode:
        raise SystemExit(done.stderr)
    found = json.loads(done.stdout.splitlines()[-1])
    print(*found.values(), flush=True)
    return found


def _weights(model: torch.nn.Module) -> int:
    """Parameters that every token goes through: all but the embeddings and the head, which answers' tokens alone meet."""
    return sum(getattr(m.weight, "quant_state", None) and m.weight.quant_state.shape.numel() or m.weight.numel()
               for m in model.get_decoder().modules() if isinstance(m, torch.nn.Linear))


def _precision(cfg) -> dict[str, str]:
    return {"precision": "4-bit" if cfg.policy.load_in_4bit else cfg.policy.dtype}


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="./run_all.sh bench", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=["laptop", *made.SHAPES], default="laptop")
    parser.add_argument("--pairs", type=int, default=144)
    parser.add_argument("--times", type=int, default=1, help="how often the prefix's text stands in the prefix")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
