"""The arithmetic of a projection against what a laptop run really had: its tables counted, seed 17."""

import pytest

from helpers import projection
from helpers.config import load_profile


@pytest.fixture(scope="module")
def laptop():
    return load_profile("laptop")


def amounts(cfg, stage):
    rows = projection.work(cfg).query("stage == @stage")
    return dict(zip(rows["unit"], rows["amount"], strict=True))


def test_counts_are_those_of_the_tables_of_a_laptop_run(laptop):
    # 11 axes of 5; five people are on two of them. 50 * 12 personal + 11 * 20 divergent questions = 820, 24 answers
    # each; 50 * 12 + 55 * 20 = 1700 tournaments of 3; train 50 * (6 + 10), test 50 * 6 + 55 * 10
    assert projection.counts(laptop) == (50, 55, 11, 10, 820, 19680, 5100, 800, 850)


def test_work_of_the_notebooks_without_a_loss(laptop):
    # scored pairs of the tables: 06: 850 * 26; 10: 850 * 40; winrates 5,100 in requests of 5; 700 generations
    assert amounts(laptop, "06_prompting")["pair scored"] == 22100
    assert amounts(laptop, "10_prefix_sensitivity")["pair scored"] == 34000
    assert amounts(laptop, "12_generation")["judge"] == 1020
    assert amounts(laptop, "12_generation")["reply"] == 700
    assert amounts(laptop, "05_prefixes") == {
        "notebook": 1, "models": 1, "figure": 5, "statistic": 6, "prefixes": 250, "persona": 150, "selection": 820,
        "picked": 1700,
        "pair encoded": 850 * (15 + 7 * 6)}  # 15 written: 1 tag, 5 few_shot, 3 + 3 inferred, 2 gold, 1 name; 6 are main
    assert amounts(laptop, "04_preferences")["judge_lab"] == 432
    assert amounts(laptop, "13_alignment_tax")["evaluation"] == 59  # 1 + 28 + 2 * 15


def test_adapters_are_exact_and_their_pairs_an_upper_bound(laptop):
    personal, everybody = amounts(laptop, "08_personal_models"), amounts(laptop, "09_multitask")
    assert personal["adapter"] == 40
    assert everybody["adapter"] == 66  # 28 mt, 2 with losers, 2 noisy, 10 vpl, 12 small, 12 without some axes
    # trained on: 11851 + 1064 + 846 + 4232 of everybody and 2628 without some axes, 3 epochs; 939 small, 5
    assert 1 <= everybody["pair trained"] / (3 * (11851 + 1064 + 846 + 4232 + 2628) + 5 * 939) < 1.3
    assert personal["pair trained"] == pytest.approx(260 * 10, rel=0.05)
    # of the small set's ten, who are on more axes than most: 18 train and 18 test pairs each, where the others have 16 and 17
    assert personal["pair scored"] == pytest.approx(180 * 3 + 3600 + 10 * (18 + 2 * 18), rel=0.1)
    # the table of scores: 28, 2, 2 and 10 times 425, 1080 and 5490; the references 7 * 800 + 850; and the validations
    assert everybody["pair scored"] == pytest.approx(42 * 425 + 1080 + 5490 + 6450 + 1400, rel=0.1)


def test_a_stage_takes_its_units_times_their_cost(laptop):
    costs = {"notebook": {"seconds": 4.0, "memory_mb": 100.0}, "figure": {"seconds": 0.5},
             "answer": {"seconds": 0.01, "memory_mb": 300.0, "disk_mb": 0.001},
             "judge": {"tokens_in": 100.0, "tokens_out": 10.0}}
    table = projection.project(laptop, costs, {"input": 2.0, "output": 8.0}).set_index("stage")
    # 4 + 2 * 0.5 + 19680 * 0.01 / 2 workers; memory of two workers and the kernel
    assert table.loc["03_responses", "seconds"] == pytest.approx(103.4)
    assert table.loc["03_responses", "memory_mb"] == 700
    assert table.loc["01_personas", "memory_mb"] == 100
    assert table.loc["03_responses", "disk_mb"] == pytest.approx(19.68)
    # 2 * 1700 / 5 + 1700 / 5 = 1020 requests of 110 tokens: (100 * 2 + 10 * 8) / 1e6 dollars each
    assert table.loc["04_preferences", ["tokens", "cost_usd"]].tolist() == pytest.approx([112200, 0.2856])


def test_what_is_not_asked_for_costs_nothing(laptop):
    less = load_profile("laptop", ["schemes.names=[]", "vpl.shots=[]", "training.label_noise=[]", "prefixes.names=[none, tag]"])
    assert amounts(less, "09_multitask")["adapter"] == 2 * 4  # gold alone is trained with losers too
    assert "persona" not in amounts(less, "05_prefixes")
    assert amounts(less, "12_generation")["reply"] == 50 * (2 * 4 + 1)


def test_imported_pairs_are_counted_from_the_file(tmp_path):
    file = tmp_path / "pairs.jsonl"
    file.write_text("".join(f'{{"user": "u{u}", "prompt": "q{i}?", "chosen": "yes {i}", "rejected": "no {u}"}}\n'
                            for u in range(5) for i in range(20)))
    cfg = load_profile("smoke", [f"data.preferences={file}"])
    assert projection.counts(cfg)[:4] == (5, 5, 0, 5)
    assert projection.counts(cfg).train + projection.counts(cfg).test == 100
    assert amounts(cfg, "03_responses") == {"notebook": 1, "models": 1, "figure": 2, "statistic": 3}
