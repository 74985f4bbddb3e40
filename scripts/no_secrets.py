"""Looks for what may be a secret in the files of the checkout: private keys, and strings too random to be words.

Prints a line for each and ends with 1. ALLOWED names what only looks like one, and why.
"""

from __future__ import annotations

import math
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

HEX = re.compile(r"(?<![0-9A-Za-z])[0-9a-fA-F]{32,}(?![0-9A-Za-z])")
MIXED = re.compile(r"[A-Za-z0-9+_-]{20,}={0,2}")
PRIVATE_KEY = re.compile(r"PRIVATE KEY-----(?:\\n|\s|[\"'])+([A-Za-z0-9+/=]{40,})")
BITS_OF_HEX, BITS_OF_MIXED = 3.0, 3.9
"""Per character, by Shannon's measure. 20 random characters of base64 have about 4.1; a long identifier, which repeats
letters and seldom has capitals and digits at once, has less."""

ALLOWED = (
    ("scripts/ollama", HEX, "checksums of pinned downloads"),
    ("scripts/ollama", re.compile(r"6BrPUj.{37}="), "one more of them, in base64"),
    ("selfhost_cli/sandbox/assets.py", HEX, "checksums of pinned downloads"),
    ("selfhost_cli/sandbox/demo-model.txt", HEX, "checksums of the parts of a model"),
    ("selfhost_cli/sandbox/demo-model-1.5b.txt", HEX, "checksums of the parts of a model"),
    ("docs/demo-ollama.md", HEX, "checksum of a model's layer, as the demo prints it"),
    ("tests/proxy/kit.py", re.compile(r"chatcmpl-\w{32}"), "an id as llama.cpp makes them"),
    ("tests/proxy/kit.py", re.compile(r"085514\w{26}"), "an id as llama.cpp makes them"),
    ("tests/unit/test_payload.py", re.compile(r"b3BlbnNzaC1rZXktdjE\w+"), "with what every such key begins"),
    ("tests/unit/test_payload.py", HEX, "the published sha256 of “abc”"),
)


def suspects(line: str) -> Iterator[str]:
    """What in a line may be a secret."""
    for found in PRIVATE_KEY.finditer(line):
        yield found[1]
    for found in HEX.finditer(line):
        if bits(found[0].lower()) > BITS_OF_HEX:
            yield found[0]
    for found in MIXED.finditer(line):
        mixed = all(re.search(kind, found[0]) for kind in ("[a-z]", "[A-Z]", "[0-9]"))
        if mixed and bits(found[0]) > BITS_OF_MIXED:
            yield found[0]


def bits(text: str) -> float:
    """Shannon's entropy of its characters."""
    return -sum(n / len(text) * math.log2(n / len(text)) for n in Counter(text).values())


def allowed(name: str, suspect: str) -> bool:
    return any(file == name and shape.fullmatch(suspect) for file, shape, _ in ALLOWED)


def main() -> int:
    """Of the files that git has or would take, those of the current directory."""
    listed = subprocess.run(["git", "ls-files", "-coz", "--exclude-standard"], capture_output=True, check=True)
    found = False
    for name in sorted(filter(None, listed.stdout.decode().split("\0"))):
        path = Path(name)
        if path.is_symlink() or not path.is_file():
            continue  # removed, and not yet from the index
        for number, line in enumerate(path.read_text(errors="replace").splitlines(), 1):
            for suspect in suspects(line):
                if not allowed(name, suspect):
                    found = True
                    print(f"{name}:{number}: {suspect[:6]}… is random enough to be a secret")  # noqa: T201
    return int(found)


if __name__ == "__main__":
    sys.exit(main())
