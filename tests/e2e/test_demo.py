"""`selfhost demo`, the README's first promise."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO

import pytest

from selfhost_cli import config
from selfhost_cli.sandbox import demo
from tests.e2e.stage import Answer, finished
from tests.waiting import until

pytestmark = pytest.mark.e2e

GIVEN = dict(os.environ)
"""As the user has it: how this machine reaches its package registries may be in there."""
CHECKOUT = Path(__file__).parents[2]
SYSTEM = ("/boot", "/etc", "/home", "/opt", "/root", "/run", "/srv", "/usr", "/var")

# Everybody writes to /tmp and /dev/shm. In empty ones of its own a command is alone: what is there in the end is its.
# sh -c … sh FILE PATHS COMMAND…: runs it so and writes what it left there to FILE. PATHS (a:b) stay where they are.
ALONE = """
report=$1 paths=$2 number=0 IFS=: && set -f && shift 2 && mount -n -t tmpfs none /mnt || exit 99
for path in $paths; do
  number=$((number + 1)) && mkdir "/mnt/$number" && mount -n --rbind "$path" "/mnt/$number" || exit 99
done
mount -n -t tmpfs -o mode=1777 none /tmp && mount -n -t tmpfs -o mode=1777 none /dev/shm && number=0 || exit 99
for path in $paths; do
  number=$((number + 1)) && mkdir -p "$path" && mount -n --move "/mnt/$number" "$path" || exit 99
done
before=$(find /tmp /dev/shm -xdev)
"$@"
code=$?
find /tmp /dev/shm -xdev | grep -vxF "$before" >"$report"
exit "$code"
"""


def can_be_alone() -> bool:
    """Root may have mounts of its own, unless a container's rules forbid them; nobody else may."""
    done = subprocess.run(["unshare", "-m", "mount", "-n", "-t", "tmpfs", "none", "/mnt"], capture_output=True)
    return done.returncode == 0


def changed_since(moment: float, *, but: Sequence[Path]) -> list[str]:
    """What changed in the system since then: files, and folders in which something was made or deleted."""
    pruned = [word for path in but for word in ("-path", str(path), "-prune", "-o")]
    roots = [root for root in SYSTEM if Path(root).is_dir()]
    found = subprocess.run(
        ["find", *roots, "-xdev", *pruned, "-newerct", f"@{moment}", "-print"],
        capture_output=True,
        text=True,
        check=False,  # what an ordinary user may not look at, he did not write
    )
    return found.stdout.splitlines()


def processes_of(home: Path) -> list[str]:
    """Command lines of what still runs with this home."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            if str(home).encode() in (entry / "environ").read_bytes():
                found.append((entry / "cmdline").read_text().replace("\0", " "))
        except OSError:
            continue
    return found


@pytest.fixture
def home(cache: Path) -> Iterator[Path]:
    """With a short name, as a person's has: Claude Code's socket below it may have one of 107 bytes."""
    with tempfile.TemporaryDirectory(prefix="home-") as folder:
        (Path(folder) / "cache").symlink_to(cache)
        yield Path(folder)


def selfhost(
    home: Path, *words: str, code: int = 0, out: int | IO[str] = subprocess.PIPE, around: Sequence[str | Path] = ()
) -> Answer:
    """Run `selfhost …` in that home, to the end that is expected."""
    process = subprocess.Popen(
        [*around, sys.executable, "-B", "-m", "selfhost_cli", *words],
        env={"PATH": os.environ["PATH"], "HOME": str(home), "SELFHOST_HOME": str(home)},
        cwd=home,
        stdin=subprocess.DEVNULL,
        stdout=out,
        stderr=subprocess.PIPE,
        text=True,
    )
    told = Answer(*finished(process, home, 110))
    assert process.returncode == code, f"{told.out}{told.err}"
    return told


def test_the_demo_does_the_whole_job_and_leaves_nothing_behind(home: Path, cache: Path, tmp_path: Path) -> None:
    left, began = tmp_path / "left", time.time()
    needed = (home, tmp_path, cache.resolve(), CHECKOUT, Path(sys.prefix), Path(sys.base_prefix))
    alone = ["unshare", "-m", "sh", "-c", ALONE, "sh", left, ":".join(map(str, needed))] if can_be_alone() else []
    done = selfhost(home, "demo", around=alone)
    assert "simulated GPU" in done.err
    assert "nothing is billed any more" in done.out
    assert "per million tokens" in done.out
    word = (home / "state" / "demo" / "task" / "note.txt").read_text().split()[-1].rstrip(".")
    assert word in done.out.lower()
    until(lambda: not processes_of(home))
    assert sorted(entry.name for entry in home.iterdir()) == ["cache", "config", "state"]
    assert changed_since(began, but=[CHECKOUT, home, tmp_path.parent.parent, cache.resolve()]) == []
    if alone:
        assert left.read_text().splitlines() == []


def test_a_kept_demo_can_be_played_with_by_the_commands_that_it_names(home: Path) -> None:
    assert "slow, and it compacts early" in selfhost(home, "demo", "--keep").out
    assert "ready" in selfhost(home, "--profile", "demo", "status").out
    assert "2.1.330" in selfhost(home, "--profile", "demo", "claude", "--version").out
    with open("/dev/full", "w") as full:
        told = selfhost(home, "--profile", "demo", "up", "--yes", "--json", code=5, out=full).err
    assert "is ready and MAY STILL BE BILLING: [Errno 28] No space left on device" in told
    for _ in range(2):
        assert "nothing is billed any more" in selfhost(home, "--profile", "demo", "down").out
    market = demo.find_market(config.paths(demo.PROFILE, {"SELFHOST_HOME": str(home)}))
    assert market
    assert market.billed() == 0
    market.shut_down()
    until(lambda: not processes_of(home))


@pytest.mark.long
@pytest.mark.timeout(900)
@pytest.mark.skipif(os.getuid() != 0, reason="needs root, to become somebody else")
def test_the_first_command_of_the_readme_works_for_an_ordinary_user_in_a_fresh_clone(tmp_path: Path) -> None:
    place = Path(subprocess.run(["mktemp", "-d"], capture_output=True, text=True, check=True).stdout.strip())
    try:
        subprocess.run(["git", "clone", "--quiet", str(CHECKOUT), str(place / "selfhost")], check=True)
        (place / "home").mkdir()
        subprocess.run(["chown", "-R", "nobody", str(place)], check=True)
        kept = {name: value for name, value in GIVEN.items() if not name.startswith(("SELFHOST_", "PYTEST_"))}
        done = subprocess.run(
            ["su", "nobody", "-s", "/bin/bash", "-c", f"HOME={place}/home scripts/demo"],
            env={**kept, "PATH": "/usr/local/bin:/usr/bin:/bin"},
            cwd=place / "selfhost",
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=800,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        assert "nothing is billed any more" in done.stdout
    finally:
        subprocess.run(["rm", "-rf", str(place)], check=True)
