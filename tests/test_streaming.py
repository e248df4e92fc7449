import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from experiments.data import Corpus, DataConfig, DataError, StreamBatches, load_corpus

pytest.importorskip("datasets", reason="streams through the package datasets (extra `data`)")

TEXTS = [f"document number {k} " + "words " * (k % 7) for k in range(200)]


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "data" / "a.jsonl"
    path.parent.mkdir()
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    return path


def load(path: Path | str, seq_len: int = 16, vocab_size: int = 256, **options: Any) -> Corpus:
    config = DataConfig(path=str(path), **{"streaming": True, "val_tokens": 300, **options})
    return load_corpus(config, seq_len=seq_len, vocab_size=vocab_size)


def stream(corpus: Corpus, batch_size: int = 3, **options: int) -> StreamBatches:
    batches = corpus.batches(batch_size, **options)
    assert isinstance(batches, StreamBatches)
    return batches


def text_of(batches: list[torch.Tensor]) -> bytes:
    return np.concatenate([inputs.flatten().numpy() for inputs in batches]).astype(np.uint8).tobytes()


def test_stream_is_the_text_in_order_without_the_held_out_head(file: Path) -> None:
    corpus = load(file)
    held = corpus.val.tobytes().split(b"\x00")[:-1]
    assert held == [text.encode() for text in TEXTS[: len(held)]]
    assert 300 <= len(corpus.val) < 400
    assert corpus.bytes_per_token == 1.0
    rest = b"".join(text.encode() + b"\x00" for text in TEXTS[len(held) :])
    batches = stream(corpus)
    got = text_of([next(batches)[0] for _ in range(2 * len(rest) // 48)])
    # two passes and no more than the end of the second is missing
    assert (rest * 2).startswith(got)
    assert len(got) > 2 * len(rest) - 48


def test_targets_follow_the_inputs_across_rows_and_batches(file: Path) -> None:
    batches = stream(load(file))
    (inputs, targets), (later, _) = next(batches), next(batches)
    assert torch.equal(inputs.flatten()[1:], targets.flatten()[:-1])
    assert targets[-1, -1] == later[0, 0]


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_cursor_resumes_at_the_exact_token(file: Path, kind: str) -> None:
    if kind == "parquet":
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.table({"text": TEXTS}), file.with_suffix(".parquet"), row_group_size=17)
        file = file.with_suffix(".parquet")
    corpus = load(file)
    run = stream(corpus)
    states, whole = [], []
    # through the end of the first pass, which the last, smaller group of documents reaches before its tokens are used
    for _ in range(190):
        states.append(io.BytesIO())
        torch.save(run.state_dict(), states[-1])
        whole.append(next(run))
    assert run.state_dict()["epoch"] == 1
    for number in range(188):
        resumed = stream(corpus)
        states[number].seek(0)
        resumed.load_state_dict(torch.load(states[number], weights_only=True))
        for expected in whole[number : number + 2]:
            assert all(torch.equal(a, b) for a, b in zip(next(resumed), expected, strict=True)), number


def test_two_streams_of_one_corpus_do_not_disturb_each_other(file: Path) -> None:
    corpus = load(file)
    alone = stream(corpus)
    expected = [next(alone)[0] for _ in range(40)]
    one, two = stream(corpus), stream(corpus)
    for k in range(20):
        next(two)
        assert torch.equal(next(one)[0], expected[k])
        assert torch.equal(next(two)[0], expected[2 * k + 1])


def test_ranks_read_different_documents_that_are_all_of_them(file: Path) -> None:
    corpus = load(file)
    parts = []
    for rank in range(2):
        batches = stream(corpus, 1, rank=rank, world_size=2)
        # both ranks read about half; stop before the second pass
        parts.append(text_of([next(batches)[0] for _ in range(150)]).split(b"\x00")[:-1])
    assert not set(parts[0]) & set(parts[1])
    assert not (set(parts[0]) | set(parts[1])) & set(corpus.val.tobytes().split(b"\x00")[:-1])
    assert len(parts[0]) > 50
    assert len(parts[1]) > 50


def test_a_file_for_validation_leaves_its_documents_out(file: Path, tmp_path: Path) -> None:
    val = tmp_path / "val.jsonl"
    val.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS[50:60]))
    corpus = load(file, val_path=str(val), val_tokens=10_000)
    assert corpus.val.tobytes() == b"".join(text.encode() + b"\x00" for text in TEXTS[50:60])
    batches = stream(corpus)
    first_pass = text_of([next(batches)[0] for _ in range(100)])
    assert TEXTS[49].encode() in first_pass
    assert TEXTS[60].encode() in first_pass
    assert not any(text.encode() + b"\x00" in first_pass for text in TEXTS[50:60])


def test_fingerprint_is_stable(file: Path) -> None:
    assert load(file).fingerprint == load(file).fingerprint
    assert load(file).fingerprint != load(file, val_tokens=500).fingerprint


def test_a_dataset_by_name_takes_the_same_way(file: Path) -> None:
    # a folder with data files is a dataset too: this is the hub's code path without the hub
    for streaming in (None, False):
        corpus = load(f"hf:{file.parent}", streaming=streaming)
        assert next(corpus.batches(2))[0].shape == (2, 16)
        assert corpus.fingerprint["path"] == f"hf:{file.parent}"
    with pytest.raises(DataError, match=r"cannot open the dataset .*split 'nosuch'") as caught:
        load(f"hf:{file.parent}", split="nosuch")
    assert "\n" not in str(caught.value)


def test_an_unreachable_hub_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    with pytest.raises(DataError, match=r"cannot open the dataset 'allenai/c4', split 'train': ") as caught:
        load("hf:allenai/c4", dataset_config="en", val_split="validation", streaming=None)
    assert "\n" not in str(caught.value)


def test_a_broken_line_a_missing_column_and_an_empty_stream_are_one_line(file: Path) -> None:
    with pytest.raises(DataError, match=r"no column 'body' \(data.text_column\); it has text"):
        load(file, text_column="body")
    with pytest.raises(DataError, match=r"gave this process no training text; lower data.val_tokens"):
        next(stream(load(file, val_tokens=10**6)))
    with pytest.raises(DataError, match=r"the validation part holds \d+ tokens, less than one sequence"):
        load(file, seq_len=100_000)
    file.write_text('{"text": "fine"}\n{"text": oops}\n')
    with pytest.raises(DataError, match=r"a.jsonl: reading failed") as caught:
        load(file)
    assert "\n" not in str(caught.value)
    file.write_text('{"text": ""}\n')
    with pytest.raises(DataError, match=r"a.jsonl: the data is empty"):
        load(file)


def test_text_files_do_not_stream(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(DataError, match=r"reads either .jsonl or .parquet files, not .txt"):
        load(tmp_path / "a.txt")


def test_an_id_outside_the_vocabulary_and_impossible_ranks_are_refused(file: Path) -> None:
    with pytest.raises(DataError, match="data.tokenizer=bytes has 256 tokens"):
        load(file, vocab_size=100)
    with pytest.raises(ValueError, match="rank must be in"):
        stream(load(file), rank=2, world_size=2)
