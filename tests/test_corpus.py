import hashlib
import sysconfig
from pathlib import Path

import numpy as np
import pytest
import torch

from experiments.corpus import (
    DataError,
    checksum,
    file_documents,
    find_files,
    hold_out,
    offline_documents,
    require,
    samples,
)


@pytest.fixture(scope="module")
def offline() -> list[bytes]:
    return list(offline_documents())


def test_offline_corpus_is_the_code_that_torch_and_python_bring(offline: list[bytes]) -> None:
    assert Path(torch.optim.__file__).read_bytes() in offline
    assert Path(sysconfig.get_paths()["stdlib"], "json", "decoder.py").read_bytes() in offline
    # big enough for the default run, and free of what differs between machines or is not Python's own
    assert sum(map(len, offline)) > 20e6
    assert not any(b"build_time_vars" in document[:200] for document in offline)
    assert Path(pytest.__file__).read_bytes() not in offline


def test_offline_corpus_is_distinct_utf8_and_the_same_every_time(offline: list[bytes]) -> None:
    assert len(set(offline)) == len(offline)
    assert all(document.decode("utf-8") for document in offline)
    assert list(offline_documents()) == offline


@pytest.mark.parametrize("size", [3_000, 400_000])
def test_a_text_file_is_cut_at_line_ends_and_nothing_is_lost(tmp_path: Path, size: int) -> None:
    text = "".join(f"line {k} of the text, ä\n" for k in range(size // 22)).encode()
    (tmp_path / "a.txt").write_bytes(text)
    pieces = list(file_documents([tmp_path / "a.txt"], "text"))
    assert b"".join(pieces) == text
    assert len(pieces) > 1
    assert all(piece.endswith(b"\n") for piece in pieces)
    assert max(map(len, pieces)) < 3 * 1024


def test_text_without_line_ends_is_cut_between_characters(tmp_path: Path) -> None:
    text = "a" + "ä€" * 5000
    (tmp_path / "a.txt").write_bytes(text.encode())
    pieces = [piece.decode("utf-8") for piece in file_documents([tmp_path / "a.txt"], "text")]
    assert "".join(pieces) == text
    assert len(pieces) > 5


def test_folders_and_patterns_name_sorted_files(tmp_path: Path) -> None:
    for name in ("b.txt", "a.jsonl", "sub/c.parquet", "notes.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    assert [file.name for file in find_files(str(tmp_path))] == ["a.jsonl", "b.txt", "c.parquet"]
    assert [file.name for file in find_files(str(tmp_path / "*.txt"))] == ["b.txt"]
    assert [file.name for file in find_files(str(tmp_path / "**/*.parquet"))] == ["c.parquet"]


def test_hold_out_sees_content_and_not_order() -> None:
    texts = [f"document {k % 150}".encode() for k in range(200)]
    tokens = [np.zeros(10, dtype=np.uint8) for _ in texts]
    held = {text for text, out in zip(texts, hold_out(texts, tokens, 0.2, 1), strict=True) if out}
    reverse = {text for text, out in zip(texts[::-1], hold_out(texts[::-1], tokens, 0.2, 1), strict=True) if out}
    assert held == reverse
    assert 15 <= len(held) <= 45
    kept = {text for text, out in zip(texts, hold_out(texts, tokens, 0.2, 1), strict=True) if not out}
    assert not held & kept


def test_hold_out_takes_more_where_a_sequence_needs_it() -> None:
    texts = [f"document {k}".encode() for k in range(50)]
    tokens = [np.zeros(10, dtype=np.uint8) for _ in texts]
    assert hold_out(texts, tokens, 1e-9, 101).sum() == 11


def test_checksum_sees_every_id_of_an_ordinary_array_and_its_borders() -> None:
    ids = np.arange(100, dtype=np.uint16)
    other = ids.copy()
    other[50] += 1
    assert checksum([ids]) == checksum([ids.copy()])
    assert len({checksum([ids]), checksum([other]), checksum([ids[:50], ids[50:]]), checksum([])}) == 4
    want = hashlib.sha256(b"100" + ids.tobytes()).hexdigest()
    assert checksum([ids]) == want[:16]


def test_samples_of_a_huge_array_reach_both_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("experiments.corpus._WHOLE", 1000)
    monkeypatch.setattr("experiments.corpus._PIECES", 5)
    monkeypatch.setattr("experiments.corpus._PIECE", 20)
    pieces = list(samples(np.arange(1001, dtype=np.uint8)))
    assert [len(piece) for piece in pieces] == [20] * 5
    assert pieces[0][0] == 0
    assert pieces[-1][-1] == 1000 % 256


def test_a_missing_package_is_named_with_the_extra_that_brings_it() -> None:
    message = r"streaming needs the package 'no_such_package': pip install 'lowrank_optim\[data\]'"
    with pytest.raises(DataError, match=message):
        require("no_such_package.part", "streaming")
