"""Hostile messages: each gets a status of the table, says nothing it should not, and hurts no one.

Most go to the handlers without a socket, as bytes; a smaller part goes over real gRPC.
"""

import asyncio
import collections
import re
from functools import cache
from typing import Any

import grpc
import pytest
import tokenizers
from google.rpc import error_details_pb2, status_pb2

from jaxinfer.server.hub import Hub
from jaxinfer.server.served import ServedModel
from jaxinfer.server.service import NAMES, Service
from jaxinfer.server.status import DETAILS_KEY
from jaxinfer.text.assets import TextAssets
from jaxinfer.text.tokenizer import Tokenizer
from jaxinfer.v1 import inference_pb2 as pb
from tests.server import hostile
from tests.server.fake_engine import CONFIG, LIMITS, MODEL, FakeEngine, expected_text, served
from tests.server.serving import with_stub

ALLOWED = {grpc.StatusCode.OK, grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.NOT_FOUND}
ALLOWED |= {grpc.StatusCode.ALREADY_EXISTS}  # two at once under one id
PATH = {name: NAMES[name in ("ListModels", "GetModel")] for name in hostile.METHODS}
TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% for c in m.tool_calls or [] %}"
    "{{ c.name ~ c['arguments'] | tojson }}{% endfor %}{% endfor %}{{ tools | tojson }}"
)
# What Python says of itself; a client's own words come back in quotes and are left out.
LEAKS = re.compile(
    r"0x[0-9a-f]{6,}|/\w+/\w+\.py|site-packages|Traceback|\b[A-Z]\w+Error\b|NoneType"
)


class Ended(Exception):
    """What ends a handler after its abort."""


class Heard:
    """A call without a socket: it keeps the status."""

    def __init__(self) -> None:
        self.code = grpc.StatusCode.OK
        self.text = ""
        self.details = status_pb2.Status()
        self._callbacks: list[Any] = []

    def time_remaining(self) -> float | None:
        return None

    def add_done_callback(self, callback: Any) -> None:
        self._callbacks.append(callback)

    async def abort(self, code: grpc.StatusCode, details: str = "", trailing_metadata: Any = ()):
        self.code, self.text = code, details
        self.details = status_pb2.Status.FromString(dict(trailing_metadata)[DETAILS_KEY])
        raise Ended

    def end(self) -> None:
        for callback in self._callbacks:
            callback(self)


async def ask(service: Service, message: hostile.Hostile) -> Heard:
    """One message through a handler, as gRPC would call it."""
    heard = Heard()
    name = re.sub("(?<!^)([A-Z])", r"_\1", message.method).lower()
    try:
        reply = getattr(service, name)(message.data, heard)
        if message.method == "GenerateStream":
            async for event in reply:
                pb.GenerateStreamResponse.FromString(event)
        else:
            (await reply).SerializeToString()
    except Ended:
        pass
    finally:
        heard.end()
    return heard


def check(heard: Heard, message: hostile.Hostile) -> None:
    """The status is one of the table, with its details, and leaks nothing."""
    assert heard.code in ALLOWED, (message, heard.code, heard.text)
    if heard.code is grpc.StatusCode.OK:
        return
    own_words = re.sub(r"'(?:[^'\\]|\\.)*'?", "''", heard.text)
    assert not LEAKS.search(own_words), (message, heard.text)
    assert len(heard.text.encode()) <= 500 and heard.details.ByteSize() < 2500
    found = error_details_pb2.BadRequest()
    for packed in heard.details.details:
        packed.Unpack(found)
    assert found.field_violations and found.field_violations[0].field, (message, heard.text)
    assert found.field_violations[0].description


@cache
def byte_level() -> Tokenizer:
    """One token for each byte, by the real library, with a real template."""
    letters = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    model = tokenizers.models.BPE({letter: place for place, letter in enumerate(letters)}, [])
    made = tokenizers.Tokenizer(model)
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    return Tokenizer(TextAssets(made.to_str(), TEMPLATE))


def models() -> list[ServedModel]:
    """Both tokenizers: one that checks nothing, and a real one with a real template."""
    return [served(), ServedModel(MODEL, CONFIG, byte_level(), LIMITS, served().defaults)]


async def run(seed: int, count: int, model: ServedModel) -> collections.Counter:
    """So many through the handlers of one model, sixteen at once."""
    hub = Hub(asyncio.get_running_loop())
    engine = FakeEngine(hub.deliver)
    engine.start()
    service = Service(model, engine, hub)
    codes: collections.Counter = collections.Counter()
    left = iter(list(hostile.messages(seed, count)))

    async def worker() -> None:
        for message in left:
            heard = await ask(service, message)
            check(heard, message)
            codes[heard.code.name] += 1

    good = hostile.Hostile(
        "Generate", pb.GenerateRequest(text="a", sampling={"seed": 1}).SerializeToString(), "good"
    )
    before = await ask(service, good)
    await asyncio.gather(*(worker() for _ in range(16)))
    assert (await ask(service, good)).code is before.code is grpc.StatusCode.OK
    assert hub.live == [], "a request is left behind"
    engine.stop()
    return codes


def every_kind_of_end(codes: collections.Counter) -> None:
    """The generator would be no test if all were refused, or none."""
    total = sum(codes.values())
    assert codes["OK"] > total / 20 and codes["INVALID_ARGUMENT"] > total / 4, codes
    assert codes["NOT_FOUND"], codes


@pytest.mark.parametrize("place", [0, 1])
def test_handlers_hold_under_hostile_messages(place):
    every_kind_of_end(asyncio.run(run(place, 2_250, models()[place])))


@pytest.mark.full
def test_handlers_hold_under_a_hundred_thousand():
    codes: collections.Counter = collections.Counter()
    for seed in range(10):
        codes += asyncio.run(run(100 + seed, 10_000, models()[seed % 2]))
    print(dict(codes))
    every_kind_of_end(codes)


def test_over_grpc_hostile_messages_get_the_same_ends():
    async def body(stub, server):
        good = pb.GenerateRequest(text="hello", sampling={"seed": 4})
        before = await stub.Generate(good)
        async with grpc.aio.insecure_channel(server.target) as wire:
            for message in hostile.messages(77, 500):
                path = f"/{PATH[message.method]}/{message.method}"
                kind = wire.unary_unary if message.method != "GenerateStream" else wire.unary_stream
                try:
                    call = kind(path)(message.data)
                    if message.method == "GenerateStream":
                        async for _ in call:
                            pass
                    else:
                        await call
                except grpc.aio.AioRpcError as error:
                    assert error.code() in ALLOWED, (message, error)
                    assert DETAILS_KEY in dict(error.trailing_metadata() or ())
        after = await stub.Generate(good)
        assert (after.output, after.finished) == (before.output, before.finished)
        assert after.output.text == expected_text("hello", 8, seed=4)
        assert server.server._hub.live == []

    with_stub(body)


def test_a_message_beyond_the_bound_is_resource_exhausted():
    async def body(stub, server):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.Generate(pb.GenerateRequest(text="x" * (5 << 20)))
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert (await stub.Generate(pb.GenerateRequest(text="a"))).output.text

    with_stub(body)
