"""The shell scripts of the checkout: they parse, pass shellcheck, and say what is missing."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
COMMANDS = [
    "check",
    "crash-matrix",
    "demo",
    "format",
    "ollama",
    "peers",
    "record-demo",
    "setup",
    "test",
    "test-long",
    "test-ollama",
]
SCRIPTS = [ROOT / "scripts" / name for name in [*COMMANDS, "lib.sh"]] + [ROOT / ".ci" / "run"]


def bash(script: str, *, path: str = os.environ["PATH"], **environment: str) -> subprocess.CompletedProcess[str]:
    """Run with nothing of the user's environment but PATH."""
    return subprocess.run(
        ["/bin/bash", "-c", script], env={"PATH": path, **environment}, cwd="/", capture_output=True, text=True
    )


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """What set-up reads of a checkout, in a place of its own and without .venv."""
    copy = tmp_path / "a checkout"
    shutil.copytree(ROOT / "scripts", copy / "scripts")
    (copy / "selfhost_cli" / "sandbox").mkdir(parents=True)
    for name in [
        "pyproject.toml",
        "selfhost_cli/__init__.py",
        "selfhost_cli/errors.py",
        "selfhost_cli/sandbox/assets.py",
        "selfhost_cli/sandbox/processes.py",
    ]:
        shutil.copy(ROOT / name, copy / name)
    return copy


def stub(folder: Path, name: str, body: str) -> None:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(f"#!/bin/bash\n{body}\n")
    (folder / name).chmod(0o755)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_a_script_parses(script: Path) -> None:
    assert subprocess.run(["/bin/bash", "-n", script], capture_output=True, text=True).stderr == ""


def test_the_scripts_pass_shellcheck() -> None:
    shellcheck = Path(sys.executable).with_name("shellcheck")
    command: list[str | Path] = [shellcheck, "--external-sources", "--source-path=SCRIPTDIR", *SCRIPTS]
    assert subprocess.run(command, capture_output=True, text=True).stdout == ""


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_can_be_run_and_says_in_its_second_line_what_it_does(name: str) -> None:
    script = ROOT / "scripts" / name
    assert os.access(script, os.X_OK)
    assert script.read_text().splitlines()[1].startswith("# ")


@pytest.mark.skipif(not shutil.which("make"), reason="make is not installed")
def test_make_help_lists_every_command() -> None:
    done = subprocess.run(["make", "-s", "-C", ROOT, "help"], capture_output=True, text=True, check=True)
    assert [line.split()[1] for line in done.stdout.splitlines()] == sorted(COMMANDS)


def test_an_unfit_interpreter_named_by_the_user_is_refused(checkout: Path, tmp_path: Path) -> None:
    stub(tmp_path / "bin", "oldpython", "exit 1")
    done = bash(f'"{checkout}/scripts/setup"', PYTHON=str(tmp_path / "bin" / "oldpython"))
    assert done.returncode == 3
    assert f"PYTHON={tmp_path}/bin/oldpython is not a Python >= 3.11" in done.stderr
    assert not (checkout / ".venv").exists()


def install(checkout: Path, user: int, stubs: Path, packages: str) -> subprocess.CompletedProcess[str]:
    """Call lib.sh's install_packages as this user id, with the stubs before everything else on PATH."""
    stub(stubs, "id", f"echo {user}")
    script = f'source "{checkout}/scripts/lib.sh"; install_packages {packages}'
    return bash(script, path=f"{stubs}:{os.environ['PATH']}")


def test_an_ordinary_user_gets_the_one_line_to_run(checkout: Path, tmp_path: Path) -> None:
    stub(tmp_path / "bin", "apt-get", "echo it was run; exit 1")
    done = install(checkout, 1000, tmp_path / "bin", "curl python3.11-venv")
    assert done.returncode == 3
    assert done.stdout == ""
    assert done.stderr.splitlines() == [
        "error: missing on this machine: curl python3.11-venv",
        "  run: sudo apt-get install -y curl python3.11-venv",
    ]


def test_an_ordinary_user_is_not_told_to_start_a_login_service(checkout: Path, tmp_path: Path) -> None:
    stub(tmp_path / "bin", "apt-get", "exit 1")
    done = install(checkout, 1000, tmp_path / "bin", "openssh-server")
    assert "run: sudo install -D -m 644 /dev/null /etc/ssh/sshd_not_to_be_run && sudo apt-get install" in done.stderr


