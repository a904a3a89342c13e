"""The scheduler: plan reads, begin and commit write; no clock, no randomness, no device.

One engine step runs some prefill chunks and then one decode of every sequence that can take one.

    plan()                     what to run next, given what is under way
    begin(plan)                books it: slots, pages, stored and pending tokens
    retire(plan, tokens)       a part of it has returned: its full pages may be shared
    commit(sequence, token)    a sampled token is known: extends or finishes its sequence

With overlap, plan and begin of step n+1 come before retire and commit of step n.
"""

import bisect
import heapq
from collections.abc import Callable
from collections.abc import Sequence as Items

from jaxinfer.config import EngineConfig
from jaxinfer.host.draft import Draft
from jaxinfer.host.pace import Pace
from jaxinfer.host.pages import PagePool
from jaxinfer.host.plan import Admission, Plan
from jaxinfer.host.prefix import PrefixCache
from jaxinfer.host.request import FinishReason, Request
from jaxinfer.host.sequence import Sequence
from jaxinfer.host.tenancy import Tenancy


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
        self.prefill_debt: dict[str, int] = {}  # by tenant: tokens that decodes make up for
        self.chunks_under_way: list[str] = []  # their tenants
        self.tenancy = Tenancy()
        self.num_arrived = 0
        self._eos = frozenset(eos_token_ids)

    @property
    def running(self) -> list[Sequence]:
        """The sequences that hold a slot, first in line first."""
        held = (sequence for sequence in self.slots if sequence is not None)
        return sorted(held, key=lambda sequence: sequence.rank)

    def add(self, request: Request) -> Sequence:
        """Puts a request into the line."""
        sequence = Sequence(order=self.num_arrived, request=request)
        self.num_arrived += 1
        bisect.insort(self.waiting, sequence, key=lambda waiting: waiting.rank)
        self.tenancy.asks(sequence, (*self.running, *self.waiting))
        return sequence

    def overdue(self, now_s: float, pace: Pace | None = None) -> list[Sequence]:
        """The sequences to end: their deadline has passed or, while they wait, can't be met.

        It can't where even the best pace would give them no token until then.
        """
        found: list[Sequence] = []
        for sequence in (*self.running, *self.waiting):
            deadline_s = sequence.request.deadline_s
            if deadline_s is None:
                continue
            is_late = deadline_s <= now_s
            if not is_late and pace is not None and any(pace) and sequence.slot is None:
                is_late = now_s + self._wait_s(sequence, pace) > deadline_s
            if is_late:
                found.append(sequence)
        return found

    def plan(self) -> Plan:
        """Decides the next step: every decode, then prefill work up to the bound.

        The first in line gets what it needs; where pages run out, one of those behind gives way.
        """
        running, is_open = self.running, True
        standing = self.tenancy.standing(running, self.waiting, self.config.num_slots)
        draft = Draft(
            self.config,
            self.pool,
            self.slots,
            cached_pages=self.cached_pages,
            num_soon_cached=self.num_soon_cached,
            prefill_debt=self.prefill_debt,
            under_way=self.chunks_under_way,
            standing=standing,
        )
        for sequence in running:
            if not sequence.is_prefilling:
                draft.decode(sequence)
        prefilling = [sequence for sequence in running if sequence.is_prefilling]
        for sequence in _in_turn(prefilling, self.waiting, standing.has_its_share):
            if sequence.slot is None:
                is_open = is_open and draft.admit(sequence)
            elif not draft.must_pause(sequence):
                draft.go_on(sequence)
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
        self.prefill_debt = self._debt_after(plan)
        self.chunks_under_way += [chunk.sequence.tenant for chunk in plan.chunks]

    def retire(self, plan: Plan, tokens: Items[int], first: int = 0) -> None:
        """The step has returned with these tokens, from `first` on of plan.sampled.

        What it wrote may be shared from now on. Pages are published once a finite token shows that
        all before it was finite, so those of a long prompt with its first token.
        """
        sampled = plan.sampled[first : first + len(tokens)]
        is_over = first + len(tokens) == len(plan.sampled)
        if is_over:
            del self.chunks_under_way[: len(plan.chunks)]
        broken = [one for one, token in zip(sampled, tokens, strict=True) if token < 0]
        for sequence, num_stored, num_preemptions in plan.stored:
            if not (is_over or sequence in sampled):
                continue
            is_held = sequence.finish_reason is None and sequence.slot is not None
            if is_held and sequence.num_preemptions == num_preemptions and sequence not in broken:
                is_decode_left = not is_over and sequence in plan.decodes
                sequence.num_written = num_stored - is_decode_left
                if sequence in sampled:
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
            self._preempt(sequence)
        for sequence in self.waiting:
            sequence.num_pending = 0
        self.chunks_under_way.clear()
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

    def _debt_after(self, plan: Plan) -> dict[str, int]:
        paid_back = self.config.prefill_per_decode
        if not (plan.decodes and paid_back):
            return {}
        left = {name: debt - paid_back for name, debt in self.prefill_debt.items()}
        debts = {name: debt for name, debt in left.items() if debt > 0}
        ended = [chunk.sequence for chunk in plan.chunks if chunk.is_last]
        for chunk in plan.chunks:
            is_long = chunk.sequence.num_to_prefill > self.config.prefill_chunks[-1]
            if is_long and chunk.sequence not in ended:
                name = chunk.sequence.tenant
                debts[name] = debts.get(name, 0) + chunk.size
        return debts

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

    def _wait_s(self, sequence: Sequence, pace: Pace) -> float:
        """The least time until a waiting sequence's next token, whatever happens until then.

        What nobody has stored yet has to be prefilled by somebody.
        """
        if sequence.num_pending:
            return 0.0
        num_left = max(1, len(sequence.tokens) - self._num_shareable(sequence))
        most = max(self.config.max_prefill_tokens, self.config.prefill_chunks[-1])
        return max(num_left * pace.prefill_token_s, -(-num_left // most) * pace.step_s)

    def _num_shareable(self, sequence: Sequence) -> int:
        """At most so many of its tokens are known, or stored by others who may share them."""
        if not (self.config.cache.prefix and sequence.request.use_prefix_cache):
            return 0
        size, digests = self.config.cache.page_size, self._digests(sequence)
        stored, most_begun = set[bytes](), 0
        for other in self.running:
            wrote, num_full = other.request, other.num_stored // size
            if not wrote.use_prefix_cache or wrote.salt != sequence.request.salt:
                continue
            theirs = self._digests(other)
            stored.update(theirs[:num_full])
            if num_full < len(digests) and theirs[:num_full] == digests[:num_full]:
                begun = slice(num_full * size, other.num_stored)
                pairs = zip(sequence.tokens[begun], other.tokens[begun], strict=False)
                is_same = all(mine == their for mine, their in pairs)
                most_begun = max(most_begun, is_same * (other.num_stored - num_full * size))
        known = sum(digest in stored or self.prefix.knows(digest) for digest in digests)
        return known * size + most_begun

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

    def num_soon_cached(self, sequence: Sequence) -> int:
        """Tokens that it could begin with once the last chunks under way have returned.

        Whoever stores them publishes them with a first token, which is sampled but not yet known.
        """
        if not (self.config.cache.prefix and sequence.request.use_prefix_cache):
            return 0
        digests, size, most = self._digests(sequence), self.config.cache.page_size, 0
        for other in self.running:
            wrote, num_full = other.request, min(other.num_stored, len(other.tokens)) // size
            if other.is_prefilling or num_full <= other.num_published:
                continue
            if not wrote.use_prefix_cache or wrote.salt != sequence.request.salt:
                continue
            both = zip(digests, self._digests(other)[:num_full], strict=False)
            most = max(most, sum(mine == theirs for mine, theirs in both))
        num_tokens = min(most * size, len(sequence.tokens) - 1)
        return num_tokens - num_tokens % self.config.prefix_step

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
            parent = digests[place - 1] if place else b""
            self.prefix.publish(
                sequence.pages[place],
                tokens,
                digests[place],
                parent=parent,
                salt=sequence.request.salt,
            )
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


def _in_turn(
    prefilling: list[Sequence], waiting: list[Sequence], has_its_share: Callable[[Sequence], bool]
) -> list[Sequence]:
    """Who prefills first: those that hold a slot, but tenants in their turn, slot or none.

    What tenants have begun that have their share goes behind what others wait for.
    """
    later = [sequence for sequence in prefilling if has_its_share(sequence)]
    sooner = [sequence for sequence in prefilling if sequence not in later]
    num_ahead = next((at for at, one in enumerate(waiting) if has_its_share(one)), len(waiting))
    return [
        *heapq.merge(sooner, waiting[:num_ahead], key=_place),
        *heapq.merge(later, waiting[num_ahead:], key=_place),
    ]


def _place(sequence: Sequence) -> tuple[bool, tuple[int, int, int]]:
    return (sequence.slot is None and not sequence.request.turn, sequence.rank)
