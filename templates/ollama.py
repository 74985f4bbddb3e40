"""Ollama on the box, run in ~/.selfhost: `serve` keeps a model loaded, `pull` brings it, `have` looks for it.

serve   runs engine/bin/ollama on a free port of 127.0.0.1, writes run/engine.port once it answers, and loads the model
        as soon as it is there, again whenever it is gone. Why it cannot be loaded is in run/engine.problem.
        What does not fit into the GPU's memory is loaded with less: fewer slots first, then less context, in eighths of
        what was asked for, down to half of it. What it came to is in run/engine.fit, as JSON; a restart begins there.
        Ends with the server's status; SIGTERM ends both.
pull    brings the model through that server: lines `DONE TOTAL TEXT` (bytes) on stdout. Exit 1: the reason is the last
        line on stderr. Exit 3: no other machine could do it either.
have    exit 0 when manifest and blobs of the model are on the disk, whole. No server is asked.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from typing import Any

ENGINE = Path("engine").absolute()
MODELS = ENGINE / "models"
PORT_FILE = Path("run/engine.port")
PROBLEM = Path("run/engine.problem")
FIT = Path("run/engine.fit")
REGISTRY = "https://registry.ollama.ai"
# In the environment of the server, and so of the llama-servers that it starts: how their leftovers are found.
MARK = f"SELFHOST_OLLAMA_OF={ENGINE}"
LOOK_S = 1.0
SOON_S = 0.2
"""Between two looks for a model that is still to come."""
ASK_S = 15.0
LOAD_S = VERIFY_S = 3600.0
TRIES = 5
REFUSED = 3
PATIENCE_S = float(os.environ.get("SELFHOST_PATIENCE_S") or 180)
"""A registry that is busy for a minute is no reason to lose a box that is paid for."""
ON_GPU = 0.99
"""Of a model's bytes, so many at least: a layer on the CPU costs most of the speed."""
NO_ROOM = re.compile(r"cuda.*(out of memory|alloc)|allocate cuda", re.IGNORECASE)
"""In Ollama's words for why it could not load."""
KV_TYPES = ("f16", "q8_0", "q4_0")
UNANSWERED = 4
"""So many asks in a row, each with its own time limit: then the server hangs."""
MB = 1_000_000
RESERVE = 200 * MB


class Failure(Exception):
    """Ollama or the registry said no. The text is for the user."""


class Spilled(Exception):
    """The model does not fit into the GPU's memory as it was loaded. The text says what was seen."""


class Refusal(Failure):
    """What is asked for is impossible, and would be on every other machine, too."""


def main() -> None:
    args = arguments()
    try:
        model = Model.parse(args.model, getattr(args, "registry", ""))
        if args.command == "serve":
            sys.exit(serve(model, Shape(args.context, args.slots, args.kv_cache_type), args.port))
        if args.command == "have":
            sys.exit(not model.present())
        pull(model, args.context, args.free_mb, args.stall, args.slow)
    except Failure as failure:
        print(failure, file=sys.stderr)
        sys.exit(REFUSED if isinstance(failure, Refusal) else 1)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    serve_, pull_, have_ = (commands.add_parser(name) for name in ("serve", "pull", "have"))
    for command in (serve_, pull_, have_):
        command.add_argument("--model", required=True, help="any name that Ollama knows: NAME[:TAG], USER/NAME:TAG, …")
    for command in (serve_, pull_):
        command.add_argument("--context", type=int, required=True, help="tokens, of each slot")
    serve_.add_argument("--slots", type=int, default=1, help="answers at once")
    serve_.add_argument("--kv-cache-type", choices=KV_TYPES, default="q8_0", help="what keys and values are kept as")
    serve_.add_argument("--port", type=int, default=11434, help="preferred port; the next free one is taken")
    pull_.add_argument("--registry", default="", help="instead of Ollama's own; http:// only on loopback")
    pull_.add_argument("--free-mb", type=int, help="space on the disk; without it, it is not checked")
    pull_.add_argument("--slow", type=float, default=20, help="seconds far below its own best that count as a cut")
    pull_.add_argument("--stall", type=float, default=30, help="seconds without a byte that count as a cut")
    return parser.parse_args()


