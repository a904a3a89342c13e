"""What a client gets back."""

from dataclasses import dataclass

from jaxinfer.host.request import FinishReason, SamplingParams


@dataclass(frozen=True, slots=True)
class Usage:
    """What a request took."""

    num_prompt_tokens: int = 0
    num_output_tokens: int = 0
    num_preemptions: int = 0
    num_cached_tokens: int = 0
    """Prompt tokens that the server had in its prefix cache."""


@dataclass(frozen=True, slots=True)
class Timings:
    """Seconds on the server's clock; None where it never came to that."""

    queue_s: float | None = None
    prefill_s: float | None = None
    decode_s: float | None = None
    ttft_s: float | None = None
    total_s: float | None = None


@dataclass(frozen=True, slots=True)
class Stamps:
    """Seconds on the client's clock, queue and network included; None where not observed."""

    ttft_s: float | None = None
    """From sending to the first streamed token."""
    tpot_s: float | None = None
    """From the first token to the last, for each token after the first."""
    e2e_s: float | None = None
    """From sending to the last token, or to the reply where nothing was streamed."""


@dataclass(frozen=True, slots=True)
class Completion:
    """A finished request."""

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    usage: Usage
    timings: Timings
    parameters: SamplingParams
    """The values that were in force, the seed that was drawn included."""
    request_id: str
    model: str
    stop: str | int | None = None
    """The stop string or the token that ended it."""
    logprobs: tuple[float, ...] = ()
    """One for each token, where asked for."""
    stamps: Stamps = Stamps()


@dataclass(frozen=True, slots=True)
class Delta:
    """What a stream brought since the last one."""

    text: str = ""
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True)
class Completed:
    """A stream's last event: all of it, as `generate` would have returned it."""

    completion: Completion


@dataclass(frozen=True, slots=True)
class Score:
    """How likely the model finds a text."""

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    """Of each token but the first, given those before it: one fewer than token_ids."""
    is_likeliest: tuple[bool, ...]
    """Whether greedy decoding would have chosen it."""


@dataclass(frozen=True, slots=True)
class Model:
    """A model that a server has."""

    name: str
    architecture: str
    vocab_size: int
    max_seq_len: int
    num_layers: int
    d_model: int
    eos_token_ids: tuple[int, ...]
    defaults: SamplingParams
    """Values for what a request leaves out."""
