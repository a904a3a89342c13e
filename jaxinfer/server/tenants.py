"""Who asks, what they may take, and whose turn it is: tenants, quotas, salts and fair order."""

import math
import time
from collections.abc import Callable, Iterable
from contextvars import ContextVar
from dataclasses import dataclass
from typing import NamedTuple

from jaxinfer.errors import ConfigError, Forbidden, QuotaExceeded

BUSY_RETRY_S = 1.0


@dataclass(frozen=True)
class Quota:
    """What one tenant may take; 0 bounds nothing."""

    requests_per_s: float = 0.0
    """On average; as many as in one second may come at once."""
    tokens_per_minute: int = 0
    """Of prompts and answers; as many as in one minute may be asked for at once."""
    concurrent: int = 0
    """Requests that generate at the same time."""

    def __post_init__(self) -> None:
        for key in ("requests_per_s", "tokens_per_minute", "concurrent"):
            if not 0 <= getattr(self, key) < math.inf:
                raise ConfigError(f"{key} is {getattr(self, key)}; it must be at least 0, finite")


class Caller(NamedTuple):
    """Who a call comes from; without tokens everybody is the same nameless tenant."""

    tenant: str = ""
    scopes: frozenset[str] = frozenset()
    quota: Quota = Quota()

    def salt(self, server_salt: str) -> str:
        """Tenants of other names share no cached prefix, whatever the server's own salt is."""
        return f"{len(self.tenant)}:{self.tenant}:{server_salt}" if self.tenant else server_salt

    def check_priority(self, priority: int) -> None:
        """Raises Forbidden where a tenant would go before the others."""
        if priority < 0 and self.tenant and "admin" not in self.scopes:
            raise Forbidden(
                f"priority is {priority}; below 0 it goes before other tenants, which needs a "
                "token with the scope 'admin'"
            )

    def request_id(self, chosen: str) -> str:
        """The name inside the server: a tenant can neither meet nor take another one's request."""
        return f"{self.tenant}/{chosen}" if self.tenant else chosen


ANYONE = Caller()
CALLER: ContextVar[Caller] = ContextVar("caller", default=ANYONE)
"""Who asked the call of this task; the interceptor sets it before the handler runs."""


class Bucket:
    """A token bucket: it holds `capacity`, fills at `rate_per_s`, and may owe."""

    def __init__(self, capacity: float, rate_per_s: float, now_s: float) -> None:
        self._capacity = self._level = capacity
        self._rate_per_s = rate_per_s
        self._at_s = now_s

    def wait_s(self, amount: float, now_s: float) -> float:
        """How long until so much can be taken; 0 says now. More than all of it counts as all."""
        self._level = min(self._capacity, self._level + (now_s - self._at_s) * self._rate_per_s)
        self._at_s = now_s
        lacking = min(amount, self._capacity) - self._level
        return max(0.0, lacking / self._rate_per_s)

    def take(self, amount: float) -> None:
        """Takes, or with a negative amount gives back."""
        self._level = min(self._capacity, self._level - amount)


class FairQueue:
    """Start-time fair queueing: each request gets a turn, and lower turns go first.

    A tenant's turns are apart by the tokens that it asked for, so tenants that ask more than their
    share wait behind their own requests. A tenant that was away begins at the turn of the oldest
    request that lives, not at its own old one: it saves nothing up, and what it sends now goes
    before what others have sent too much of. One tenant alone is served in order.
    """

    def __init__(self, first: int = 0) -> None:
        self._oldest = first
        self._next: dict[str, int] = {}

    def turn(self, tenant: str, cost: int, live: Iterable[int] = ()) -> int:
        """The turn of a request that arrives now; `live` are those that have not ended."""
        newest = max(self._next.values(), default=self._oldest)
        self._oldest = max(self._oldest, min(live, default=newest))
        self._next = {name: at for name, at in self._next.items() if at > self._oldest}
        turn = max(self._oldest, self._next.get(tenant, 0))
        self._next[tenant] = turn + cost
        return turn


