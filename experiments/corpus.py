"""Where text comes from: the documents of the offline corpus, of local files, and raw token files."""

from __future__ import annotations

import glob
import hashlib
import importlib
import json
import os
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch

TEXT_SUFFIXES = (".txt", ".jsonl", ".parquet")
TOKEN_DTYPES = {"uint8": "<u1", "uint16": "<u2", "uint32": "<u4"}
_SKIPPED_FOLDERS = {
    *("test", "tests", "idlelib", "lib2to3", "testing"),
    *("site-packages", "dist-packages", "__pycache__"),
}
_LARGEST_PIECE = 64 * 1024
_SMALLEST_PIECE = 1024
# of an array above this many bytes, only so many evenly spaced pieces are looked at
_WHOLE, _PIECES, _PIECE = 2**28, 256, 2**20

Tokens = np.ndarray[Any, Any]


class DataError(ValueError):
    """The data cannot be used as asked; the message is one line that names the cause."""


def require(package: str, purpose: str) -> ModuleType:
    """Imports a package of the extra `data`.

    Raises:
        DataError: If it is not installed.
    """
    try:
        return importlib.import_module(package)
    except ImportError as error:
        top = package.split(".")[0]
        message = f"{purpose} needs the package '{top}': pip install 'lowrank_optim[data]'"
        raise DataError(message) from error


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its type where it has none."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def offline_documents() -> Iterator[bytes]:
    """Every distinct `.py` file of the standard library and of torch, without their tests.

    This is source code, not prose: about 50 MB that each machine with torch already holds. Losses on it compare with
    each other, not with published language-model losses. The same versions of Python and torch give the same documents
    in the same order. Files that are not UTF-8 are left out.
    """
    seen: set[bytes] = set()
    for root in (sysconfig.get_paths()["stdlib"], os.path.dirname(torch.__file__)):
        for folder, subfolders, names in os.walk(root):
            subfolders[:] = sorted(set(subfolders) - _SKIPPED_FOLDERS)
            for name in sorted(names):
                # _sysconfigdata holds the paths and flags of the machine that built Python
                if not name.endswith(".py") or name.startswith("_sysconfigdata"):
                    continue
                document = Path(folder, name).read_bytes()
                digest = hashlib.sha256(document).digest()
                if document and digest not in seen and _is_utf8(document):
                    seen.add(digest)
                    yield document


def find_files(path: str) -> list[Path]:
    """The data files that a path, a folder or a glob pattern stands for, sorted.

    A folder stands for every .txt, .jsonl, .parquet or .bin file below it.

    Raises:
        DataError: If there is none, if one has another extension, or if raw tokens are mixed with text.
    """
    known = (*TEXT_SUFFIXES, ".bin")
    place = Path(path).expanduser()
    if place.is_dir():
        files = sorted(file for file in place.rglob("*") if file.suffix in known and file.is_file())
        if not files:
            raise DataError(f"{path}: no {', '.join(known)} file in this folder")
    elif place.exists():
        files = [place]
    else:
        files = sorted(Path(name) for name in glob.glob(str(place), recursive=True) if os.path.isfile(name))
        if not files:
            raise DataError(f"{path}: no such file or folder, and no file matches it as a pattern")
    for file in files:
        if file.suffix not in known:
            raise DataError(f"{file}: unknown extension {file.suffix!r}; known are {', '.join(known)}")
    if len({file.suffix == ".bin" for file in files}) > 1:
        raise DataError(f"{path}: raw tokens (.bin) and text together; name one kind")
    return files