# --- the model --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Model:
    short: str
    """As /api/ps lists it: with its tag, and without the parts that are Ollama's defaults."""
    source: str
    """As /api/pull wants it: from which registry."""
    manifest: Path
    url: str
    """Of the manifest."""

    @classmethod
    def parse(cls, text: str, registry: str = "") -> Model:
        """`[HOST/][USER/]NAME[:TAG]`. Raises Failure for anything else."""
        front, _, last = text.rpartition("/")
        name, _, tag = last.partition(":")
        parts = [*(front.split("/") if front else ["library"]), name, tag or "latest"]
        host = parts.pop(0) if len(parts) == 4 else ""
        if len(parts) != 3 or not all(re.fullmatch(r"\w[\w.-]*", part, re.ASCII) for part in parts):
            raise Refusal(f"{text!r} is no name of a model for Ollama")
        if not re.fullmatch(r"(\w[\w.:-]*)?", host, re.ASCII):
            raise Refusal(f"{text!r} is no name of a model for Ollama")
        space, name, tag = parts
        short = f"{name}:{tag}"
        if host or space != "library":
            short = "/".join(filter(None, (host, space, short)))
        base = f"https://{host}" if host else (registry or REGISTRY).rstrip("/")
        if base.startswith("http://") and not loopback(base):
            raise Refusal(f"the registry {base} is refused: without https it may only be on loopback")
        source = short if base in (f"https://{host}", REGISTRY) else f"{base}/{space}/{name}:{tag}"
        manifest = MODELS / "manifests" / (host or urllib.parse.urlsplit(REGISTRY).netloc) / space / name / tag
        return cls(short, source.removeprefix("https://"), manifest, f"{base}/v2/{space}/{name}/manifests/{tag}")

    def present(self) -> bool:
        """All of it is on the disk, by name and size; what it holds is checked when it is pulled."""
        try:
            return all(size_of(blob(digest)) == size for digest, size in layers(self.manifest.read_bytes()).items())
        except (OSError, Failure):
            return False


def layers(manifest: bytes) -> dict[str, int]:
    """Digest -> bytes of everything that a model is made of."""
    try:
        content = json.loads(manifest)
        found = {layer["digest"]: int(layer["size"]) for layer in [*content["layers"], content["config"]]}
    except (ValueError, KeyError, TypeError) as error:
        raise Failure("the model's manifest cannot be read") from error
    if not all(re.fullmatch("sha256:[0-9a-f]{64}", digest) for digest in found):
        raise Failure("the model's manifest cannot be read")
    return found


def blob(digest: str) -> Path:
    return MODELS / "blobs" / digest.replace(":", "-")


