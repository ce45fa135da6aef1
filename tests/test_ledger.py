import json
import sqlite3
import subprocess
import sys
from dataclasses import replace

import pytest

from helpers import ROOT, ledger
from helpers.ledger import BudgetExceeded, CacheError, Ledger, Paid, new_owner

PAID = Paid("k1", "judge", "{}", "schema", "yes", "stop", "ok", 100, 10, 0.25)
DEAD = "1 0.0 ffff"  # process 1 did not start in 1970


@pytest.fixture
def books(tmp_path):
    return Ledger(tmp_path / "answers.sqlite", "r")


def other(books, run="r"):
    return Ledger(books.path, run)


def test_an_answer_is_there_for_every_process_and_charged_to_the_run_that_bought_it(books):
    me = new_owner()
    assert books.promise(me, {"k1": 0.5}, 1.0) == ["k1"]
    books.keep(me, PAID)
    assert other(books, "s").get("k1") == PAID
    assert books.get("k2") is None
    assert books.totals()["by_tag"] == {
        "judge": {"requests": 1, "prompt_tokens": 100, "completion_tokens": 10, "cost_usd": 0.25}}
    assert books.totals()["outcomes"] == {"ok": 1}
    assert other(books, "s").totals()["requests"] == 0


def test_the_budget_counts_what_is_spent_and_what_is_set_aside(books):
    me = new_owner()
    books.promise(me, {"k1": 0.5}, 1.0)
    books.keep(me, PAID)  # 0.25 spent
    # 0.25 + 0.3 + 0.4 = 0.95 fit into 1.0; another 0.1 does not
    assert books.promise(me, {"k2": 0.3, "k3": 0.4, "k4": 0.1}, 1.0) == ["k2", "k3"]
    with pytest.raises(BudgetExceeded, match=r"could cost \$0.1000, and \$0.9500 of teacher.budget_usd = 1.0"):
        other(books).promise(new_owner(), {"k4": 0.1}, 1.0)
    assert other(books, "s").promise(new_owner(), {"k4": 0.1}, 1.0) == ["k4"]  # another run has its own budget
    books.release(me, "k3")
    assert books.promise(me, {"k5": 0.4}, 1.0) == ["k5"]


def test_what_is_answered_or_under_way_elsewhere_is_not_sent(books):
    books.promise(new_owner(), {"k1": 0.1}, 1.0)
    assert other(books).promise(new_owner(), {"k1": 0.1, "k2": 0.1}, 1.0) == ["k2"]


def test_what_a_dead_process_had_under_way_is_in_doubt_and_can_be_sent_again(books):
    books.promise(DEAD, {"k1": 0.5}, 1.0)
    again = other(books)  # sweeps when it opens
    assert again.totals()["in_doubt"] == {"requests": 1, "at_most_usd": 0.5}
    with pytest.raises(BudgetExceeded):  # it may have been paid: 0.5 + 0.6 > 1.0
        again.promise(new_owner(), {"k1": 0.6}, 1.0)
    assert again.promise(new_owner(), {"k1": 0.5}, 1.0) == ["k1"]


def test_who_cannot_even_say_goodbye_on_a_full_disk_is_known_to_be_gone(books, monkeypatch):
    me = new_owner()
    books.promise(me, {"k1": 0.5}, 1.0)
    with monkeypatch.context() as full:
        full.setattr(books, "_transaction", lambda: (_ for _ in ()).throw(CacheError("full")))
        books.leave(me)
    assert books.promise(new_owner(), {"k1": 0.5}, 1.0) == []  # still set aside by me
    books.sweep()
    assert books.promise(new_owner(), {"k1": 0.5}, 1.0) == ["k1"]
    assert books.totals()["in_doubt"]["requests"] == 1


def test_a_batch_of_a_dead_process_waits_to_be_adopted(books):
    books.promise("1 0.0 batch abc", {"k1": 0.5}, 1.0)
    alive = new_owner("batch")
    books.promise(alive, {"k2": 0.1}, 1.0)
    assert other(books).orphans() == {"1 0.0 batch abc": ["k1"]}
    books.leave(alive)
    assert set(other(books).orphans()) == {"1 0.0 batch abc", f"0 0 batch {alive.split()[-1]}"}
    assert books.totals()["in_doubt"]["requests"] == 0


def test_an_answer_that_two_have_collected_is_charged_once(books):
    books.promise("1 0.0 batch abc", {"k1": 0.5}, 1.0)
    for one in (books, other(books)):
        one.keep("1 0.0 batch abc", PAID)
    assert books._held() == 0.25


