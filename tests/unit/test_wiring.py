"""What the command line makes of what it finds on this machine."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

import pytest

from selfhost_cli import config
from selfhost_cli.cli import wiring
from selfhost_cli.cli.logs import Hiding
from selfhost_cli.ledger import Ledger
from selfhost_cli.model import Event
from tests.fakes.rental import make_rental


@pytest.fixture
def settings(tmp_path: Path) -> config.Settings:
    settings = config.load("default", env={"SELFHOST_HOME": str(tmp_path)})
    settings.paths.make()
    return settings


def test_without_a_ledger_that_can_be_read_it_is_said_what_is_not_known(settings: config.Settings) -> None:
    settings.paths.ledger.write_bytes(b"no database" * 100)
    told: list[Event] = []
    with closing(wiring._ledger(settings, told.append, needed=False)):
        pass
    (event,) = told
    assert (event.stage, event.status) == ("ledger", "note")
    assert event.text.endswith("asking the market itself, without what it knew of boxes and machines")


def test_the_token_of_a_box_that_is_rented_while_its_logs_are_waited_for_is_hidden(settings: config.Settings) -> None:
    with closing(Ledger(settings.paths.ledger)) as ledger:
        hide = Hiding(settings, ledger)
        assert hide("plain words stay") == "plain words stay"
        ledger.intend(make_rental("selfhost-0123456789-a", box_token="quite-plain-words-of-a-token"))
        assert "plain-words" not in hide("it said quite-plain-words-of-a-token")
