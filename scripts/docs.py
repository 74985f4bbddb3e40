"""Write docs/settings.md from the table that validates the settings. `--check` only compares."""

from __future__ import annotations

import sys
from dataclasses import fields
from pathlib import Path

from selfhost_cli.config import FLAGS, Settings

TARGET = Path(__file__).resolve().parent.parent / "docs" / "settings.md"

HEAD = """# Settings

Written by `scripts/docs.py` from the table in `selfhost_cli/config.py`. A flag beats the environment, the environment
beats `config.toml`, the file beats the default. `config.toml` is in the profile's folder of your system's place for
settings, on Linux `~/.config/selfhost/default/`. Unknown keys are errors.

| setting | environment | flag of `up` | default | what it is |
| --- | --- | --- | --- | --- |
"""


def text() -> str:
    rows = []
    for setting in fields(Settings):
        if setting.metadata:
            flag = f"`--{setting.name.replace('_', '-')}`" if setting.name in FLAGS else ""
            default = "" if setting.default in ("", None) else f"`{setting.default}`"
            row = (f"`{setting.name}`", f"`SELFHOST_{setting.name.upper()}`", flag, default, setting.metadata["help"])
            rows.append("| " + " | ".join(row) + " |")
    return HEAD + "\n".join(rows) + "\n"


if __name__ == "__main__":
    if "--check" in sys.argv:
        sys.exit(None if TARGET.read_text() == text() else "docs/settings.md is stale: run scripts/docs.py")
    TARGET.write_text(text())
