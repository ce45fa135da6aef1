"""What the teacher was paid for: every answer in one sqlite file, and what is set aside for requests under way.

An answer is committed the moment it arrives. Before a request is sent, a row says what it can cost at most. So a
run never pays twice for what it has, the budget holds for all processes that share the file, and requests whose
answer was lost on the way are known: in doubt, they count at their worst case. `python -m helpers.ledger --help`.
"""

import argparse
import hashlib
import json
import os
import sqlite3
import sys
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, astuple, dataclass, fields
from functools import cache
from pathlib import Path
from uuid import uuid4

import psutil
import yaml

from helpers import DATA

PRICES = DATA / "prices.yaml"
LOCK_SECONDS = 60.0  # how long to wait for another process that is writing
TABLES = """
CREATE TABLE IF NOT EXISTS answers (key TEXT PRIMARY KEY, run TEXT, tag TEXT, text TEXT, finish TEXT,
    prompt_tokens INTEGER, completion_tokens INTEGER, cost_usd REAL,
    request TEXT DEFAULT '', how TEXT DEFAULT '', outcome TEXT DEFAULT '', seal TEXT DEFAULT '');
CREATE TABLE IF NOT EXISTS promised (key TEXT, run TEXT, owner TEXT, usd REAL);
CREATE INDEX IF NOT EXISTS promised_key ON promised (key);
CREATE TABLE IF NOT EXISTS spent (run TEXT PRIMARY KEY, usd REAL);
INSERT OR IGNORE INTO spent SELECT run, SUM(cost_usd) FROM answers GROUP BY run;
CREATE TABLE IF NOT EXISTS file (id TEXT);
INSERT INTO file SELECT hex(randomblob(16)) WHERE NOT EXISTS (SELECT 1 FROM file);
"""
NOBODY, LEFT = "0 0", set()  # an owner that is no process; owners of this process that are done
ADDED = ("request", "how", "outcome", "seal")  # columns that a file of an earlier version lacks
ADVICE = {
    "full": "Free some space", "readonly": "Make the file and its folder writable", "locked": "Let the other process end",
    "malformed": "Move the file away, or save what can be saved with `sqlite3 FILE .recover`",
    "not a database": "Move the file away, it is not the teacher's"}


class TeacherError(RuntimeError):
    """The teacher cannot be asked, or did not answer; says what to do. What was answered so far is kept."""


class BudgetExceeded(TeacherError):
    """The next request could cost more than is left of teacher.budget_usd; it was not sent."""


class CacheError(TeacherError):
    """The file of answers cannot be read or written: a full disk, a damaged row, somebody else's file."""


@dataclass(frozen=True)
class Paid:
    """One bought answer. request: canonical JSON, whose sha256 is the key; how: schema, or prompt (see llm)."""

    key: str
    tag: str
    request: str
    how: str
    text: str
    finish: str
    outcome: str
    prompt_tokens: int
    completion_tokens: int
    cost_usd: float

    def seal(self) -> str:
        """16 hex digits that no longer fit when a row or an exported line was changed."""
        return hashlib.sha256(repr(astuple(self)).encode()).hexdigest()[:16]


COLUMNS = [field.name for field in fields(Paid)]
SEALED = ", ".join([*COLUMNS, "seal"])