def size_of(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return -1


def arrived(digest: str, size: int) -> int:
    """Bytes of a blob that need not come again. The partial file itself has its full size from the start."""
    path = blob(digest)
    if size_of(path) == size:
        return size
    done = 0
    for part in path.parent.glob(f"{path.name}-partial-*"):
        try:
            done += int(json.loads(part.read_bytes())["Completed"])
        except (OSError, ValueError, KeyError, TypeError):
            continue  # it is just being written
    return done


def blocks(digest: str) -> int:
    """Bytes of the disk that its partial file takes."""
    try:
        return blob(digest).with_name(f"{blob(digest).name}-partial").stat().st_blocks * 512
    except FileNotFoundError:
        return 0


def checksum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def loopback(url: str) -> bool:
    return urllib.parse.urlsplit(url).hostname in ("127.0.0.1", "::1", "localhost")


# --- serve ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shape:
    """How the model is served: each of `slots` answers at once has the whole `context`."""

    context: int
    slots: int
    kv_cache_type: str

    def __str__(self) -> str:
        return f"{self.slots} × {self.context} tokens, KV {self.kv_cache_type}"

    def less(self) -> list[Shape]:
        """What is tried, one after the other, when this does not fit."""
        fewer = [replace(self, slots=slots) for slots in range(self.slots - 1, 0, -1)]
        return fewer + [replace(self, slots=1, context=self.context * eighths // 8) for eighths in (7, 6, 5, 4)]


def serve(model: Model, asked: Shape, preferred: int) -> int:
    end_when_told()
    bury()
    PROBLEM.unlink(missing_ok=True)
    shapes = [asked, *asked.less()]
    shapes = shapes[shapes.index(reached(asked)) :]
    port = 0
    while True:
        shape, *smaller = shapes
        note(asked, shape, loaded=False)
        port = free_port(preferred, but=port)
        child = subprocess.Popen([ENGINE / "bin/ollama", "serve"], env=environment(port, shape))
        try:
            if comes_up(child, port):
                publish(PORT_FILE, f"{port}\n")
                keep_loaded(child, port, model, shape, partial(note, asked, shape, loaded=True), last=not smaller)
            break
        except Spilled as spilled:
            print(f"ollama: {spilled}; now {smaller[0]}", file=sys.stderr)
            # On another port the proxy asks anew how much context there is.
            PORT_FILE.unlink(missing_ok=True)
            shapes = smaller
        finally:
            end(child)
        end_when_told()
    status: int = child.returncode
    return status if status >= 0 else 128 - status


def end_when_told() -> None:
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: sys.exit(0))


def note(asked: Shape, shape: Shape, *, loaded: bool) -> None:
    publish(FIT, json.dumps({"asked": asdict(asked), **asdict(shape), "loaded": loaded}) + "\n")


def reached(asked: Shape) -> Shape:
    """Where an earlier start came to that was asked for the same: a killed server is no reason to try it again."""
    try:
        told = json.loads(FIT.read_text())
        before = Shape(told["context"], told["slots"], told["kv_cache_type"])
        return before if told["asked"] == asdict(asked) and before in asked.less() else asked
    except (OSError, ValueError, KeyError, TypeError):
        return asked


def environment(port: int, shape: Shape) -> dict[str, str]:
    """What Ollama gets: how it works is decided here for all requests, and nothing secret goes along.

    Requests repeat what matters (num_ctx, shift): with other values than those of the load it would load again.
    """
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("OLLAMA_", "PYTHON")) and not re.search("KEY|TOKEN|SECRET|PASS", name)
    }
    name, _, value = MARK.partition("=")
    return kept | {
        name: value,
        # Its own key, its history and whatever else it wants to keep.
        "HOME": str(ENGINE / "home"),
        "TMPDIR": str(ENGINE / "home"),
        "OLLAMA_HOST": f"127.0.0.1:{port}",
        "OLLAMA_MODELS": str(MODELS),
        "OLLAMA_CONTEXT_LENGTH": str(shape.context),
        "OLLAMA_FLASH_ATTENTION": "1",
        "OLLAMA_KV_CACHE_TYPE": shape.kv_cache_type,
        "OLLAMA_NUM_PARALLEL": str(shape.slots),
        "OLLAMA_MAX_LOADED_MODELS": "1",
        "OLLAMA_KEEP_ALIVE": "-1",
        "OLLAMA_NO_CLOUD": "1",
        # A restart would otherwise throw away what has come of a model that is still being pulled.
        "OLLAMA_NOPRUNE": "1",
    }


def free_port(preferred: int, but: int = 0) -> int:
    ports = list(range(preferred, preferred + 100))
    try:
        ports.insert(0, int(PORT_FILE.read_text()))
    except (OSError, ValueError):
        pass  # it is the first start
    for port in ports:
        if port != but and free(port):
            return port
    raise Failure(f"no free port from {preferred} on")


def free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except (OSError, OverflowError):
            return False
    return True


