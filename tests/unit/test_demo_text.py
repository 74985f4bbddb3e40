"""What the demo tells of the box that it keeps."""

from __future__ import annotations

import typer

from selfhost_cli.cli import app, demo


def test_the_demo_names_what_to_try_with_its_profile_and_all_of_it_exists() -> None:
    known = typer.main.get_command(app.app).commands  # type: ignore[attr-defined]
    shown = [line.split() for line in demo.KEPT.splitlines() if line.startswith("  ")]
    assert all(words[:3] == ["selfhost", "--profile", "demo"] for words in shown)
    named = [words[3] for words in shown]
    assert named == ["status", "offers", "logs", "doctor", "claude", "down"]
    assert set(named) <= set(known)