def test_root_installs_with_apt_quietly_and_without_questions(checkout: Path, tmp_path: Path) -> None:
    log = tmp_path / "log"
    stub(tmp_path / "bin", "apt-get", f'echo "$DEBIAN_FRONTEND $*" >>"{log}"; echo noise')
    done = install(checkout, 0, tmp_path / "bin", "curl flock")
    assert (done.returncode, done.stdout) == (0, "")
    assert log.read_text().splitlines() == [
        "noninteractive update -qq",
        "noninteractive install -qq -y --no-install-recommends curl flock",
    ]


def test_an_apt_that_fails_is_a_set_up_error(checkout: Path, tmp_path: Path) -> None:
    stub(tmp_path / "bin", "apt-get", "echo 'E: no such package' >&2; exit 100")
    done = install(checkout, 0, tmp_path / "bin", "curl")
    assert done.returncode == 3
    assert "E: no such package" in done.stderr
    assert "apt could not install curl" in done.stderr


def test_an_environment_that_moved_or_broke_counts_as_missing(checkout: Path) -> None:
    """`python -m venv` writes its place into itself; --without-pip keeps this quick, and makes it unusable too."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", checkout / ".venv"], check=True)
    ask = f"""source "{checkout}/scripts/lib.sh"
        if venv_is_current; then echo current; fi
        if venv_is_usable; then echo usable; fi"""
    assert bash(ask).stdout == ""

    (checkout / ".venv" / "bin" / "selfhost").symlink_to("/bin/true")
    bash(f'source "{checkout}/scripts/lib.sh"; stamp_text >"$stamp"')
    assert bash(ask).stdout == "current\n"

    with (checkout / "pyproject.toml").open("a") as file:
        file.write("# a new requirement\n")
    assert bash(ask).stdout == ""


# --- scripts/ollama: everything but the build ---------------------------------------------------------------------

ORDINARY = ["basename", "cat", "dirname", "flock", "grep", "head", "ln", "ls", "mkdir", "mv", "readlink", "rm"]
ORDINARY += ["sha256sum", "sort", "tail", "tr", "uname"]


@pytest.fixture
def ready_checkout(checkout: Path) -> Path:
    """With an environment that counts as current, so that nothing is installed."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", checkout / ".venv"], check=True)
    (checkout / ".venv" / "bin" / "selfhost").symlink_to("/bin/true")
    bash(f'source "{checkout}/scripts/lib.sh"; stamp_text >"$stamp"')
    return checkout


