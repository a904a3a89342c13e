"""What the self-test of a start has found, kept beside the programs that it was found of."""

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from jaxinfer.compile import Programs
from jaxinfer.store import Key, Store


@dataclass(frozen=True)
class SelfTest:
    """Which programs of an engine give the same bits for the same tokens."""

    num_tokens: int
    """Tokens of the sequence that went through all of them; 0 where nothing was compared."""
    groups: tuple[tuple[str, ...], ...] = ()
    """Programs by name; those in one group give the same tokens, logprobs, keys and values."""
    unsteady: tuple[str, ...] = ()
    """Programs whose bits for a row change with its place or its neighbours."""
    dropped: tuple[str, ...] = ()
    """Programs that are not used, because others give other bits."""
    seconds: float = 0.0
    is_recalled: bool = False
    """An earlier start compared these very executables; this one only ran each of them."""

    @property
    def is_exact(self) -> bool:
        """Whether every answer has the same bits, alone or beside others, whatever happens."""
        return bool(self.num_tokens) and not self.broken_promises

    @property
    def broken_promises(self) -> tuple[str, ...]:
        """What is not promised, in plain words."""
        left = [set(group) - set(self.dropped) for group in self.groups]
        said = []
        if steady := [name for name in self.unsteady if name not in self.dropped]:
            said.append(
                f"{', '.join(steady)} gives a row other bits in another place or beside others: "
                "an answer may depend on what runs beside it"
            )
        if sum(map(bool, left)) > 1:
            said.append(
                "prefill and decode give other bits for the same tokens: a request that was "
                "interrupted and goes on, or that finds its beginning in the prefix cache, may "
                "get another answer than one that was not"
            )
        return tuple(said)


def key_of(programs: Programs, test: Path) -> Key:
    """All that a verdict depends on: each program with all that it depends on, and the test."""
    keys = {shape.name: program.key for shape, program in programs.items()}
    return {**keys, "test": hashlib.sha256(test.read_bytes()).hexdigest()}


def recall(store: Store | None, key: Key, programs: Programs) -> SelfTest | None:
    """What an earlier start found of these very executables; None where one was just compiled."""
    if store is None or not all(program.load_s for program in programs.values()):
        return None
    kept = store.recall(key)
    return None if kept is None else _read(kept)


def remember(store: Store, key: Key, report: SelfTest) -> None:
    """Keeps a verdict for the next start."""
    store.remember(key, asdict(report))


def _read(kept: Mapping[str, Any]) -> SelfTest:
    return SelfTest(
        num_tokens=kept["num_tokens"],
        groups=tuple(map(tuple, kept["groups"])),
        unsteady=tuple(kept["unsteady"]),
        dropped=tuple(kept["dropped"]),
        is_recalled=True,
    )
