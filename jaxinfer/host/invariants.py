"""What must hold in every state of a world, and of every plan, token and end.

Each check recomputes from the outside what the scheduler books on the inside.
"""

from jaxinfer.config import EngineConfig
from jaxinfer.host.fake_device import EMPTY, NAN
from jaxinfer.host.loop import Sampled
from jaxinfer.host.plan import Plan, chunk_size, worth_a_step
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
        self.fingerprint = world.fingerprint() if world.is_logged else 0
        self.known = set(scheduler.prefix.pages)
        self.idle = list(scheduler.pool.idle)
        self.num_pages = {one.order: len(one.pages) for one in world.live.values()}


def check_state(world: World) -> None:
    """After every event: pages, slots, lines, and what the prefix cache says of pages."""
    scheduler, pool = world.scheduler, world.scheduler.pool
    scheduler.check_integrity()
    known = check_known(world)
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
    if world.is_logged:
        _check_published(world, running, known)
    _note_idle(world, known, owners)


def check_known(world: World) -> list[int]:
    """What can be found has been written by steps that returned, and holds no NaN."""
    size = world.config.cache.page_size
    known = world.scheduler.prefix.pages
    cells, returned = world.device.cells, world.returned
    for page in known:
        there = returned[page * size : (page + 1) * size]
        assert EMPTY not in there, f"page {page} is known before it is written"
        assert NAN not in there, f"page {page} is known and broken"
        assert there == cells[page * size : (page + 1) * size], f"known page {page} is overwritten"
        writer = world.sequences[world.writers[page]].request
        assert writer.use_prefix_cache, f"page {page} is known, its request asked for none of it"
    return known


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


def check_hopeless(world: World, sequence: Sequence) -> None:
    """One that ends for its deadline is late, or waits and even the fastest service would be."""
    deadline_s = sequence.request.deadline_s
    assert deadline_s is not None
    if deadline_s > world.now_s:
        assert sequence.slot is None, f"request {sequence.order}: it runs and has time left"
        wait_s = least_wait_s(world, sequence)
        assert world.now_s + wait_s > deadline_s, f"request {sequence.order}: it could make it"
        world.hopeless[sequence.order] = sequence.num_preemptions


