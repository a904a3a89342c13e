"""What a client asks and what it gets: requests, sampling parameters, outputs."""

from dataclasses import dataclass, fields, replace
from enum import StrEnum
from typing import Any, NamedTuple

from jaxinfer.errors import InvalidRequest

MAX_SEED = 2**64 - 1
MAX_STOP_IDS = 16  # end tokens that one row can ban until min_tokens is reached
MAX_STOP_STRINGS = 16
MAX_STOP_CHARS = 256


class Range(NamedTuple):
    """The values that a number may have, both ends included."""

    low: float
    high: float
    is_whole: bool


RANGES = {
    "temperature": Range(0.0, 100.0, is_whole=False),
    "top_k": Range(0, 2**31 - 1, is_whole=True),
    "top_p": Range(0.0, 1.0, is_whole=False),  # but not 0
    "min_p": Range(0.0, 1.0, is_whole=False),
    "seed": Range(0, MAX_SEED, is_whole=True),
    "max_tokens": Range(1, 2**31 - 1, is_whole=True),
    "min_tokens": Range(0, 2**31 - 1, is_whole=True),
}
"""Of every number in SamplingParams; what a server says of itself is read off here."""


class FinishReason(StrEnum):
    """Why a request ended."""

    EOS = "eos"
    STOP_TOKEN = "stop_token"
    STOP_STRING = "stop_string"
    LENGTH = "length"  # max_tokens reached
    CONTEXT = "context"  # the longest sequence that the engine holds is reached
    CANCELLED = "cancelled"
    DEADLINE = "deadline"
    ERROR = "error"


UNFINISHED = (FinishReason.CANCELLED, FinishReason.DEADLINE, FinishReason.ERROR)
"""Ends that are not the answer's own: asked again, it would go on."""


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How tokens are chosen and when to stop; None means the model's default, then jaxinfer's.

    Raises InvalidRequest, naming the field, on a value that can't be served.
    """

    temperature: float | None = None
    """0 takes the likeliest token."""
    top_k: int | None = None
    """Keep the k likeliest tokens; 0 keeps all."""
    top_p: float | None = None
    """Keep the smallest set of likeliest tokens whose probabilities sum to at least this."""
    min_p: float | None = None
    """Drop tokens less likely than this share of the likeliest one's probability."""
    seed: int | None = None
    """The same seed and request give the same tokens; without one, one is drawn and reported."""
    max_tokens: int | None = None
    """None means as many as the context holds."""
    min_tokens: int | None = None
    """No end token or stop token before this many."""
    stop: tuple[str, ...] = ()
    """Ends at any of these texts, which is not part of the answer."""
    stop_token_ids: tuple[int, ...] = ()
    """Ends at any of these tokens, which is not part of the text."""
    ignore_eos: bool = False
    """Goes on after the model's own end token."""

    def __post_init__(self) -> None:
        for name, allowed in RANGES.items():
            _check_range(name, getattr(self, name), allowed)
        if self.top_p == 0.0:
            raise InvalidRequest("top_p is 0; it must be above 0, up to 1", field="top_p")
        if self.max_tokens is not None and (self.min_tokens or 0) > self.max_tokens:
            raise InvalidRequest(
                f"min_tokens is {self.min_tokens}, above max_tokens = {self.max_tokens}",
                field="min_tokens",
            )
        _check_stops(self)

    def or_else(self, defaults: "SamplingParams") -> "SamplingParams":
        """These parameters, with every unset scalar taken from `defaults`."""
        unset = {
            entry.name: getattr(defaults, entry.name)
            for entry in fields(self)
            if getattr(self, entry.name) is None
        }
        return replace(self, **unset)


@dataclass(frozen=True, slots=True)
class Request:
    """One prompt to continue. `sampling` has no unset scalar left but max_tokens."""

    request_id: str
    prompt: tuple[int, ...]
    sampling: SamplingParams
    priority: int = 0
    """Lower goes first; equal ones by turn, then in order of arrival."""
    turn: int = 0
    """Of equal priorities the lower goes first; the edge sets it so that tenants share fairly."""
    salt: str = ""
    """Only requests with the same salt share cached prefixes."""
    use_prefix_cache: bool = True
    """False neither reads nor leaves anything in the prefix cache."""
    deadline_s: float | None = None
    """On the engine's clock; past it the request ends with DEADLINE."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What an engine can take; requests outside it are refused before they wait."""

    vocab_size: int
    max_seq_len: int
    eos_token_ids: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Timings:
    """Seconds on the engine's clock; None until it happened."""

    arrived_s: float
    scheduled_s: float | None = None
    first_token_s: float | None = None
    finished_s: float | None = None


