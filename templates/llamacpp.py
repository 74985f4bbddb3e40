"""Serve one GGUF with llama.cpp's own HTTP server, on a port of 127.0.0.1 that is written to a file once it answers.

Runs on the box, in the engine's venv (python with `xllamacpp`). SIGTERM ends it.
Exit 1: the reason is the last line on stderr.
"""

from __future__ import annotations

import argparse
import os
import signal
import socket
import struct
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

STRING, ARRAY = 8, 9
KV_TYPES = ("f16", "q8_0", "q4_0")
SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
KEPT = 2
HINT = "Now reply in plain English (no code, no JSON) based on this result."


def main() -> None:
    args = arguments()
    try:
        template = fenced_calls(chat_template(args.model))
        # kept in a name: the server lives as long as the object does
        server, port = serve(args, template)
        wait_until_healthy(port)
    except (OSError, ValueError, RuntimeError) as error:
        sys.exit(f"llamacpp: {args.model}: {error}")
    # not earlier: while llama.cpp loads, a handler of Python's would have to wait for it
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: os._exit(0))
    publish(args.port_file, port)
    held = f"{args.slots} × {args.context} tokens"
    print(f"llamacpp: {args.alias} with {held} on {server.listening_address}", file=sys.stderr)
    while True:
        signal.pause()


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True, help="the GGUF file")
    parser.add_argument("--alias", required=True, help="the model name to serve")
    parser.add_argument("--context", type=int, required=True, help="tokens, of each slot")
    parser.add_argument("--slots", type=int, default=1, help="answers at once")
    parser.add_argument("--kv-cache-type", choices=KV_TYPES, default="f16", help="what keys and values are kept as")
    parser.add_argument("--port-file", type=Path, required=True, help="where the bound port is written")
    parser.add_argument("--port", type=int, default=11434, help="preferred port; the next free one is taken")
    return parser.parse_args()


def chat_template(path: Path) -> str:
    """The model's own template, from the metadata at the front of a GGUF. Raises ValueError."""
    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise ValueError("not a GGUF file")
        _, _, pairs = numbers(file, "<IQQ")
        for _ in range(pairs):
            key, (kind,) = text(file), numbers(file, "<I")
            value = skip(file, kind)
            if key == b"tokenizer.chat_template":
                return value.decode()
    raise ValueError("the GGUF has no chat template")


def numbers(file: BinaryIO, layout: str) -> tuple[int, ...]:
    data = file.read(struct.calcsize(layout))
    if len(data) < struct.calcsize(layout):
        raise ValueError("the GGUF is cut short")
    return struct.unpack(layout, data)


def text(file: BinaryIO) -> bytes:
    return file.read(*numbers(file, "<Q"))


def skip(file: BinaryIO, kind: int) -> bytes:
    """Go past one value; only strings are returned, nothing else is asked for."""
    if kind == STRING:
        return text(file)
    if kind == ARRAY:
        kind, count = numbers(file, "<IQ")
        if kind in SIZES:
            file.seek(SIZES[kind] * count, os.SEEK_CUR)
        else:
            for _ in range(count):
                skip(file, kind)
    elif kind in SIZES:
        file.seek(SIZES[kind], os.SEEK_CUR)
    else:
        raise ValueError(f"unknown kind {kind} in the GGUF's metadata")
    return b""


def fenced_calls(template: str) -> str:
    """The template with tool calls in a ```json fence instead of <tool_call> tags, and a hint after tool results.

    The small Qwen2.5-Coder models write calls in a fence whatever they are told; llama.cpp infers the syntax that it
    parses from the template. Without the hint they repeat the same call. A template that has no such tags is kept.
    """
    if "<tool_call>" not in template:
        return template
    changed = template.replace("within <tool_call></tool_call> XML tags", "within a ```json code fence")
    changed = changed.replace("<tool_call>", "```json").replace("</tool_call>", "```")
    end = 'loop.last or (messages[loop.index0 + 1].role != "tool") %}\n            {{- \''
    return changed.replace(end, f"{end}\\n{HINT}")


def serve(args: argparse.Namespace, template: str) -> tuple[Any, int]:
    """Start the server on the first port that it can bind. Raises RuntimeError when the reason is not the port."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path, params.model_alias = str(args.model), {args.alias}
    params.n_ctx, params.n_parallel, params.fit_params = args.context * args.slots, args.slots, False
    kept_as = getattr(xllamacpp.ggml_type, f"GGML_TYPE_{args.kv_cache_type.upper()}")
    params.cache_type_k = params.cache_type_v = kept_as
    params.chat_template, params.use_jinja = template, True
    params.sampling.temp, params.sampling.top_k = 0.0, 1
    params.endpoint_metrics = params.endpoint_slots = params.endpoint_props = True
    params.ui, params.cors_origins = False, "http://127.0.0.1"
    params.cache_ram_mib = 1024
    params.slot_save_path = f"{kept_prompts(args.port_file)}/"
    # Slots that are chosen by similarity are written over without a copy when most of a prompt stays: the end of
    # another conversation, which will come back (b11549).
    params.slot_prompt_similarity = 0.0
    if (os.cpu_count() or 1) <= 2:
        # two decoding threads lose two thirds of their speed when anything else wants one of two cores
        params.cpuparams.n_threads, params.cpuparams_batch.n_threads = 1, 2
        # whoever leaves is noticed between two batches: one of 2048 tokens takes half a minute here
        params.n_batch = params.n_ubatch
    params.hostnames = ["127.0.0.1"]
    for port in ports(args.port_file, args.port):
        params.port = port
        try:
            return xllamacpp.Server(params), port
        except RuntimeError as error:
            if free(port):
                raise RuntimeError("llama.cpp could not load it; its reason is above") from error
    raise RuntimeError(f"no free port from {args.port} on")


def kept_prompts(port_file: Path) -> Path:
    """Where the proxy has read prompts put away for the next start: the newest stay."""
    folder = port_file.with_name("prompts")
    folder.mkdir(mode=0o700, exist_ok=True)
    files = sorted(folder.iterdir(), key=lambda file: file.stat().st_mtime, reverse=True)
    for file in files[KEPT:]:
        file.unlink()
    return folder


def ports(port_file: Path, preferred: int) -> Iterator[int]:
    try:
        before = [int(port_file.read_text())]
    except (OSError, ValueError):
        before = []
    yield from (port for port in [*before, *range(preferred, preferred + 100)] if free(port))


def free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except (OSError, OverflowError):
            return False
    return True


def wait_until_healthy(port: int, seconds: float = 600) -> None:
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    deadline = time.monotonic() + seconds
    while True:
        try:
            direct.open(f"http://127.0.0.1:{port}/health", timeout=5).close()
            return
        except (urllib.error.URLError, OSError) as error:
            if time.monotonic() > deadline:
                raise RuntimeError(f"no answer on /health within {seconds:.0f} s: {error}") from error
        time.sleep(0.2)


def publish(port_file: Path, port: int) -> None:
    """Readers see the old number or the new one, never half of one."""
    draft = port_file.with_name(f".{port_file.name}.{os.getpid()}")
    draft.write_text(f"{port}\n")
    draft.replace(port_file)


if __name__ == "__main__":
    main()