class Ledger:
    """The file `path`, seen from the run `run`. Several processes of one machine may share it."""

    def __init__(self, path: Path, run: str):
        self.path, self.run = path, run
        path.parent.mkdir(parents=True, exist_ok=True)
        with self._errors():
            # isolation_level None: transactions are begun here, by hand, and never by the driver
            self._db = sqlite3.connect(path, LOCK_SECONDS, check_same_thread=False, isolation_level=None)
            weakref.finalize(self, self._db.close)
            # WAL and NORMAL: a kill loses nothing that was committed; a power cut may lose the last second
            for pragma in ("journal_mode=WAL", "synchronous=NORMAL"):
                self._db.execute(f"PRAGMA {pragma}")
            self._db.executescript(TABLES)
            there = {row[1] for row in self._db.execute("PRAGMA table_info(answers)")}
            for column in (name for name in ADDED if name not in there):
                self._db.execute(f"ALTER TABLE answers ADD COLUMN {column} TEXT DEFAULT ''")
        self.sweep()

    def order(self, key: str) -> str:
        """What a request is called at the server: the same however often this file's processes send it, and nobody else's."""
        with self._errors():
            (of_file,) = self._db.execute("SELECT id FROM file").fetchone()
        return hashlib.sha256(f"{of_file} {key}".encode()).hexdigest()

    def get(self, key: str) -> Paid | None:
        """The answer, if it was paid for. Raises CacheError where the row is not what was written."""
        with self._errors():
            row = self._db.execute(f"SELECT {SEALED} FROM answers WHERE key = ?", (key,)).fetchone()
        return self._unsealed(row) if row else None

    def promise(self, owner: str, worst_usd: Mapping[str, float], budget_usd: float) -> list[str]:
        """Set aside what these requests (key -> dollars) can cost, for as many as the budget has room, in order.

        Returns the keys to send now. Left out are those answered by now, and those that somebody else has under
        way. Raises BudgetExceeded where nothing but the budget stands in the way of the first.
        """
        with self._transaction() as db:
            held, sent, short = self._held(), [], None
            for key, usd in worst_usd.items():
                if db.execute("SELECT 1 FROM answers WHERE key = ?1 UNION ALL "
                              "SELECT 1 FROM promised WHERE key = ?1 AND owner <> ''", (key,)).fetchone():
                    continue
                if held + usd > budget_usd:
                    short = usd
                    break
                db.execute("INSERT INTO promised VALUES (?, ?, ?, ?)", (key, self.run, owner, usd))
                held += usd
                sent.append(key)
        if short is not None and not sent:
            raise BudgetExceeded(
                f"the next request could cost ${short:.4f}, and ${held:.4f} of teacher.budget_usd = {budget_usd} "
                f"are spent, or may be by requests under way or in doubt: it was not sent. Raise the budget and run "
                "again; what was paid for is kept.")
        return sent

    def keep(self, owner: str, paid: Paid, replayed: bool = False) -> None:
        """Commit an answer and give back what was set aside for it. Once only, whoever else may collect it.

        replayed: the server says that it had given this answer before, and so did not charge for it again; what was in
        doubt about the request is then known.
        """
        with self._transaction() as db:
            mine = db.execute("DELETE FROM promised WHERE key = ? AND owner = ?", (paid.key, owner)).rowcount
            if replayed:
                db.execute("DELETE FROM promised WHERE key = ? AND owner = ''", (paid.key,))
            if self._insert(paid, paid.seal(), self.run) or mine:
                db.execute("INSERT INTO spent VALUES (?, ?) ON CONFLICT (run) DO UPDATE SET usd = usd + excluded.usd",
                           (self.run, paid.cost_usd))

    def release(self, owner: str, *keys: str) -> None:
        """These requests were turned down, and cost nothing."""
        with self._transaction() as db:
            db.executemany("DELETE FROM promised WHERE key = ? AND owner = ?", [(key, owner) for key in keys])

    def doubt(self, owner: str, key: str) -> None:
        """No answer came to this request: it may have been paid for, and what was set aside stays so."""
        with self._transaction() as db:
            db.execute("UPDATE promised SET owner = '' WHERE owner = ? AND key = ?", (owner, key))

    def sweep(self) -> None:
        """Requests of processes that are gone are in doubt; their batches wait at the server, to be adopted."""
        for owner in self._owners():
            if not _alive(owner) and " batch " not in owner:
                self.leave(owner)

    def leave(self, owner: str) -> None:
        """The owner, of this process, is done: what it still has under way is in doubt; a batch may be adopted."""
        LEFT.add(owner)
        with suppress(CacheError), self._transaction() as db:  # on a full disk the next `sweep` does it
            if " batch " in owner:
                db.execute("UPDATE promised SET owner = ? WHERE owner = ?", (f"{NOBODY} batch {owner.split()[-1]}", owner))
            else:
                db.execute("UPDATE promised SET owner = '' WHERE owner = ?", (owner,))

    def orphans(self) -> dict[str, list[str]]:
        """owner -> keys, of the batches whose process is gone."""
        owners = [owner for owner in self._owners() if " batch " in owner and not _alive(owner)]
        with self._errors():
            return {owner: [key for (key,) in self._db.execute("SELECT key FROM promised WHERE owner = ?", (owner,))]
                    for owner in owners}

    def totals(self) -> dict:
        """What this run has paid for: requests, tokens and dollars, in all and by tag; outcomes; what is in doubt."""
        with self._errors():
            rows = self._db.execute(
                """SELECT tag, COUNT(*), SUM(prompt_tokens), SUM(completion_tokens), SUM(cost_usd)
                   FROM answers WHERE run = ? GROUP BY tag ORDER BY tag""", (self.run,)).fetchall()
            outcomes = self._db.execute("""SELECT outcome, COUNT(*) FROM answers WHERE run = ? AND outcome <> ''
                                           GROUP BY outcome ORDER BY outcome""", (self.run,)).fetchall()
            doubt = self._db.execute("""SELECT COUNT(*), COALESCE(SUM(usd), 0.0) FROM promised
                                        WHERE run = ? AND owner = ''""", (self.run,)).fetchone()
        names = ("requests", "prompt_tokens", "completion_tokens", "cost_usd")
        by_tag = {tag: dict(zip(names, sums, strict=True)) for tag, *sums in rows}
        totals = {name: sum(sums[name] for sums in by_tag.values()) for name in names}
        in_doubt = {"requests": doubt[0], "at_most_usd": doubt[1]}
        return {**totals, "outcomes": dict(outcomes), "in_doubt": in_doubt, "by_tag": by_tag}

    def export(self, file: Path) -> int:
        """Every answer in the file as a line of JSON, by key: what a class needs to run again without a key."""
        n = 0
        with self._errors(), file.open("w", encoding="utf-8") as out:
            for row in self._db.execute(f"SELECT {SEALED} FROM answers ORDER BY key"):
                paid, n = self._unsealed(row), n + 1
                out.write(json.dumps(asdict(paid) | {"seal": paid.seal()}, ensure_ascii=False) + "\n")
        return n

    def take_in(self, file: Path) -> int:
        """Add the answers of an exported file; somebody else paid, so no run is charged. Returns how many are new.

        Raises CacheError, and adds nothing, for a line that is not as it was exported.
        """
        with file.open(encoding="utf-8") as lines, self._transaction():
            return sum(self._insert(*_line(line, f"{file}, line {number}"), "(imported)")
                       for number, line in enumerate(lines, 1))

    def mend(self) -> int:
        """Take out the rows that are not what was written; returns how many."""
        with self._transaction() as db:
            rows = db.execute(f"SELECT {SEALED} FROM answers WHERE seal <> ''").fetchall()
            bad = [(row[0],) for row in rows if Paid(*row[:-1]).seal() != row[-1]]
            db.executemany("DELETE FROM answers WHERE key = ?", bad)
        return len(bad)

    def _insert(self, paid: Paid, seal: str, run: str) -> int:
        """1 if the row is new."""
        row = (*astuple(paid), seal, run)
        return self._db.execute(f"INSERT OR IGNORE INTO answers ({SEALED}, run) VALUES ({', '.join('?' * len(row))})",
                                row).rowcount

    def _unsealed(self, row: tuple) -> Paid:
        paid, seal = Paid(*row[:-1]), row[-1]
        if seal and seal != paid.seal():  # rows of an earlier version have none
            raise CacheError(f"{self.path}: the answer {paid.key[:12]}… is not what was written there. "
                             f"`python -m helpers.ledger mend --cache {self.path}` takes such rows out; they are "
                             "then asked, and paid for, again.")
        return paid

    def _held(self) -> float:
        """Dollars that this run has spent, or may have to pay for requests under way or in doubt."""
        return self._db.execute("""SELECT COALESCE((SELECT usd FROM spent WHERE run = ?1), 0) +
                                   COALESCE((SELECT SUM(usd) FROM promised WHERE run = ?1), 0)""",
                                (self.run,)).fetchone()[0]

    def _owners(self) -> list[str]:
        with self._errors():
            return [owner for (owner,) in self._db.execute("SELECT DISTINCT owner FROM promised WHERE owner <> ''")]

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        """Nobody else writes meanwhile; all of it is committed, or nothing."""
        with self._errors(), self._db:
            self._db.execute("BEGIN IMMEDIATE")
            yield self._db

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            advice = next((said for word, said in ADVICE.items() if word in str(error)), "Look at the file")
            raise CacheError(f"the answers of the teacher are kept in {self.path}, and sqlite says: {error}. "
                             f"{advice}, then run the same command again.") from None