@dataclass(frozen=True, slots=True)
class Output:
    """What one request got from one engine step."""

    request_id: str
    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    text: str
    """New text; half a character or a possible stop string is held back until it is decided."""
    finish_reason: FinishReason | None = None
    stop: str | int | None = None
    """The stop string or stop token id that ended it."""
    error: str = ""
    num_prompt_tokens: int = 0
    num_output_tokens: int = 0
    """So far, this output's tokens included."""
    num_preemptions: int = 0
    num_cached_tokens: int = 0
    """Prompt tokens that were found in the prefix cache."""
    timings: Timings = Timings(0.0)


@dataclass(frozen=True, slots=True)
class EngineStats:
    """Counts of one engine since it was built, and what it holds now."""

    num_slots: int
    num_running: int
    num_waiting: int
    num_pages: int
    num_free_pages: int
    peak_pages_used: int
    num_steps: int
    num_prefill_tokens: int
    num_output_tokens: int
    num_preemptions: int
    num_recoveries: int
    num_programs: int
    num_compiles_after_start: int
    host_s: float
    """Processor seconds of the engine's thread in all steps: plan, pack, commit, text.

    On a CPU device the step under way runs on the same cores; their share is not counted here.
    """
    dispatch_s: float
    """The same for handing programs to the device: what JAX's own call takes."""
    wait_s: float
    """Seconds in which the host only waited for the device."""
    num_queried_tokens: int = 0
    """Prompt tokens that were looked up in the prefix cache."""
    num_cached_tokens: int = 0
    """Of these, found."""
    num_evicted_pages: int = 0
    num_cached_pages: int = 0
    """Pages that only the prefix cache holds; they count as free."""


def check_request(request: Request, limits: Limits) -> None:
    """Raises InvalidRequest where an engine with these limits can't serve the request."""
    prompt, sampling = request.prompt, request.sampling
    if not prompt:
        raise InvalidRequest("the prompt is empty; give at least one token", field="prompt")
    if len(prompt) >= limits.max_seq_len:
        raise InvalidRequest(
            f"the prompt has {len(prompt)} tokens; this server holds sequences of "
            f"{limits.max_seq_len} (engine.max_seq_len), so at most {limits.max_seq_len - 1} "
            "may be the prompt",
            field="prompt",
        )
    for name, ids in (("prompt", prompt), ("stop_token_ids", sampling.stop_token_ids)):
        for place, token in enumerate(ids):
            if not 0 <= token < limits.vocab_size:
                raise InvalidRequest(
                    f"{name}[{place}] is {token}; token ids of this model go from 0 to "
                    f"{limits.vocab_size - 1}",
                    field=name,
                )
    num_ends = len(set(limits.eos_token_ids) | set(sampling.stop_token_ids))
    if sampling.min_tokens and num_ends > MAX_STOP_IDS:
        raise InvalidRequest(
            f"min_tokens with {num_ends} end tokens; at most {MAX_STOP_IDS} can be held back",
            field="stop_token_ids",
        )


def _check_range(name: str, value: Any, allowed: Range) -> None:
    if value is None:
        return
    kinds, words = (int, "a whole number") if allowed.is_whole else (int | float, "a number")
    if isinstance(value, bool) or not isinstance(value, kinds):
        raise InvalidRequest(f"{name} is {value!r}; it must be {words}", field=name)
    if not allowed.low <= value <= allowed.high:  # NaN is in no range
        low, high = allowed.low, allowed.high
        raise InvalidRequest(f"{name} is {value}; it must be from {low} to {high}", field=name)


def _check_stops(params: SamplingParams) -> None:
    if len(params.stop) > MAX_STOP_STRINGS:
        raise InvalidRequest(
            f"{len(params.stop)} stop strings; at most {MAX_STOP_STRINGS} are served", field="stop"
        )
    for stop in params.stop:
        if not 1 <= len(stop) <= MAX_STOP_CHARS:
            raise InvalidRequest(
                f"a stop string must have 1 to {MAX_STOP_CHARS} characters", field="stop"
            )
    if len(params.stop_token_ids) > MAX_STOP_IDS:
        raise InvalidRequest(
            f"{len(params.stop_token_ids)} stop tokens; at most {MAX_STOP_IDS} are served",
            field="stop_token_ids",
        )


JAXINFER_DEFAULTS = SamplingParams(temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, min_tokens=0)
"""What holds where neither the request nor the model says; the edge draws the seed."""
