"""Run the demo in a home of its own and keep what it printed: docs/demo.md as text, docs/demo.svg in colour.

Behind the cache directory: the engine, llamacpp when it is left out. With ollama it is docs/demo-ollama.md alone; else
docs/offers.svg comes too: what `selfhost offers` shows of the demo's market.
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

from selfhost_cli.sandbox import demo

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
        kept = {name: os.environ[name] for name in ("PATH", "LANG") if name in os.environ}
        os.environ.clear()  # ours, too: the market below is started from here
        os.environ.update(kept, HOME=home, SELFHOST_HOME=home, FORCE_COLOR="1", COLUMNS=str(WIDTH))
        os.environ["TERM"] = "xterm-256color"
        recorded = record(words, home)
        offers = None if given else offers_of_the_market(home)
    lines = [line.rstrip() for line in recorded.export_text(styles=False, clear=False).splitlines()]
    if offers:
        (DOCS / "demo.svg").write_text(recorded.export_svg(title="selfhost demo"))
        (DOCS / "offers.svg").write_text(offers.export_svg(title="selfhost offers"))
    head = HEAD.format(
        with_=f" with {engine}" if given else "",
        words="".join(f" {word}" for word in words[1:]),
        engine=f" {engine}" if given else "",
    )
    (DOCS / f"{'-'.join(['demo', *given])}.md").write_text(head + "\n".join(lines).strip() + "\n```\n")


def offers_of_the_market(home: str) -> Console:
    """The ranking, as it is shown while the demo's market runs. Nothing is rented."""
    where = demo.paths()
    made = demo.prepare(where, lambda line: None)
    market = demo.start_market(where, keep=False)
    try:
        demo.write_config(where, market, made)
        return record(["--profile", demo.PROFILE, "offers"], home)
    finally:
        demo.stop(where)


def record(words: list[str], home: str) -> Console:
    """Run `selfhost` with these words; what it printed, ready to be exported."""
    done = subprocess.run(
        [sys.executable, "-m", "selfhost_cli", *words],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=True,
    )
    console = Console(record=True, width=WIDTH, file=io.StringIO())
    console.print(Text.from_ansi(f"$ selfhost {' '.join(words)}\n" + done.stdout.replace(home, "~")))
    return console


if __name__ == "__main__":
    main()
