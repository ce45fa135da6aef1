"""Step 4: which answer would this person prefer? Tournaments put to the teacher (paper section 3, G.4).

Four candidates a question meet in three comparisons, single elimination. The bracket, and for each comparison
the order of showing, are drawn by a seed and recorded. A tie or an unparsable answer is asked again and then
left open: no coin decides anywhere.
"""

from dataclasses import asdict, dataclass, replace
from random import Random
from typing import TYPE_CHECKING

import pandas as pd
from pydantic import BaseModel, ConfigDict, Field

from helpers import prompts, splits

if TYPE_CHECKING:
    from helpers.llm import Answer, Request, Teacher

CANDIDATES = 4


class Verdict(BaseModel):
    """One pair: the reason first, then whether (a) wins; None is a tie."""

    model_config = ConfigDict(extra="forbid")
    explanation: str = Field(alias="Concise explanation")
    first_is_better: bool | None = Field(alias="Output (a) is better than Output (b)")


class Verdicts(BaseModel):
    """The judge's answer to one request: one verdict a pair, in their order."""

    model_config = ConfigDict(extra="forbid")
    verdicts: list[Verdict]


@dataclass
class Match:
    """One comparison: who judges which two responses (ids), and what came of it."""

    persona_id: str
    name: str
    question_id: str
    question: str
    round: int
    response_a: str
    response_b: str
    shown_first: str
    winner: str = ""
    asks: int = 0
    outcome: str = ""
    explanation: str = ""
    cost_usd: float = 0.0

    @property
    def shown_second(self) -> str:
        return self.response_b if self.shown_first == self.response_a else self.response_a

    def take(self, verdict: Verdict | None, cost_usd: float) -> None:
        """Note one answer; None is an unparsable one."""
        self.asks, self.cost_usd = self.asks + 1, self.cost_usd + cost_usd
        if verdict is None:
            self.outcome, self.explanation = "unparsable", ""
            return
        self.explanation = verdict.explanation
        self.outcome = "tie" if verdict.first_is_better is None else "clear"
        if self.outcome == "clear":
            self.winner = self.shown_first if verdict.first_is_better else self.shown_second


def judge(teacher: "Teacher", personas: pd.DataFrame, questions: pd.DataFrame, responses: pd.DataFrame, cfg,
          seed: int) -> pd.DataFrame:
    """The `comparisons` table: three rounds for every person and question of theirs that has four candidates.

    Rounds 1 and 2 are the semi-finals, 3 the final, which is held only if both have a winner. Batches of
    `judge.pairs_per_request` pairs are packed over all people in a seeded order.
    """
    texts = dict(zip(responses["response_id"], responses["text"], strict=True))
    semis = first_rounds(personas, questions, responses, seed)
    _settle(teacher, semis, texts, cfg, seed, "judging semi-finals")
    pairs = zip(semis[::2], semis[1::2], strict=True)
    finals = [_match(one, 3, one.winner, two.winner, seed) for one, two in pairs if one.winner and two.winner]
    _settle(teacher, finals, texts, cfg, seed, "judging finals")
    table = pd.DataFrame([asdict(match) for match in semis + finals]).drop(columns=["name", "question"])
    table = table.sort_values(["persona_id", "question_id", "round"], ignore_index=True)
    return table.assign(model=teacher.model)


