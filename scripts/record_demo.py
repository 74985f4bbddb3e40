"""Run the demo in a home of its own and keep what it printed: docs/demo.md as text, docs/demo.svg in colour."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from rich.console import Console
from rich.text import Text

WIDTH = 110
DOCS = Path(__file__).resolve().parent.parent / "docs"

HEAD = """# The demo, as it ran

The transcript of `scripts/demo` on two cores without a GPU, downloads already made; written by `scripts/record-demo`.
The picture in the README is the same run. Prices and the GPU are simulated, the rest is real.

```text
"""


def main() -> None:
    cache = Path(sys.argv[1])
    with tempfile.TemporaryDirectory() as home:
        (Path(home) / "cache").symlink_to(cache)
        env = {name: os.environ[name] for name in ("PATH", "LANG") if name in os.environ}
        env |= {
            "HOME": home,
            "SELFHOST_HOME": home,
            "FORCE_COLOR": "1",
            "COLUMNS": str(WIDTH),
            "TERM": "xterm-256color",
        }
        done = subprocess.run(
            [sys.executable, "-m", "selfhost_cli", "demo"],
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=True,
        )
        text = Text.from_ansi("$ selfhost demo\n" + done.stdout.replace(home, "~"))
    console = Console(record=True, width=WIDTH, file=io.StringIO())
    console.print(text)
    (DOCS / "demo.svg").write_text(console.export_svg(title="selfhost demo", clear=False))
    lines = [line.rstrip() for line in console.export_text(styles=False).splitlines()]
    (DOCS / "demo.md").write_text(HEAD + "\n".join(lines).strip() + "\n```\n")


if __name__ == "__main__":
    main()
