"""The bytes that travel to a box: onstart, the scripts, and the proxy as a zip. Pure but for reading package data."""

from __future__ import annotations

import base64
import gzip
import hashlib
import io
import re
import zipfile
from importlib import resources
from importlib.resources.abc import Traversable

from selfhost_cli.errors import SelfhostError

# The market's documents disagree (4048, 4096, 16 K): this is below all of them.
ONSTART_LIMIT = 4000

_ZIP_TIME = (1980, 1, 1, 0, 0, 0)


def onstart(host_key_private: str, host_key_public: str, login_public: str) -> str:
    """The text of the create call's onstart: the keys, then the watchdog (packed) and `onstart.sh`.

    Takes the bootstrap host key pair and our public login key in OpenSSH's own text formats, ed25519.
    Raises SelfhostError when the whole would not stay below ONSTART_LIMIT bytes, or a key is no such key.
    """
    watchdog = gzip.compress(strip(script("watchdog.sh")), 9, mtime=0)
    prelude = [
        "#!/bin/sh",
        f"HOST_KEY='{_private_key(host_key_private)}'",
        f"HOST_PUB='{_public_key(host_key_public)}'",
        f"LOGIN_KEY='{_public_key(login_public)}'",
        f"WATCHDOG='{base64.b64encode(watchdog).decode()}'",
    ]
    text = "\n".join(prelude) + "\n" + strip(script("onstart.sh")).decode()
    size = len(text.encode())
    if size >= ONSTART_LIMIT:
        raise SelfhostError(
            f"the start script of the box would have {size} bytes, the market takes less than {ONSTART_LIMIT}",
            "use a shorter login key: ssh-ed25519, with a short comment",
        )
    return text


def script(name: str) -> bytes:
    """One whole file of `templates/`, as it ships."""
    return (resources.files("selfhost_cli") / "templates" / name).read_bytes()


def strip(text: bytes) -> bytes:
    """The script without comment-only lines, blank lines and indentation; the rest as written."""
    lines = (line.strip() for line in text.splitlines())
    return b"".join(line + b"\n" for line in lines if line and not line.startswith(b"#"))


def proxy_zip() -> bytes:
    """The proxy as an importable zip; the same sources give the same bytes."""
    package = resources.files("selfhost_cli")
    sources = {"selfhost_cli/__init__.py": package / "__init__.py"}
    sources |= _python_files(package / "proxy", "selfhost_cli/proxy")
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        for path, source in sorted(sources.items()):
            info = zipfile.ZipInfo(path, _ZIP_TIME)
            info.external_attr = 0o644 << 16
            info.compress_type = zipfile.ZIP_DEFLATED
            archive.writestr(info, source.read_bytes())
    return out.getvalue()


def digest(data: bytes) -> str:
    """SHA-256 in hex, as `sha256sum` prints it."""
    return hashlib.sha256(data).hexdigest()


def _python_files(folder: Traversable, prefix: str) -> dict[str, Traversable]:
    found: dict[str, Traversable] = {}
    for entry in folder.iterdir():
        path = f"{prefix}/{entry.name}"
        if entry.is_dir():
            found |= _python_files(entry, path)
        elif entry.name.endswith(".py"):
            found[path] = entry
    return found


def _private_key(text: str) -> str:
    key = text.strip()
    if not re.fullmatch(r"-----BEGIN [A-Z ]+-----\n[A-Za-z0-9+/=\n]+\n-----END [A-Z ]+-----", key):
        raise SelfhostError("the bootstrap host key is not a private key in OpenSSH's format")
    return key


def _public_key(text: str) -> str:
    """Without a comment that could hurt: it stands between single quotes in a shell script."""
    match = re.match(r"(ssh-[a-z0-9-]+|ecdsa-[a-z0-9-]+|sk-[a-z0-9@.-]+) ([A-Za-z0-9+/=]+)(?:[ \t]|$)", text.strip())
    if not match:
        raise SelfhostError("not a public key in OpenSSH's format", "check the login key's .pub file")
    return f"{match[1]} {match[2]}"
