"""The order of one engine step, with one step always under way: engine and simulator share it.

step n      |-- device --|
step n+1        plan, begin, dispatch |-- device --|
step n                                 read, retire, commit

A step comes back in parts: the first token of a prompt need not wait for the decodes behind it.
"""

from collections import deque
from collections.abc import Callable, Iterable
from collections.abc import Sequence as Items
from typing import Generic, Literal, NamedTuple, ParamSpec, TypeVar
from weakref import WeakMethod

from jaxinfer.host.plan import Plan
from jaxinfer.host.scheduler import Scheduler
from jaxinfer.host.sequence import Sequence

Handle = TypeVar("Handle")
Result = TypeVar("Result")
Arguments = ParamSpec("Arguments")
Phase = Literal["dispatch", "read"]


class Sampled(NamedTuple):
    """One token of a step that has returned."""

    sequence: Sequence
    token: int  # negative where the row's logits were not finite
    place: int  # among the outputs of its part of the step
    counts: bool  # False where the sequence ended before, or ends now because of this token


class Loop(Generic[Handle]):
    """Drives a scheduler; what a step means is up to the callbacks.

    `planned` sees every plan before it is booked, `dispatch` starts a step and returns its handle,
    `read` waits for one and gives its tokens in the order of plan.sampled, in parts, each as soon
    as it is there, `take` gets each token as soon as it is committed, and `told` hears that those
    of a part are, where another part follows. Where dispatch or read raises, call `restart`.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        *,
        overlap: bool,
        dispatch: Callable[[Plan], Handle],
        read: Callable[[Plan, Handle], Iterable[Items[int]]],
        take: Callable[[Sampled], None],
        planned: Callable[[Plan], None] = lambda plan: None,
        told: Callable[[], None] = lambda: None,
    ) -> None:
        self.scheduler = scheduler
        self.under_way: deque[tuple[Plan, Handle]] = deque()
        self.phase: Phase = "dispatch"  # of the device that was entered last
        self._overlap = overlap
        self._dispatch = dispatch
        self._read = read
        self._take = take
        self._planned = planned
        self._told = told

    def step(self, *, drain: bool = False) -> None:
        """Dispatches one step, if there is one to run, and takes in the step before it.

        With `drain` the new one is taken in as well: nothing is under way at the end.
        """
        plan = self.scheduler.plan()
        self._planned(plan)
        self.scheduler.begin(plan)
        if not plan.is_empty:
            self.phase = "dispatch"
            self.under_way.append((plan, self._dispatch(plan)))
        keep = 1 if self._overlap and not (plan.is_empty or plan.is_waited_for or drain) else 0
        while len(self.under_way) > keep:
            self._finish(*self.under_way.popleft())

    def restart(self) -> None:
        """After a failed step: what was under way is lost, and every sequence starts over."""
        self.under_way.clear()
        self.scheduler.restart()

    def _finish(self, plan: Plan, handle: Handle) -> None:
        self.phase = "read"
        sampled, first = plan.sampled, 0
        for tokens in self._read(plan, handle):
            self.scheduler.retire(plan, tokens, first)
            for place, token in enumerate(tokens):
                sequence = sampled[first + place]
                counts = self.scheduler.commit(sequence, token)
                self._take(Sampled(sequence, token, place, counts))
            first += len(tokens)
            if first < len(sampled):
                self._told()
        assert first == len(sampled), f"{first} of {len(sampled)} tokens came back"


def weakly(method: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """A method that does not keep its object, for who drives a loop of its own."""
    held = WeakMethod(method)

    def call(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        found = held()
        assert found is not None
        return found(*args, **kwargs)

    return call