@pytest.fixture
def bare(tmp_path: Path) -> Path:
    """A PATH of ordinary tools, without compilers, whose `id` is an ordinary user."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in ORDINARY:
        (folder / name).symlink_to(str(shutil.which(name)))
    stub(folder, "id", "echo 1000")
    stub(folder, "apt-get", "exit 1")
    return folder


def build_ollama(checkout: Path, cache: Path, path: Path) -> subprocess.CompletedProcess[str]:
    return bash(f'"/bin/bash" "{checkout}/scripts/ollama"', path=str(path), SELFHOST_TEST_CACHE=str(cache))


def test_without_a_compiler_no_ollama_is_built_and_nothing_is_written(
    ready_checkout: Path, tmp_path: Path, bare: Path
) -> None:
    done = build_ollama(ready_checkout, tmp_path / "cache", bare)
    assert (done.returncode, done.stdout) == (3, "")
    assert "run: sudo apt-get install -y g++ libc6-dev zstd" in done.stderr
    assert not (tmp_path / "cache").exists()


def test_an_ollama_that_was_built_is_taken_as_it_is_and_linked(
    ready_checkout: Path, tmp_path: Path, bare: Path
) -> None:
    """Its name is a hash of the inputs: a compiler is not asked, and what another processor needed is not taken."""
    cache = tmp_path / "cache"
    ask = f'source <(sed "/^main$/d; /^source /d" "{ready_checkout}/scripts/ollama"); inputs | sha256sum | head -c 8'
    built = cache / "ollama" / f"0.34.0-{bash(ask).stdout}"
    (built / "bin").mkdir(parents=True)
    (built / "ollama-linux-amd64.tar.zst").write_text("an archive")
    stub(built / "bin", "ollama", "")
    (cache / "ollama" / "current").symlink_to("0.33.0-ffffffff")
    for _ in range(2):
        done = build_ollama(ready_checkout, cache, bare)
        assert (done.returncode, done.stdout, done.stderr) == (0, f"{built}\n", "")
        assert os.readlink(cache / "ollama" / "current") == built.name
    assert sorted(path.name for path in (cache / "ollama").iterdir()) == [built.name, "current"]

    (built / "bin" / "ollama").unlink()  # half of one is none
    assert build_ollama(ready_checkout, cache, bare).returncode == 3


def test_a_build_that_fails_shows_its_last_words_and_leaves_nothing(
    ready_checkout: Path, tmp_path: Path, bare: Path
) -> None:
    for name in ("g++", "gcc", "zstd"):
        stub(bare, name, "")
    python = ready_checkout / ".venv" / "bin" / "python"
    python.rename(python.with_name("real-python"))
    stub(
        python.parent,
        "python",
        '[[ $2 != venv ]] || { echo "no venv today"; exit 1; }\nexec "${0%/*}/real-python" "$@"',
    )
    cache = tmp_path / "cache"
    (cache / "ollama" / "partial" / "left by a kill").mkdir(parents=True)
    done = build_ollama(ready_checkout, cache, bare)
    assert (done.returncode, done.stdout) == (3, "")
    assert "no venv today\nerror: getting the tools failed" in done.stderr
    assert [path.name for path in (cache / "ollama").iterdir()] == ["lock"]


# --- scripts/peers: everything but the downloads ------------------------------------------------------------------


@pytest.fixture
def installs(ready_checkout: Path, tmp_path: Path, bare: Path) -> Path:
    """A log of what pip and npm were told to install; both fail at what the file `broken` names."""
    log, python = tmp_path / "installs", ready_checkout / ".venv" / "bin" / "python"
    log.write_text("")
    (tmp_path / "broken").write_text("nothing")
    stub(bare, "npm", f'echo "${{*: -1}}" >>"{log}"; [[ ${{*: -1}} != *"$(<"{tmp_path}/broken")"* ]]')
    python.rename(python.with_name("real-python"))
    venv = f'mkdir -p "$3/bin"; ln -s "{bare}/npm" "$3/bin/python"; exit'
    stub(python.parent, "python", f'[[ $2 != venv ]] || {{ {venv}; }}\nexec "${{0%/*}}/real-python" "$@"')
    return log


def install_peers(checkout: Path, cache: Path, path: Path) -> subprocess.CompletedProcess[str]:
    return bash(f'"/bin/bash" "{checkout}/scripts/peers"', path=str(path), SELFHOST_TEST_CACHE=str(cache))


def test_peers_are_installed_once_and_again_only_where_the_version_is_another(
    ready_checkout: Path, tmp_path: Path, bare: Path, installs: Path
) -> None:
    cache = tmp_path / "cache"
    first = install_peers(ready_checkout, cache, bare)
    assert first.returncode == 0
    folders, pins = zip(*(line.split("  ") for line in first.stdout.splitlines()), strict=True)
    assert folders == (f"{cache}/peers/litellm", f"{cache}/peers/ccr")
    assert installs.read_text().split() == list(pins)

    again = install_peers(ready_checkout, cache, bare)
    assert (again.stdout, again.stderr) == (first.stdout, "")
    assert installs.read_text().split() == list(pins)

    script = ready_checkout / "scripts" / "peers"
    script.write_text(script.read_text().replace(pins[1], "ccr@99"))
    assert install_peers(ready_checkout, cache, bare).stdout == first.stdout.replace(pins[1], "ccr@99")
    assert installs.read_text().split() == [*pins, "ccr@99"]


def test_a_peer_that_could_not_be_installed_is_named_and_tried_again(
    ready_checkout: Path, tmp_path: Path, bare: Path, installs: Path
) -> None:
    (tmp_path / "broken").write_text("claude-code-router")
    done = install_peers(ready_checkout, tmp_path / "cache", bare)
    assert done.returncode == 3
    assert "claude-code-router" in done.stderr.splitlines()[-2]
    assert not (tmp_path / "cache" / "peers" / "ccr" / "made").exists()

    (tmp_path / "broken").write_text("nothing")
    assert install_peers(ready_checkout, tmp_path / "cache", bare).returncode == 0
    assert [line.count("claude-code-router") for line in installs.read_text().split()] == [0, 1, 1]


REPORT = """<testsuites><testsuite>
<testcase classname="tests.unit.test_a" name="test_one"/>
<testcase classname="tests.unit.test_a" name="test_two"><failure message="no"/></testcase>
<testcase classname="tests.unit.test_a" name="test_three"><error message="in set-up"/></testcase>
<testcase classname="tests.unit.test_b" name="test_four"><skipped message="needs a GPU"/></testcase>
</testsuite></testsuites>"""


def test_the_summary_names_what_was_skipped_and_closes_with_the_counts(tmp_path: Path) -> None:
    report = tmp_path / "report.xml"
    report.write_text(REPORT)
    command: list[str | Path] = [sys.executable, ROOT / "scripts" / "summary.py", report]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    assert "  unit.test_b::test_four: needs a GPU" in lines
    assert lines[-2:] == ["3 tests ran", "1 passed, 2 failed, 1 skipped"]
