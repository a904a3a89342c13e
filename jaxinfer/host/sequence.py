"""A request on its way through the scheduler."""

from dataclasses import dataclass, field

from jaxinfer.host.request import FinishReason, Request


@dataclass(slots=True, eq=False)
class Sequence:
    """What the scheduler moves from waiting through a slot to finished.

    Its tokens, and what has happened to each of them:

        |-- stored: keys and values are in pages --|-- known --|-- pending --|
        0                                     num_stored   len(tokens)     total_len

    `num_stored` runs ahead to what the steps under way will have stored when they are done, and
    `pending` are tokens that those steps sample; they lie on the device and are not yet known here.
    """

    order: int  # of arrival; breaks every tie
    request: Request
    tokens: list[int] = field(default_factory=list)  # the prompt, then what was sampled
    pages: list[int] = field(default_factory=list)
    slot: int | None = None
    num_stored: int = 0
    num_to_prefill: int = 0  # tokens known when the slot was given
    num_written: int = 0  # tokens stored by steps that have returned
    num_pending: int = 0
    num_published: int = 0  # pages of this slot that were offered to the prefix cache
    num_cached: int = 0  # prompt tokens that the first admission found in the prefix cache
    digests: list[bytes] = field(default_factory=list)  # of the full pages of `tokens`
    num_preemptions: int = 0
    finish_reason: FinishReason | None = None

    def __post_init__(self) -> None:
        self.tokens = list(self.request.prompt)

    @property
    def total_len(self) -> int:
        """Tokens, those still on the device included."""
        return len(self.tokens) + self.num_pending

    @property
    def num_outputs(self) -> int:
        """Sampled tokens, those still on the device included."""
        return self.total_len - len(self.request.prompt)

    @property
    def is_prefilling(self) -> bool:
        """Whether tokens known when the slot was given are still to be stored."""
        return self.num_stored < self.num_to_prefill

    @property
    def tenant(self) -> str:
        """Whose request it is: tenants have salts and turns. Without them all are nobody's."""
        return self.request.salt if self.request.turn else ""

    @property
    def rank(self) -> tuple[int, int, int]:
        """Who goes first: lower priority number, then lower turn, then earlier arrival."""
        return (self.request.priority, self.request.turn, self.order)
