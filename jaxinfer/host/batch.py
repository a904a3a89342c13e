"""Plans into arrays: what the device is told about each row."""

import numpy as np

from jaxinfer.config import EngineConfig
from jaxinfer.host.plan import Plan
from jaxinfer.host.prefills import Prefill
from jaxinfer.host.sequence import Sequence
from jaxinfer.inputs import inert_batch, pack, unpack


class SlotTable:
    """One packed row a slot, kept up to date, so that a step's batch is a gather of rows."""

    def __init__(self, config: EngineConfig, *, eos_token_ids: tuple[int, ...] = ()) -> None:
        self._config = config
        self._eos = eos_token_ids
        self._trash_slot = config.num_slots
        rows = inert_batch(
            config.num_slots + 1,
            1,
            pages_per_seq=config.pages_per_seq,
            trash_slot=config.num_slots,
            trash_page=config.num_pages,
        )
        rows.slots[:] = np.arange(config.num_slots + 1)
        for field in (rows.take_last, rows.lengths, rows.sample):
            field[: config.num_slots] = 1
        self._packed = pack(rows)
        self._fields = unpack(self._packed, tokens=1)

    def update(self, plan: Plan) -> None:
        """Takes over slots and pages of a plan that is booked."""
        for admission in plan.admit:
            self.admit(admission.sequence)
        for stored in plan.stored:
            if stored.sequence.order in plan.num_pages:
                self.grow(stored.sequence)

    def admit(self, sequence: Sequence) -> None:
        """Sets the row of a sequence that has just got its slot."""
        slot, sampling = sequence.slot, sequence.request.sampling
        self._fields.temperature[slot] = sampling.temperature
        self._fields.top_k[slot] = sampling.top_k
        self._fields.top_p[slot] = sampling.top_p
        self._fields.min_p[slot] = sampling.min_p
        seed = sampling.seed or 0
        self._fields.seed[slot] = (seed & 0xFFFFFFFF, seed >> 32)
        self._fields.page_table[slot] = self._config.num_pages
        self._fields.banned[slot] = -1

    def grow(self, sequence: Sequence) -> None:
        """Takes over the pages that a sequence holds now."""
        self._fields.page_table[sequence.slot, : len(sequence.pages)] = sequence.pages

    def prefill(self, prefill: Prefill) -> np.ndarray:
        """The packed batch of one prefill program: i32 [rows, W]."""
        slots = np.full(prefill.rows, self._trash_slot)
        for row, chunk in enumerate(prefill.chunks):
            sequence = chunk.sequence
            slots[row] = sequence.slot
            self._ban(sequence, len(sequence.tokens) - len(sequence.request.prompt))
        known = self._packed[slots, 1:]
        packed = np.zeros((prefill.rows, prefill.size + known.shape[1]), np.int32)
        packed[:, prefill.size :] = known
        fields = unpack(packed, tokens=prefill.size)
        fields.take_last[:] = 0
        for row, chunk in enumerate(prefill.chunks):
            end = chunk.start + chunk.length
            fields.tokens[row, : chunk.length] = chunk.sequence.tokens[chunk.start : end]
            fields.starts[row] = chunk.start
            fields.lengths[row] = chunk.length
            fields.sample[row] = chunk.is_last
        return packed

    def decode(self, sequences: tuple[Sequence, ...]) -> np.ndarray:
        """The packed batch of one decode of these sequences: i32 [rows, W].

        Called once they are booked: each stores its last token but one pending.
        """
        count = len(sequences)
        rows = next(rows for rows in self._config.row_counts if rows >= count)
        slots = np.full(rows, self._trash_slot)
        slots[:count] = [sequence.slot for sequence in sequences]
        for sequence in sequences:
            self._ban(sequence, sequence.num_outputs - 1)
        packed = self._packed[slots]
        fields = unpack(packed, tokens=1)
        fields.starts[:count] = [sequence.num_stored - 1 for sequence in sequences]
        return packed

    def _ban(self, sequence: Sequence, num_outputs: int) -> None:
        """Forbids end tokens where fewer than min_tokens come before the one to sample."""
        sampling = sequence.request.sampling
        if not sampling.min_tokens:
            return
        banned = self._fields.banned[sequence.slot]
        banned[:] = -1
        if num_outputs < sampling.min_tokens:
            ends = {*sampling.stop_token_ids, *(() if sampling.ignore_eos else self._eos)}
            banned[: len(ends)] = sorted(ends)
