from __future__ import annotations

import sqlite3
import stat
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest

from selfhost_cli.errors import Superseded
from selfhost_cli.ledger import Ledger, LedgerBroken, Usage
from selfhost_cli.model import Charges, Endpoint, Heard, Rental, State
from tests.fakes.rental import make_rental


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    return Ledger(tmp_path / "ledger.sqlite3")


def test_what_is_written_is_read_back_by_another_process_object(ledger: Ledger) -> None:
    rental = make_rental()
    ledger.intend(rental)
    moved = ledger.advance(rental, State.BOOTING, instance_id=7, endpoint=Endpoint("192.0.2.1", 22))
    assert Ledger(ledger.path).live() == [moved]
    assert isinstance(moved, Rental)


def test_the_file_is_the_owners_alone(ledger: Ledger) -> None:
    assert stat.S_IMODE(ledger.path.stat().st_mode) == 0o600


def test_a_second_intent_is_refused_while_one_is_unfinished(ledger: Ledger) -> None:
    ledger.intend(make_rental("one"))
    with pytest.raises(Superseded, match="one"):
        ledger.intend(make_rental("two"))
    ledger.end("one", "down")
    with pytest.raises(Superseded):
        ledger.intend(make_rental("two"))
    ledger.ended("one", 1.0)
    ledger.intend(make_rental("two"))


def test_who_moves_on_after_down_is_stopped(ledger: Ledger) -> None:
    rental = make_rental()
    ledger.intend(rental)
    ledger.end(rental.label, "down")
    with pytest.raises(Superseded, match="ending"):
        ledger.advance(rental, State.BOOTING, instance_id=7)
    with pytest.raises(Superseded):
        ledger.note(rental, sent_at=1.0)
    assert ledger.live()[0].state is State.ENDING


def test_of_two_writers_the_second_is_stopped(ledger: Ledger) -> None:
    rental = make_rental()
    ledger.intend(rental)
    ledger.advance(rental, State.BOOTING, instance_id=7)
    with pytest.raises(Superseded):
        Ledger(ledger.path).advance(rental, State.BOOTING, instance_id=8)
    assert ledger.live()[0].instance_id == 7


def test_the_first_reason_for_an_end_stays(ledger: Ledger) -> None:
    ledger.intend(make_rental("one"))
    ledger.end("one", "idle")
    assert ledger.end("one", "down").reason == "idle"


def test_what_was_heard_and_billed_is_recorded_in_any_state(ledger: Ledger) -> None:
    ledger.intend(make_rental("one"))
    heard, charges = Heard(5.0, 4.0, 3.0, 0.2, 10, 20), Charges(0.1, 0.2, 0.3, 0.4, until=9.0)
    ledger.amend("one", heard=heard)
    ledger.end("one", "down")
    ledger.ended("one", 9.0)
    settled = ledger.amend("one", charges=charges, estimated=0.9)
    assert Ledger(ledger.path).get("one") == settled
    assert (settled.state, settled.heard, settled.charges) == (State.ENDED, heard, charges)
    with pytest.raises(Superseded):
        ledger.amend("two", heard=heard)


def test_a_record_of_an_older_version_has_no_such_facts(ledger: Ledger) -> None:
    ledger.intend(make_rental("one"))
    with closing(sqlite3.connect(ledger.path)) as db:
        db.execute("UPDATE rentals SET record = json_remove(record, '$.heard', '$.charges', '$.estimated')")
        db.commit()
    (rental,) = ledger.all()
    assert (rental.heard, rental.charges, rental.estimated) == (None, None, None)


def test_events_tell_the_story_in_order(ledger: Ledger) -> None:
    rental = make_rental("one")
    ledger.intend(rental)
    ledger.advance(rental, State.BOOTING)
    ledger.end("one", "down")
    ledger.ended("one", 5.0)
    assert [text for _, _, text in ledger.events("one")] == ["creating", "booting", "ending down", "ended down"]


def test_usage_adds_up(ledger: Ledger) -> None:
    ledger.add_usage("one", "main", Usage(1, 100, 60, 10))
    ledger.add_usage("one", "auxiliary", Usage(1, 50, 0, 5))
    ledger.add_usage("two", "main", Usage(1, 1, 1, 1))
    assert ledger.usage("one") == Usage(2, 150, 60, 15)


def test_what_reuse_spared_is_told_at_the_rate_at_which_the_engine_really_reads(ledger: Ledger) -> None:
    assert ledger.usage("one").spared_s is None
    ledger.add_usage("one", "main", Usage(1, 10_000, 0, 1))  # from a proxy that does not say
    ledger.add_usage("one", "main", Usage(1, 10_000, 9_900, 1), 1.0)  # nearly nothing was read
    assert ledger.usage("one").spared_s is None
    ledger.add_usage("one", "main", Usage(1, 3_000, 1_000, 1), 2.0)
    ledger.add_usage("one", "main", Usage(1, 2_000, 0, 1), 2.0)
    assert ledger.usage("one") == Usage(4, 25_000, 10_900, 4, 4_000, 4.0)
    assert ledger.usage("one").spared_s == pytest.approx(10.9)


