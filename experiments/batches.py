"""Random batches of a fixed set of tokens: batch i is a pure function of (seed, i)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from experiments.corpus import DataError, Tokens

Batch = tuple[Tensor, Tensor]


class Batches:
    """Endless (inputs, targets) batches, each token once per epoch, in an order drawn from the seed.

    The tokens are cut into cells of `seq_len`; an epoch visits every cell once, in a pseudo-random permutation that is
    computed and not stored, and each epoch cuts at another offset. Sequence number k of the run, for all ranks
    together, is cell k of that order: ranks never share one, and the order depends on the global batch size only.
    The whole position is one integer.

    Args:
        tokens: One or several arrays of ids, in memory or memory-mapped; no sequence crosses two of them.
        batch_size: Sequences per batch and rank, B.
        seq_len: Tokens per sequence, T.
        seed: Chooses the order.
        rank: Which slice of each global batch this process takes.
        world_size: How many processes share it.
        token_limit: Ids must be below this, the model's vocabulary size; None means anything goes.

    Raises:
        ValueError: If an argument is out of range.
        DataError: If an array is shorter than one sequence and its target, or a batch holds an id out of range.
    """

    def __init__(
        self,
        tokens: Sequence[Tokens],
        *,
        batch_size: int,
        seq_len: int,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        token_limit: int | None = None,
    ) -> None:
        check_arguments(batch_size, seq_len, rank, world_size)
        shortest = min(map(len, tokens), default=0)
        if shortest < seq_len + 1:
            raise DataError(f"{shortest} tokens are shorter than one sequence of {seq_len} and its target")
        self._tokens = list(tokens)
        self._batch_size, self._seq_len = batch_size, seq_len
        self._seed, self._rank, self._world_size, self._limit = seed, rank, world_size, token_limit
        # one cell is kept back (where there are two) as room for the offset
        self._cells = np.array([max(1, (len(array) - seq_len) // seq_len) for array in self._tokens])
        self._next = 0

    @property
    def sequences_per_epoch(self) -> int:
        """How many sequences, over all ranks, use each token once."""
        return int(self._cells.sum())

    def batch(self, number: int) -> Batch:
        """Batch `number`: (inputs, targets), int64, each of shape (B, T), targets one token ahead."""
        first = (number * self._world_size + self._rank) * self._batch_size
        rows = [self._window(first + k) for k in range(self._batch_size)]
        return to_batch(np.stack(rows), self._limit)

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        self._next += 1
        return self.batch(self._next - 1)

    def state_dict(self) -> dict[str, Any]:
        """The number of the next batch."""
        return {"batch": self._next}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on with the batch that came next when `state_dict` was called."""
        self._next = int(state["batch"])

    def _window(self, sequence: int) -> Tokens:
        epoch, position = divmod(sequence, self.sequences_per_epoch)
        key = mix(self._seed, epoch)
        cell = permute(position, self.sequences_per_epoch, key)
        which = int(np.searchsorted(np.cumsum(self._cells), cell, side="right"))
        array, cells = self._tokens[which], int(self._cells[which])
        cell -= int(self._cells[:which].sum())
        slack = len(array) - 1 - cells * self._seq_len
        start = cell * self._seq_len + mix(key, which) % (min(slack, self._seq_len - 1) + 1)
        return array[start : start + self._seq_len + 1]


def mix(*words: int) -> int:
    """Hashes integers to 64 bits, the same on every machine and version (the finalizer of SplitMix64)."""
    state = 0
    for word in words:
        state = (state + word + 0x9E3779B97F4A7C15) % 2**64
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) % 2**64
        state ^= state >> 31
    return state


def permute(index: int, size: int, key: int) -> int:
    """Where `index` goes in a pseudo-random permutation of range(size) that `key` chooses; needs no memory."""
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    mask = (1 << half) - 1
    while True:
        # a Feistel network permutes 2 * half bits; walking on while outside of range(size) permutes the range
        left, right = index >> half, index & mask
        for turn in range(4):
            left, right = right, left ^ (mix(key, turn, right) & mask)
        index = left << half | right
        if index < size:
            return index


def to_batch(rows: Tokens, token_limit: int | None) -> Batch:
    """Splits rows of T + 1 ids into (inputs, targets).

    Raises:
        DataError: If an id is `token_limit` or more.
    """
    if token_limit is not None and (largest := int(rows.max())) >= token_limit:
        raise DataError(
            f"vocabulary mismatch: the data holds token id {largest}, but model.vocab_size is {token_limit}"
        )
    ids = torch.from_numpy(rows.astype(np.int64))
    return ids[:, :-1].contiguous(), ids[:, 1:].contiguous()


def check_arguments(batch_size: int, seq_len: int, rank: int, world_size: int) -> None:
    """Raises ValueError if a batch of this shape cannot be."""
    if batch_size < 1 or seq_len < 1:
        raise ValueError(f"batch_size and seq_len must be at least 1, got {batch_size} and {seq_len}")
    if not 0 <= rank < world_size:
        raise ValueError(f"rank must be in [0, world_size), got {rank} of {world_size}")