def least_wait_s(world: World, sequence: Sequence) -> float:
    """The time until a token, if all that is in no page were prefilled at once and alone."""
    config, cells = world.config, world.solo(sequence).cells[: len(sequence.tokens)]
    size, stored = config.cache.page_size, set[int]()
    in_full_pages = {EMPTY, *cells[: len(cells) // size * size]}
    for page, writer in enumerate(world.writers):
        there = set(world.device.cells[page * size : (page + 1) * size])
        if config.cache.prefix and there <= in_full_pages:
            stored |= there if _can_share(world.sequences, writer, sequence) else set()
    num_left = max(1, sum(cell not in stored for cell in cells))
    most = max(config.max_prefill_tokens, config.prefill_chunks[-1])
    return max(num_left * world.pace.prefill_token_s, -(-num_left // most) * world.pace.step_s)


def check_plan(world: World, plan: Plan, before: Before) -> None:
    """Before a plan is booked: making it has changed nothing, and it is fair and within bounds."""
    if world.is_logged:
        assert world.fingerprint() == before.fingerprint, "plan() must only read"
    scheduler, config = world.scheduler, world.config
    line = scheduler.running
    assert [one.order for one in scheduler.waiting] == [
        one.order for one in sorted(scheduler.waiting, key=lambda one: one.rank)
    ], "the line is out of order"
    admitted = [admission.sequence for admission in plan.admit]
    assert admitted == scheduler.waiting[: len(admitted)], "not the first in line were admitted"
    padded = [chunk.size for chunk in plan.chunks]
    is_bound = config.batching == "continuous"
    most = max(config.max_prefill_tokens, *padded[:1], 0)
    assert not is_bound or sum(padded) <= most, "too much prefill"
    assert not line or line[0] not in plan.preempt, "the first in line was preempted"
    for sequence in plan.preempt:
        lower = [one for one in line if one.request.priority > sequence.request.priority]
        has_rank = all(one in plan.preempt or not one.pages for one in lower)
        assert has_rank, f"request {sequence.order} gives way to a lower priority"
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
        for page in evicted:
            for other in left:
                assert since[page] <= since[other], "one that was idle for longer is not evicted"
                is_deeper = world.depths[other] > world.depths[page]
                is_kin = since[page] == since[other] and world.writers[page] == world.writers[other]
                assert not (is_kin and is_deeper), "a page is evicted before one that needs it"
    if not plan.preempt:
        _check_refused(world, plan)
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
        known = set(world.scheduler.prefix.pages)
        assert not known.intersection(world.tables[order]), "pages of a broken request are known"
    elif reason is FinishReason.DEADLINE:
        deadline_s = sequence.request.deadline_s
        is_late = deadline_s is not None and deadline_s <= world.now_s
        assert is_late or order in world.hopeless, "ended before its time"


def taken_pages(plan: Plan, before: Before) -> list[int]:
    """The pages that a plan, now booked, has taken from the pool."""
    had = {one.order: len(shared) for one, _, shared in plan.admit}
    taken: list[int] = []
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


def _note_idle(world: World, known: list[int], owners: list[int]) -> None:
    """Keeps the books on since when pages are idle, and makes free pages unreadable."""
    idle_since, is_known, size = world.idle_since, set(known), world.device.page_size
    for page, count in enumerate(owners):
        if page in is_known and not count:
            idle_since.setdefault(page, world.num_events)
        else:
            idle_since.pop(page, None)
            if not count and world.device.cells[page * size] != EMPTY:
                world.hand_out([page])


def _check_hits(world: World, plan: Plan) -> None:
    """An admission shares the longest prefix that it may: found by contents, not by digest."""
    if not plan.admit:
        return
    size, config = world.config.cache.page_size, world.config
    found = _findable(world, world.scheduler.prefix.pages)
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
        is_others_turn = _makes_way(world, plan, first)
        assert takes_part or is_done or is_others_turn, "the first in line stands still"
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
        outputs = length - len(sequence.request.prompt)
        assert outputs < _most_outputs(world, sequence), f"request {sequence.order}: past its end"
        assert end == length - 1, f"request {sequence.order}: a decode at {end} of {length} tokens"


def _makes_way(world: World, plan: Plan, sequence: Sequence) -> bool:
    """Whether a tenant's sequence leaves this step to others: chunks under way, or before it."""
    is_behind = any(
        one.sequence.tenant != sequence.tenant or one.sequence.rank < sequence.rank
        for one in plan.chunks
    )
    return sequence.request.turn > 0 and bool(world.scheduler.chunks_under_way or is_behind)


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


def _check_refused(world: World, plan: Plan) -> None:
    """Where slot, budget and pages would do, the first in line is not left waiting."""
    scheduler, config, size = world.scheduler, world.config, world.config.cache.page_size
    if not scheduler.waiting or None not in scheduler.slots or scheduler.waiting[0].num_pending:
        return
    if config.batching == "static" and scheduler.running:
        return
    first, pool = scheduler.waiting[0], scheduler.pool
    standing = scheduler.tenancy.standing(
        scheduler.running, scheduler.waiting, world.config.num_slots
    )
    is_kept = scheduler.slots.count(None) <= standing.num_kept
    if _makes_way(world, plan, first) or is_kept and standing.has_its_slots(first):
        return
    shared = scheduler.cached_pages(first)
    left = len(first.tokens) - len(shared) * size
    num_soon = scheduler.num_soon_cached(first) - len(shared) * size
    if num_soon >= worth_a_step(config) and world.loop.under_way:
        return
    chunk = chunk_size(left, config.prefill_chunks)
    if plan.chunks and _most_spent(plan, config) + chunk > config.max_prefill_tokens:
        return
    num_pages = -(-(len(first.tokens) + 1) // size) - sum(not pool.is_idle(page) for page in shared)
    assert num_pages > pool.num_available, f"request {first.order}: could have been admitted"


def _most_spent(plan: Plan, config: EngineConfig) -> int:
    """What the chunks took of a step's bound, before some were cut into smaller ones."""
    booked = sum(chunk.size for chunk in plan.chunks)
    if config.prefill_row_counts == (1,):
        return booked  # none is cut
    lengths: dict[int, int] = {}
    for chunk in plan.chunks:
        order = chunk.sequence.order
        lengths[order] = lengths.get(order, 0) + chunk.length
    spent = 0
    for left in lengths.values():
        while left > 0:
            size = chunk_size(left, config.prefill_chunks)
            spent, left = spent + size, left - size
    return max(spent, booked)


def _check_published(world: World, running: list[Sequence], known: list[int]) -> None:
    """While nothing had to be forgotten, all that decoding sequences have written can be found."""
    if world.num_forgotten or world.scheduler.pool.num_evicted or not world.config.cache.prefix:
        return
    size, found = world.config.cache.page_size, _findable(world, known)
    for sequence in running:
        if not sequence.request.use_prefix_cache:
            continue
        cells = [world.returned[page * size + at] for page in sequence.pages for at in range(size)]
        written = cells.index(EMPTY) if EMPTY in cells else len(cells)
        if written <= sequence.num_to_prefill:
            continue
        for end in range(size, min(written, len(sequence.tokens) - 2) + 1, size):
            is_known = (sequence.request.salt, cells[end - 1]) in found
            assert is_known, f"request {sequence.order}: a full page was not published"


def _findable(world: World, known: list[int]) -> set[tuple[str, int]]:
    """The known pages by what is in them: the last cell depends on all before it."""
    size, found = world.config.cache.page_size, set[tuple[str, int]]()
    for page in known:
        salt = world.sequences[world.writers[page]].request.salt
        found.add((salt, world.returned[(page + 1) * size - 1]))
    return found


def _can_share(sequences: list[Sequence], writer: int, sequence: Sequence) -> bool:
    """Whether what request number `writer` has written may be read by the sequence."""
    if writer < 0:
        return False
    wrote, reads = sequences[writer].request, sequence.request
    return wrote.use_prefix_cache and reads.use_prefix_cache and wrote.salt == reads.salt


def _may_decode(world: World, sequence: Sequence) -> bool:
    return sequence.num_outputs < _most_outputs(world, sequence)


def _most_outputs(world: World, sequence: Sequence) -> int:
    limit = sequence.request.sampling.max_tokens
    room = world.config.max_seq_len - len(sequence.request.prompt)
    return room if limit is None else min(room, limit)
