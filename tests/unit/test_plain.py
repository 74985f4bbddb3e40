"""What markets and boxes say is shown without what would steer a terminal."""

from __future__ import annotations

import logging

import pytest

from selfhost_cli.cli.words import say
from selfhost_cli.errors import plain
from selfhost_cli.keeper.daemon import Plain


@pytest.mark.parametrize(
    "steering",
    ["\x1b[2J", "\x1b]0;title\x07", "\x9b1A", "\r", "\x08", "\x7f", "\u202e", "\u2066", "\u2028", "\x00"],
)
def test_no_character_that_steers_is_left(steering: str) -> None:
    told = plain(f"before{steering}after")
    assert told.isprintable()
    assert told.startswith("before")
    assert told.endswith("after")


def test_words_of_any_language_lines_and_columns_stay() -> None:
    text = "Größe\t→ 12 €\nбокс 箱子 ✓"
    assert plain(text) == text


def test_the_keepers_log_holds_nothing_that_steers() -> None:
    record = logging.LogRecord("selfhost.keeper", logging.WARNING, "", 0, "box %s: %s", (7, "\x1b[2Jgone\r"), None)
    assert Plain("%(levelname)s %(message)s").format(record) == "WARNING box 7: [2Jgone"


def test_an_error_message_holds_nothing_that_steers(capsys: pytest.CaptureFixture[str]) -> None:
    say("selfhost: the market refused (400): \x1b[2Jbad\nTry again.")
    assert capsys.readouterr().err == "selfhost: the market refused (400): [2Jbad\nTry again.\n"