def comes_up(child: subprocess.Popen[bytes], port: int, seconds: float = 120) -> bool:
    """Wait until it answers; false when it ended instead."""
    deadline = time.monotonic() + seconds
    while child.poll() is None:
        # Another Ollama may have taken the port meanwhile, and would answer.
        if listens(child.pid, port):
            call(port, "GET", "/api/version")
            return True
        if time.monotonic() > deadline:
            raise Failure(f"ollama serve does not listen within {seconds:.0f} s")
        time.sleep(0.05)
    return False


def listens(pid: int, port: int) -> bool:
    """The process holds the socket that listens on that port of 127.0.0.1."""
    table = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    local = f"{int.from_bytes(socket.inet_aton('127.0.0.1'), sys.byteorder):08X}:{port:04X}"
    sockets = {f"socket:[{row[9]}]" for row in table if row[1] == local and row[3] == "0A"}
    try:
        return any(os.readlink(file) in sockets for file in Path(f"/proc/{pid}/fd").iterdir())
    except OSError:
        return False  # it is opening and closing files, or gone


def keep_loaded(
    child: subprocess.Popen[bytes], port: int, model: Model, shape: Shape, fits: Callable[[], None], *, last: bool
) -> None:
    """Returns when the server has ended, or hangs: then it is to be ended.

    `fits` is told when the model is loaded as it should be. Raises Spilled when it does not fit; `last`: there is no
    smaller shape to be tried.
    """
    pause, told, asked, unanswered = LOOK_S, "", 0.0, 0
    known: set[int] = set()
    while child.poll() is None and unanswered < UNANSWERED:
        problem = ""
        # /api/ps goes on listing a model whose llama-server was killed: the next request would find out, slowly.
        runners = {pid for pid in marked() if pid != child.pid}
        lives = bool(runners)
        # Ollama logs every request: asked each second, its log would hold nothing else.
        if told or not lives or time.monotonic() - asked > ASK_S:
            asked = time.monotonic()
            try:
                if load(port, model, shape.context, lives):
                    fits()
                    runners = {pid for pid in marked() if pid != child.pid}
                    if known and known.isdisjoint(runners):
                        # What was read before is gone with the old one: a new date tells the proxy so.
                        publish(PORT_FILE, f"{port}\n")
                    known = runners
                unanswered = 0
            except Spilled as spilled:
                if not last:
                    raise
                problem, unanswered = f"{spilled}, and there is nothing less to try", 0
            except Failure as failure:
                problem, unanswered = str(failure), 0
            except (OSError, HTTPException) as error:
                print(f"ollama: no answer: {error}", file=sys.stderr)
                problem, asked, unanswered = told, 0.0, unanswered + 1
        if problem != told:
            print(f"ollama: {problem or 'the problem is gone'}", file=sys.stderr)
            told = problem
            if problem:
                publish(PROBLEM, f"{problem}\n")
            else:
                PROBLEM.unlink(missing_ok=True)
        # Loading a model in vain is much work.
        pause = min(pause * 2, 60) if problem else LOOK_S if lives else SOON_S
        try:
            child.wait(pause)
        except subprocess.TimeoutExpired:
            continue


def load(port: int, model: Model, context: int, lives: bool) -> bool:
    """Load the model, if it is there and not loaded; whether it is there.

    Raises Failure when it cannot be, or only with less context, and Spilled when a part of it is not on the GPU.
    """
    if not model.present():
        return False  # it is still being pulled
    entry = listed(port, model) if lives else {}
    if not entry:
        check_context(port, model, context)
        try:
            # As the proxy's requests say it: with another `shift` the first of them would load the model again.
            body = {"model": model.short, "keep_alive": -1, "stream": False, "shift": False}
            call(port, "POST", "/api/generate", body, LOAD_S)
        except Failure as failure:
            if NO_ROOM.search(str(failure)):
                raise Spilled(f"{model.short} does not fit into the GPU's memory: {failure}") from failure
            raise Failure(f"Ollama cannot load {model.short}: {failure}") from failure
        entry = listed(port, model)
    got = entry.get("context_length", context)
    if got < context:
        raise Refusal(
            f"{model.short} was loaded with {got} tokens of context instead of {context} (a num_ctx of its own?): "
            f"ask for --context {got} or less"
        )
    size, there = entry.get("size") or 0, entry.get("size_vram") or 0
    if 0 < there < ON_GPU * size:  # 0: there is no GPU
        raise Spilled(f"{model.short} does not fit into the GPU's memory: {there // MB} of {size // MB} MB are there")
    return True