def test_a_ledger_of_the_first_schema_goes_on(ledger: Ledger) -> None:
    ledger.intend(make_rental("one"))
    ledger.add_usage("one", "main", Usage(1, 100, 50, 10))
    with closing(sqlite3.connect(ledger.path)) as db:
        db.execute("ALTER TABLE usage DROP COLUMN prompt_s")
        db.execute("PRAGMA user_version = 1")
        db.commit()
    for _ in range(2):
        with closing(Ledger(ledger.path)) as again:
            again.add_usage("one", "main", Usage(1, 400, 0, 10), 2.0)
            assert [rental.label for rental in again.live()] == ["one"]
            found = again.usage("one")
    assert found == Usage(3, 900, 50, 30, 800, 4.0)


def test_a_broken_file_refuses_with_a_remedy(tmp_path: Path) -> None:
    path = tmp_path / "ledger.sqlite3"
    path.write_bytes(b"this is no database, but long enough to be looked at" * 30)
    with pytest.raises(LedgerBroken, match=str(path)) as caught:
        Ledger(path).check()
    assert "selfhost down" in caught.value.remedy
    assert path.exists()


def test_a_schema_of_the_future_is_refused(ledger: Ledger) -> None:
    with sqlite3.connect(ledger.path) as db:
        db.execute("PRAGMA user_version = 99")
    db.close()
    with pytest.raises(LedgerBroken, match="another version"):
        Ledger(ledger.path)


def test_a_killed_writer_leaves_no_lock_and_no_half_row(ledger: Ledger) -> None:
    ledger.intend(make_rental("one"))
    script = (
        "import os, signal, sys; from pathlib import Path; from selfhost_cli.ledger import Ledger\n"
        "led = Ledger(Path(sys.argv[1]))\n"
        "with led._transaction() as db:\n"
        "    db.execute(\"UPDATE rentals SET state = 'ready'\")\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run([sys.executable, "-c", script, str(ledger.path)], check=False)
    assert done.returncode == -9
    assert ledger.end("one", "down").state is State.ENDING


def test_fields_of_a_newer_record_are_ignored(ledger: Ledger) -> None:
    ledger.intend(make_rental("one"))
    with sqlite3.connect(ledger.path) as db:
        db.execute("UPDATE rentals SET record = json_set(record, '$.colour', 'blue')")
    db.close()
    assert ledger.live() == [replace(make_rental("one"))]


def test_an_interrupt_inside_a_transaction_leaves_none_open(ledger: Ledger) -> None:
    rental = make_rental("one")
    ledger.intend(rental)
    with pytest.raises(KeyboardInterrupt), ledger._transaction():
        raise KeyboardInterrupt
    assert ledger.end("one", "down").state is State.ENDING


def test_a_record_that_makes_no_sense_is_a_broken_ledger(ledger: Ledger) -> None:
    ledger.intend(make_rental("one"))
    with sqlite3.connect(ledger.path) as db:
        db.execute("UPDATE rentals SET record = json_set(record, '$.state', 'paused')")
    db.close()
    with pytest.raises(LedgerBroken, match="paused"):
        ledger.live()


def test_a_ledger_that_was_moved_away_is_not_current(ledger: Ledger, tmp_path: Path) -> None:
    assert ledger.current()
    ledger.path.rename(tmp_path / "aside")
    assert not ledger.current()
    Ledger(ledger.path).close()
    assert not ledger.current()


def test_what_a_long_lived_process_writes_survives_the_comings_and_goings_of_others(ledger: Ledger) -> None:
    look = "import sys; from pathlib import Path; from selfhost_cli.ledger import Ledger\n"
    look += "led = Ledger(Path(sys.argv[1])); print([r.state for r in led.all()]); led.close()"
    command = [sys.executable, "-c", look, str(ledger.path)]
    ledger.intend(make_rental("one"))
    Ledger(ledger.path).close()
    subprocess.run(command, check=True, capture_output=True)
    ledger.end("one", "down")
    ledger.ended("one", 1.0)
    assert "'ended'" in subprocess.run(command, check=True, capture_output=True, text=True).stdout


def test_several_that_come_first_at_once_all_get_the_ledger(tmp_path: Path) -> None:
    together = threading.Barrier(4)

    def come(number: int) -> None:
        together.wait(10)
        ledger = Ledger(tmp_path / f"{number}.sqlite3")
        ledger.check()
        ledger.add_usage("one", "main", Usage(1, 2, 0, 3))
        ledger.close()

    for number in range(40):
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(come, [number] * 4))
        ledger = Ledger(tmp_path / f"{number}.sqlite3")
        assert ledger.usage("one").requests == 4  # they all got the same one
        ledger.close()
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(f"{number}.sqlite3" for number in range(40))
