"""What must hold in every state of a world, and of every plan, token and end.

Each check recomputes from the outside what the scheduler books on the inside.
"""

from jaxinfer.host.fake_device import NAN
from jaxinfer.host.loop import Sampled
from jaxinfer.host.plan import Plan
from jaxinfer.host.request import FinishReason
from jaxinfer.host.sequence import Sequence
from jaxinfer.host.world import MAX_PREEMPTIONS, World

_OWN_ENDS = {
    FinishReason.EOS,
    FinishReason.STOP_TOKEN,
    FinishReason.STOP_STRING,
    FinishReason.LENGTH,
    FinishReason.CONTEXT,
}


class Before:
    """What was so before a plan was made."""

    def __init__(self, world: World) -> None:
        scheduler = world.scheduler
        self.fingerprint = world.fingerprint()
        self.known = set(scheduler.prefix.pages)
        self.idle = list(scheduler.pool.idle)
        self.num_pages = {one.order: len(one.pages) for one in world.live.values()}


def check_state(world: World) -> None:
    """After every event: pages, slots, lines, and what the prefix cache says of pages."""
    scheduler, pool = world.scheduler, world.scheduler.pool
    scheduler.check_integrity()
    known = scheduler.prefix.pages
    running = [one for one in scheduler.slots if one is not None]
    _check_held(world, running)
    owners = [0] * pool.num_pages
    for sequence in running:
        assert len(set(sequence.pages)) == len(sequence.pages), "a page twice in one table"
        for page in sequence.pages:
            owners[page] += 1
    for sequence in running:
        first_unwritten = sequence.num_written // world.config.cache.page_size
        for page in sequence.pages[first_unwritten:]:
            assert owners[page] == 1, f"page {page} may be written and is in two tables"
            assert page not in known, f"page {page} is known and not all written"
    num_free = 0
    for page in range(pool.num_pages):
        assert owners[page] == pool.num_owners(page), f"page {page}: a wrong count of owners"
        num_free += not owners[page]
    assert num_free == pool.num_available, "free and idle pages are not those that nobody owns"
    _check_known(world, known)
    _note_idle(world, known, owners)


def check_drained(world: World) -> None:
    """Once all has ended: nothing is held, and every request has got exactly one end."""
    scheduler, pool = world.scheduler, world.scheduler.pool
    assert not scheduler.running and not scheduler.waiting
    assert pool.num_available == pool.num_pages, "pages have leaked"
    assert sorted(world.ended) == list(range(len(world.sequences)))


def check_deadlines(world: World) -> None:
    """Nothing that is overdue goes into a step."""
    for sequence in world.live.values():
        deadline_s = sequence.request.deadline_s
        assert deadline_s is None or deadline_s > world.now_s, "overdue and still live"


def check_plan(world: World, plan: Plan, before: Before) -> None:
    """Before a plan is booked: making it has changed nothing, and it is fair and within bounds."""
    assert world.fingerprint() == before.fingerprint, "plan() must only read"
    scheduler, config = world.scheduler, world.config
    line = scheduler.running
    assert [one.order for one in scheduler.waiting] == [
        one.order for one in sorted(scheduler.waiting, key=lambda one: one.rank)
    ], "the line is out of order"
    admitted = [admission.sequence for admission in plan.admit]
    assert admitted == scheduler.waiting[: len(admitted)], "not the first in line were admitted"
    padded = [chunk.size for chunk in plan.chunks]
    assert sum(padded) <= max(config.max_prefill_tokens, *padded[:1], 0), "too much prefill"
    assert not line or line[0] not in plan.preempt, "the first in line was preempted"
    for sequence in plan.preempt:
        assert sequence in line and sequence not in plan.sampled, "a victim takes part"
    for chunk in plan.chunks:
        assert 1 <= chunk.length <= chunk.size, "an empty or overfull chunk"
        assert chunk.start + chunk.length <= len(chunk.sequence.tokens), "a chunk past the end"
        is_last = chunk.start + chunk.length == len(chunk.sequence.tokens)
        assert chunk.is_last == is_last, "a last chunk that isn't, or the other way round"
    assert len({one.order for one in plan.decodes}) == len(plan.decodes), "two decodes of one"
    if not world.num_failures:
        for sequence in plan.preempt:
            times = world.preempted.get(sequence.order, 0) + 1
            assert times <= MAX_PREEMPTIONS, f"request {sequence.order}: preempted {times} times"
    _check_hits(world, plan)
    _check_progress(world, plan, line)


