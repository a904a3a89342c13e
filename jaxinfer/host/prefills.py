"""Which pieces of prompts share a prefill program.

Tokens that are few cost no more than the weights they wait for, so pieces of the smallest chunk,
of one prompt or of several, go side by side as the rows of one program. Rows of one prompt may:
each layer writes the keys and values of all rows before any of them reads.
"""

import itertools
from collections.abc import Iterable, Iterator
from collections.abc import Sequence as Items
from typing import NamedTuple

from jaxinfer.config import EngineConfig
from jaxinfer.host.plan import CHUNK_OVERHEAD, Chunk, chunk_size


class Prefill(NamedTuple):
    """One prefill program of a step and what goes into its first rows; the others are inert."""

    rows: int
    size: int  # tokens of each row
    chunks: tuple[Chunk, ...]

    @property
    def num_tokens(self) -> int:
        """That it computes, padding included."""
        return self.rows * self.size

    @property
    def sampled(self) -> tuple[int, ...]:
        """The rows whose token is kept."""
        return tuple(row for row, chunk in enumerate(self.chunks) if chunk.is_last)


def prefills(chunks: Items[Chunk], config: EngineConfig) -> Iterator[Prefill]:
    """The programs of a plan's chunks, in their order: neighbours of the smallest size share."""
    smallest = config.prefill_chunks[0]
    for is_small, neighbours in itertools.groupby(chunks, key=lambda chunk: chunk.size == smallest):
        left = tuple(neighbours)
        while left:
            rows = _rows(len(left), config) if is_small else 1
            yield Prefill(rows, left[0].size, left[:rows])
            left = left[rows:]


def arrange(chunks: Items[Chunk], config: EngineConfig) -> tuple[Chunk, ...]:
    """The same tokens, in the order and the pieces that take the least work.

    As they come, where that is no more; else those that have a program to themselves first and
    then the small ones beside each other, so that what is left of a prompt follows its beginning.
    Where it pays, a chunk with a piece of padding or more is cut up and joins the small ones.
    """
    given, smallest = tuple(chunks), config.prefill_chunks[0]
    if len(given) < 2 or config.prefill_row_counts == (1,):
        return given
    pieces = itertools.chain.from_iterable(_cut(chunk, smallest) for chunk in given)
    ways = (given, _small_last(given, smallest), _small_last(pieces, smallest))
    return min(ways, key=lambda way: _work(way, config))


def _rows(num_pieces: int, config: EngineConfig) -> int:
    """The rows of the first of those programs that take so many pieces with the least work."""
    size = config.prefill_chunks[0]
    sizes = tuple(rows * size for rows in config.prefill_row_counts)
    return chunk_size(num_pieces * size, sizes) // size


def _work(chunks: Items[Chunk], config: EngineConfig) -> int:
    """Of the programs of these chunks, in tokens."""
    return sum(one.num_tokens + CHUNK_OVERHEAD for one in prefills(chunks, config))


def _small_last(chunks: Iterable[Chunk], smallest: int) -> tuple[Chunk, ...]:
    return tuple(sorted(chunks, key=lambda chunk: chunk.size == smallest))


def _cut(chunk: Chunk, size: int) -> Iterator[Chunk]:
    """A chunk in pieces of this size; whole where none of them would be padding alone."""
    size = size if chunk.size - chunk.length >= size else chunk.size
    for start in range(0, chunk.length, size):
        length = min(size, chunk.length - start)
        is_last = chunk.is_last and start + length == chunk.length
        yield Chunk(chunk.sequence, chunk.start + start, length, size, is_last)
