"""Stop strings found in a growing text, whatever parts it comes in."""

from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

from jaxinfer.errors import InvalidRequest


class Found(NamedTuple):
    """Text that no stop string can claim any more, and the stop string that ended it."""

    text: str
    stop: str | None


class StopMatcher:
    """Ends a text before the first stop string that it completes.

    First is where a stop string ends, character by character, so the answer doesn't depend on how
    the text was cut into tokens; of several that end at one character the longest counts. Text
    that may be the beginning of a stop string is held back. One dictionary lookup a character,
    whatever the number of stop strings (Aho and Corasick, 1975).
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._nodes = _automaton(stops)
        self._firsts = frozenset(stop[0] for stop in stops)
        self._state = 0
        self._held = ""

    def push(self, text: str) -> Found:
        """Takes the next part of the text; after a stop nothing more may be pushed."""
        if self._state == 0 and self._firsts.isdisjoint(text):
            return Found(text, None)
        nodes, state = self._nodes, self._state
        start = len(self._held)
        self._held += text
        for place, char in enumerate(text, start + 1):
            while state and char not in nodes[state].after:
                state = nodes[state].fallback
            state = nodes[state].after.get(char, 0)
            stop = nodes[state].stop
            if stop is not None:
                return Found(self._held[: place - len(stop)], stop)
        self._state = state
        certain = len(self._held) - nodes[state].depth
        text, self._held = self._held[:certain], self._held[certain:]
        return Found(text, None)

    def finish(self) -> str:
        """What was held back: the text ended without completing a stop string."""
        text, self._held, self._state = self._held, "", 0
        return text


class _Node(NamedTuple):
    depth: int  # characters of a stop string that the text ends with: the ones to hold back
    after: dict[str, int]  # next character -> node
    fallback: int  # the node of the longest proper suffix that also begins a stop string
    stop: str | None  # the longest stop string that the text ends with


def _automaton(stops: Sequence[str]) -> list[_Node]:
    nodes = [_Node(0, {}, 0, None)]
    for stop in stops:
        if not stop:
            raise InvalidRequest("a stop string must have at least one character", field="stop")
        state = 0
        for depth, char in enumerate(stop, 1):
            if char not in nodes[state].after:
                nodes[state].after[char] = len(nodes)
                nodes.append(_Node(depth, {}, 0, None))
            state = nodes[state].after[char]
        nodes[state] = nodes[state]._replace(stop=stop)
    waiting = deque(nodes[0].after.values())  # breadth first: a fallback is always shallower
    while waiting:
        state = waiting.popleft()
        for char, child in nodes[state].after.items():
            suffix = nodes[state].fallback
            while suffix and char not in nodes[suffix].after:
                suffix = nodes[suffix].fallback
            suffix = nodes[suffix].after.get(char, 0) if state else 0
            stop = nodes[child].stop or nodes[suffix].stop
            nodes[child] = nodes[child]._replace(fallback=suffix, stop=stop)
            waiting.append(child)
    return nodes