def file_documents(files: list[Path], text_column: str) -> Iterator[bytes]:
    """The documents of local text files, in order.

    A row of .jsonl or .parquet is a document. A .txt file is one document where it is small against the whole,
    otherwise it is cut at line ends, so that even a single file can give a validation set.

    Raises:
        DataError: If a file cannot be read, or a row lacks the text column.
    """
    total = sum(file.stat().st_size for file in files)
    piece = min(_LARGEST_PIECE, max(_SMALLEST_PIECE, total // 256))
    for file in files:
        if file.suffix == ".txt":
            yield from _cut(file.read_bytes(), piece)
        elif file.suffix == ".jsonl":
            yield from _jsonl_rows(file, text_column)
        else:
            yield from _parquet_rows(file, text_column)


def row_text(row: Any, column: str, place: str) -> bytes:
    """The text of one row as UTF-8, empty where it is null.

    Raises:
        DataError: If the row has no such column, or something else than text in it.
    """
    if not isinstance(row, dict):
        raise DataError(f"{place}: expected an object with a column {column!r}, got {type(row).__name__}")
    if column not in row:
        raise DataError(f"{place}: no column {column!r} (data.text_column); it has {', '.join(sorted(row)) or 'none'}")
    text = row[column]
    if text is not None and not isinstance(text, str):
        raise DataError(f"{place}: column {column!r} holds {type(text).__name__}, not text")
    # JSON may escape half a surrogate pair, which UTF-8 cannot write: such a character becomes "?"
    return (text or "").encode("utf-8", "replace")


def open_tokens(file: Path, dtype: str | None) -> tuple[Tokens, dict[str, Any]]:
    """Maps a .bin file of raw little-endian token ids into memory.

    The file holds ids and nothing else, without a header. `name.bin.json` beside it may say
    `{"dtype": "uint8" | "uint16" | "uint32", "vocab_size": int, "bytes_per_token": float}`; all three are optional.

    Args:
        file: The tokens.
        dtype: What the ids are if the file beside it does not say so.

    Returns:
        The ids, one-dimensional, and what the file beside it says.

    Raises:
        DataError: If nobody says the dtype, the size is no multiple of it, or the file is empty.
    """
    size = file.stat().st_size
    if size == 0:
        raise DataError(f"{file}: the file is empty")
    sidecar = file.with_name(file.name + ".json")
    try:
        about = json.loads(sidecar.read_bytes()) if sidecar.exists() else {}
    except ValueError as error:
        raise DataError(f"{sidecar}: not valid JSON: {error}") from error
    if not isinstance(about, dict):
        raise DataError(f"{sidecar}: expected an object such as {{'dtype': 'uint16'}}")
    for key in ("vocab_size", "bytes_per_token"):
        value = about.get(key, 1)
        if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
            raise DataError(f"{sidecar}: {key} must be a positive number, got {value!r}")
    name = about.get("dtype", dtype)
    if name not in TOKEN_DTYPES:
        example = '{"dtype": "uint16", "vocab_size": 32000}'
        raise DataError(f"{file}: the dtype is {name!r}; set data.bin_dtype, or write {example} into {sidecar.name}")
    if size % np.dtype(TOKEN_DTYPES[name]).itemsize:
        raise DataError(f"{file}: {size} bytes are not a whole number of {name} tokens")
    return np.memmap(file, dtype=TOKEN_DTYPES[name], mode="r"), about


def hold_out(documents: list[bytes], tokens: list[Tokens], fraction: float, at_least: int) -> Tokens:
    """Marks the documents for validation: those whose hash lies below `fraction`, or below what `at_least` tokens need.

    The choice sees the content alone, not the order, and equal documents stay together.
    """
    scores = np.array([int.from_bytes(hashlib.sha256(text).digest()[:6], "big") / 2.0**48 for text in documents])
    order = np.argsort(scores, kind="stable")
    reached = np.cumsum([len(tokens[k]) for k in order])
    needed = scores[order][int(np.searchsorted(reached, at_least))]
    held_out: Tokens = (scores < fraction) | (scores <= needed)
    return held_out


def check_length(what: str, length: int, seq_len: int) -> None:
    """Raises DataError if there is no room for one sequence and its target."""
    if length < seq_len + 1:
        raise DataError(f"{what} holds {length} tokens, less than one sequence and its target ({seq_len} + 1)")


def samples(ids: Tokens) -> Iterator[Tokens]:
    """All ids of an array of ordinary size, evenly spaced pieces of a huge one."""
    if ids.nbytes <= _WHOLE:
        yield ids
        return
    for k in range(_PIECES):
        start = k * (len(ids) - _PIECE) // (_PIECES - 1)
        yield ids[start : start + _PIECE]


def checksum(arrays: list[Tokens]) -> str:
    """Sixteen hexadecimal digits that depend on the lengths and the `samples` of the arrays."""
    result = hashlib.sha256()
    for ids in arrays:
        result.update(str(len(ids)).encode())
        for sample in samples(ids):
            result.update(np.ascontiguousarray(sample).data)
    return result.hexdigest()[:16]


def _is_utf8(document: bytes) -> bool:
    try:
        document.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True


def _cut(text: bytes, size: int) -> Iterator[bytes]:
    start = 0
    while start < len(text):
        end = text.find(b"\n", start + size - 1, start + 2 * size) + 1
        if end == 0:
            # no line ends here: cut between characters, not inside one
            end = min(start + 2 * size, len(text))
            while end < len(text) and text[end] & 0xC0 == 0x80:
                end += 1
        yield text[start:end]
        start = end


def _jsonl_rows(file: Path, column: str) -> Iterator[bytes]:
    with file.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:
                raise DataError(f"{file}, line {number}: not valid JSON: {error}") from error
            yield row_text(row, column, f"{file}, line {number}")


def _parquet_rows(file: Path, column: str) -> Iterator[bytes]:
    parquet = require("pyarrow.parquet", f"reading {file}")
    try:
        table = parquet.ParquetFile(file)
    # pyarrow's errors are ValueErrors and OSErrors
    except (ValueError, OSError) as error:
        raise DataError(f"{file}: not a parquet file: {first_line(error)}") from error
    with table:
        names = table.schema_arrow.names
        if column not in names:
            raise DataError(f"{file}: no column {column!r} (data.text_column); it has {', '.join(sorted(names))}")
        for batch in table.iter_batches(columns=[column]):
            for text in batch.column(0).to_pylist():
                yield row_text({column: text}, column, str(file))
