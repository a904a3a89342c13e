"""What an engine's steps hold that nobody asked for: padding, and ends of pages."""

from jaxinfer.config import EngineConfig
from jaxinfer.host.live import Live
from jaxinfer.host.plan import Plan
from jaxinfer.host.prefills import prefills
from jaxinfer.host.sequence import Sequence


class Tally:
    """Counts every step of an engine that it is the observer of."""

    def __init__(self, config: EngineConfig) -> None:
        self._config = config
        self._live: dict[int, Sequence] = {}
        self.num_steps = 0
        self.num_prefill_tokens = 0
        self.num_padded_tokens = 0
        """The same with the padding of their programs."""
        self.num_decodes = 0
        self.num_rows = 0
        """The same with the rows that are inert."""
        self.num_stored = 0
        """Tokens in pages, summed over sequences and steps."""
        self.num_room = 0
        """Tokens that those pages hold."""

    @property
    def page_waste(self) -> float:
        """Share of the tokens' places in owned pages that are empty."""
        return 1 - self.num_stored / self.num_room if self.num_room else 0.0

    @property
    def prefill_padding(self) -> float:
        """Share of what prefill programs compute that is padding."""
        return 1 - self.num_prefill_tokens / self.num_padded_tokens if self.num_padded_tokens else 0

    @property
    def decode_padding(self) -> float:
        """Share of the rows of decode programs that are inert."""
        return 1 - self.num_decodes / self.num_rows if self.num_rows else 0.0

    def submitted(self, live: Live, /) -> None:
        """A request came."""
        self._live[live.sequence.order] = live.sequence

    def dispatched(self, plan: Plan, began_s: float, /) -> None:
        """A step began; what it will have stored counts."""
        self.num_steps += 1
        self.num_prefill_tokens += sum(chunk.length for chunk in plan.chunks)
        self.num_padded_tokens += sum(
            prefill.num_tokens for prefill in prefills(plan.chunks, self._config)
        )
        if plan.decodes:
            count = len(plan.decodes)
            self.num_decodes += count
            self.num_rows += next(rows for rows in self._config.row_counts if rows >= count)
        for sequence in self._live.values():
            if sequence.slot is not None:
                self.num_stored += sequence.num_stored
                self.num_room += len(sequence.pages) * self._config.cache.page_size

    def returned(self, now_s: float, /) -> None:
        """A step returned."""

    def ended(self, live: Live, /) -> None:
        """A request ended."""
        self._live.pop(live.sequence.order, None)

    def failed(self, now_s: float, /) -> None:
        """A step failed."""
