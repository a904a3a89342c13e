"""Every rank but the first: the same engine, run on the log of rank 0."""

import threading
from collections.abc import Callable
from dataclasses import replace

from jaxinfer import config as settings
from jaxinfer import replay
from jaxinfer.cluster import build, group
from jaxinfer.cluster.build import Meeting
from jaxinfer.cluster.log import Digests, Followed
from jaxinfer.cluster.process import DONE, Process
from jaxinfer.config import JournalConfig
from jaxinfer.engine import Engine
from jaxinfer.errors import GroupRefused, JaxinferError
from jaxinfer.host.plain import Record
from jaxinfer.replay import Conditions


class Replica:
    """An engine that takes its steps from a log. Its clock is the log's."""

    def __init__(
        self, engine: Engine, conditions: Conditions, told: Callable[[int, str], None]
    ) -> None:
        self._engine = engine
        self._conditions = conditions
        self._names: dict[int, str] = {}
        engine.journal = Followed(Digests(told))

    def step(self, inputs: Record) -> None:
        """The same step that rank 0 begins now."""
        self._conditions.begin(inputs)
        for event in inputs.get("events", ()):
            replay.apply(event, self._engine, self._names)
        outputs = self._engine.step(drain="drain" in inputs, pace=self._conditions.pace)
        ended = {one.request_id for one in outputs if one.finish_reason is not None}
        if ended:
            self._names = {order: name for order, name in self._names.items() if name not in ended}

    def score(self, tokens: list[int], start: int) -> None:
        """The same part of a text that rank 0 scores now."""
        assert self._engine.scorer is not None, "rank 0 has the same settings"
        self._engine.scorer.part(tokens, start)


def run(process: Process) -> None:
    """Joins, loads, and follows until the group ends."""
    spec, config = process.spec, process.config
    threading.Thread(target=process.until_told, name="stdin", daemon=True).start()
    member = group.Follower(
        (spec.host, spec.port),
        bytes.fromhex(spec.key),
        rank=spec.rank,
        about=build.about(),
        lost=process.lost,
        timeout_s=config.cluster.start_limit_s,
    )
    kind, begin = member.next()
    if kind != "begin":
        raise GroupRefused(f"rank 0 began with {kind!r}")
    try:
        replica = _load(process, member, begin)
        member.settle()
        process.say("ready")
        while True:
            match member.next():
                case ["step", dict(inputs)]:
                    replica.step(inputs)
                case ["score", list(tokens), int(start)]:
                    replica.score(tokens, start)
                case ["bye"]:
                    process.end(DONE)
                case message:
                    raise GroupRefused(f"rank 0 sent {message[0]!r}, which is unknown here")
    except JaxinferError as error:
        member.failed(str(error))
        raise


def _load(process: Process, member: group.Follower, begin: Record) -> Replica:
    spec = process.spec
    config = settings.load_over(begin["settings"], name="rank 0's settings", environ={})
    config = replace(config, journal=JournalConfig())
    build.meet(config, Meeting(begin["meet"], spec.rank, spec.size, spec.place, spec.num_here))
    conditions = Conditions()
    loaded = build.load(config, member.agree, is_fresh=begin["is_fresh"], clock=conditions.clock)
    return Replica(loaded.engine, conditions, member.digest)
