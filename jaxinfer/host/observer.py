"""What an engine tells whoever watches it: server.timeline is one, and it costs next to nothing."""

from typing import Protocol, runtime_checkable

from jaxinfer.host.live import Live
from jaxinfer.host.plan import Plan


@runtime_checkable
class Observer(Protocol):
    """Called on the engine's thread; times are those of the engine's clock.

    Steps return in the order in which they were dispatched. After `failed` those that are under
    way never return, and every live request is back in line.
    """

    def submitted(self, live: Live, /) -> None: ...
    def dispatched(self, plan: Plan, began_s: float, /) -> None: ...
    def returned(self, now_s: float, /) -> None: ...
    def ended(self, live: Live, /) -> None: ...
    def failed(self, now_s: float, /) -> None: ...
