"""What makes vectors of texts: the seam, and an engine's own /v1/embeddings. The model on the laptop: minilm.py."""

from __future__ import annotations

from collections.abc import Container, Mapping
from typing import Any, Protocol, TypeAlias

import numpy as np
from aiohttp import ClientError, ClientSession, ClientTimeout
from numpy.typing import NDArray

from selfhost_cli.proxy.codec import decode, encode

Vector: TypeAlias = NDArray[np.float32]
"""Of length 1."""

PATIENCE_S = 2.0


class EmbedError(Exception):
    """There is no vector for a text; says why."""


class Embedder(Protocol):
    """`name`: vectors of two names have nothing to do with each other. `lexicon`: English words, as far as it knows."""

    name: str
    lexicon: Container[str]

    async def embed(self, text: str) -> Vector:
        """Raises EmbedError."""
        ...

    async def close(self) -> None: ...


class EngineEmbedder:
    """Asks an engine at `url`, which has /v1/embeddings as OpenAI has. The session stays its owner's."""

    lexicon: Container[str] = ()

    def __init__(self, session: ClientSession, url: str, model: str, headers: Mapping[str, str] | None = None) -> None:
        self.name = f"engine:{model}"
        self._session = session
        self._url = f"{url.rstrip('/')}/v1/embeddings"
        self._model = model
        self._headers = {"content-type": "application/json", **(headers or {})}

    async def embed(self, text: str) -> Vector:
        asked = encode({"model": self._model, "input": [text], "encoding_format": "float"})
        timeout = ClientTimeout(total=PATIENCE_S)
        try:
            async with self._session.post(self._url, data=asked, headers=self._headers, timeout=timeout) as answer:
                told = await answer.read()
                if answer.status != 200:
                    raise EmbedError(f"{self._url} answered with HTTP {answer.status}")
            return unit(decode(told)["data"][0]["embedding"])
        except (ClientError, TimeoutError) as error:
            raise EmbedError(f"{self._url} does not answer: {error or type(error).__name__}") from error
        except (ValueError, TypeError, LookupError) as error:
            raise EmbedError(f"{self._url} answered with something else than a vector") from error

    async def close(self) -> None: ...


def unit(numbers: Any) -> Vector:
    """The vector of length 1 in that direction. Raises ValueError, TypeError for what has none."""
    vector = np.asarray(numbers, dtype=np.float32)
    length = float(np.linalg.norm(vector))
    if vector.ndim != 1 or not np.isfinite(length) or length == 0:
        raise ValueError("not a vector")
    return np.asarray(vector / length, dtype=np.float32)
