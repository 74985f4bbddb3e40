"""`selfhost demo`, the README's first promise."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from selfhost_cli import config
from selfhost_cli.sandbox import demo
from tests.waiting import until

pytestmark = pytest.mark.e2e

GIVEN = dict(os.environ)
"""As the user has it: how this machine reaches its package registries may be in there."""
SYSTEM = ("/boot", "/etc", "/home", "/opt", "/root", "/run", "/srv", "/usr", "/var")


def changed_since(moment: float, *, but: list[Path]) -> list[str]:
    """Files of the system whose content or rights changed since then."""
    pruned = [word for path in but for word in ("-path", str(path), "-prune", "-o")]
    roots = [root for root in SYSTEM if Path(root).is_dir()]
    found = subprocess.run(
        ["find", *roots, "-xdev", *pruned, "-newerct", f"@{moment}", "-not", "-type", "d", "-print"],
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
def home(cache: Path, tmp_path: Path) -> Path:
    home = tmp_path / "home"
    home.mkdir()
    (home / "cache").symlink_to(cache)
    return home


def selfhost(home: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """Run `selfhost …` in that home, to a good end."""
    done = subprocess.run(
        [sys.executable, "-B", "-m", "selfhost_cli", *words],
        env={"PATH": os.environ["PATH"], "HOME": str(home), "SELFHOST_HOME": str(home)},
        cwd=home,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def test_the_demo_does_the_whole_job_and_leaves_nothing_behind(home: Path, cache: Path, tmp_path: Path) -> None:
    began = time.time()
    done = selfhost(home, "demo")
    assert "simulated GPU" in done.stderr
    assert "nothing is billed any more" in done.stdout
    assert "per million tokens" in done.stdout
    word = (home / "state" / "demo" / "task" / "note.txt").read_text().split()[-1].rstrip(".")
    assert word in done.stdout.lower()
    until(lambda: not processes_of(home))
    assert sorted(entry.name for entry in home.iterdir()) == ["cache", "config", "state"]
    checkout = Path(__file__).parent.parent.parent
    assert changed_since(began, but=[checkout, tmp_path.parent.parent, cache.resolve()]) == []


def test_a_kept_demo_can_be_played_with_by_the_commands_that_it_names(home: Path) -> None:
    assert "slow, and it compacts early" in selfhost(home, "demo", "--keep").stdout
    assert "ready" in selfhost(home, "--profile", "demo", "status").stdout
    assert "2.1.330" in selfhost(home, "--profile", "demo", "claude", "--version").stdout
    for _ in range(2):
        assert "nothing is billed any more" in selfhost(home, "--profile", "demo", "down").stdout
    market = demo.find_market(config.paths(demo.PROFILE, {"SELFHOST_HOME": str(home)}))
    assert market
    market.shut_down()
    until(lambda: not processes_of(home))


@pytest.mark.long
@pytest.mark.timeout(900)
@pytest.mark.skipif(os.getuid() != 0, reason="needs root, to become somebody else")
def test_the_first_command_of_the_readme_works_for_an_ordinary_user_in_a_fresh_clone(tmp_path: Path) -> None:
    checkout = Path(__file__).parent.parent.parent
    place = Path(subprocess.run(["mktemp", "-d"], capture_output=True, text=True, check=True).stdout.strip())
    try:
        subprocess.run(["git", "clone", "--quiet", str(checkout), str(place / "selfhost")], check=True)
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
