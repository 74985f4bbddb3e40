"""Sealing: a cached answer holds code, and calls that Claude Code would execute.

AES-GCM with a key that is never in a store, and the name under which the answer is kept as associated data: what was
changed, cut, moved to another name or written by somebody without the key does not open.
"""

from __future__ import annotations

import os
import zlib

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

KEY_BYTES = 32
NONCE_BYTES = 12
LEVEL = 1
"""zlib's fastest: twice the speed of its default on answers, and a tenth larger."""


class Seal:
    """Packs and seals, under one key of KEY_BYTES bytes. Raises ValueError for a key of another length."""

    def __init__(self, key: bytes) -> None:
        if len(key) != KEY_BYTES:
            raise ValueError(f"a key of {KEY_BYTES} bytes is needed, not of {len(key)}")
        self._cipher = AESGCM(key)

    def shut(self, plain: bytes, name: str) -> bytes:
        nonce = os.urandom(NONCE_BYTES)
        return nonce + self._cipher.encrypt(nonce, zlib.compress(plain, LEVEL), name.encode())

    def open(self, sealed: bytes, name: str, limit: int) -> bytes | None:
        """What was sealed under this name; None when it does not open, or has more than `limit` bytes."""
        nonce, rest = sealed[:NONCE_BYTES], sealed[NONCE_BYTES:]
        try:
            packed = self._cipher.decrypt(nonce, rest, name.encode())
            unpacker = zlib.decompressobj()
            plain = unpacker.decompress(packed, limit)
        except (InvalidTag, ValueError, zlib.error):
            return None
        return plain if unpacker.eof else None
