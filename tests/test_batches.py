from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from experiments.batches import Batches, mix, permute
from experiments.corpus import DataError

TOKENS = np.arange(1000, dtype=np.uint16)


def make(tokens: list[np.ndarray] | None = None, **options: int) -> Batches:
    return Batches(tokens or [TOKENS], **{"batch_size": 4, "seq_len": 10, **options})


@pytest.mark.parametrize("size", [1, 2, 3, 7, 64, 65, 1000])
def test_permutation_is_one_and_depends_on_its_key(size: int) -> None:
    orders = [[permute(k, size, key) for k in range(size)] for key in (0, 1)]
    assert all(sorted(order) == list(range(size)) for order in orders)
    if size > 10:
        assert orders[0] != orders[1]
        # neighbours do not stay neighbours
        assert np.corrcoef(orders[0], range(size))[0, 1] < 0.5


def test_hash_never_changes() -> None:
    # a different value would silently reorder the data of every run that is resumed
    assert mix(0) == 0xE220A8397B1DCDAF
    assert mix(1, 2) != mix(2, 1)
    assert mix(-1) == mix(2**64 - 1)


def test_batch_holds_windows_and_their_successors() -> None:
    inputs, targets = make().batch(3)
    assert inputs.shape == targets.shape == (4, 10)
    assert inputs.dtype == targets.dtype == torch.int64
    # the token at position k is k
    assert torch.equal(targets, inputs + 1)
    assert torch.equal(inputs, inputs[:, :1] + torch.arange(10))


def test_batch_is_a_function_of_seed_and_number() -> None:
    one, other = make(seed=1), make(seed=1)
    run = [next(one) for _ in range(5)]
    assert all(torch.equal(a, b) for k in (4, 0, 2) for a, b in zip(other.batch(k), run[k], strict=True))
    assert not torch.equal(make(seed=2).batch(0)[0], run[0][0])


def test_an_epoch_uses_each_token_once_and_the_next_is_cut_elsewhere() -> None:
    batches = make(batch_size=1)
    length = batches.sequences_per_epoch
    assert length == 99
    epochs = [torch.cat([batches.batch(e * length + k)[0][0] for k in range(length)]) for e in range(2)]
    for tokens in epochs:
        assert len(tokens.unique()) == len(tokens) == 990
    starts = [set((tokens[::10] % 10).tolist()) for tokens in epochs]
    assert all(len(found) == 1 for found in starts)
    assert not torch.equal(*epochs)


def test_cursor_is_one_integer_that_resumes_the_run() -> None:
    run = make()
    for _ in range(7):
        next(run)
    state = run.state_dict()
    assert state == {"batch": 7}
    resumed = make()
    resumed.load_state_dict(state)
    for _ in range(60):
        assert torch.equal(next(resumed)[0], next(run)[0])


def test_ranks_share_nothing_and_together_are_one_process() -> None:
    whole = make(batch_size=12)
    ranks = [make(rank=r, world_size=3) for r in range(3)]
    for number in range(8):
        parts = [rank.batch(number)[0] for rank in ranks]
        assert torch.equal(torch.cat(parts), whole.batch(number)[0])
        assert len(torch.cat(parts).unique()) == 120


def test_no_window_crosses_two_arrays_and_all_are_used() -> None:
    arrays = [np.arange(first, first + n, dtype=np.uint16) for first, n in ((0, 300), (1000, 11), (2000, 95))]
    batches = make(arrays, batch_size=1)
    rows = [batches.batch(k) for k in range(batches.sequences_per_epoch)]
    assert all(torch.equal(targets, inputs + 1) for inputs, targets in rows)
    used = Counter(int(inputs[0, 0]) // 1000 for inputs, _ in rows)
    assert used == {0: 29, 1: 1, 2: 8}


def test_a_memory_map_gives_the_same_batches(tmp_path: Path) -> None:
    TOKENS.tofile(tmp_path / "t.bin")
    mapped = np.memmap(tmp_path / "t.bin", dtype=np.uint16, mode="r")
    assert torch.equal(make([mapped]).batch(5)[0], make().batch(5)[0])


def test_the_smallest_set_is_one_sequence_and_its_target() -> None:
    inputs, targets = make([TOKENS[:11]], batch_size=2).batch(9)
    assert inputs.tolist() == [list(range(10))] * 2
    assert targets[0].tolist() == list(range(1, 11))
    with pytest.raises(DataError, match="10 tokens are shorter than one sequence of 10 and its target"):
        make([TOKENS[:10]])


def test_an_id_outside_the_vocabulary_is_named() -> None:
    with pytest.raises(DataError, match=r"token id \d+, but model.vocab_size is 5$"):
        make(token_limit=5).batch(0)
    assert make(token_limit=1000).batch(0)[0].max() < 1000


@pytest.mark.parametrize(
    "wrong", [{"batch_size": 0}, {"seq_len": 0}, {"rank": 2, "world_size": 2}, {"rank": -1}, {"world_size": 0}]
)
def test_impossible_arguments_are_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="must be"):
        make(**wrong)
