"""A plan in the making: who gets pages, who waits, and who has to give way."""

import math
from collections.abc import Callable, Collection, Mapping
from collections.abc import Sequence as Items

from jaxinfer.config import EngineConfig
from jaxinfer.host.pages import PagePool
from jaxinfer.host.plan import Admission, Chunk, HeldUp, Plan, Stored, chunk_size, worth_a_step
from jaxinfer.host.prefills import arrange
from jaxinfer.host.sequence import Sequence
from jaxinfer.host.tenancy import Standing


class Draft:
    """Collects a plan and what it would leave free; only reads what it is given.

    `cached_pages` says which known pages a sequence could begin with, `num_soon_cached` how many
    tokens once the steps under way have returned, `prefill_debt` is what decode steps have yet to
    make up for by tenant. Of several tenants those that have their share, by their `standing`,
    leave room for the others: they wait for what is `under_way` of theirs.
    """

    def __init__(
        self,
        config: EngineConfig,
        pool: PagePool,
        slots: Items[Sequence | None],
        *,
        cached_pages: Callable[[Sequence], tuple[int, ...]],
        num_soon_cached: Callable[[Sequence], int],
        prefill_debt: Mapping[str, int],
        under_way: Collection[str] = (),
        standing: Standing,
    ) -> None:
        self._config = config
        self._pool = pool
        self._cached_pages = cached_pages
        self._num_soon_cached = num_soon_cached
        self._prefill_debt = prefill_debt
        self._under_way = under_way
        self._standing = standing
        self._is_held = False  # no prefill from here on
        self._paused: list[Sequence] = []  # for decodes, in line
        self._running = [sequence for sequence in slots if sequence is not None]
        self._is_static = config.batching == "static"
        self._is_closed = self._is_static and bool(self._running)  # until all have ended
        self._free_pages = pool.num_available
        self._revived: list[int] = []  # idle pages that an admission takes over
        self._free_slots = [slot for slot, held in enumerate(slots) if held is None]
        self._prefill_budget = config.max_prefill_tokens
        self._preempt: list[Sequence] = []
        self._gainers: list[Sequence] = []
        self._held_up: HeldUp = ""
        self._admit: list[Admission] = []
        self._chunks: list[Chunk] = []
        self._decodes: list[Sequence] = []
        self._num_pages: dict[int, int] = {}

    def decode(self, sequence: Sequence) -> None:
        """One more token for a sequence, if it may get one and the pages for it can be had."""
        if sequence in self._preempt or not self._can_extend(sequence, sequence.num_outputs):
            return
        if self._hold(sequence, sequence.total_len):
            self._decodes.append(sequence)

    def must_pause(self, sequence: Sequence) -> bool:
        """Whether a long prompt, between two chunks, leaves this step to earlier sequences.

        Those of other tenants are earlier by their turn only: who comes back after a while begins
        at the oldest turn, and does not make up for what others prefilled.
        """
        if self._must_leave_room(sequence):
            return True
        if self._prefill_debt.get(sequence.tenant, 0) <= self._config.prefill_per_decode:
            return False
        if not any(_goes_before(decode, sequence) for decode in self._decodes):
            return False
        self._paused.append(sequence)
        return True

    def go_on(self, sequence: Sequence) -> None:
        """The next chunks of a sequence that need not pause."""
        self._wake(sequence)
        self.prefill(sequence, start=sequence.num_stored)

    def _wake(self, sequence: Sequence) -> None:
        """A pause is for decodes: it ends where the chunk of another tenant's would fill it."""
        while self._standing.served and self._paused:
            if self._paused[0].tenant == sequence.tenant:
                return
            paused = self._paused.pop(0)
            self.prefill(paused, start=paused.num_stored)

    def _must_leave_room(self, sequence: Sequence) -> bool:
        """Whether a tenant has a chunk under way: its next one waits until that has returned.

        And so do all behind it. Who comes now then finds one step with a chunk before its own, not
        two: the one under way and the one behind that.
        """
        if sequence.tenant in self._under_way and self._standing.has_its_share(sequence):
            self._is_held = True
        return self._is_held

    def _must_leave_slots(self, sequence: Sequence) -> bool:
        """Whether what slots are free are for tenants that have not got their share."""
        is_kept = len(self._free_slots) <= self._standing.num_kept
        return is_kept and self._standing.has_its_slots(sequence)

    def prefill(self, sequence: Sequence, *, start: int) -> None:
        """The next chunks of a sequence that holds a slot, as far as the bound allows."""
        while start < len(sequence.tokens) and sequence not in self._preempt:
            chunk = self._chunk(sequence, start)
            if not self._has_budget(chunk) or not self._hold(sequence, start + chunk.length):
                return
            self._prefill_budget -= chunk.size
            self._chunks.append(chunk)
            start += chunk.length
        if start == len(sequence.tokens):
            self._decode_at_once(sequence)

    def admit(self, sequence: Sequence) -> bool:
        """A slot for the first in line, if its tokens fit beside all others; else nobody's turn."""
        if self._preempt or sequence.num_pending or not self._free_slots or self._is_closed:
            is_full = not self._free_slots or self._is_closed
            self._held_up = "slot" if is_full else "pages" if self._preempt else "step"
            return False
        if self._must_leave_room(sequence) or self._must_leave_slots(sequence):
            self._held_up = "prefill" if self._is_held else "slot"
            return False
        self._wake(sequence)
        shared = self._cached_pages(sequence)
        start = len(shared) * self._config.cache.page_size
        if self._num_soon_cached(sequence) - start >= worth_a_step(self._config):
            self._held_up = "prefix"
            return False
        is_idle = self._pool.is_idle
        revived = [page for page in shared if is_idle(page) and page not in self._revived]
        needed = self._pages_for(len(sequence.tokens) + 1) - len(shared) + len(revived)
        if needed > self._free_pages or not self._has_budget(self._chunk(sequence, start)):
            self._held_up = "pages" if needed > self._free_pages else "prefill"
            return False
        self._admit.append(Admission(sequence, self._free_slots.pop(0), shared))
        self._running.append(sequence)
        self._revived += revived
        self._free_pages -= len(revived)
        self._num_pages[sequence.order] = len(shared)
        self.prefill(sequence, start=start)
        return True

    def finished(self) -> Plan:
        """The plan."""
        return Plan(
            preempt=tuple(self._preempt),
            admit=tuple(self._admit),
            chunks=arrange(self._chunks, self._config),
            decodes=tuple(self._decodes),
            num_pages=self._num_pages,
            stored=self._stored(),
            held_up=self._held_up,
            gainers=tuple(self._gainers),
            is_waited_for=bool(self._standing.served),
        )

    def _stored(self) -> tuple[Stored, ...]:
        ends = {chunk.sequence.order: chunk.start + chunk.length for chunk in self._chunks}
        touched = {chunk.sequence.order: chunk.sequence for chunk in self._chunks}
        for sequence in self._decodes:
            touched[sequence.order] = sequence
            ends[sequence.order] = ends.get(sequence.order, sequence.num_stored) + 1
        return tuple(
            Stored(sequence, ends[order], sequence.num_preemptions)
            for order, sequence in touched.items()
        )

    def _decode_at_once(self, sequence: Sequence) -> None:
        """The token sampled by a last chunk goes into the decode of the same step, if it fits."""
        outputs = sequence.num_outputs + 1
        total_len = len(sequence.tokens) + 1
        grown = self._pages_for(total_len) - self._pages_held(sequence)
        if self._can_extend(sequence, outputs) and grown <= self._free_pages:
            self._hold(sequence, total_len)
            self._decodes.append(sequence)

    def _can_extend(self, sequence: Sequence, num_outputs: int) -> bool:
        """Whether the sequence may get one more token after `num_outputs`."""
        limit = sequence.request.sampling.max_tokens
        room = self._config.max_seq_len - len(sequence.request.prompt)
        return num_outputs < (room if limit is None else min(limit, room))

    def _chunk(self, sequence: Sequence, start: int) -> Chunk:
        """The chunk at `start`: its edges depend on the tokens, and on whether others lack room."""
        left = len(sequence.tokens) - start
        sizes = self._config.prefill_chunks
        size = chunk_size(left, sizes)
        if self._standing.has_its_share(sequence):
            size = min(size, chunk_size(self._config.shared_prefill_tokens, sizes))
        return Chunk(sequence, start, min(left, size), size, left <= size)

    def _has_budget(self, chunk: Chunk) -> bool:
        """Whether the step has room for it; whose tenant has its share joins no other's chunk."""
        if self._is_static or not self._chunks:
            return True
        if self._standing.has_its_share(chunk.sequence):
            booked = sum(one.size for one in self._chunks)
            is_own = all(one.sequence.tenant == chunk.sequence.tenant for one in self._chunks)
            if not is_own or booked + chunk.size > self._config.shared_prefill_tokens:
                return False
        return chunk.size <= self._prefill_budget

    def _hold(self, sequence: Sequence, num_tokens: int) -> bool:
        """Books pages for that many tokens; later ones in line give way as needed."""
        wanted = self._pages_for(num_tokens)
        while wanted - self._pages_held(sequence) > self._free_pages:
            later = [one for one in self._running if one.rank > sequence.rank]
            victims = [one for one in later if one not in self._preempt and self._can_lose(one)]
            if not victims:
                return False
            num_missing = wanted - self._pages_held(sequence) - self._free_pages
            self._drop(self._victim(victims, num_missing))
            self._gainers.append(sequence)
        if wanted > self._pages_held(sequence):
            self._free_pages -= wanted - self._pages_held(sequence)
            self._num_pages[sequence.order] = wanted
        return True

    def _can_lose(self, sequence: Sequence) -> bool:
        return sequence.slot is not None and bool(sequence.pages)

    def _victim(self, victims: list[Sequence], num_missing: int) -> Sequence:
        """Who gives way: of the lowest priority the last in line, or one that loses far less.

        Far less is under a third of the work: who goes out of turn holds up the line later on, and
        with a half more is lost in the end than with the last in line alone. Who has given way
        twice does so again only as the last in line.
        """
        lowest = max(one.request.priority for one in victims)
        victims = [one for one in victims if one.request.priority == lowest]
        last = max(victims, key=lambda one: one.order)
        others = [one for one in victims if one.num_preemptions < 2]
        least = min(others, key=lambda one: self._work_lost(one, num_missing), default=last)
        is_far_less = 3 * self._work_lost(least, num_missing) < self._work_lost(last, num_missing)
        return least if is_far_less else last

    def _work_lost(self, victim: Sequence, num_missing: int) -> float:
        """Tokens to store again for each page that is missing and that the victim would free.

        Pages that others hold stay known. Those that nobody else holds are counted as lost, known
        or not: where pages run out they are evicted before their owner is back.
        """
        size = self._config.cache.page_size
        num_shared = sum(self._pool.num_owners(page) > 1 for page in victim.pages)
        num_useful = min(self._num_freed(victim), num_missing)
        if not num_useful:
            return math.inf
        return max(0, victim.num_stored - num_shared * size) / num_useful

    def _num_freed(self, victim: Sequence) -> int:
        own = sum(self._pool.num_owners(page) == 1 for page in victim.pages)
        return self._pages_held(victim) - len(victim.pages) + own

    def _drop(self, victim: Sequence) -> None:
        self._preempt.append(victim)
        self._free_pages += self._num_freed(victim)
        self._num_pages.pop(victim.order, None)
        self._decodes = [sequence for sequence in self._decodes if sequence is not victim]

    def _pages_held(self, sequence: Sequence) -> int:
        return self._num_pages.get(sequence.order, len(sequence.pages))

    def _pages_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self._config.cache.page_size)


def _goes_before(one: Sequence, other: Sequence) -> bool:
    if one.tenant == other.tenant:
        return one.rank < other.rank
    return one.rank[:2] < other.rank[:2]
