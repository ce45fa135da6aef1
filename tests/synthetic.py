"""A file in AlignX's format of any size, in which every flaw is planted and counted."""

import json
from pathlib import Path
from random import Random
from typing import NamedTuple

DIRECTION = json.dumps([(0, 0.5, 1)[k % 3] for k in range(90)])
SHOT = ('{"prompt": "Post %d-%d: what next?", "chosen": "I would take path %d in case %d-%d.", '
        '"rejected": "Rather path %d in case %d-%d."}')
ROW = ('{"prompt": "Post %d: what shall I do about it?", "chosen": "%s", "rejected": "%s", "Preference Direction": '
       + DIRECTION + ', "Demographic Information": "Person %d likes path %d.", "User-Generated Content": [{"prompt": '
       '"Post %d-u", "comment": "%s"}], "Pair-wise Comparative Feedback": [%s]}')


class Planted(NamedTuple):
    """How many there are of what."""

    rows: int
    copies: int  # rows that are there twice
    leaks: int  # test pairs that somebody else's history holds
    told: int  # test answers that stand in a comment of the person's own
    longer: int  # good rows whose chosen answer is the longer one
    good: int


def write_alignx(path: Path, n: int, seed: int = 17, share: float = 0.002, longer_share: float = 0.7) -> Planted:
    """n rows, of which `share` are copies, another leak into the next row's history, a third into a comment."""
    random, few = Random(seed), max(1, int(n * share))
    copied, leaked, told = (set(ids) for ids in _apart(random, n - few, 3, few))
    lines, wins, good, before = [], 0, 0, {}
    with path.open("w") as file:
        for i in range(n - few):
            long = random.random() < longer_share
            chosen, rejected = f"My advice in case {i} is to take the first path of all", f"In case {i} wait"
            chosen, rejected = (chosen, rejected) if long else (rejected, chosen)
            shots = [SHOT % (i, k, k, i, k, k + 1, i, k) for k in range(4)]
            if i - 1 in leaked:
                shots[0] = json.dumps({"prompt": f"Post {i - 1}: what shall I do about it?", **before})
            before = {"chosen": chosen, "rejected": rejected}
            comment = f"As I said, my advice in case {i} is clear." if i not in told else (chosen if long else rejected)
            line = ROW % (i, chosen, rejected, i, i % 7, i, comment, ", ".join(shots))
            file.write(line + "\n")
            lines += [line] if i in copied else []
            is_good = i not in leaked and i not in told
            wins, good = wins + (long and is_good), good + is_good
        file.writelines(line + "\n" for line in lines)
    return Planted(n, few, few, few, wins, good)


def _apart(random: Random, n: int, parts: int, each: int) -> list[list[int]]:
    """Disjoint draws; the last row has no next one."""
    ids = random.sample(range(n - 1), parts * each)
    return [ids[k * each:(k + 1) * each] for k in range(parts)]
