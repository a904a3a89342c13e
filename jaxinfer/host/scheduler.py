"""The scheduler: plan reads, begin and commit write; no clock, no randomness, no device.

One engine step runs some prefill chunks and then one decode of every sequence that can take one.

    plan()                     what to run next, given what is under way
    begin(plan)                books it: slots, pages, stored and pending tokens
    retire(plan, tokens)       the step has returned: its full pages may be shared
    commit(sequence, token)    a sampled token is known: extends or finishes its sequence

With overlap, plan and begin of step n+1 come before retire and commit of step n.
"""

import bisect
from collections.abc import Sequence as Items

from jaxinfer.config import EngineConfig
from jaxinfer.host.pages import PagePool
from jaxinfer.host.plan import Admission, Chunk, Plan, Stored
from jaxinfer.host.prefix import PrefixCache
from jaxinfer.host.request import FinishReason, Request
from jaxinfer.host.sequence import Sequence


class Scheduler:
    """First come, first served within a priority, into a fixed number of slots."""

    def __init__(
        self, config: EngineConfig, *, eos_token_ids: tuple[int, ...] = (), model: str = ""
    ) -> None:
        self.config = config
        self.pool = PagePool(config.num_pages)
        self.prefix = PrefixCache(self.pool, page_size=config.cache.page_size, namespace=model)
        self.waiting: list[Sequence] = []  # by rank
        self.slots: list[Sequence | None] = [None] * config.num_slots
        self.num_preemptions = 0
        self._eos = frozenset(eos_token_ids)
        self._num_arrived = 0

    @property
    def running(self) -> list[Sequence]:
        """The sequences that hold a slot, first in line first."""
        held = (sequence for sequence in self.slots if sequence is not None)
        return sorted(held, key=lambda sequence: sequence.rank)

    def add(self, request: Request) -> Sequence:
        """Puts a request into the line."""
        sequence = Sequence(order=self._num_arrived, request=request)
        self._num_arrived += 1
        bisect.insort(self.waiting, sequence, key=lambda waiting: waiting.rank)
        return sequence

    def overdue(self, now_s: float) -> list[Sequence]:
        """The sequences whose deadline has passed, by rank."""
        live = [*self.running, *self.waiting]
        return [
            sequence
            for sequence in live
            if sequence.request.deadline_s is not None and sequence.request.deadline_s <= now_s
        ]

    def plan(self) -> Plan:
        """Decides the next step: every decode, then prefill work up to the bound.

        The first in line gets what it needs; where pages run out, the last in line is preempted.
        """
        draft = _Draft(self)
        for sequence in self.running:
            if not sequence.is_prefilling and self.can_extend(sequence, sequence.num_outputs):
                draft.decode(sequence)
        for sequence in self.running:
            if sequence.is_prefilling:
                draft.prefill(sequence, start=sequence.num_stored)
        for sequence in self.waiting:
            if not draft.admit(sequence):
                break
        return draft.finished()

    def begin(self, plan: Plan) -> None:
        """Books a plan: from here on its effects count as done."""
        for sequence in plan.preempt:
            self._preempt(sequence)
        for admission in plan.admit:
            self._admit(admission)
        live = {sequence.order: sequence for sequence in self.running}
        for order, count in plan.num_pages.items():
            pages = live[order].pages
            pages.extend(self.pool.take(count - len(pages)))
        for chunk in plan.chunks:
            chunk.sequence.num_stored = chunk.start + chunk.length
            chunk.sequence.num_pending += chunk.is_last
        for sequence in plan.decodes:
            sequence.num_stored += 1
            sequence.num_pending += 1

    def retire(self, plan: Plan, tokens: Items[int]) -> None:
        """The step has returned with these tokens: what it wrote may be shared from now on.

        Pages are published once a finite token shows that all before it was finite, so those of a
        long prompt with its first token.
        """
        broken = [one for one, token in zip(plan.sampled, tokens, strict=True) if token < 0]
        for sequence, num_stored, num_preemptions in plan.stored:
            is_held = sequence.finish_reason is None and sequence.slot is not None
            if is_held and sequence.num_preemptions == num_preemptions and sequence not in broken:
                sequence.num_written = num_stored
                if sequence in plan.sampled:
                    self._publish(sequence)

    def commit(self, sequence: Sequence, token: int) -> bool:
        """Takes in one sampled token, in the order of plan.sampled; False where it doesn't count.

        A token of a sequence that has ended meanwhile is dropped. A negative token means that the
        row's logits were not finite: that sequence ends with ERROR.
        """
        if sequence.finish_reason is not None:
            return False
        sequence.num_pending -= 1
        if token < 0:
            self.prefix.forget(sequence.pages)
            self.finish(sequence, FinishReason.ERROR)
            return False
        sequence.tokens.append(token)
        reason = self._end_of(sequence, token)
        if reason is not None:
            self.finish(sequence, reason)
        return True

    def finish(self, sequence: Sequence, reason: FinishReason) -> None:
        """Ends a sequence now: its slot and pages are free for the next plan.

        A step under way may still write to those pages; whoever gets them writes later.
        """
        sequence.finish_reason = reason
        if sequence.slot is None:
            self.waiting.remove(sequence)
        self._free(sequence)

    def restart(self) -> None:
        """Sends every running sequence back to the line: what was under way is lost."""
        for sequence in self.running:
            sequence.num_pending = 0
            self._preempt(sequence)
        for sequence in self.waiting:
            sequence.num_pending = 0
        self.prefix.flush()

    def check_integrity(self) -> None:
        """Asserts that pages, slots and lines add up."""
        running = self.running
        owned = [page for sequence in running for page in sequence.pages]
        self.pool.check_integrity(owned, self.prefix.pages)
        for slot, sequence in enumerate(self.slots):
            assert sequence is None or sequence.slot == slot
        for sequence in self.waiting:
            assert sequence.slot is None and not sequence.pages and not sequence.num_stored
        for sequence in [*running, *self.waiting]:
            assert sequence.finish_reason is None
        for sequence in running:
            held = len(sequence.pages) * self.config.cache.page_size
            assert sequence.num_stored <= held, f"{sequence.num_stored} tokens in {held} places"
            assert sequence.num_written <= sequence.num_stored

    def can_extend(self, sequence: Sequence, num_outputs: int) -> bool:
        """Whether the sequence may get one more token after `num_outputs`."""
        limit = sequence.request.sampling.max_tokens
        room = self.config.max_seq_len - len(sequence.request.prompt)
        return num_outputs < (room if limit is None else min(limit, room))

    def _end_of(self, sequence: Sequence, token: int) -> FinishReason | None:
        sampling = sequence.request.sampling
        num_outputs = len(sequence.tokens) - len(sequence.request.prompt)
        if token in self._eos and not sampling.ignore_eos:
            return FinishReason.EOS
        if token in sampling.stop_token_ids:
            return FinishReason.STOP_TOKEN
        if sampling.max_tokens is not None and num_outputs >= sampling.max_tokens:
            return FinishReason.LENGTH
        if len(sequence.tokens) >= self.config.max_seq_len:
            return FinishReason.CONTEXT
        return None

    def cached_pages(self, sequence: Sequence) -> tuple[int, ...]:
        """The known pages that the sequence can begin with; its last token is always stored anew.

        They end at a multiple of `prefix_step`, so that the chunks after them begin at an edge.
        """
        if not (self.config.cache.prefix and sequence.request.use_prefix_cache):
            return ()
        step, size = self.config.prefix_step, self.config.cache.page_size
        pages = self.prefix.match(sequence.tokens, self._digests(sequence))
        num_tokens = min(len(pages) * size, len(sequence.tokens) - 1) // step * step
        return tuple(pages[: num_tokens // size])

    def _admit(self, admission: Admission) -> None:
        sequence, slot, shared = admission
        self.waiting.remove(sequence)
        self.slots[slot] = sequence
        self.pool.share(shared)
        num_shared = len(shared) * self.config.cache.page_size
        sequence.slot = slot
        sequence.pages = list(shared)
        sequence.num_to_prefill = len(sequence.tokens)
        sequence.num_stored = sequence.num_written = num_shared
        sequence.num_published = len(shared)
        if not sequence.num_preemptions:
            sequence.num_cached = num_shared
            self.prefix.count(queried=len(sequence.tokens), hits=num_shared)

    def _publish(self, sequence: Sequence) -> None:
        """Offers the sequence's full, written pages to the prefix cache."""
        if not (self.config.cache.prefix and sequence.request.use_prefix_cache):
            return
        size = self.config.cache.page_size
        num_full = min(sequence.num_written, len(sequence.tokens)) // size
        if num_full == sequence.num_published:
            return
        digests = self._digests(sequence)
        for place in range(sequence.num_published, num_full):
            tokens = sequence.tokens[place * size : (place + 1) * size]
            self.prefix.publish(sequence.pages[place], tokens, digests[place])
        sequence.num_published = num_full

    def _digests(self, sequence: Sequence) -> list[bytes]:
        if len(sequence.digests) < len(sequence.tokens) // self.config.cache.page_size:
            sequence.digests = self.prefix.digests(
                sequence.tokens, salt=sequence.request.salt, done=sequence.digests
            )
        return sequence.digests

    def _preempt(self, sequence: Sequence) -> None:
        """Back to the line; its tokens are kept and stored anew when its turn comes."""
        self._free(sequence)
        sequence.num_stored = sequence.num_written = sequence.num_published = 0
        sequence.num_preemptions += 1
        self.num_preemptions += 1
        bisect.insort(self.waiting, sequence, key=lambda waiting: waiting.rank)

    def _free(self, sequence: Sequence) -> None:
        self.pool.release(sequence.pages)
        sequence.pages = []
        if sequence.slot is not None:
            self.slots[sequence.slot] = None
            sequence.slot = None


class _Draft:
    """A plan in the making: what it would leave free, without touching the scheduler."""

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler
        self._config = scheduler.config
        self._running = scheduler.running
        self._free_pages = scheduler.pool.num_available
        self._revived: list[int] = []  # idle pages that an admission takes over
        self._free_slots = [slot for slot, held in enumerate(scheduler.slots) if held is None]
        self._prefill_budget = scheduler.config.max_prefill_tokens
        self._preempt: list[Sequence] = []
        self._admit: list[Admission] = []
        self._chunks: list[Chunk] = []
        self._decodes: list[Sequence] = []
        self._num_pages: dict[int, int] = {}

    def decode(self, sequence: Sequence) -> None:
        """One more token for a sequence, if the pages for it can be had."""
        if sequence not in self._preempt and self._hold(sequence, sequence.total_len):
            self._decodes.append(sequence)

    def prefill(self, sequence: Sequence, *, start: int) -> None:
        """The next chunks of a sequence that holds a slot, as far as the bound allows."""
        while start < len(sequence.tokens) and sequence not in self._preempt:
            chunk = self._chunk(sequence, start)
            if not self._has_budget(chunk.size) or not self._hold(sequence, start + chunk.length):
                return
            self._prefill_budget -= chunk.size
            self._chunks.append(chunk)
            start += chunk.length
        if start == len(sequence.tokens):
            self._decode_at_once(sequence)

    def admit(self, sequence: Sequence) -> bool:
        """A slot for the first in line, if its tokens fit beside all others; else nobody's turn."""
        if self._preempt or sequence.num_pending or not self._free_slots:
            return False
        shared = self._scheduler.cached_pages(sequence)
        start = len(shared) * self._config.cache.page_size
        is_idle = self._scheduler.pool.is_idle
        revived = [page for page in shared if is_idle(page) and page not in self._revived]
        needed = self._pages_for(len(sequence.tokens) + 1) - len(shared) + len(revived)
        if needed > self._free_pages or not self._has_budget(self._chunk(sequence, start).size):
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
            chunks=tuple(self._chunks),
            decodes=tuple(self._decodes),
            num_pages=self._num_pages,
            stored=self._stored(),
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
        if self._scheduler.can_extend(sequence, outputs) and grown <= self._free_pages:
            self._hold(sequence, total_len)
            self._decodes.append(sequence)

    def _chunk(self, sequence: Sequence, start: int) -> Chunk:
        """The chunk at `start`: its edges depend on the sequence's tokens alone."""
        left = len(sequence.tokens) - start
        sizes = self._config.prefill_chunks
        size = next((size for size in sizes if size >= left), sizes[-1])
        return Chunk(sequence, start, min(left, size), size, left <= size)

    def _has_budget(self, size: int) -> bool:
        return not self._chunks or size <= self._prefill_budget

    def _hold(self, sequence: Sequence, num_tokens: int) -> bool:
        """Books pages for that many tokens, preempting from the end of the line as needed."""
        wanted = self._pages_for(num_tokens)
        while wanted - self._pages_held(sequence) > self._free_pages:
            later = [one for one in self._running if one.rank > sequence.rank]
            victims = [one for one in later if one not in self._preempt and self._can_lose(one)]
            if not victims:
                return False
            self._drop(max(victims, key=lambda one: one.rank))
        if wanted > self._pages_held(sequence):
            self._free_pages -= wanted - self._pages_held(sequence)
            self._num_pages[sequence.order] = wanted
        return True

    def _can_lose(self, sequence: Sequence) -> bool:
        return sequence.slot is not None and bool(sequence.pages)

    def _drop(self, victim: Sequence) -> None:
        self._preempt.append(victim)
        own = [page for page in victim.pages if self._scheduler.pool.num_owners(page) == 1]
        self._free_pages += self._pages_held(victim) - len(victim.pages) + len(own)
        self._num_pages.pop(victim.order, None)
        self._chunks = [chunk for chunk in self._chunks if chunk.sequence is not victim]
        self._decodes = [sequence for sequence in self._decodes if sequence is not victim]

    def _pages_held(self, sequence: Sequence) -> int:
        return self._num_pages.get(sequence.order, len(sequence.pages))

    def _pages_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self._config.cache.page_size)
