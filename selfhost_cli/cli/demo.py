"""`selfhost demo`: the whole way on this machine, as somebody would type it."""

from __future__ import annotations

import time

from selfhost_cli.cli import render
from selfhost_cli.errors import SelfhostError, UsageError
from selfhost_cli.sandbox import demo as sandbox

KEPT = """
The demo box is still up (simulated money; it ends by itself after 45 minutes without use). Try:

  selfhost --profile demo status
  selfhost --profile demo offers      # what its market has, ranked by what it really costs
  selfhost --profile demo logs        # what its parts write of themselves
  selfhost --profile demo doctor      # the checks to run when something is wrong
  selfhost --profile demo claude      # a 32 k model on a CPU: slow, and it compacts early
  selfhost --profile demo down
"""


def run(*, keep: bool, engine: str) -> None:
    """Rent, install, ask Claude, destroy, prove. Raises SelfhostError when any of it fails."""
    if engine not in sandbox.ENGINES:
        raise UsageError(f"the demo has no engine {engine!r}", f"Its engines are {' and '.join(sandbox.ENGINES)}.")
    began = time.monotonic()
    where = sandbox.paths()
    _say("selfhost demo: a sandbox market, a real box with a real sshd, a real model on the CPU, the real Claude Code.")
    _say("No account and no money: prices and the GPU are simulated.\n")
    made = sandbox.prepare(where, lambda line: render.err.print(line, style="dim"))
    ollama = sandbox.prepare_ollama(where, made) if engine == "ollama" else None
    market = sandbox.start_market(where, keep=keep, ollama=ollama)
    try:
        sandbox.write_config(where, market, made, ollama)
        _command(["up", "--yes", "--detach"])
        _ask_claude(sandbox.make_task(where))
        if keep:
            _say(KEPT)
            return
        _command(["down"])
        if billed := market.billed():
            raise SelfhostError(f"the market still bills {billed} boxes", "This is a bug of ours: please report it.")
    except BaseException:
        keep = False  # what failed is nothing to play with
        raise
    finally:
        if not keep:
            sandbox.stop(where)
    _say(f"\nThe whole way took {time.monotonic() - began:.0f} s.")


def _command(arguments: list[str]) -> None:
    _say(f"\n$ {sandbox.shown(arguments)}")
    code, _ = sandbox.run(arguments)
    if code:
        raise SelfhostError(
            f"`{sandbox.shown(arguments)}` ended with exit code {code}", "Its own message stands above."
        )


def _ask_claude(task: sandbox.Task) -> None:
    """One tool call on a real file; the right answer is a word that only the file holds."""
    _say(f"\n$ {sandbox.shown(task.arguments)}")
    code, answer = sandbox.run(task.arguments, cwd=task.folder, capture=True)
    _say(answer.rstrip())
    if code:
        raise SelfhostError(f"claude ended with exit code {code}", "Its own message stands above.")
    if not task.solved_by(answer):
        raise SelfhostError(
            f"Claude answered, but without the word {task.word!r} that the file holds",
            "The demo's model is tiny (0.5 B) and fails now and then: run `selfhost demo` again.",
        )


def _say(text: str) -> None:
    render.out.print(text, markup=False)