def check_context(port: int, model: Model, context: int) -> None:
    """Raises Failure when the model was not made for so much: Ollama would take less, and say nothing."""
    info = call(port, "POST", "/api/show", {"model": model.short}).get("model_info") or {}
    most = info.get(f"{info.get('general.architecture')}.context_length") or context
    if most < context:
        raise Refusal(
            f"{model.short} takes at most {most} tokens of context, {context} were asked for: "
            f"ask for --context {most} or less"
        )


def listed(port: int, model: Model) -> dict[str, Any]:
    """What /api/ps says about the model; {} when it is not loaded."""
    models = call(port, "GET", "/api/ps").get("models") or []
    return next((entry for entry in models if entry.get("name", "").lower() == model.short.lower()), {})


def end(child: subprocess.Popen[bytes]) -> None:
    """Politely first; stop.sh waits for 5 seconds."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    child.terminate()
    try:
        child.wait(3)
    except subprocess.TimeoutExpired:
        child.kill()
        child.wait()
    bury()


def bury() -> None:
    """Kill what a server that was killed left behind: a llama-server that keeps the memory of the GPU."""
    deadline = time.monotonic() + 10
    while (left := marked()) and time.monotonic() < deadline:
        for pid in left:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
        time.sleep(0.02)


def marked() -> list[int]:
    return [int(entry) for entry in os.listdir("/proc") if entry.isdigit() and MARK.encode() in variables(entry)]


def variables(pid: str) -> list[bytes]:
    try:
        return Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:
        return []  # somebody else's, or gone


# --- pull -------------------------------------------------------------------------------------------------------------


def pull(model: Model, context: int, free_mb: int | None, stall: float, slow: float) -> None:
    manifest = fetch_manifest(model)
    blobs = layers(manifest) if manifest else {}
    missing = sum(size - arrived(digest, size) for digest, size in blobs.items())
    # What a killed server did not write down comes again, into the same blocks.
    taken = sum(max(0, blocks(digest) - arrived(digest, 0)) for digest in blobs)
    if free_mb is not None and missing + RESERVE > free_mb * MB + taken:
        raise Failure(
            f"the disk is too small for {model.short}: {missing // MB} MB are still to come and {RESERVE // MB} MB "
            f"must stay, but only {free_mb} MB are free"
        )
    Pull(model, blobs, stall, slow).run()
    port = int(PORT_FILE.read_text())
    if model.source != model.short:
        call(port, "POST", "/api/copy", {"source": model.source, "destination": model.short})
        call(port, "DELETE", "/api/delete", {"model": model.source})
    check_context(port, model, context)


def fetch_manifest(model: Model) -> bytes | None:
    """None when the registry does not say, for minutes: Ollama may have more luck."""
    handlers = [urllib.request.ProxyHandler({})] if loopback(model.url) else []
    opener = urllib.request.build_opener(*handlers)
    wanted = urllib.request.Request(
        model.url,
        headers={"Accept": "application/vnd.docker.distribution.manifest.v2+json", "User-Agent": "selfhost"},
    )
    patience = Patience()
    while True:
        pause = 0.0
        try:
            with opener.open(wanted, timeout=20) as reply:
                return bytes(reply.read())
        except urllib.error.HTTPError as error:
            if error.code == 404:
                raise Refusal(f"the registry has no model {model.short}: {model.url} answers 404") from error
            reason, patient = f"HTTP status {error.code}", error.code >= 500 or error.code in (408, 425, 429)
            pause = min(float(told), 60) if (told := error.headers.get("Retry-After") or "").isdigit() else 0
        except (OSError, HTTPException) as error:
            reason, patient = str(error) or type(error).__name__, True
        report(0, 0, f"{model.short}: no answer of the registry ({reason})")
        if not (patient and patience.lasts()):
            return None
        time.sleep(max(pause, patience.tries))


class Patience:
    """How long to go on without a gain: five tries, and minutes."""

    def __init__(self) -> None:
        self.gained()

    def gained(self) -> None:
        self.tries, self.since = 0, time.monotonic()

    def lasts(self) -> bool:
        self.tries += 1
        return self.tries < TRIES or time.monotonic() - self.since < PATIENCE_S


class Slow(TimeoutError):
    """Bytes come, and once came much faster."""


class Pace:
    """Notices a download that has become slow: a new connection may be as fast as this one was. So often at most."""

    RESTARTS = 3
    SLICES = 4

    def __init__(self, seconds: float) -> None:
        self.slice = seconds / self.SLICES
        self.best, self.restarts = 0.0, 0
        self.begin(0)

    def begin(self, done: int) -> None:
        """A connection that begins with so many bytes there."""
        self.at, self.done, self.all, self.slow = time.monotonic(), done, received(), 0

    def fell(self, done: int) -> bool:
        """For all that time it has come with less than a quarter of its best, and no other download has the rest."""
        now = time.monotonic()
        if now - self.at < self.slice:
            return False
        whole = received()
        rate, link = (done - self.done) / (now - self.at), (whole - self.all) / (now - self.at)
        self.at, self.done, self.all = now, done, whole
        self.best = max(self.best, rate)
        self.slow = self.slow + 1 if rate < self.best / 4 and link < self.best / 2 else 0
        if self.slow < self.SLICES or self.restarts == self.RESTARTS:
            return False
        self.restarts += 1
        return True


def received() -> int:
    """Bytes that came to this machine, over all interfaces but the loopback; 0 when that cannot be known."""
    try:
        table = Path(os.environ.get("SELFHOST_NET_DEV") or "/proc/net/dev").read_text()
    except OSError:
        return 0
    rows = (line.split(":") for line in table.splitlines() if ":" in line)
    return sum(int(row[1].split()[0]) for row in rows if row[0].strip() != "lo")


class Pull:
    """One model's way through /api/pull, over cuts and stalls, reported over all of its layers."""

    def __init__(self, model: Model, blobs: dict[str, int], stall: float, slow: float) -> None:
        self.model, self.blobs, self.stall = model, blobs, stall
        self.pace = Pace(slow)
        self.come = self.on_disk()
        self.told, self.told_at = "", 0.0
        self.unverified: set[str] = set()

    def on_disk(self) -> dict[str, int]:
        return {digest: arrived(digest, size) for digest, size in self.blobs.items()}

    @property
    def done(self) -> int:
        return sum(self.come.values())

    @property
    def total(self) -> int:
        return sum(self.blobs.values())

    def run(self) -> None:
        """Raises Failure after minutes without a gain, or when there is no use in going on."""
        patience, best, broken = Patience(), self.done, 0
        while reason := self.attempt() or self.damaged():
            if "no space left" in reason:
                self.drop()
                raise Failure(f"the disk is full, {self.model.short} does not fit; what had come of it was deleted")
            broken += "digest mismatch" in reason
            if broken > 1:  # once may be an accident; each time costs all of its bytes
                raise Failure(f"a file of {self.model.short} is not what the registry promised: {reason}")
            self.say(f"{self.model.short}: interrupted ({reason}), going on")
            time.sleep(1 + patience.tries)
            # A server that was killed loses what was on its way: only what it wrote down counts.
            self.come = self.on_disk()
            if self.done > best:
                best = self.done
                patience.gained()
            if not patience.lasts():
                raise Failure(f"the pull of {self.model.short} makes no progress at {best // MB} MB: {reason}")

    def damaged(self) -> str:
        """Of what was there before an attempt: Ollama verifies only what came in the one that succeeded."""
        for digest in sorted(self.unverified):
            self.say(f"{self.model.short}: checking what was there")
            if checksum(blob(digest)) != digest.removeprefix("sha256:"):
                blob(digest).unlink()
                return f"digest mismatch of {blob(digest).name}"
            self.unverified.discard(digest)
        return ""

    def attempt(self) -> str:
        """Why it ended before its end, "" when it did not."""
        self.unverified |= {digest for digest in self.blobs if blob(digest).exists()}
        try:
            for event in self.events():
                if "error" in event:
                    return str(event["error"])
                if event.get("status") == "success":
                    return ""
            return "the answer of Ollama ended too early"
        except TimeoutError as error:
            return str(error) if isinstance(error, Slow) else "it stalled"
        except (OSError, HTTPException, ValueError) as error:
            return str(error) or type(error).__name__

    def events(self) -> Iterator[dict[str, Any]]:
        connection = HTTPConnection("127.0.0.1", int(PORT_FILE.read_text()), timeout=self.stall)
        connection.connect()
        line = connection.sock
        body = {"model": self.model.source, "insecure": self.model.source.startswith("http://")}
        try:
            connection.request("POST", "/api/pull", json.dumps(body), {"Content-Type": "application/json"})
            grown = time.monotonic()
            self.pace.begin(self.done)
            for raw in connection.getresponse():
                event = json.loads(raw)
                before = self.done
                self.note(event)
                if self.done != before:
                    grown = time.monotonic()
                # While bytes are awaited there is an event every moment, whether any come or not.
                if "digest" in event and time.monotonic() - grown > self.stall:
                    raise TimeoutError
                if "digest" in event and self.pace.fell(self.done):
                    raise Slow("it became slow")
                # 19 GB are read again then, and nothing is said meanwhile.
                line.settimeout(self.stall if str(event.get("status")).startswith("pulling") else VERIFY_S)
                yield event
        finally:
            # Ollama notices, and keeps what has come.
            connection.close()

    def note(self, event: dict[str, Any]) -> None:
        digest = event.get("digest", "")
        if digest and digest not in self.blobs:  # the manifest could not be read
            self.blobs[digest] = int(event.get("total") or 0)
            self.come[digest] = 0
        if digest:
            self.come[digest] = max(self.come[digest], min(int(event.get("completed") or 0), self.blobs[digest]))
            self.say(self.model.short)
        elif status := event.get("status"):
            if status == "verifying sha256 digest":
                self.come = dict(self.blobs)
            self.say(f"{self.model.short}: {status}")

    def say(self, text: str) -> None:
        """Once a second, and whatever is new."""
        if text != self.told or time.monotonic() - self.told_at >= 1:
            self.told, self.told_at = text, time.monotonic()
            report(self.done, self.total, text)

    def drop(self) -> None:
        for digest in self.blobs:
            for part in (MODELS / "blobs").glob(f"{blob(digest).name}-partial*"):
                part.unlink(missing_ok=True)


def report(done: int, total: int, text: str) -> None:
    print(done, total, " ".join(text.split()), flush=True)


# --- helpers ----------------------------------------------------------------------------------------------------------


def call(port: int, method: str, path: str, body: object = None, timeout: float = 30) -> dict[str, Any]:
    """Ask the server. Raises Failure with Ollama's own words, OSError or HTTPException when there is no answer."""
    connection = HTTPConnection("127.0.0.1", port, timeout=timeout)
    try:
        connection.request(method, path, json.dumps(body) if body else None, {"Content-Type": "application/json"})
        reply = connection.getresponse()
        text = reply.read().decode(errors="replace")
    finally:
        connection.close()
    try:
        answer = json.loads(text or "{}")
    except ValueError:
        answer = {}
    if reply.status >= 400:
        words = answer.get("error") if isinstance(answer, dict) else None
        raise Failure(" ".join(str(words or text or f"HTTP status {reply.status}").split()))
    return answer if isinstance(answer, dict) else {}


def publish(file: Path, text: str) -> None:
    """Readers see the old text or the new one, never half of one."""
    draft = file.with_name(f".{file.name}.{os.getpid()}")
    draft.write_text(text)
    draft.replace(file)


if __name__ == "__main__":
    main()
