import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from experiments.data import Batches, Corpus, DataConfig, DataError, load_corpus

SENTENCES = [
    f"{word} {k}: the quick brown fox jumps over the lazy dog, ä.\n" for k in range(60) for word in ("One", "Two")
]


def load(path: Path | str, vocab_size: int = 256, seq_len: int = 16, **options: Any) -> Corpus:
    return load_corpus(DataConfig(path=str(path), **options), seq_len=seq_len, vocab_size=vocab_size)


def write_jsonl(file: Path, texts: list[str], column: str = "text") -> Path:
    file.write_text("".join(json.dumps({"id": k, column: text}) + "\n" for k, text in enumerate(texts)))
    return file


def write_parquet(file: Path, texts: list[str | None], column: str = "text") -> Path:
    parquet = pytest.importorskip("pyarrow.parquet", reason="writes a parquet file (extra `test`)")
    import pyarrow

    parquet.write_table(pyarrow.table({column: texts, "id": list(range(len(texts)))}), file, row_group_size=7)
    return file


@pytest.fixture(scope="module")
def tokenizer_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    library = pytest.importorskip("tokenizers", reason="trains a tokenizer (extra `data`)")
    from tokenizers import decoders, models, pre_tokenizers, trainers

    tokenizer = library.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet)
    tokenizer.train_from_iterator(SENTENCES, trainer)
    # what must not reach the training text
    tokenizer.enable_truncation(4)
    file = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    tokenizer.save(str(file))
    return file


def documents(ids: np.ndarray) -> list[bytes]:
    text = ids.tobytes()
    assert text.endswith(b"\x00")
    return text[:-1].split(b"\x00")


def test_default_is_the_offline_corpus_with_one_checksum() -> None:
    one, two = (load_corpus(DataConfig(), seq_len=128, vocab_size=256) for _ in range(2))
    assert one.fingerprint == two.fingerprint
    assert one.fingerprint["path"] == "offline"
    assert one.fingerprint["train_tokens"] == len(one.train[0]) > 20e6
    assert one.fingerprint["val_tokens"] == len(one.val) > 2e5
    assert one.bytes_per_token == 1.0
    assert not set(documents(one.train[0])) & set(documents(one.val))
    inputs, targets = next(one.batches(4))
    assert inputs.shape == (4, 128)
    assert torch.equal(inputs[:, 1:], targets[:, :-1])


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_rows_become_documents_that_are_on_one_side_only(tmp_path: Path, kind: str) -> None:
    write = write_jsonl if kind == "jsonl" else write_parquet
    # every text twice: equal texts must not be parted
    corpus = load(write(tmp_path / f"a.{kind}", SENTENCES * 2, "body"), text_column="body", val_fraction=0.1)
    train, val = documents(corpus.train[0]), documents(corpus.val)
    assert sorted(train + val) == sorted(text.encode() for text in SENTENCES * 2)
    assert not set(train) & set(val)
    assert 0.02 < len(val) / (2 * len(SENTENCES)) < 0.2
    assert corpus.fingerprint["train_documents"] == len(train)


def test_empty_and_null_rows_are_no_documents(tmp_path: Path) -> None:
    corpus = load(write_parquet(tmp_path / "a.parquet", [*SENTENCES, "", None]))
    assert b"" not in documents(corpus.train[0]) + documents(corpus.val)


