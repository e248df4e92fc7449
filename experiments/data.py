"""The data of a run: what `--data.path` names, as training batches and a fixed validation set.

The default, `offline`, is the source code of the standard library and of torch: code, not prose (see
`experiments.corpus.offline_documents`). Nothing is downloaded unless `--data.path hf:NAME` asks for it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import compress
from typing import Any

import numpy as np

from experiments.batches import Batch, Batches, to_batch
from experiments.corpus import (
    DataError,
    Tokens,
    check_length,
    checksum,
    file_documents,
    find_files,
    hold_out,
    offline_documents,
    open_tokens,
    samples,
)
from experiments.streaming import (
    StreamBatches,
    digest,
    first_documents,
    open_dataset,
    open_files,
    stream_documents,
)
from experiments.tokenizer import Tokenizer, encode_all, join, load_tokenizer

_HUB = "hf:"


@dataclass(frozen=True)
class DataConfig:
    """Where the tokens come from.

    Args:
        path: `offline` (source code that every machine with torch holds; code, not prose), a .txt, .jsonl, .parquet or
            .bin file, a folder or glob pattern of such, or `hf:NAME` for a Hugging Face dataset.
        val_path: Files for validation; by default part of `path` is held out.
        tokenizer: `bytes`, or the path of a tokenizer.json (extra `data`).
        text_column: Column of .jsonl, .parquet and Hugging Face rows that holds the text.
        val_fraction: Share of the documents that is held out, chosen by a hash of their content. Raised as far as one
            sequence needs. For .bin files, the share of the tokens at the end.
        val_tokens: Most tokens held out of a stream or of .bin files.
        bin_dtype: uint8, uint16 or uint32: what .bin files hold, where no `name.bin.json` says so.
        dataset_config: Configuration of the Hugging Face dataset, such as `en` for allenai/c4.
        split: Split of the Hugging Face dataset to train on.
        val_split: Split to validate on, such as `validation`; by default part of `split` is held out.
        seed: Order of the training sequences; a stream keeps its own order.
        streaming: Tokenize while reading instead of holding all tokens in memory (needs the extra `data`). By default
            Hugging Face datasets stream and files do not.

    Raises:
        DataError: If options contradict each other.
    """

    path: str = "offline"
    val_path: str | None = None
    tokenizer: str = "bytes"
    text_column: str = "text"
    val_fraction: float = 0.02
    val_tokens: int = 1_000_000
    bin_dtype: str | None = None
    dataset_config: str | None = None
    split: str = "train"
    val_split: str | None = None
    seed: int = 0
    streaming: bool | None = None

    def __post_init__(self) -> None:
        if not self.path:
            raise DataError("data.path is empty: give 'offline', a file, a folder, a pattern or hf:NAME")
        if not 0 < self.val_fraction < 1:
            raise DataError(f"data.val_fraction must be between 0 and 1, got {self.val_fraction}")
        if self.val_tokens < 1:
            raise DataError(f"data.val_tokens must be at least 1, got {self.val_tokens}")
        if self.path == "offline" and self.streaming:
            raise DataError("data.streaming=true needs files or a Hugging Face dataset; data.path is 'offline'")
        if self.val_path is not None and self.hub_name is not None:
            raise DataError("data.val_path is for files; name a split of a Hugging Face dataset with data.val_split")
        if self.hub_name is None and (self.val_split is not None or self.dataset_config is not None):
            raise DataError("data.val_split and data.dataset_config are for Hugging Face datasets (data.path=hf:NAME)")

    @property
    def hub_name(self) -> str | None:
        """The name of the Hugging Face dataset, None for local data."""
        return self.path.removeprefix(_HUB) if self.path.startswith(_HUB) else None


@dataclass(frozen=True)
class Corpus:
    """Training and validation tokens, ready to be cut into batches.

    Attributes:
        seq_len: Tokens per sequence, T.
        seed: Order of the training sequences.
        token_limit: The model's vocabulary size, which no id may reach.
        bytes_per_token: UTF-8 bytes of the validation text per token, separators counted as one byte; bits per byte are
            nats per token / log(2) / this. None where raw tokens do not say.
        fingerprint: Counts and a checksum: equal for equal data.
        val: Validation ids, in one array.
        train: Training ids; empty where they are streamed.
        open_stream: Makes the batches of a stream; None where the tokens are in `train`.
    """

    seq_len: int
    seed: int
    token_limit: int
    bytes_per_token: float | None
    fingerprint: dict[str, str | int]
    val: Tokens = field(repr=False)
    train: list[Tokens] = field(repr=False)
    open_stream: Callable[..., StreamBatches] | None = field(repr=False, default=None)

    def batches(self, batch_size: int, *, rank: int = 0, world_size: int = 1) -> Batches | StreamBatches:
        """Endless training batches of this rank; `state_dict` and `load_state_dict` move the data cursor."""
        shape = {"batch_size": batch_size, "seq_len": self.seq_len, "rank": rank, "world_size": world_size}
        if self.open_stream is not None:
            return self.open_stream(**shape, token_limit=self.token_limit)
        return Batches(self.train, **shape, seed=self.seed, token_limit=self.token_limit)

    def validation(self, batch_size: int, max_tokens: int | None = None) -> list[Batch]:
        """The same sequences in every call: spread evenly over the validation set, without overlap.

        All batches have `batch_size` sequences, so that the mean of their losses is the mean over tokens; where the set
        is smaller than one batch, there is one batch with what there is.
        """
        available = (len(self.val) - 1) // self.seq_len
        count = available if max_tokens is None else min(available, max(1, max_tokens // self.seq_len))
        count = count // batch_size * batch_size or count
        starts = np.arange(count) * available // count * self.seq_len
        rows = self.val[starts[:, None] + np.arange(self.seq_len + 1)]
        return [to_batch(rows[k : k + batch_size], self.token_limit) for k in range(0, count, batch_size)]


def load_corpus(config: DataConfig, *, seq_len: int, vocab_size: int) -> Corpus:
    """Reads, tokenizes and splits the data.

    Args:
        config: What to read.
        seq_len: Tokens per training sequence.
        vocab_size: The model's vocabulary size.

    Raises:
        DataError: Missing, empty, too short or unreadable data, a missing column or package, or ids that the model's
            vocabulary does not hold; one line each.
    """
    local = [path for path in (config.path, config.val_path) if path not in (None, "offline") and not config.hub_name]
    raw = {find_files(path)[0].suffix == ".bin" for path in local}
    if len(raw) > 1 or (True in raw and config.path == "offline"):
        raise DataError("data.path and data.val_path must both be raw tokens (.bin) or both be text")
    if True in raw:
        read = _map_tokens(config, seq_len)
        origin = config.path
    else:
        tokenizer = load_tokenizer(config.tokenizer)
        stream = config.hub_name is not None if config.streaming is None else config.streaming
        read = _read_stream(config, tokenizer, seq_len) if stream else _read_documents(config, tokenizer, seq_len)
        origin = f"data.tokenizer={config.tokenizer}"
    if read.vocab_size > vocab_size:
        raise DataError(
            f"vocabulary mismatch: {origin} has {read.vocab_size} tokens, but model.vocab_size is {vocab_size};"
            f" set model.vocab_size to {read.vocab_size} or more"
        )
    return Corpus(
        seq_len=seq_len,
        seed=config.seed,
        token_limit=vocab_size,
        bytes_per_token=read.bytes_per_token,
        fingerprint={
            "path": config.path,
            "tokenizer": config.tokenizer,
            **read.counts,
            "train_tokens": sum(map(len, read.train)),
            "val_tokens": len(read.val),
            "sha256": checksum([*read.train, read.val]),
        },
        val=read.val,
        train=read.train,
        open_stream=read.open_stream,
    )


@dataclass(frozen=True)
class _Read:
    train: list[Tokens]
    val: Tokens
    vocab_size: int
    bytes_per_token: float | None
    counts: dict[str, str | int]
    open_stream: Callable[..., StreamBatches] | None = None


def _read_documents(config: DataConfig, tokenizer: Tokenizer, seq_len: int) -> _Read:
    """Holds everything in memory; a document goes to one side by its content alone."""
    documents = list(_documents(config, validation=False))
    if not documents:
        raise DataError(f"{config.path}: the data is empty")
    tokens = encode_all(tokenizer, documents)
    check_length(f"{config.path}: the data", sum(map(len, tokens)), seq_len)
    if config.val_path is None and config.val_split is None:
        held_out = hold_out(documents, tokens, config.val_fraction, seq_len + 1)
        if held_out.all():
            message = "too few distinct documents to hold out a validation set; name one with data.val_path"
            raise DataError(f"{config.path}: {message}")
        val_documents = list(compress(documents, held_out))
        val = list(compress(tokens, held_out))
    else:
        val_documents = list(_documents(config, validation=True))
        val = encode_all(tokenizer, val_documents)
        known = {digest(document) for document in val_documents}
        held_out = np.array([digest(document) in known for document in documents])
    train = list(compress(tokens, ~held_out))
    counts: dict[str, str | int] = {"train_documents": len(train), "val_documents": len(val)}
    size = sum(map(len, val_documents)) + tokenizer.separator_bytes * len(val_documents)
    joined = [join(part, tokenizer) for part in (train, val)]
    check_length(f"{config.path}: the training part", len(joined[0]), seq_len)
    check_length(f"{config.val_path or config.path}: the validation part", len(joined[1]), seq_len)
    return _Read([joined[0]], joined[1], tokenizer.vocab_size, size / len(joined[1]), counts)


def _map_tokens(config: DataConfig, seq_len: int) -> _Read:
    """Maps .bin files; the end of the last one is held out, unless there are files for validation."""
    files = find_files(config.path)
    opened = [open_tokens(file, config.bin_dtype) for file in files]
    train = [ids for ids, _ in opened]
    if config.val_path is not None:
        opened += [open_tokens(file, config.bin_dtype) for file in find_files(config.val_path)]
        val = np.concatenate([ids for ids, _ in opened[len(files) :]])
    else:
        share = min(int(sum(map(len, train)) * config.val_fraction), config.val_tokens, len(train[-1]) // 2)
        cut = max(0, len(train[-1]) - max(seq_len + 1, share))
        train[-1], val = train[-1][:cut], np.array(train[-1][cut:])
    for file, ids in zip(files, train, strict=True):
        check_length(f"{file}: the training part", len(ids), seq_len)
    check_length(f"{config.val_path or files[-1]}: the validation part", len(val), seq_len)
    found = 1 + max(int(sample.max()) for ids in [*train, val] for sample in samples(ids))
    vocab_size = max([found, *(int(about.get("vocab_size", 0)) for _, about in opened)])
    # bytes are their own measure; other ids have to say how much text they stand for
    said = opened[-1][1].get("bytes_per_token", 1.0 if val.dtype.itemsize == 1 else None)
    return _Read(train, val, vocab_size, None if said is None else float(said), {"files": len(files)})


def _read_stream(config: DataConfig, tokenizer: Tokenizer, seq_len: int) -> _Read:
    """Reads the validation set only: the head of the stream, unless there is a split or a file for it."""
    column, source = config.text_column, config.path
    dataset = _open_stream(config, validation=False)
    separate = config.val_path is not None or config.val_split is not None
    head = _open_stream(config, validation=True) if separate else dataset
    wanted = max(config.val_tokens, seq_len + 1)
    val, held_out, size = first_documents(stream_documents(head, column, source), tokenizer, wanted)
    if not val:
        raise DataError(f"{config.val_path or source}: the data is empty")

    def open_stream(**shape: Any) -> StreamBatches:
        return StreamBatches(
            dataset,
            tokenizer=tokenizer,
            text_column=column,
            source=source,
            is_held_out=lambda document: digest(document) in held_out,
            **shape,
        )

    joined = join(val, tokenizer)
    check_length(f"{config.val_path or source}: the validation part", len(joined), seq_len)
    counts: dict[str, str | int] = {"val_documents": len(val)}
    return _Read([], joined, tokenizer.vocab_size, size / len(joined), counts, open_stream)


def _documents(config: DataConfig, *, validation: bool) -> Iterator[bytes]:
    """The non-empty documents to train on, or those of the separate validation set."""
    path = config.val_path if validation and config.val_path is not None else config.path
    if config.hub_name is not None:
        split = config.val_split if validation and config.val_split is not None else config.split
        dataset = open_dataset(config.hub_name, config.dataset_config, split, streaming=False)
        yield from stream_documents(dataset, config.text_column, config.path)
    else:
        found = offline_documents() if path == "offline" else file_documents(find_files(path), config.text_column)
        yield from (document for document in found if document)


def _open_stream(config: DataConfig, *, validation: bool) -> Any:
    if config.hub_name is None:
        return open_files(find_files(config.val_path if validation and config.val_path is not None else config.path))
    split = config.val_split if validation and config.val_split is not None else config.split
    return open_dataset(config.hub_name, config.dataset_config, split, streaming=True)
