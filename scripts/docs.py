"""Write docs/settings.md from the table that validates the settings. `--check` only compares."""

from __future__ import annotations

import sys
from dataclasses import fields
from pathlib import Path

from selfhost_cli.config import FLAGS, Settings
from selfhost_cli.old_variables import FILE, TABLE

TARGET = Path(__file__).resolve().parent.parent / "docs" / "settings.md"

HEAD = """# Settings

Written by `scripts/docs.py` from the table in `selfhost_cli/config.py`. A flag beats the environment, the environment
beats `config.toml`, the file beats the default. `config.toml` is in the profile's folder of your system's place for
settings, on Linux `~/.config/selfhost/default/`. Unknown keys are errors that name the nearest one, and so are
variables named nearly like one of these. A setting may stand in a table: `untempered` in `[cache]` is
`cache_untempered`, and `selfhost config get cache.untempered` finds it.

```sh
selfhost config show                  # every setting: its value, where that comes from, what it is
selfhost config get hours
selfhost config set max_price 0.5     # checked first; comments and other lines of the file stay
selfhost config set api_key           # asks for it: what is typed on a command line stays in its history
selfhost config unset max_price       # the default holds again, or what beats the file
selfhost config path
```

`config set` writes the whole file anew, readable by you alone. `config show` hides secrets; `config get` does not print
them.

`selfhost completion bash` prints what completes commands, options, profiles and settings; for zsh and fish likewise. In
`~/.bashrc` or `~/.zshrc` (there behind `compinit`): `eval "$(selfhost completion bash)"`, with the name of the shell;
for fish: `selfhost completion fish >~/.config/fish/completions/selfhost.fish`.

| setting | environment | flag of `up` | default | what it is |
| --- | --- | --- | --- | --- |
"""

OLD = """
## Variables of the old system

What the system before this one was set up with, and what became of it; this table is the one in
`selfhost_cli/old_variables.py`. `selfhost up` and `selfhost claude` say once which of them are set and do nothing;
`selfhost config show` lists them.

| variable | what it was | now | what to do |
| --- | --- | --- | --- |
"""


def text() -> str:
    rows = []
    for setting in fields(Settings):
        if setting.metadata:
            flag = f"`--{setting.name.replace('_', '-')}`" if setting.name in FLAGS else ""
            default = "" if setting.default in ("", None) else f"`{setting.default}`"
            row = (f"`{setting.name}`", f"`SELFHOST_{setting.name.upper()}`", flag, default, setting.metadata["help"])
            rows.append("| " + " | ".join(row) + " |")
    old = (f"| `{one.name}` | {one.was} | {one.now} | {one.instead} |" for one in (*TABLE, FILE))
    return HEAD + "\n".join(rows) + "\n" + OLD + "\n".join(old) + "\n"


if __name__ == "__main__":
    if "--check" in sys.argv:
        sys.exit(None if TARGET.read_text() == text() else "docs/settings.md is stale: run scripts/docs.py")
    TARGET.write_text(text())