def first_rounds(personas: pd.DataFrame, questions: pd.DataFrame, responses: pd.DataFrame,
                 seed: int) -> list[Match]:
    """The two semi-finals of every person and question, one after the other; nothing is asked yet."""
    chosen = responses[responses["selected"]].sort_values("response_id").groupby("question_id")["response_id"]
    candidates = {question: list(ids) for question, ids in chosen if len(ids) == CANDIDATES}
    matches = []
    for person in personas.itertuples():
        own = questions[(questions["persona_id"] == person.persona_id) | questions["axis"].isin(person.axes)]
        for question in own.itertuples():
            ids = list(candidates.get(question.question_id, ()))
            Random(f"{seed} bracket {person.persona_id} {question.question_id}").shuffle(ids)
            base = Match(person.persona_id, person.name, question.question_id, question.text, 0, "", "", "")
            matches += [_match(base, i // 2 + 1, ids[i], ids[i + 1], seed) for i in range(0, len(ids), 2)]
    return matches


def request(matches: list[Match], texts: dict[str, str], ask: int) -> "Request":
    """One judge request: instructions, a worked demonstration, a few pairs. texts: response_id -> text."""
    pairs = [prompts.render("teacher", "judge_example", NUMBER=i, NAME=m.name, X=m.question,
                            OUTPUT_A=texts[m.shown_first], OUTPUT_B=texts[m.shown_second])
             for i, m in enumerate(matches, 3)]
    messages = [
        {"role": "system", "content": prompts.render("teacher", "judge_system")},
        {"role": "user", "content": prompts.render("teacher", "judge_demo_request")},
        {"role": "assistant", "content": prompts.render("teacher", "judge_demo_answer")},
        {"role": "user", "content": prompts.render("teacher", "judge", EXAMPLES="\n\n".join(pairs))},
    ]
    from helpers.llm import Request  # slow to import, by way of openai: not for who only reads verdicts

    return Request(messages, Verdicts, "judge", seed=ask)


def compare(teacher: "Teacher", matches: list[Match], texts: dict[str, str], cfg, seed: int, desc: str) -> list[Match]:
    """Put any matches to the judge as they are; a tie is an answer here, only an unparsable one is asked again.

    texts: response id -> text, as for `request`. To have a pair judged in both orders, compare twice: the
    judge is then never shown a pair beside its own mirror image. Returns the matches, filled in.
    """
    _settle(teacher, matches, texts, cfg, seed, desc, again=("unparsable",))
    return matches


def label(comparisons: pd.DataFrame, questions: pd.DataFrame, responses: pd.DataFrame, cfg,
          seed: int) -> pd.DataFrame:
    """The `preferences` table: chosen is the winner of the final, rejected by `judge.rejected`.

    "random": one of the other three, drawn by a seed of the person and question (the paper's rule);
    "finalist": the loser of the final. A tournament left open gives no row. `judge.shuffle_labels` swaps
    chosen and rejected by a seeded coin: a control from which nothing can be learned. Of who is on several
    axes, no more divergent train pairs are kept than of others (splits.cap_train); all test pairs are.
    """
    texts = dict(zip(responses["response_id"], responses["text"], strict=True))
    about = questions.set_index("question_id")
    rows = []
    for (person, question), rounds in comparisons.groupby(["persona_id", "question_id"]):
        final = rounds[rounds["round"] == 3]
        if final.empty or not final["winner"].item():
            continue
        chosen, random = final["winner"].item(), Random(f"{seed} label {person} {question}")
        pool = final if cfg.judge.rejected == "finalist" else rounds
        others = sorted({*pool["response_a"], *pool["response_b"]} - {chosen})
        rejected = random.choice(others)
        if cfg.judge.shuffle_labels and random.random() < 0.5:
            chosen, rejected = rejected, chosen
        asked = about.loc[question]
        rows.append({"pair_id": f"{person}:{question}", "persona_id": person, "question_id": question,
                     "kind": asked["kind"], "axis": asked["axis"], "split": asked["split"],
                     "prompt": asked["text"], "chosen": texts[chosen], "rejected": texts[rejected],
                     "chosen_id": chosen, "rejected_id": rejected})
    return splits.cap_train(pd.DataFrame(rows), seed) if rows else pd.DataFrame(rows)


def _match(base: Match, number: int, a: str, b: str, seed: int) -> Match:
    """The next match of a person and question, with the order of showing drawn."""
    coin = Random(f"{seed} order {base.persona_id} {base.question_id} {number}")
    return replace(base, round=number, response_a=a, response_b=b, shown_first=coin.choice((a, b)), asks=0,
                   winner="", outcome="", explanation="", cost_usd=0.0)


def _settle(teacher: "Teacher", matches: list[Match], texts: dict, cfg, seed: int, desc: str,
            again: tuple[str, ...] = ("tie", "unparsable")) -> None:
    """Ask until no match has an outcome in `again`, or each was asked `judge.max_asks` times."""
    size, open_ = cfg.judge.pairs_per_request, list(matches)
    Random(f"{seed} packing {desc}").shuffle(open_)
    for ask in range(cfg.judge.max_asks if matches else 0):
        batches = [open_[i:i + size] for i in range(0, len(open_), size)]
        answers = teacher.map([request(batch, texts, ask) for batch in batches], desc)
        for batch, answer in zip(batches, answers, strict=True):
            for match, verdict in zip(batch, _verdicts(answer, len(batch)), strict=True):
                match.take(verdict, answer.cost_usd / len(batch))
        open_ = [match for match in open_ if match.outcome in again]


def _verdicts(answer: "Answer", n: int) -> list[Verdict | None]:
    """n verdicts, or n times None for an answer that is no JSON, is cut off or has another number of them."""
    verdicts = answer.parsed.verdicts if answer.outcome == "ok" else []
    return verdicts if len(verdicts) == n else [None] * n
