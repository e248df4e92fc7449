"""Text that does not fit the disk: tokenized while it is read, through the package `datasets`."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from experiments.batches import Batch, check_arguments, to_batch
from experiments.corpus import DataError, Tokens, first_line, require, row_text
from experiments.tokenizer import Tokenizer

# documents that are tokenized in one call, on all cores
_GROUP = 32
_BUILDERS = {".jsonl": "json", ".parquet": "parquet"}


def open_dataset(name: str, config: str | None, split: str, *, streaming: bool) -> Any:
    """A Hugging Face dataset by name.

    Raises:
        DataError: If the package is missing, the hub cannot be reached, or it has no such dataset or split.
    """
    datasets = require("datasets", f"data.path=hf:{name}")
    try:
        return datasets.load_dataset(name, config, split=split, streaming=streaming)
    # the hub client raises a dozen unrelated types; each becomes one line and keeps its cause
    except Exception as error:
        raise DataError(f"cannot open the dataset {name!r}, split {split!r}: {first_line(error)}") from error


def open_files(files: list[Path]) -> Any:
    """Local .jsonl or .parquet files as a stream.

    Raises:
        DataError: If the package is missing, or the files are of another or of two kinds.
    """
    datasets = require("datasets", "data.streaming=true")
    kinds = {file.suffix for file in files}
    if len(kinds) > 1 or not kinds <= set(_BUILDERS):
        raise DataError(f"data.streaming=true reads either .jsonl or .parquet files, not {', '.join(sorted(kinds))}")
    names = [str(file) for file in files]
    return datasets.load_dataset(_BUILDERS[kinds.pop()], data_files=names, split="train", streaming=True)


def stream_documents(dataset: Any, text_column: str, source: str) -> Iterator[bytes]:
    """The non-empty documents of a dataset, in order.

    Raises:
        DataError: If the stream breaks or a row lacks the text column.
    """
    rows = iter(dataset)
    while True:
        try:
            row = next(rows, None)
        # a broken line, a lost connection: whatever it is, the user gets one line that names the source
        except Exception as error:
            raise DataError(f"{source}: reading failed: {first_line(error.__cause__ or error)}") from error
        if row is None:
            return
        if document := row_text(row, text_column, source):
            yield document


class StreamBatches:
    """Endless (inputs, targets) batches of a stream, in its own order; resumes at the exact token.

    Documents follow each other in one run of tokens that is cut into batches without gaps. With several processes each
    reads its own part of the stream. The order is the dataset's: a shuffle buffer could not be resumed exactly, and C4
    comes shuffled. After the end the stream starts again.

    Args:
        dataset: A `datasets.IterableDataset`.
        tokenizer: Turns documents into ids.
        text_column: Which column holds the text.
        source: How messages name the stream.
        is_held_out: True for documents of the validation set, which are skipped.
        batch_size: Sequences per batch and rank, B.
        seq_len: Tokens per sequence, T.
        rank: Which part of the stream this process reads.
        world_size: How many processes share it.
        token_limit: Ids must be below this, the model's vocabulary size.

    Raises:
        ValueError: If an argument is out of range.
        DataError: If the stream breaks, holds nothing, or holds an id out of range.
    """

    def __init__(
        self,
        dataset: Any,
        *,
        tokenizer: Tokenizer,
        text_column: str,
        source: str,
        is_held_out: Callable[[bytes], bool],
        batch_size: int,
        seq_len: int,
        rank: int = 0,
        world_size: int = 1,
        token_limit: int | None = None,
    ) -> None:
        check_arguments(batch_size, seq_len, rank, world_size)
        by_node = require("datasets.distributed", "streaming").split_dataset_by_node
        self._dataset = by_node(dataset, rank=rank, world_size=world_size)
        self._tokenizer, self._column, self._source = tokenizer, text_column, source
        self._is_held_out, self._limit = is_held_out, token_limit
        self._batch_size, self._seq_len = batch_size, seq_len
        self._rows = stream_documents(self._dataset, self._column, self._source)
        self._epoch, self._next, self._began, self._found = 0, 0, False, False
        self._rest: Tokens = np.empty(0, dtype=self._tokenizer.dtype)

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        span = self._batch_size * self._seq_len
        parts, size = [self._rest], len(self._rest)
        while size < span + 1:
            read = self._read_group()
            parts += read
            size += sum(map(len, read))
        tokens = np.concatenate(parts)
        # the last target is the first input of the next batch
        self._rest = tokens[span:]
        self._next += 1
        starts = np.arange(self._batch_size)[:, None] * self._seq_len
        return to_batch(tokens[starts + np.arange(self._seq_len + 1)], self._limit)

    def state_dict(self) -> dict[str, Any]:
        """Everything the next batch depends on, as plain numbers, strings and lists."""
        place = self._dataset.state_dict() if self._began else None
        state = {"batch": self._next, "epoch": self._epoch, "found": self._found, "dataset": place}
        return {**state, "rest": self._rest.tolist()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on with the batch that came next when `state_dict` was called."""
        self._next, self._epoch, self._found = int(state["batch"]), int(state["epoch"]), bool(state["found"])
        self._rest = np.array(state["rest"], dtype=self._tokenizer.dtype)
        self._dataset.set_epoch(self._epoch)
        self._began = state["dataset"] is not None
        if self._began:
            self._dataset.load_state_dict(copy.deepcopy(state["dataset"]))
        self._rows = stream_documents(self._dataset, self._column, self._source)

    def _read_group(self) -> list[Tokens]:
        self._began = True
        documents = list(islice(self._rows, _GROUP))
        if not documents:
            if not self._found:
                hint = "lower data.val_tokens if all of it is held out"
                raise DataError(f"{self._source}: the stream gave this process no training text; {hint}")
            self._epoch, self._found = self._epoch + 1, False
            self._dataset.set_epoch(self._epoch)
            self._rows = stream_documents(self._dataset, self._column, self._source)
            return []
        documents = [document for document in documents if not self._is_held_out(document)]
        self._found = self._found or bool(documents)
        return self._tokenizer.encode(documents)


def first_documents(
    documents: Iterator[bytes], tokenizer: Tokenizer, count: int
) -> tuple[list[Tokens], set[bytes], int]:
    """Reads from the head of a stream until it gave `count` tokens.

    Returns:
        The ids of each document, the digests of the documents, and their bytes with separators.
    """
    tokens: list[Tokens] = []
    digests: set[bytes] = set()
    size = total = 0
    while total < count and (group := list(islice(documents, _GROUP))):
        for document, ids in zip(group, tokenizer.encode(group), strict=True):
            if total >= count:
                break
            tokens.append(ids)
            digests.add(digest(document))
            total += len(ids)
            size += len(document) + tokenizer.separator_bytes
    return tokens, digests, size


def digest(document: bytes) -> bytes:
    """What tells equal documents apart from others."""
    return hashlib.sha256(document).digest()
