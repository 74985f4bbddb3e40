"""What stands for Ollama in an archive: --version, serve, and the API as far as templates/ollama.py uses it.

Blobs, manifests and partial files are named and kept as the real one does; what it serves is a sleeping child.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Callable
from http.client import HTTPException, HTTPResponse
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

VERSION = "0.34.0"
MOST = 32768
DEFAULT = "registry.ollama.ai"
SIZE = 1000
runner: dict[str, subprocess.Popen[bytes]] = {}
loads = threading.Lock()


def in_the_card(context: int) -> int:
    """Of SIZE. A file says for how many tokens there is room; without one there is no card."""
    try:
        room = int((Path(os.environ["HOME"]) / "room").read_text())
    except OSError:
        return 0
    return SIZE if context * int(os.environ["OLLAMA_NUM_PARALLEL"]) <= room else SIZE * 9 // 10


def models() -> Path:
    return Path(os.environ["OLLAMA_MODELS"])


def manifest(name: str) -> Path:
    front, _, last = name.removeprefix("http://").rpartition("/")
    model, _, tag = last.partition(":")
    host, _, space = front.rpartition("/")
    return models() / "manifests" / (host or DEFAULT) / (space or "library") / model / (tag or "latest")


def pull(name: str, say: Callable[[dict[str, Any]], None]) -> None:
    base, model = name.rsplit("/", 2)[0], name.rsplit("/", 2)[1:]
    url = f"{base}/v2/{model[0]}/{model[1].partition(':')[0]}"
    say({"status": "pulling manifest"})
    with urllib.request.urlopen(f"{url}/manifests/{model[1].partition(':')[2]}", timeout=10) as reply:
        content = reply.read()
    parts = json.loads(content)
    layers = [*parts["layers"], parts["config"]]
    came = [layer for layer in layers if not (models() / "blobs" / layer["digest"].replace(":", "-")).exists()]
    for layer in layers:
        bring(f"{url}/blobs/{layer['digest']}", layer["digest"], layer["size"], say)
    say({"status": "verifying sha256 digest"})
    for layer in came:  # as the real one: what was there before counts as verified
        path = models() / "blobs" / layer["digest"].replace(":", "-")
        if hashlib.sha256(path.read_bytes()).hexdigest() != layer["digest"].partition(":")[2]:
            path.unlink()
            raise OSError("digest mismatch, file must be downloaded again")
    manifest(name).parent.mkdir(parents=True, exist_ok=True)
    manifest(name).write_bytes(content)
    say({"status": "success"})


def bring(url: str, digest: str, size: int, say: Callable[[dict[str, Any]], None]) -> None:
    path = models() / "blobs" / digest.replace(":", "-")
    path.parent.mkdir(parents=True, exist_ok=True)
    partial, part = Path(f"{path}-partial"), Path(f"{path}-partial-0")
    state = {"done": json.loads(part.read_text())["Completed"] if part.exists() else 0}
    failed: list[str] = []
    if path.exists():
        return
    request = urllib.request.Request(url, headers={"Range": f"bytes={state['done']}-"} if state["done"] else {})
    reply: HTTPResponse = urllib.request.urlopen(request, timeout=30)

    def receive() -> None:
        try:
            with partial.open("r+b" if partial.exists() else "wb", buffering=0) as file:
                file.seek(state["done"])
                while data := reply.read1(65536):
                    file.write(data)
                    state["done"] += len(data)
        except (OSError, HTTPException) as error:
            failed.append(str(error))

    thread = threading.Thread(target=receive, daemon=True)
    thread.start()
    try:
        more = True
        while more:
            more = thread.is_alive()
            thread.join(0.03)
            say({"status": f"pulling {digest[7:19]}", "digest": digest, "total": size, "completed": state["done"]})
    finally:
        part.write_text(json.dumps({"N": 0, "Offset": 0, "Size": size, "Completed": state["done"]}))
    if failed or state["done"] < size:
        raise OSError("max retries exceeded: unexpected EOF")
    partial.rename(path)
    part.unlink()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        if self.path == "/api/version":
            return self.answer({"version": VERSION})
        # A runner that was killed stays listed, as with the real one.
        for child in runner.values():
            child.poll()
        context = int(os.environ["OLLAMA_CONTEXT_LENGTH"])
        facts = {"context_length": min(context, MOST), "size": SIZE, "size_vram": in_the_card(context)}
        return self.answer({"models": [{"name": name, **facts} for name in runner]})

    def do_DELETE(self) -> None:
        manifest(self.body()["model"]).unlink()
        self.answer({})

    def do_POST(self) -> None:
        body = self.body()
        if self.path == "/api/pull":
            return self.stream(body["model"])
        if self.path == "/api/copy":
            target = manifest(body["destination"])
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(manifest(body["source"]).read_bytes())
            return self.answer({})
        if self.path == "/api/show":
            return self.answer({"model_info": {"general.architecture": "qwen2", "qwen2.context_length": MOST}})
        assert set(body) == {"model", "keep_alive", "stream", "shift"}, body
        assert self.path == "/api/generate"
        return self.load(body["model"])

    def load(self, name: str) -> None:
        parts = json.loads(manifest(name).read_text())
        weights = models() / "blobs" / parts["layers"][0]["digest"].replace(":", "-")
        if weights.read_bytes().startswith(b"rotten"):
            return self.answer({"error": "llama runner process has terminated: these weights are rotten"}, 500)
        strict, context = Path(os.environ["HOME"]) / "strict", int(os.environ["OLLAMA_CONTEXT_LENGTH"])
        if strict.exists() and in_the_card(context) < SIZE:
            return self.answer({"error": "llama runner process has terminated: unable to allocate CUDA0 buffer"}, 500)
        with loads:
            if name not in runner or runner[name].poll() is not None:
                runner[name] = subprocess.Popen(["sleep", "1000"])
        return self.answer({"done": True, "done_reason": "load"})

    def stream(self, name: str) -> None:
        self.send_response(200)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()

        def say(event: dict[str, Any]) -> None:
            line = json.dumps(event).encode() + b"\n"
            self.wfile.write(b"%x\r\n%s\r\n" % (len(line), line))

        try:
            try:
                pull(name, say)
            except BrokenPipeError:
                raise
            except OSError as error:
                say({"error": str(error)})
            self.wfile.write(b"0\r\n\r\n")
        except OSError:
            self.close_connection = True  # the client is gone; what has come is kept

    def body(self) -> dict[str, Any]:
        content: dict[str, Any] = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        return content

    def answer(self, content: dict[str, Any], status: int = 200) -> None:
        data = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args: object) -> None: ...


def main() -> None:
    if sys.argv[1:] == ["--version"]:
        sys.stdout.write("Warning: could not connect to a running Ollama instance\n")
        sys.stdout.write(f"Warning: client version is {VERSION}\n")
        return
    assert sys.argv[1:] == ["serve"]
    home = Path(os.environ["HOME"])
    (home / "environment.json").write_text(json.dumps(dict(os.environ)))
    with (home / "hosts").open("a") as hosts:
        hosts.write(f"{os.environ['OLLAMA_HOST']} {os.environ.get('OLLAMA_CONTEXT_LENGTH', 0)}\n")

    def leave(*_: object) -> None:
        for child in runner.values():
            child.kill()
        os._exit(0)

    signal.signal(signal.SIGTERM, leave)
    host, _, port = os.environ["OLLAMA_HOST"].partition(":")
    ThreadingHTTPServer.daemon_threads = True
    ThreadingHTTPServer((host, int(port)), Handler).serve_forever()


if __name__ == "__main__":
    main()
