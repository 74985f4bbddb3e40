"""The model as `ollama pull` wants it of a registry: made here once, served on loopback by the market.

    cache/registry/1a2b3c4d/    named after what it was made from: model, Modelfile, name, Ollama's version
        manifests/registry.ollama.ai/library/NAME/TAG
        blobs/sha256-…          the big one is a hard link to the model in the cache: it is not on the disk twice

A pull names `http://127.0.0.1:PORT/library/NAME:TAG` and is `insecure`. Ollama's client expects to be sent to another
host for a blob, with a Location whose host name differs: localhost and 127.0.0.1 are two names of this one.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from aiohttp import web

from selfhost_cli.errors import SelfhostError
from selfhost_cli.sandbox.assets import locked
from selfhost_cli.wait import Pending, until

MODELFILE: Final = Path(__file__).with_name("Modelfile")
HOST: Final = "registry.ollama.ai"
_MODEL_TYPE: Final = "application/vnd.ollama.image.model"
_MANIFEST_TYPE: Final = "application/vnd.docker.distribution.manifest.v2+json"
_WORD: Final = re.compile(r"\w[\w.-]*")
_DIGEST: Final = re.compile(r"sha256:[0-9a-f]{64}")
_LISTENING: Final = re.compile(r"Listening on (127\.0\.0\.1:\d+)")


# --- making it ----------------------------------------------------------------------------------------------------


def prepare(cache: Path, ollama: Path, model: Path, name: str, modelfile: Path = MODELFILE) -> Path:
    """The folder in `cache` with `model` (a GGUF file) as `name` (NAME or NAME:TAG); made when it is not there.

    `ollama` is the program that makes it; `modelfile` says FROM ./model.gguf. A second caller waits for the first.
    Raises SelfhostError.
    """
    digest = _sha256(model)
    version = _run([str(ollama), "--version"], {"OLLAMA_HOST": "127.0.0.1:9"})  # of this program, not of a server
    inputs = "\n".join([modelfile.read_text("utf-8"), digest, name, version])
    folder = cache / "registry" / hashlib.sha256(inputs.encode()).hexdigest()[:8]
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with locked(folder.parent / "lock", lambda line: None):
        if not folder.is_dir():
            work = folder.parent / "partial"
            shutil.rmtree(work, ignore_errors=True)  # what a killed run left
            try:
                _create(work, ollama, model, digest, name, modelfile)
                (work / "models").replace(folder)
            finally:
                shutil.rmtree(work, ignore_errors=True)
    return folder


def _sha256(model: Path) -> str:
    """From the stamp that says it was verified, where there is one."""
    stamp = model.with_name(model.name + ".sha256")
    if stamp.exists():
        return stamp.read_text("utf-8").strip()
    with model.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _create(work: Path, ollama: Path, model: Path, digest: str, name: str, modelfile: Path) -> None:
    blobs = work / "models" / "blobs"
    blobs.mkdir(parents=True)
    (work / "home").mkdir()
    shutil.copy(modelfile, work / "Modelfile")
    (work / "model.gguf").symlink_to(model.resolve())
    # `ollama create` sends the model to the server, unless that has it.
    blob = blobs / f"sha256-{digest}"
    try:
        blob.hardlink_to(model.resolve())
    except OSError:  # another file system
        shutil.copy(model, blob)
    environment = {"HOME": str(work / "home"), "OLLAMA_MODELS": str(work / "models"), "OLLAMA_NO_CLOUD": "1"}
    # At its start it would remove what no manifest names.
    environment |= {"OLLAMA_NOPRUNE": "1", "TMPDIR": str(work)}
    with _serving(ollama, environment, work / "serve.log") as address:
        command = [str(ollama), "create", name, "-f", str(work / "Modelfile")]
        _run(command, environment | {"OLLAMA_HOST": address})
    for manifest in (work / "models" / "manifests").glob("*/*/*/*"):
        _name_the_original(manifest, blob)


def _name_the_original(manifest: Path, blob: Path) -> None:
    """`create` checks a GGUF by writing it anew; that copy differs in the order of its header only. One is enough."""
    made = json.loads(manifest.read_text("utf-8"))
    for layer in made["layers"]:
        if layer["mediaType"] == _MODEL_TYPE:
            copy = blob.with_name(layer["digest"].replace(":", "-"))
            layer |= {"digest": blob.name.replace("-", ":"), "size": blob.stat().st_size}
            if copy != blob:
                copy.unlink()
    manifest.write_text(json.dumps(made), "utf-8")


@contextmanager
def _serving(ollama: Path, environment: dict[str, str], log: Path) -> Iterator[str]:
    """A throw-away server on a port of the system's choice; its address as host:port."""
    with log.open("wb") as output:
        process = subprocess.Popen(
            [ollama, "serve"],
            env=_curated(environment | {"OLLAMA_HOST": "127.0.0.1:0"}),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
        )

    def address() -> str | Pending:
        said = log.read_text("utf-8", errors="replace")
        if process.poll() is not None:
            raise SelfhostError(f"`{ollama} serve` ended at once: {said[-300:].strip()}")
        found = _LISTENING.search(said)
        return found[1] if found else Pending(said[-200:].strip() or "it says nothing")

    try:
        yield until(address, what=f"`{ollama} serve`", seconds=30, every=0.05)
    finally:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _run(command: list[str], environment: dict[str, str]) -> str:
    """What it printed. Raises SelfhostError when it fails."""
    done = subprocess.run(
        command,
        env=_curated(environment),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=300,
        text=True,
    )
    if done.returncode != 0:
        raise SelfhostError(f"`{' '.join(command[:3])}` failed: {done.stdout[-300:].strip()}")
    return done.stdout


