"""Run the demo in a home of its own and keep what it printed: docs/demo.md as text, docs/demo.svg in colour.

Behind the cache directory: the engine, llamacpp when it is left out. With ollama it is docs/demo-ollama.md alone.
"""

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

HEAD = """# The demo, as it ran{with_}

The transcript of `scripts/demo{words}` on two cores without a GPU, downloads already made; written by
`scripts/record-demo{engine}`. Prices and the GPU are simulated, the rest is real.

```text
"""


def main() -> None:
    cache, *given = sys.argv[1:]
    engine = given[0] if given else "llamacpp"
    words = ["demo", "--engine", engine] if given else ["demo"]
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
            [sys.executable, "-m", "selfhost_cli", *words],
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=True,
        )
        text = Text.from_ansi(f"$ selfhost {' '.join(words)}\n" + done.stdout.replace(home, "~"))
    console = Console(record=True, width=WIDTH, file=io.StringIO())
    console.print(text)
    if not given:
        (DOCS / "demo.svg").write_text(console.export_svg(title="selfhost demo", clear=False))
    lines = [line.rstrip() for line in console.export_text(styles=False).splitlines()]
    head = HEAD.format(
        with_=f" with {engine}" if given else "",
        words="".join(f" {word}" for word in words[1:]),
        engine=f" {engine}" if given else "",
    )
    (DOCS / f"{'-'.join(['demo', *given])}.md").write_text(head + "\n".join(lines).strip() + "\n```\n")


if __name__ == "__main__":
    main()