def test_a_file_of_the_first_version_keeps_its_answers_and_its_spending(tmp_path):
    path = tmp_path / "old.sqlite"
    with sqlite3.connect(path) as db:
        db.execute("""CREATE TABLE answers (key TEXT PRIMARY KEY, run TEXT, tag TEXT, text TEXT, finish TEXT,
                      prompt_tokens INTEGER, completion_tokens INTEGER, cost_usd REAL)""")
        db.execute("INSERT INTO answers VALUES ('k1', 'r', 'judge', 'yes', 'stop', 100, 10, 0.25)")
    db.close()
    books = Ledger(path, "r")
    assert books.get("k1") == replace(PAID, request="", how="", outcome="")
    assert books._held() == 0.25
    assert Ledger(path, "r")._held() == 0.25  # opening it twice does not count it twice


def test_export_and_import_give_the_same_answers_and_charge_nobody(books, tmp_path):
    for key in ("k2", "k1"):
        books.keep(new_owner(), replace(PAID, key=key, text=f"ä {key}"))
    file, fresh = tmp_path / "answers.jsonl", Ledger(tmp_path / "fresh.sqlite", "r")
    assert books.export(file) == 2
    assert [json.loads(line)["key"] for line in file.read_text().splitlines()] == ["k1", "k2"]
    assert (fresh.take_in(file), fresh.take_in(file)) == (2, 0)
    assert fresh.get("k2") == books.get("k2")
    assert (fresh._held(), fresh.totals()["requests"]) == (0.0, 0)


@pytest.mark.parametrize(("change", "message"), [
    (lambda line: line.replace("yes", "no"), "line 2: it was changed after its export"),
    (lambda line: line[:40], "line 2: expected a line that"),
    (lambda line: "[]", "line 2: expected a line that")])
def test_a_line_that_was_changed_is_refused_and_nothing_is_taken_in(books, tmp_path, change, message):
    for key in ("k1", "k2"):
        books.keep(new_owner(), replace(PAID, key=key))
    file, fresh = tmp_path / "answers.jsonl", Ledger(tmp_path / "fresh.sqlite", "r")
    books.export(file)
    one, two = file.read_text().splitlines()
    file.write_text(f"{one}\n{change(two)}\n")
    with pytest.raises(CacheError, match=message):
        fresh.take_in(file)
    assert fresh.get("k1") is None


def test_a_file_that_is_no_database_is_a_clear_error(tmp_path):
    (tmp_path / "answers.sqlite").write_text("something else altogether, and long enough to be looked at" * 20)
    with pytest.raises(CacheError, match="not a database. Move the file away"):
        Ledger(tmp_path / "answers.sqlite", "r")


def test_two_processes_cannot_overdraw_a_budget_together(books):
    """Each tries to set 200 x 0.01 aside out of 2.5: together 250 fit, whoever is faster."""
    script = ("import sys\nfrom pathlib import Path\nfrom helpers.ledger import Ledger, BudgetExceeded, new_owner\n"
              "books, me, name = Ledger(Path(sys.argv[1]), 'r'), new_owner(), sys.argv[2]\n"
              "try:\n    for i in range(200): books.promise(me, {name + str(i): 0.01}, 2.505)\n"
              "except BudgetExceeded: pass\n"
              "print('done', flush=True)\nsys.stdin.read()\n")
    words = [sys.executable, "-c", script, str(books.path)]
    both = [subprocess.Popen([*words, name], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            for name in "ab"]
    assert [process.stdout.readline() for process in both] == ["done\n", "done\n"]
    assert books._held() == pytest.approx(2.5)
    for process in both:
        process.communicate()


def test_prices_are_dated_and_every_model_has_all_three():
    prices = ledger.prices_file()
    assert prices["as_of"]
    assert 0 < prices["batch"] <= 1
    assert all(set(price) == {"input", "cached_input", "output"} for price in prices["models"].values())


@pytest.mark.parametrize("words", [["export"], ["mend", "file"]])
def test_the_command_says_which_words_it_takes(words, capsys):
    with pytest.raises(SystemExit, match="2"):
        ledger.main(words)
    assert "export and import need a FILE" in capsys.readouterr().err


def test_the_command_says_where_it_looked(tmp_path):
    with pytest.raises(SystemExit, match="no answers in .*nowhere.sqlite; --run or --cache"):
        ledger.main(["show", "--cache", str(tmp_path / "nowhere.sqlite")])
