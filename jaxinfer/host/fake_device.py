"""A model that shows every mix-up of pages: its next token is a hash of all that its row reads.

A page holds cells, one a token. A cell is a hash of the cell before it and of its token, as keys
and values depend on everything before them; the next token is a hash of all cells that the row's
page table leads to. So one wrong page, token, slot or length changes the text, and a cell that
nobody has written since its page was handed out is noticed at once.

The hashes are our own: Python's differ between processes and versions.
"""

import zlib
from array import array
from collections.abc import Iterable
from collections.abc import Sequence as Items
from typing import NamedTuple

from jaxinfer.config import EngineConfig
from jaxinfer.host.batch import SlotTable
from jaxinfer.host.plan import Plan
from jaxinfer.host.prefills import prefills
from jaxinfer.host.request import FinishReason, Request
from jaxinfer.host.sequence import Sequence
from jaxinfer.inputs import Batch, unpack

VOCAB_SIZE = 50
EMPTY = 0  # a cell that must not be read
NAN = 1  # what a broken row writes
_ROOT = 17
_BROKEN_TOKEN = -1
_MASK = 2**61 - 1


class Row(NamedTuple):
    """What one row of a step is told."""

    slot: int
    start: int
    tokens: tuple[int, ...] | None  # None takes the slot's last sampled token
    pages: tuple[int, ...]
    is_sampled: bool
    seed: int
    banned: frozenset[int]

    @property
    def length(self) -> int:
        """Tokens that the row stores."""
        return 1 if self.tokens is None else len(self.tokens)


class Solo(NamedTuple):
    """What a request gets when it is alone."""

    tokens: tuple[int, ...]
    reason: FinishReason
    cells: tuple[int, ...]  # of its prompt and its tokens


