"""What operators do to a server: the handlers of AdminService, on a port of loopback's own."""

import asyncio
import math
import time
from collections.abc import Callable, Iterable
from typing import Any

import grpc

import jaxinfer
from jaxinfer.errors import InvalidRequest, OutOfTurn, UnknownRequest
from jaxinfer.server import translate
from jaxinfer.server.facts import Facts
from jaxinfer.server.health import Door
from jaxinfer.server.hub import Hub
from jaxinfer.server.profiling import Profiler
from jaxinfer.server.served import EngineLike, ServedModel
from jaxinfer.server.status import Call, Reported
from jaxinfer.server.watch import Watch
from jaxinfer.v1 import admin_pb2 as pb

NAME = pb.DESCRIPTOR.services_by_name["AdminService"].full_name
MAX_PROFILE_S = 600.0
PROFILE_S = 10.0
POLL_S = 0.02

Explain = Callable[[str], Iterable[pb.Happening] | None]
"""What happened to a request, by its id; None for one that is not known."""


class Admin:
    """AdminService of one server."""

    def __init__(
        self,
        served: ServedModel,
        engine: EngineLike,
        hub: Hub,
        door: Door,
        watch: Watch,
        *,
        facts: Facts,
        profiler: Profiler,
        explain: Explain | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._served = served
        self._engine = engine
        self._hub = hub
        self._door = door
        self._watch = watch
        self._facts = facts
        self._profiler = profiler
        self._explain = explain
        self._clock = clock
        self._began_s = clock()

    def handlers(self) -> grpc.GenericRpcHandler:
        """What a grpc.aio server dispatches to."""
        behaviours = {
            "GetServerInfo": self.get_server_info,
            "GetLoad": self.get_load,
            "ExplainRequest": self.explain_request,
            "Abort": self.abort,
            "Drain": self.drain,
            "Resume": self.resume,
            "FlushPrefixCache": self.flush_prefix_cache,
            "StartProfile": self.start_profile,
            "StopProfile": self.stop_profile,
            "RotateJournal": self.rotate_journal,
        }
        return grpc.method_handlers_generic_handler(
            NAME, {name: _unary(behaviour) for name, behaviour in behaviours.items()}
        )

    async def get_server_info(self, data: bytes, call: Call) -> pb.GetServerInfoResponse:
        async with Reported(call):
            translate.parse(pb.GetServerInfoRequest, data)
            return pb.GetServerInfoResponse(
                version=jaxinfer.__version__,
                model=self._served.name,
                device=self._facts.device,
                config_toml=self._facts.config_toml,
                programs=self._facts.programs,
                uptime_s=self._clock() - self._began_s,
                num_compiles_after_start=self._engine.stats().num_compiles_after_start,
                broken_promises=self._facts.broken_promises,
            )

    async def get_load(self, data: bytes, call: Call) -> pb.GetLoadResponse:
        async with Reported(call):
            translate.parse(pb.GetLoadRequest, data)
            stats = self._engine.stats()
            return pb.GetLoadResponse(
                is_serving=self._door.is_serving,
                is_draining=self._door.is_draining,
                num_waiting=stats.num_waiting,
                num_running=stats.num_running,
                num_slots=stats.num_slots,
                num_pages=stats.num_pages,
                num_free_pages=stats.num_free_pages,
                num_cached_pages=stats.num_cached_pages,
                num_steps=stats.num_steps,
                num_output_tokens=stats.num_output_tokens,
                num_preemptions=stats.num_preemptions,
                stalled_s=self._watch.stalled_s,
                live_request_ids=self._hub.live,
            )

    async def explain_request(self, data: bytes, call: Call) -> pb.ExplainRequestResponse:
        async with Reported(call):
            message = translate.parse(pb.ExplainRequestRequest, data)
            if self._explain is None:
                raise OutOfTurn("this server keeps no timelines, so it can't explain a request")
            # A request of many thousand steps takes tens of milliseconds to tell.
            happenings = await asyncio.to_thread(self._explain, message.request_id)
            if happenings is None:
                raise UnknownRequest(
                    f"no request {message.request_id!r} is live or among the last that ended",
                    field="request_id",
                )
            return pb.ExplainRequestResponse(
                request_id=message.request_id, happenings=list(happenings)
            )

    async def abort(self, data: bytes, call: Call) -> pb.AbortResponse:
        async with Reported(call):
            message = translate.parse(pb.AbortRequest, data)
            if message.all and message.request_ids:
                raise InvalidRequest("give request_ids or all, not both", field="request_ids")
            if not message.all and not message.request_ids:
                raise InvalidRequest(
                    "say which requests to end: request_ids, or all", field="request_ids"
                )
            names = self._hub.abort(self._hub.live if message.all else message.request_ids)
            for name in names:
                self._engine.cancel(name)
            return pb.AbortResponse(request_ids=names)

    async def drain(self, data: bytes, call: Call) -> pb.DrainResponse:
        async with Reported(call):
            message = translate.parse(pb.DrainRequest, data)
            wait_s = _seconds(message.wait_s, "wait_s")
            self._door.drain()
            end_s = self._clock() + wait_s
            while self._hub.live and self._door.is_draining and self._clock() < end_s:
                await asyncio.sleep(POLL_S)
            return pb.DrainResponse(num_live=len(self._hub.live))

    async def resume(self, data: bytes, call: Call) -> pb.ResumeResponse:
        async with Reported(call):
            translate.parse(pb.ResumeRequest, data)
            self._door.resume()
            return pb.ResumeResponse()

    async def flush_prefix_cache(self, data: bytes, call: Call) -> pb.FlushPrefixCacheResponse:
        async with Reported(call):
            translate.parse(pb.FlushPrefixCacheRequest, data)
            num_pages = await self._ask(lambda engine: engine.flush_prefix_cache())
            return pb.FlushPrefixCacheResponse(num_pages=num_pages)

    async def start_profile(self, data: bytes, call: Call) -> pb.StartProfileResponse:
        async with Reported(call):
            message = translate.parse(pb.StartProfileRequest, data)
            max_s = message.max_s if message.HasField("max_s") else PROFILE_S
            if not 0 < max_s <= MAX_PROFILE_S:
                raise InvalidRequest(
                    f"max_s is {max_s}; it must be above 0 and at most {MAX_PROFILE_S:g}",
                    field="max_s",
                )
            return pb.StartProfileResponse(folder=str(await self._profiler.start(max_s)))

    async def stop_profile(self, data: bytes, call: Call) -> pb.StopProfileResponse:
        async with Reported(call):
            translate.parse(pb.StopProfileRequest, data)
            return pb.StopProfileResponse(folder=str(await self._profiler.stop()))

    async def rotate_journal(self, data: bytes, call: Call) -> pb.RotateJournalResponse:
        async with Reported(call):
            translate.parse(pb.RotateJournalRequest, data)
            before = await self._ask(lambda engine: engine.rotate_journal())
            if before is None:
                raise OutOfTurn("no journal is kept; set journal.folder and start again")
            # The step that follows a call leaves nothing under way and begins the new segment.
            if await self._ask(lambda engine: engine.journal.path) == before:
                raise OutOfTurn(
                    f"the journal has stopped and {before} is its last segment; the log says why"
                )
            return pb.RotateJournalResponse(path=str(before))

    async def _ask(self, function: Callable[[Any], Any]) -> Any:
        return await asyncio.wrap_future(self._engine.ask(function))


def _seconds(value: float, field: str) -> float:
    if not 0 <= value < math.inf:
        raise InvalidRequest(f"{field} is {value}; it must be at least 0 and finite", field=field)
    return value


def _unary(behaviour: Any) -> grpc.RpcMethodHandler:
    return grpc.unary_unary_rpc_method_handler(behaviour, response_serializer=_to_bytes)


def _to_bytes(message: Any) -> bytes:
    return message.SerializeToString()