def check_begun(world: World, plan: Plan, before: Before) -> None:
    """Once a plan is booked: pages were evicted only for need, longest idle first."""
    scheduler, pool = world.scheduler, world.scheduler.pool
    known = set(scheduler.prefix.pages)
    evicted = [page for page in before.known if page not in known]
    if evicted:
        assert pool.num_available == pool.num_idle, "a page was evicted though others were free"
        assert not known.intersection(taken_pages(plan, before)), "an evicted page is still known"
        left = [page for page in before.idle if pool.is_idle(page)]
        since = [world.idle_since.get(page, world.num_events) for page in range(pool.num_pages)]
        newest = max(since[page] for page in evicted)
        oldest = min((since[page] for page in left), default=newest)
        assert newest <= oldest, "a page was evicted before one that was idle for longer"
    if not plan.preempt:
        for sequence in scheduler.running:
            _check_decodes(world, plan, sequence)


def check_token(world: World, sampled: Sampled) -> None:
    """The client of a live request gets the next token of its solo run."""
    sequence = sampled.sequence
    order = sequence.order
    assert order not in world.ended, f"request {order}: a token after its end"
    wanted, place = world.solo(sequence).tokens, world.emitted[order]
    got = sequence.tokens[len(sequence.request.prompt) :]
    assert len(got) == place + 1, f"request {order}: token {len(got)} follows token {place}"
    assert place < len(wanted), f"request {order}: a token more than alone"
    assert sampled.token == wanted[place] == got[place], (
        f"request {order}: token {place} is {sampled.token}, alone it is {wanted[place]}"
    )


def check_end(world: World, sequence: Sequence) -> None:
    """A request ends once, for a reason that is true, with nothing left in its hands."""
    order, reason = sequence.order, sequence.finish_reason
    assert order not in world.ended, f"request {order}: a second end"
    assert world.live.get(world.indices[order]) is sequence, f"request {order}: not live"
    assert sequence.slot is None and not sequence.pages, f"request {order}: ended with pages"
    if reason in _OWN_ENDS:
        alone = world.solo(sequence)
        assert reason is alone.reason, f"request {order}: {reason}, alone {alone.reason}"
        assert world.emitted[order] == len(alone.tokens), f"request {order}: ended early"
    elif reason is FinishReason.ERROR:
        assert order in world.struck, f"request {order}: an error without a cause"
    elif reason is FinishReason.DEADLINE:
        deadline_s = sequence.request.deadline_s
        assert deadline_s is not None and deadline_s <= world.now_s, "ended before its time"


def taken_pages(plan: Plan, before: Before) -> list[int]:
    """The pages that a plan, now booked, has taken from the pool."""
    had = {one.order: len(shared) for one, _, shared in plan.admit}
    taken = []
    for stored in plan.stored:
        sequence = stored.sequence
        taken += sequence.pages[had.get(sequence.order, before.num_pages[sequence.order]) :]
    return taken


def _check_held(world: World, running: list[Sequence]) -> None:
    waiting = world.scheduler.waiting
    held = sorted(one.order for one in (*running, *waiting))
    live = sorted(one.order for one in world.live.values())
    assert held == live, f"the scheduler holds {held}, clients wait for {live}"
    for sequence in world.live.values():
        assert sequence.finish_reason is None, f"request {sequence.order}: its end was not told"


