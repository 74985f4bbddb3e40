"""vllm-router, for as long as our stdin is open: whoever holds the other end may be killed, and it must not stay."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import threading

PROGRAM = "vllm_router.launch_router"
PASSED_ON = ("PATH", "HOME", "LANG", "TMPDIR", "PYTHONPATH", "PYTHONDONTWRITEBYTECODE")
OPTIONS = [
    *("--policy", "sticky_least_loaded", "--health-check-endpoint", "/", "--disable-retries"),
    *("--health-check-interval-secs", "2", "--health-failure-threshold", "1", "--health-success-threshold", "1"),
    *("--host", "127.0.0.1", "--prometheus-host", "127.0.0.1", "--log-level", "error"),
]


def there() -> bool:
    """Whether the extra is installed that it comes with."""
    return importlib.util.find_spec(PROGRAM.partition(".")[0]) is not None


def words(port: int, metrics: int) -> list[str]:
    """The program that listens on this port of loopback, with its metrics on the other."""
    return [sys.executable, "-m", __name__, "--port", str(port), "--prometheus-port", str(metrics), *OPTIONS]


def main() -> int:
    # A process of its own: it never lets go of the interpreter, so no thread beside it would hear of the end.
    # The keys in our environment are none of its business.
    env = {name: os.environ[name] for name in PASSED_ON if name in os.environ}
    child = subprocess.Popen([sys.executable, "-m", PROGRAM, *sys.argv[1:]], stdin=subprocess.DEVNULL, env=env)
    threading.Thread(target=_end_with_stdin, args=(child,), daemon=True).start()
    return child.wait()


def _end_with_stdin(child: subprocess.Popen[bytes]) -> None:
    while os.read(sys.stdin.fileno(), 4096):
        pass
    child.kill()


if __name__ == "__main__":
    os._exit(main())
