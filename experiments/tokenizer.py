"""Bytes to token ids: one id per byte, or a trained `tokenizer.json`."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

import numpy as np

from experiments.corpus import DataError, Tokens, first_line, require

# the end-of-document tokens of T5 and LLaMA, GPT-2, and of the examples of the `tokenizers` package
_SEPARATORS = ("</s>", "<|endoftext|>", "<|end_of_text|>", "<eos>", "[EOS]", "[SEP]")


class Tokenizer(Protocol):
    """Turns documents into ids; each document is followed by a separator where there is one."""

    vocab_size: int
    dtype: str
    separator_bytes: int

    def encode(self, documents: list[bytes]) -> list[Tokens]:
        """One array of `dtype` per document."""
        ...


class ByteTokenizer:
    """A byte is a token; NUL, which text does not use, ends a document."""

    vocab_size = 256
    dtype = "uint8"
    separator_bytes = 1

    def encode(self, documents: list[bytes]) -> list[Tokens]:
        """One uint8 array per document."""
        return [np.frombuffer(document + b"\x00", dtype=np.uint8) for document in documents]


class FileTokenizer:
    """A `tokenizer.json` in the format of the package `tokenizers` (extra `data`).

    The end-of-document token is the first that its vocabulary knows of `</s>`, `<|endoftext|>`, `<|end_of_text|>`,
    `<eos>`, `[EOS]`, `[SEP]`; without any, documents follow each other directly. The file's own template, truncation
    and padding are not applied: they are made for single inputs, not for a stream of text.

    Args:
        path: The file.

    Raises:
        DataError: If the file is missing or unreadable, or the package is not installed.
    """

    def __init__(self, path: str) -> None:
        library = require("tokenizers", f"data.tokenizer={path}")
        if not Path(path).expanduser().is_file():
            raise DataError(f"data.tokenizer={path}: no such file; give 'bytes' or the path of a tokenizer.json")
        try:
            self._tokenizer = library.Tokenizer.from_file(str(Path(path).expanduser()))
        # the package raises plain Exception for a file that it cannot parse
        except Exception as error:
            raise DataError(f"data.tokenizer={path}: not a tokenizer.json: {first_line(error)}") from error
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        ids: dict[str, int] = self._tokenizer.get_vocab(with_added_tokens=True)
        if not ids:
            raise DataError(f"data.tokenizer={path}: the vocabulary is empty")
        # ids may have gaps: what an embedding must hold is the largest, not how many there are
        self.vocab_size = max(ids.values()) + 1
        self.dtype = "uint16" if self.vocab_size <= 2**16 else "uint32"
        separator = next((ids[token] for token in _SEPARATORS if token in ids), None)
        self._end = [] if separator is None else [separator]
        self.separator_bytes = len(self._end)

    def encode(self, documents: list[bytes]) -> list[Tokens]:
        """One array of ids per document.

        Raises:
            DataError: If a document is not UTF-8.
        """
        try:
            texts = [document.decode("utf-8") for document in documents]
        except UnicodeDecodeError as error:
            start = error.object[max(0, error.start - 20) : error.start]
            raise DataError(
                f"a document is not UTF-8 (after {start!r}); data.tokenizer=bytes takes any bytes"
            ) from error
        encoded = self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        return [np.array(item.ids + self._end, dtype=self.dtype) for item in encoded]


def load_tokenizer(name: str) -> Tokenizer:
    """`bytes`, or the tokenizer of a file.

    Raises:
        DataError: As `FileTokenizer` does.
    """
    return ByteTokenizer() if name == "bytes" else FileTokenizer(name)


def encode_all(tokenizer: Tokenizer, documents: list[bytes]) -> list[Tokens]:
    """The ids of each document, tokenized in groups so that no huge intermediate exists."""
    return [ids for k in range(0, len(documents), 256) for ids in tokenizer.encode(documents[k : k + 256])]


def join(parts: list[Tokens], tokenizer: Tokenizer) -> Tokens:
    """All ids in one array, which may be empty."""
    return np.concatenate([np.empty(0, dtype=tokenizer.dtype), *parts])
