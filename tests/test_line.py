import torch

from helpers import dpo, line


def test_by_hand():
    # prompts 7 8 9, 7 8 6 5 and 7 8 9 4: each row keeps its last prompt token for the answers; 7 8 are common to all
    batch = dpo.pack([[7, 8, 9], [7, 8, 6, 5], [7, 8, 9, 4]], [[[1, 2], [3]], [[1], [2]], [[3], [1]]], multiple=1)
    assert batch["input_ids"].tolist() == [[7, 8, 9, 1, 9], [7, 8, 6, 5, 5], [7, 8, 9, 4, 4]]
    made = line.Line(batch)
    # row 0: 7 8 | 9 1 | 9; of row 1: 6 | 5 | 5; of row 2: 9 | 4 | 4: its 9 is a prompt's, that of row 0 an answer's first
    assert made.tokens[:11].tolist() == [0, 1, 2, 3, 4, 7, 8, 9, 12, 13, 14]
    assert made.rows.slots.tolist() == [[0, 1, 2, 3, 4], [0, 1, 5, 6, 7], [0, 1, 8, 9, 10]]
    assert made.tokens[11:].tolist() == [0] * (line.LINE - 11)
    assert made.wanted == 7
    assert made.answers[:7].tolist() == [2, 3, 4, 6, 7, 9, 10]
    assert made.places[:, :3].tolist() == [[2, 3, 4], [3, 4, 4], [3, 4, 4]]


def test_rows_behind_different_heads_and_soft_tokens_are_not_shared():
    batch = dpo.pack([[7, 8, 9]] * 3, [[[1]]] * 3, multiple=1)
    assert line.Line(batch).rows.slots.tolist() == [[0, 1, 2], [0, 1, 3], [0, 1, 4]]
    behind = line.Line(batch, torch.tensor([0, 1, 0]))
    assert behind.rows.slots.tolist() == [[0, 1, 2], [3, 4, 5], [0, 1, 6]]
    soft = dpo.pack([[7, line.SOFT, 9]] * 2, [[[1]]] * 2, multiple=1)
    assert line.Line(soft).rows.slots.tolist() == [[0, 1, 2], [0, 3, 4]]


def test_the_way_there_and_back():
    batch = dpo.pack([[7, 8, 9], [7, 8, 6, 5]], [[[1, 2], [3]], [[1], [2]]])
    made, heads, d = line.Line(batch), 4, 3
    (n, length), tokens = made.rows.slots.shape, len(made.tokens)
    x = torch.randn(tokens, heads, d)
    spread = made.rows.spread(heads).take(x.view(-1, d)).view(n, heads, length, d)
    assert torch.equal(spread, x[made.rows.slots].transpose(1, 2))
    kinds = made.rows.spread(heads, 2).take(x.view(-1, d)).view(2, n, heads // 2, length, d)
    assert torch.equal(kinds, torch.stack([spread[:, :2], spread[:, 2:]]))
    assert torch.equal(made.rows.collect(heads).take(spread.reshape(-1, d)).view(tokens, heads, d), x[made.rows.slots.flatten()[
        made.rows.taken]])
    # each way back of a gradient is the transpose of the way there
    for places in (made.rows.spread(heads), made.rows.spread(heads, 2), made.ends.collect(heads)):
        a, b = torch.randn(places.size, d), torch.randn(len(places.index), d)
        torch.testing.assert_close((places.take(a) * b).sum(), (a * places.give(b)).sum())