def test_text_files_of_a_folder_keep_every_byte(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("".join(SENTENCES).encode())
    (tmp_path / "b.txt").write_bytes(b"latin-1 \xe4 is fine for bytes\n" * 3)
    corpus = load(tmp_path)
    together = b"".join(documents(corpus.train[0]) + documents(corpus.val))
    assert sorted(together.splitlines()) == sorted(b"".join(f.read_bytes() for f in tmp_path.iterdir()).splitlines())


def test_validation_files_are_kept_out_of_the_training_text(tmp_path: Path) -> None:
    val = write_jsonl(tmp_path / "val.jsonl", SENTENCES[:10])
    corpus = load(write_jsonl(tmp_path / "train.jsonl", SENTENCES), val_path=str(val))
    assert documents(corpus.val) == [text.encode() for text in SENTENCES[:10]]
    assert documents(corpus.train[0]) == [text.encode() for text in SENTENCES[10:]]


def test_the_offline_corpus_can_be_validated_on_a_file(tmp_path: Path) -> None:
    val = write_jsonl(tmp_path / "val.jsonl", SENTENCES)
    corpus = load("offline", val_path=str(val))
    assert documents(corpus.val) == [text.encode() for text in SENTENCES]
    assert len(corpus.train[0]) > 20e6


def test_tokenizer_ids_decode_to_the_text(tmp_path: Path, tokenizer_file: Path) -> None:
    from tokenizers import Tokenizer

    file = write_jsonl(tmp_path / "a.jsonl", SENTENCES)
    corpus = load(file, 400, tokenizer=str(tokenizer_file), val_fraction=0.1)
    tokenizer = Tokenizer.from_file(str(tokenizer_file))
    end = tokenizer.token_to_id("<|endoftext|>")
    texts = []
    for ids in (corpus.train[0], corpus.val):
        assert ids[-1] == end
        ends = np.flatnonzero(ids == end)
        texts += [tokenizer.decode(part[part != end].tolist()) for part in np.split(ids, ends + 1)[:-1]]
    assert sorted(texts) == sorted(SENTENCES)
    # bits per byte: the whole text, one byte for each separator, over the tokens
    val_bytes = sum(len(t.encode()) + 1 for t in texts[int(corpus.fingerprint["train_documents"]) :])
    assert corpus.bytes_per_token == pytest.approx(val_bytes / len(corpus.val))
    assert 2 < corpus.bytes_per_token < 20


def test_raw_tokens_are_mapped_and_their_end_is_held_out(tmp_path: Path) -> None:
    np.arange(1000, dtype="<u2").tofile(tmp_path / "a.bin")
    np.arange(1000, 1500, dtype="<u2").tofile(tmp_path / "b.bin")
    about = {"dtype": "uint16", "vocab_size": 2000, "bytes_per_token": 3.5}
    for name in "ab":
        (tmp_path / f"{name}.bin.json").write_text(json.dumps(about))
    corpus = load(tmp_path, 2000, val_fraction=0.1)
    assert isinstance(corpus.train[0].base, np.memmap) or isinstance(corpus.train[0], np.memmap)
    assert [len(ids) for ids in corpus.train] == [1000, 350]
    assert corpus.val.tolist() == list(range(1350, 1500))
    assert corpus.bytes_per_token == 3.5


def test_raw_tokens_take_their_dtype_from_the_option(tmp_path: Path) -> None:
    np.arange(300, dtype="<u4").tofile(tmp_path / "a.bin")
    corpus = load(tmp_path / "a.bin", 300, bin_dtype="uint32")
    assert corpus.train[0].max() < 300
    assert corpus.bytes_per_token is None
    (tmp_path / "v.bin").write_bytes(bytes(range(100)))
    (tmp_path / "t.bin").write_bytes(bytes(range(200)))
    corpus = load(tmp_path / "t.bin", val_path=str(tmp_path / "v.bin"), bin_dtype="uint8")
    assert corpus.val.tolist() == list(range(100))
    assert len(corpus.train[0]) == 200
    assert corpus.bytes_per_token == 1.0


def test_validation_is_fixed_even_and_without_overlap(tmp_path: Path) -> None:
    np.arange(2000, dtype="<u2").tofile(tmp_path / "a.bin")
    corpus = load(tmp_path / "a.bin", 2000, bin_dtype="uint16", val_fraction=0.5, seq_len=10)
    batches = corpus.validation(4, max_tokens=250)
    assert [inputs.shape for inputs, _ in batches] == [(4, 10)] * 6
    inputs = torch.cat([inputs for inputs, _ in batches])
    assert len(inputs.unique()) == inputs.numel()
    assert torch.equal(torch.cat([targets for _, targets in batches]), inputs + 1)
    # from the first to near the last of 99 sequences
    assert inputs[0, 0] == 1000
    assert inputs[-1, 0] >= 1940
    again = corpus.validation(4, max_tokens=250)
    assert all(torch.equal(a[0], b[0]) for a, b in zip(batches, again, strict=True))
    assert sum(len(x) for x, _ in corpus.validation(4)) == 96
    # less than one batch, but never nothing
    assert [len(x) for x, _ in corpus.validation(64, max_tokens=1)] == [1]


def test_seed_and_rank_reach_the_batches(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("".join(SENTENCES))
    first, second = (load(tmp_path / "a.txt", seed=seed).batches(4, rank=1, world_size=2) for seed in (0, 1))
    assert isinstance(first, Batches)
    assert not torch.equal(next(first)[0], next(second)[0])
    whole = load(tmp_path / "a.txt").batches(8).batch(0)[0]
    assert torch.equal(first.batch(0)[0], whole[4:])


def test_loss_in_bits_per_byte_of_a_uniform_guess_is_eight() -> None:
    corpus = load_corpus(DataConfig(), seq_len=16, vocab_size=256)
    assert corpus.bytes_per_token is not None
    assert math.log(256) / math.log(2) / corpus.bytes_per_token == 8.0


TOO_SHORT = "less than one sequence and its target"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"", "a.txt: the data is empty"),
        ("a.jsonl", b"\n\n", "a.jsonl: the data is empty"),
        ("a.txt", b"short", rf"a.txt: the data holds 6 tokens, {TOO_SHORT} \(16 \+ 1\)"),
        ("a.jsonl", b'{"text": "the same"}\n' * 99, "a.jsonl: too few distinct documents to hold out a validation set"),
        ("a.csv", b"x", "a.csv: unknown extension '.csv'; known are .txt, .jsonl, .parquet, .bin"),
        ("a.jsonl", b'{"text": "fine"}\n\n{"text": oops}\n', r"a.jsonl, line 3: not valid JSON: Expecting value"),
        ("a.jsonl", b'{"text": "\xff"}\n', r"a.jsonl, line 1: not valid JSON"),
        ("a.jsonl", b'{"body": "x", "id": 1}\n', r"line 1: no column 'text' \(data.text_column\); it has body, id"),
        ("a.jsonl", b"[1]\n", r"line 1: expected an object with a column 'text', got list"),
        ("a.jsonl", b'{"text": 3}\n', r"line 1: column 'text' holds int, not text"),
        ("a.parquet", b"not parquet at all", "a.parquet: not a parquet file"),
        ("a.bin", b"", "a.bin: the file is empty"),
        ("a.bin", b"x" * 99, "a.bin: the dtype is None; set data.bin_dtype, or write"),
    ],
)
def test_unusable_files_are_refused_in_one_line(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    if name.endswith("parquet"):
        pytest.importorskip("pyarrow", reason="reads a parquet file (extra `test`)")
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        load(tmp_path / name)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "options", "message"),
    [
        (b"abc", {"bin_dtype": "uint16"}, "a.bin: 3 bytes are not a whole number of uint16 tokens"),
        (b"abc", {"bin_dtype": "int8"}, "a.bin: the dtype is 'int8'; set data.bin_dtype"),
        (b"x" * 20, {"bin_dtype": "uint8"}, rf"a.bin: the training part holds 3 tokens, {TOO_SHORT}"),
        (b"x" * 12, {"bin_dtype": "uint8"}, rf"a.bin: the training part holds 0 tokens, {TOO_SHORT}"),
        (b"\xff\xff" * 99, {"bin_dtype": "uint16"}, "a.bin has 65536 tokens, but model.vocab_size is 256; set"),
    ],
)
def test_unusable_tokens_are_refused(tmp_path: Path, content: bytes, options: dict[str, str], message: str) -> None:
    (tmp_path / "a.bin").write_bytes(content)
    with pytest.raises(DataError, match=message):
        load(tmp_path / "a.bin", **options)


