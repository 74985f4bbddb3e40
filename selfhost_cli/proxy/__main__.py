"""`python -m selfhost_cli.proxy --run-dir DIR`: the engine side, until SIGTERM."""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import signal
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

from aiohttp import web

from selfhost_cli import __version__
from selfhost_cli.proxy.engines import Engine
from selfhost_cli.proxy.engines.llamacpp import LlamaCppEngine
from selfhost_cli.proxy.engines.ollama import OllamaEngine
from selfhost_cli.proxy.rundir import RunDir
from selfhost_cli.proxy.server import Settings, build_server
from selfhost_cli.proxy.web import runner

ENGINES: Mapping[str, Callable[[str, str, Callable[[], str]], Engine]] = {
    "llamacpp": LlamaCppEngine,
    "ollama": OllamaEngine,
}


def main() -> None:
    args = _arguments()
    logging.basicConfig(
        stream=sys.stderr, level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s", force=True
    )
    try:
        settings, engine = _settings(os.environ, args.slots)
        asyncio.run(_run(settings, engine, args))
    except (OSError, ValueError) as error:
        sys.exit(f"selfhost proxy: {error}")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="selfhost_cli.proxy", description=__doc__)
    parser.add_argument("--run-dir", type=Path, required=True, help="where the port files are")
    parser.add_argument("--port", type=int, default=8000, help="preferred port; the next free one is taken")
    parser.add_argument("--slots", type=int, help="answers that the engine generates at once; default: SELFHOST_SLOTS")
    return parser.parse_args()


def _settings(env: Mapping[str, str], slots: int | None) -> tuple[Settings, str]:
    """The settings and the engine's name. Raises ValueError, which names the variable."""
    needed = ("SELFHOST_TOKEN", "SELFHOST_MODEL", "SELFHOST_ENGINE")
    if missing := [name for name in needed if not env.get(name)]:
        raise ValueError(f"not set: {', '.join(missing)}")
    if env["SELFHOST_ENGINE"] not in ENGINES:
        raise ValueError(f"SELFHOST_ENGINE is {env['SELFHOST_ENGINE']!r}, known: {', '.join(ENGINES)}")
    told = env.get("SELFHOST_SLOTS") or "1"
    if not told.isdecimal():
        raise ValueError(f"SELFHOST_SLOTS is {told!r}, expected a number")
    slots = int(told) if slots is None else slots
    version = env.get("SELFHOST_VERSION") or __version__
    digest = env.get("SELFHOST_MODEL_SHA256", "")
    settings = Settings(env["SELFHOST_TOKEN"], env["SELFHOST_MODEL"], version, digest, slots=max(1, slots))
    return settings, env["SELFHOST_ENGINE"]


async def _run(settings: Settings, engine_name: str, args: argparse.Namespace) -> None:
    run = RunDir(args.run_dir)
    engine = ENGINES[engine_name](engine_name, settings.model, run.engine_url)
    app_runner = runner(build_server(settings, engine, run))
    await app_runner.setup()
    await web.SockSite(app_runner, run.listen(args.port)).start()
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    await stop.wait()
    await app_runner.cleanup()


if __name__ == "__main__":
    main()