def _curated(environment: dict[str, str]) -> dict[str, str]:
    """Nothing of the user's: no host, models or keys of an Ollama of theirs, and no proxy between us and ours."""
    return {"PATH": os.environ.get("PATH", os.defpath), "HOME": "/nonexistent", **environment}


# --- serving it ---------------------------------------------------------------------------------------------------


class Registry:
    """`/v2/library/…` at the root of the market's address, for what `prepare` made in this cache.

    Blobs are sent by the mirror (`blob_path` says where it has them), so its switches and its count apply.
    """

    def __init__(self, cache: Path | None) -> None:
        self._folder = cache / "registry" if cache else None

    def routes(self) -> list[web.RouteDef]:
        blob = "/v2/library/{name}/blobs/{digest}"
        return [
            web.get("/v2/library/{name}/manifests/{tag}", self._manifest),  # HEAD, too
            web.head(blob, self._blob_size),
            web.get(blob, self._blob, allow_head=False),
        ]

    async def _manifest(self, request: web.Request) -> web.Response:
        name, tag = _word(request, "name"), _word(request, "tag")
        found = self._find(f"manifests/{HOST}/library/{name}/{tag}")
        return web.Response(body=found.read_bytes(), content_type=_MANIFEST_TYPE)

    async def _blob_size(self, request: web.Request) -> web.Response:
        size = self._find(_blob(request)).stat().st_size
        return web.Response(headers={"Content-Length": str(size)}, content_type="application/octet-stream")

    async def _blob(self, request: web.Request) -> web.Response:
        blob = self._find(_blob(request))
        other = "127.0.0.1" if request.url.host == "localhost" else "localhost"
        where = f"/mirror/registry/{blob.parent.parent.name}/blobs/{blob.name}"
        return web.Response(status=307, headers={"Location": str(request.url.with_host(other).with_path(where))})

    def _find(self, path: str) -> Path:
        """The newest of that name: a changed Modelfile makes another folder. Raises 404."""
        found = list(self._folder.glob(f"*/{path}")) if self._folder else []
        if not found:
            raise web.HTTPNotFound(text=json.dumps({"errors": [{"code": "NOT_FOUND", "message": f"no {path} here"}]}))
        return max(found, key=lambda one: one.parent.stat().st_mtime)


def _word(request: web.Request, part: str) -> str:
    """A part of the path that is a file's name, and no pattern. Raises 404."""
    text = request.match_info[part]
    if not _WORD.fullmatch(text):
        raise web.HTTPNotFound(text=f"{text!r} is no {part}\n")
    return text


def _blob(request: web.Request) -> str:
    digest = request.match_info["digest"]
    if not _DIGEST.fullmatch(digest):
        raise web.HTTPNotFound(text=f"{digest!r} is no digest\n")
    return "blobs/" + digest.replace(":", "-")