def test_a_broken_description_of_tokens_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.bin").write_bytes(b"x" * 99)
    (tmp_path / "a.bin.json").write_text("{")
    with pytest.raises(DataError, match=r"a.bin.json: not valid JSON"):
        load(tmp_path / "a.bin")
    (tmp_path / "a.bin.json").write_text('{"dtype": "uint8", "vocab_size": 300}')
    with pytest.raises(DataError, match=r"a.bin has 300 tokens, but model.vocab_size is 256"):
        load(tmp_path / "a.bin")
    for key in ("vocab_size", "bytes_per_token"):
        (tmp_path / "a.bin.json").write_text(json.dumps({"dtype": "uint8", key: "many"}))
        with pytest.raises(DataError, match=f"a.bin.json: {key} must be a positive number, got 'many'"):
            load(tmp_path / "a.bin")


def test_parquet_without_the_column_lists_what_there_is(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no column 'text' \(data.text_column\); it has body, id$"):
        load(write_parquet(tmp_path / "a.parquet", ["x"], "body"))


def test_missing_paths_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nowhere.txt: no such file or folder, and no file matches"):
        load(tmp_path / "nowhere.txt")
    with pytest.raises(DataError, match=r"no .txt, .jsonl, .parquet, .bin file in this folder"):
        load(tmp_path)


def test_tokens_and_text_do_not_mix(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("".join(SENTENCES))
    (tmp_path / "b.bin").write_bytes(b"x" * 99)
    with pytest.raises(DataError, match=r"raw tokens \(.bin\) and text together"):
        load(tmp_path)
    with pytest.raises(DataError, match="must both be raw tokens"):
        load(tmp_path / "a.txt", val_path=str(tmp_path / "b.bin"))
    with pytest.raises(DataError, match="must both be raw tokens"):
        load("offline", val_path=str(tmp_path / "b.bin"))


def test_a_vocabulary_too_small_is_refused(tmp_path: Path, tokenizer_file: Path) -> None:
    with pytest.raises(DataError, match="data.tokenizer=bytes has 256 tokens, but model.vocab_size is 128; set"):
        load("offline", 128)
    file = write_jsonl(tmp_path / "a.jsonl", SENTENCES)
    with pytest.raises(DataError, match=r"tokenizer.json has \d+ tokens, but model.vocab_size is 256; set model.vocab"):
        load(file, 256, tokenizer=str(tokenizer_file))


def test_a_tokenizer_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("tokenizers", reason="reads a tokenizer (extra `data`)")
    with pytest.raises(DataError, match=r"data.tokenizer=t5-base: no such file; give 'bytes' or the path of"):
        load("offline", tokenizer="t5-base")
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(DataError, match=r"not a tokenizer.json"):
        load("offline", tokenizer=str(tmp_path / "tokenizer.json"))


def test_a_tokenizer_refuses_what_is_not_utf8(tmp_path: Path, tokenizer_file: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"some latin-1: \xe4\n" * 50)
    with pytest.raises(DataError, match=r"not UTF-8 \(after b'some latin-1: '\); data.tokenizer=bytes takes any bytes"):
        load(tmp_path / "a.txt", 400, tokenizer=str(tokenizer_file))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"val_fraction": 0.0}, "data.val_fraction must be between 0 and 1, got 0.0"),
        ({"val_fraction": 1.0}, "data.val_fraction must be between 0 and 1"),
        ({"val_tokens": 0}, "data.val_tokens must be at least 1"),
        ({"streaming": True}, "data.streaming=true needs files or a Hugging Face dataset"),
        ({"val_split": "validation"}, "are for Hugging Face datasets"),
        ({"dataset_config": "en"}, "are for Hugging Face datasets"),
        ({"path": "hf:allenai/c4", "val_path": "v.txt"}, "data.val_path is for files"),
    ],
)
def test_options_that_contradict_each_other_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        DataConfig(**options)