def new_owner(kind: str = "") -> str:
    """A name for who has requests under way: this process, by number and start, and a random part."""
    process = psutil.Process(os.getpid())
    return f"{process.pid} {process.create_time()}{kind and f' {kind}'} {uuid4().hex}"


def price(model: str) -> dict[str, float]:
    """Dollars per million tokens: input, cached_input, output. Raises TeacherError for a model without a price."""
    prices = prices_file()
    if model not in prices["models"]:
        raise TeacherError(f"no price for {model!r} in {PRICES} (as of {prices['as_of']}: "
                           f"{', '.join(prices['models'])}); add a line, all 0 for a server of your own")
    return prices["models"][model]


@cache
def prices_file() -> dict:
    """data/prices.yaml: as_of, batch (the share of the price that the Batch API takes), models."""
    return yaml.safe_load(PRICES.read_text())


def _alive(owner: str) -> bool:
    """Is the process that has this under way still at it?"""
    if owner in LEFT:
        return False
    pid, started = owner.split()[:2]
    try:
        return psutil.Process(int(pid)).create_time() == float(started)
    except psutil.Error:
        return False


def _line(line: str, where: str) -> tuple[Paid, str]:
    """An exported line, with its seal. Raises CacheError where one does not fit the other."""
    try:
        row = json.loads(line)
        seal, paid = row.pop("seal"), Paid(**row)
    except (ValueError, TypeError, KeyError, AttributeError):
        raise CacheError(f"{where}: expected a line that `python -m helpers.ledger export` wrote, found "
                         f"{line[:80]!r}. Nothing was taken in.") from None
    if seal != paid.seal():
        raise CacheError(f"{where}: it was changed after its export. Nothing was taken in; export it again.")
    return paid, seal


