"""A scheduler's whole state as JSON values: a scheduler loaded from them plans the same way.

Keys and values are not part of it. Every page can be computed again, by prefilling the tokens of
the sequences that hold a slot, and `prefix.chains()`.
"""

from typing import Any

from jaxinfer.config import EngineConfig
from jaxinfer.host.plain import request_from_plain, request_to_plain
from jaxinfer.host.prefix import KnownPage
from jaxinfer.host.scheduler import Scheduler
from jaxinfer.host.sequence import Sequence

State = dict[str, Any]
_COUNTS = (
    "slot",
    "num_stored",
    "num_to_prefill",
    "num_written",
    "num_published",
    "num_cached",
    "num_preemptions",
)


def save(scheduler: Scheduler) -> State:
    """The state between two steps, with nothing under way.

    Known pages that nobody could compute again are forgotten first, here as there.

        {"sequences": [{"order", "request" without its prompt, "num_prompt", "tokens", ...}],
         "known": [[page, the page that it follows or -1, salt, tokens]],
         "idle": pages, the next one to be evicted first, and counters}

    Sequences are in order of arrival. A known page comes after the one that it follows.
    """
    scheduler.prefix.forget_orphans()
    live = sorted([*scheduler.running, *scheduler.waiting], key=lambda one: one.order)
    stats = scheduler.prefix.stats()
    return {
        "sequences": [_sequence_to_plain(sequence) for sequence in live],
        "known": [
            [page, parent, salt, list(tokens)]
            for page, parent, salt, tokens in scheduler.prefix.known_pages()
        ],
        "idle": scheduler.pool.idle,
        "num_arrived": scheduler.num_arrived,
        "num_preemptions": scheduler.num_preemptions,
        "prefill_debt": dict(scheduler.prefill_debt),
        "last_asked": dict(scheduler.tenancy.last_asked),
        "peaks": dict(scheduler.tenancy.peaks),
        "peak_owned": scheduler.pool.peak_owned,
        "num_evicted": scheduler.pool.num_evicted,
        "num_queried": stats.num_queried_tokens,
        "num_hits": stats.num_hit_tokens,
    }


def load(
    state: State, config: EngineConfig, *, eos_token_ids: tuple[int, ...] = (), model: str = ""
) -> Scheduler:
    """The scheduler again; config, end tokens and model must be those of the one that was saved."""
    scheduler = Scheduler(config, eos_token_ids=eos_token_ids, model=model)
    for plain in state["sequences"]:
        sequence = _sequence_from_plain(plain)
        if sequence.slot is None:
            scheduler.waiting.append(sequence)
        else:
            scheduler.slots[sequence.slot] = sequence
    scheduler.waiting.sort(key=lambda sequence: sequence.rank)
    known = [KnownPage(page, parent, salt, tuple(t)) for page, parent, salt, t in state["known"]]
    scheduler.pool.load(
        owned=[page for sequence in scheduler.running for page in sequence.pages],
        kept=[one.page for one in known],
        idle=state["idle"],
        peak_owned=state["peak_owned"],
        num_evicted=state["num_evicted"],
    )
    scheduler.prefix.load(known, num_queried=state["num_queried"], num_hits=state["num_hits"])
    scheduler.num_arrived = state["num_arrived"]
    scheduler.num_preemptions = state["num_preemptions"]
    scheduler.prefill_debt = dict(state["prefill_debt"])
    scheduler.tenancy.last_asked = dict(state["last_asked"])
    scheduler.tenancy.peaks = dict(state["peaks"])
    scheduler.check_integrity()
    return scheduler


def _sequence_to_plain(sequence: Sequence) -> State:
    order = sequence.order
    assert not sequence.num_pending and sequence.num_written == sequence.num_stored, (
        f"request {order} has a step under way; a state is taken between two steps"
    )
    request = request_to_plain(sequence.request)
    del request["prompt"]
    return {
        "order": order,
        "request": request,
        "num_prompt": len(sequence.request.prompt),
        "tokens": list(sequence.tokens),
        "pages": list(sequence.pages),
        **{name: getattr(sequence, name) for name in _COUNTS},
    }


def _sequence_from_plain(plain: State) -> Sequence:
    prompt = plain["tokens"][: plain["num_prompt"]]
    sequence = Sequence(
        order=plain["order"],
        request=request_from_plain(plain["request"] | {"prompt": prompt}),
        pages=list(plain["pages"]),
        **{name: plain[name] for name in _COUNTS},
    )
    sequence.tokens = list(plain["tokens"])
    return sequence