def _check_known(world: World, known: list[int]) -> None:
    """What can be found has been written by steps that returned, and holds no NaN."""
    size = world.config.cache.page_size
    cells, returned = world.device.cells, world.returned
    for page in known:
        there = returned[page * size : (page + 1) * size]
        assert None not in there, f"page {page} is known before it is written"
        assert NAN not in there, f"page {page} is known and broken"
        assert there == cells[page * size : (page + 1) * size], f"known page {page} is overwritten"
        writer = world.sequences[world.writers[page]].request
        assert writer.use_prefix_cache, f"page {page} is known, its request asked for none of it"


def _note_idle(world: World, known: list[int], owners: list[int]) -> None:
    """Keeps the books on since when pages are idle, and makes free pages unreadable."""
    idle_since, is_known = world.idle_since, set(known)
    for page, count in enumerate(owners):
        if page in is_known and not count:
            idle_since.setdefault(page, world.num_events)
        else:
            idle_since.pop(page, None)
            if not count:
                world.hand_out([page])


def _check_hits(world: World, plan: Plan) -> None:
    """An admission shares the longest prefix that it may: found by contents, not by digest."""
    if not plan.admit:
        return
    size, config = world.config.cache.page_size, world.config
    found = set()
    for page in world.scheduler.prefix.pages:
        salt = world.sequences[world.writers[page]].request.salt
        found.add((salt, world.returned[(page + 1) * size - 1]))
    for sequence, slot, shared in plan.admit:
        assert world.scheduler.slots[slot] is None, f"slot {slot} is given away twice"
        length, cells = 0, world.solo(sequence).cells
        salt, tokens = sequence.request.salt, len(sequence.tokens)
        while length + size <= tokens and (salt, cells[length + size - 1]) in found:
            length += size
        length = min(length, tokens - 1) // config.prefix_step * config.prefix_step
        if not (config.cache.prefix and sequence.request.use_prefix_cache):
            length = 0
        assert len(shared) * size == length, (
            f"request {sequence.order}: {len(shared) * size} tokens are shared, not {length}"
        )


def _check_progress(world: World, plan: Plan, line: list[Sequence]) -> None:
    """The first in line always gets on, and chunks follow each other without a gap."""
    if line:
        first = line[0]
        is_done = not first.is_prefilling and not _may_decode(world, first)
        takes_part = first in plan.decodes or any(c.sequence is first for c in plan.chunks)
        assert takes_part or is_done, "the first in line stands still"
    elif world.scheduler.waiting and not world.loop.under_way:
        assert plan.admit, "nobody runs and nobody is admitted"
    ends: dict[int, int] = {}
    size = world.config.cache.page_size
    for sequence, _, shared in plan.admit:
        ends[sequence.order] = len(shared) * size
    for chunk in plan.chunks:
        order = chunk.sequence.order
        wanted = ends.get(order, chunk.sequence.num_stored)
        assert chunk.start == wanted, f"request {order}: a chunk at {chunk.start}, not {wanted}"
        ends[order] = chunk.start + chunk.length
    for sequence in plan.decodes:
        end = ends.get(sequence.order, sequence.num_stored)
        samples = any(c.sequence is sequence and c.is_last for c in plan.chunks)
        length = sequence.total_len + samples
        assert end == length - 1, f"request {sequence.order}: a decode at {end} of {length} tokens"


def _check_decodes(world: World, plan: Plan, sequence: Sequence) -> None:
    """A sequence that could decode does, however much is prefilled beside it."""
    if sequence in plan.decodes or sequence.is_prefilling:
        return
    if any(chunk.sequence is sequence for chunk in plan.chunks):
        return
    held = len(sequence.pages) * world.config.cache.page_size
    is_stuck = sequence.total_len > held and not world.scheduler.pool.num_available
    assert is_stuck or not _may_decode(world, sequence), (
        f"request {sequence.order}: its decode starves"
    )


def _may_decode(world: World, sequence: Sequence) -> bool:
    sampling, outputs = sequence.request.sampling, sequence.num_outputs
    room = world.config.max_seq_len - len(sequence.request.prompt)
    limit = room if sampling.max_tokens is None else min(room, sampling.max_tokens)
    return outputs < limit
