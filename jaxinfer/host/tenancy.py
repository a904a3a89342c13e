"""Who asks lately, who has its share of the engine, and what is kept free for the others."""

from collections import Counter
from collections.abc import Iterable
from typing import NamedTuple

from jaxinfer.host.sequence import Sequence

LATELY = 1024  # requests within which a tenant counts as one that asks
_FADE = 0.99  # of a tenant's peak, from one of its requests to the next


class Standing(NamedTuple):
    """The tenants, as one plan sees them."""

    served: frozenset[str] = frozenset()  # those that have their share, where others have not
    seated: frozenset[str] = frozenset()  # those of them who hold as many slots
    num_kept: int = 0  # slots that the seated ones leave free for the others

    def has_its_share(self, sequence: Sequence) -> bool:
        """Whether its tenant leaves room for others."""
        return sequence.tenant in self.served

    def has_its_slots(self, sequence: Sequence) -> bool:
        """Whether its tenant leaves slots to others."""
        return sequence.tenant in self.seated


class Tenancy:
    """Remembers of each tenant when it asked last and how many requests it has at once.

    A tenant has its share when it has live, running or in line, as many requests as its part of the
    slots. The others find as many slots as they have used at once lately, up to that part.
    """

    def __init__(self) -> None:
        self.last_asked: dict[str, int] = {}  # the order of its last request
        self.peaks: dict[str, float] = {}  # requests live at once

    def asks(self, sequence: Sequence, live: Iterable[Sequence]) -> None:
        """A request has come; `live` are all, itself among them."""
        name = sequence.tenant
        if not name:
            return
        num_live = sum(one.tenant == name for one in live)
        self.last_asked[name] = sequence.order
        self.peaks[name] = max(num_live, self.peaks.get(name, 0.0) * _FADE)
        oldest = sequence.order - LATELY
        self.last_asked = {name: at for name, at in self.last_asked.items() if at > oldest}
        self.peaks = {name: self.peaks[name] for name in self.last_asked}

    def standing(
        self, running: list[Sequence], waiting: list[Sequence], num_slots: int
    ) -> Standing:
        """How the tenants stand now."""
        if len(self.last_asked) < 2:
            return Standing()
        share = num_slots / len(self.last_asked)
        held = Counter(one.tenant for one in running)
        live = held + Counter(one.tenant for one in waiting)
        served = frozenset(name for name in self.last_asked if live[name] >= share)
        if len(served) == len(self.last_asked):
            return Standing()
        wanted = {name: min(share, peak) for name, peak in self.peaks.items()}
        lacking = sum(
            max(0, round(wanted[name]) - held[name])
            for name in self.last_asked
            if name not in served
        )
        seated = frozenset(name for name in served if held[name] >= share)
        return Standing(served, seated, max(1, lacking))