def main(words: list[str] | None = None) -> None:
    """show, export FILE, import FILE or mend the answers of a run, or of any file of answers."""
    parser = argparse.ArgumentParser(prog="python -m helpers.ledger", description=main.__doc__)
    parser.add_argument("what", choices=["show", "export", "import", "mend"])
    parser.add_argument("file", nargs="?", type=Path, help="JSONL to write or to read")
    parser.add_argument("--run", default="laptop", help="the run whose answers are meant (default: laptop)")
    parser.add_argument("--cache", type=Path, help="a file of answers, in place of the run's teacher.sqlite")
    asked = parser.parse_args(words)
    if (asked.file is None) == (asked.what in ("export", "import")):
        parser.error("export and import need a FILE, show and mend take none")
    try:
        print(_do(asked.what, asked.file, asked.run, asked.cache or DATA / "runs" / asked.run / "teacher.sqlite"))
    except (TeacherError, OSError) as error:
        sys.exit(str(error))


def _do(what: str, file: Path | None, run: str, path: Path) -> str:
    if what != "import" and not path.exists():
        raise CacheError(f"no answers in {path}; --run or --cache says where they are")
    ledger = Ledger(path, run)
    if what == "show":
        return json.dumps(ledger.totals(), indent=1)
    if what == "mend":
        return f"{path}: {ledger.mend()} damaged answers taken out"
    n = ledger.export(file) if what == "export" else ledger.take_in(file)
    return f"{n} answers {'written to' if what == 'export' else 'new from'} {file}"


if __name__ == "__main__":
    main()