class FakeDevice:
    """The pages of one pool, and the last token of each slot."""

    def __init__(self, config: EngineConfig, *, key: int = 0) -> None:
        self.page_size = config.cache.page_size
        self.key = key
        self.cells: list[int] = [EMPTY] * (config.num_pages * self.page_size)
        self.last: list[int] = [0] * (config.num_slots + 1)

    def run(self, row: Row, *, is_broken: bool = False) -> int:
        """Stores the row's tokens and returns the next one; negative where it is broken."""
        size, end = self.page_size, row.start + row.length
        places = [row.pages[at // size] * size + at % size for at in range(end)]
        read = [self.cells[place] for place in places[: row.start]]
        assert EMPTY not in read, f"row of slot {row.slot} reads a cell that nobody has written"
        tokens = (self.last[row.slot],) if row.tokens is None else row.tokens
        is_broken = is_broken or NAN in read
        cell = read[-1] if read else _ROOT
        for token, place in zip(tokens, places[row.start :], strict=True):
            cell = NAN if is_broken else _cell(cell, token)
            self.cells[place] = cell
            read.append(cell)
        token = _BROKEN_TOKEN if is_broken else next_token(read, row=row, key=self.key)
        if row.is_sampled:
            self.last[row.slot] = max(token, 0)
        return token

    def empty(self, pages: Iterable[int]) -> None:
        """Makes pages unreadable until they are written again."""
        size = self.page_size
        for page in pages:
            self.cells[page * size : (page + 1) * size] = [EMPTY] * size

    def places(self, row: Row) -> list[int]:
        """The cells that a row writes."""
        size, end = self.page_size, row.start + row.length
        return [row.pages[at // size] * size + at % size for at in range(row.start, end)]


def next_token(cells: Items[int], *, row: Row, key: int) -> int:
    """The token after these cells, as this row's seed and bans have it."""
    return _token(cells, seed=row.seed, banned=row.banned, key=key)


def solo(request: Request, config: EngineConfig, *, eos: frozenset[int], key: int) -> Solo:
    """The whole answer to a request, by the definition of the model and of the finish reasons."""
    sampling, cell = request.sampling, _ROOT
    cells: list[int] = []
    for token in request.prompt:
        cell = _cell(cell, token)
        cells.append(cell)
    limit = config.max_seq_len - len(request.prompt)
    if sampling.max_tokens is not None:
        limit = min(limit, sampling.max_tokens)
    tokens: list[int] = []
    while True:
        banned = _banned(request, len(tokens), eos=eos)
        token = _token(cells, seed=sampling.seed or 0, banned=banned, key=key)
        cell = _cell(cell, token)
        cells.append(cell)
        tokens.append(token)
        reason = None
        if len(tokens) == limit:
            reached = len(tokens) == sampling.max_tokens
            reason = FinishReason.LENGTH if reached else FinishReason.CONTEXT
        if str(token) in sampling.stop:
            reason = FinishReason.STOP_STRING
        if token in sampling.stop_token_ids:
            reason = FinishReason.STOP_TOKEN
        if token in eos and not sampling.ignore_eos:
            reason = FinishReason.EOS
        if reason is not None:
            return Solo(tuple(tokens), reason, tuple(cells))


def plain_rows(plan: Plan, *, eos: frozenset[int]) -> list[tuple[Sequence, Row]]:
    """The rows of a plan, straight from its sequences."""
    rows: list[tuple[Sequence, Row]] = []
    for chunk in plan.chunks:
        tokens = tuple(chunk.sequence.tokens[chunk.start : chunk.start + chunk.length])
        rows.append((chunk.sequence, _row(chunk.sequence, chunk.start, tokens, chunk.is_last, eos)))
    for sequence in plan.decodes:
        rows.append((sequence, _row(sequence, sequence.num_stored - 1, None, True, eos)))
    return rows


def packed_rows(table: SlotTable, plan: Plan, config: EngineConfig) -> list[tuple[Sequence, Row]]:
    """The rows of a plan as the real programs get them: through the packed batches."""
    table.update(plan)
    rows: list[tuple[Sequence, Row]] = []
    for prefill in prefills(plan.chunks, config):
        batch = unpack(table.prefill(prefill), tokens=prefill.size)
        assert not batch.lengths[len(prefill.chunks) :].any(), "a row of padding is not inert"
        for place, chunk in enumerate(prefill.chunks):
            rows.append((chunk.sequence, _unpacked(batch, place)))
    if plan.decodes:
        batch = unpack(table.decode(plan.decodes), tokens=1)
        assert not batch.lengths[len(plan.decodes) :].any(), "a row of padding is not inert"
        for place, sequence in enumerate(plan.decodes):
            rows.append((sequence, _unpacked(batch, place)))
    return rows


def _row(
    sequence: Sequence,
    start: int,
    tokens: tuple[int, ...] | None,
    is_sampled: bool,
    eos: frozenset[int],
) -> Row:
    end = start + (1 if tokens is None else len(tokens))
    request = sequence.request
    assert sequence.slot is not None
    return Row(
        slot=sequence.slot,
        start=start,
        tokens=tokens,
        pages=tuple(sequence.pages),
        is_sampled=is_sampled,
        seed=request.sampling.seed or 0,
        banned=_banned(request, end - len(request.prompt), eos=eos),
    )


def _unpacked(batch: Batch, place: int) -> Row:
    length = int(batch.lengths[place])
    low, high = batch.seed[place].tolist()
    return Row(
        slot=int(batch.slots[place]),
        start=int(batch.starts[place]),
        tokens=None if batch.take_last[place] else tuple(batch.tokens[place, :length].tolist()),
        pages=tuple(batch.page_table[place].tolist()),
        is_sampled=bool(batch.sample[place]),
        seed=low | high << 32,
        banned=frozenset(batch.banned[place].tolist()) - {-1},
    )


def _banned(request: Request, num_outputs: int, *, eos: frozenset[int]) -> frozenset[int]:
    """The end tokens that may not come yet."""
    sampling = request.sampling
    if num_outputs >= (sampling.min_tokens or 0):
        return frozenset()
    ends = frozenset(sampling.stop_token_ids)
    return ends if sampling.ignore_eos else ends | eos


def _cell(before: int, token: int) -> int:
    """Neither EMPTY nor NAN."""
    return ((before ^ token + 1) * 0x9E3779B97F4A7C15 >> 3) & _MASK | 2


def _token(cells: Items[int], *, seed: int, banned: frozenset[int], key: int) -> int:
    token = zlib.crc32(array("Q", (key, seed, *cells))) % VOCAB_SIZE
    while token in banned:
        token = (token + 1) % VOCAB_SIZE
    return token