class Lease:
    """What one request has taken of its tenant's quota; `end` settles it.

    `with lease:` gives all of it back where the body raises.
    """

    def __init__(self, turn: int, num_prompt_tokens: int, end: Callable[[int, int], None]) -> None:
        self.turn = turn
        self.num_output_tokens: Callable[[], int] = int
        self._num_prompt_tokens = num_prompt_tokens
        self._end = end
        self._is_ended = False

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            self._settle(0, 0)

    def end(self) -> None:
        """The request is over; what it asked for and did not get is given back, once."""
        self._settle(self._num_prompt_tokens, self.num_output_tokens())

    def _settle(self, num_prompt_tokens: int, num_output_tokens: int) -> None:
        if not self._is_ended:
            self._is_ended = True
            self._end(num_prompt_tokens, num_output_tokens)


class Tenants:
    """The counts of all tenants; on the event loop's thread only."""

    def __init__(
        self,
        *,
        clock: Callable[[], float] = time.monotonic,
        newest_turn: int = 0,
        line: int = 0,
    ) -> None:
        """`line` is how many requests the engine holds, waiting ones included; 0: not known."""
        self._clock = clock
        self._line = line
        self._calls: dict[tuple[str, float], Bucket] = {}
        self._tokens: dict[tuple[str, int], Bucket] = {}
        self._leases: dict[str, set[Lease]] = {}
        self._queue = FairQueue(newest_turn)

    def count_call(self, caller: Caller) -> None:
        """Raises QuotaExceeded where a tenant calls too often."""
        rate = caller.quota.requests_per_s
        if not rate:
            return
        now_s = self._clock()
        bucket = self._calls.setdefault((caller.tenant, rate), Bucket(max(1.0, rate), rate, now_s))
        wait_s = bucket.wait_s(1.0, now_s)
        if wait_s:
            raise _exceeded(caller, "requests_per_s", wait_s)
        bucket.take(1.0)

    def check_room(self, caller: Caller) -> None:
        """Raises QuotaExceeded where a tenant has no place left, whatever its request asks for.

        A tenant may hold as many places of the engine's line as it leaves free, so one alone gets
        half, n of them 1 / (n + 1) each, and one more always finds some.
        """
        num_held = self.num_live(caller.tenant)
        if caller.quota.concurrent and num_held >= caller.quota.concurrent:
            raise _exceeded(caller, "concurrent", BUSY_RETRY_S)
        num_free = self._line - sum(map(len, self._leases.values()))
        if self._line and caller.tenant and num_held >= num_free:
            raise _exceeded(caller, "share of the line", BUSY_RETRY_S, bound=num_held)

    def begin(self, caller: Caller, num_prompt_tokens: int, max_tokens: int | None) -> Lease:
        """Takes a request's tokens and its place; QuotaExceeded where there is none.

        An answer without max_tokens is paid for when it is there: the tenant may owe for a while.
        """
        self.check_room(caller)
        leases = self._leases.setdefault(caller.tenant, set())
        cost = num_prompt_tokens + (max_tokens or 0)
        bucket = self._bucket(caller)
        if bucket is not None:
            wait_s = bucket.wait_s(float(cost), self._clock())
            if wait_s:
                raise _exceeded(caller, "tokens_per_minute", wait_s)
            bucket.take(float(cost))

        def end(num_prompt_tokens: int, num_output_tokens: int) -> None:
            leases.discard(lease)
            if bucket is not None:
                bucket.take(float(num_prompt_tokens + num_output_tokens - cost))

        lease = Lease(self._turn(caller, cost), num_prompt_tokens, end)
        leases.add(lease)
        return lease

    def num_live(self, tenant: str) -> int:
        """Requests of a tenant that have not ended."""
        return len(self._leases.get(tenant, ()))

    def _turn(self, caller: Caller, cost: int) -> int:
        """0 where there are no tenants: then the order is that of arrival alone."""
        if not caller.tenant:
            return 0
        live = (lease.turn for leases in self._leases.values() for lease in leases)
        return self._queue.turn(caller.tenant, cost, live)

    def _bucket(self, caller: Caller) -> Bucket | None:
        limit = caller.quota.tokens_per_minute
        if not limit:
            return None
        full = Bucket(float(limit), limit / 60, self._clock())
        return self._tokens.setdefault((caller.tenant, limit), full)


def _exceeded(
    caller: Caller, key: str, wait_s: float, *, bound: int | None = None
) -> QuotaExceeded:
    bound = getattr(caller.quota, key) if bound is None else bound
    return QuotaExceeded(
        f"tenant {caller.tenant!r} is at its quota {key} = {bound:g}; ask again in {wait_s:.3g} s",
        quota=key,
        tenant=caller.tenant,
        retry_after_s=wait_s,
    )
