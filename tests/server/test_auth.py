"""Who may call what: every method with every kind of credential, and what a refusal leaves."""

import asyncio
import hmac
import socket
from datetime import datetime, timedelta

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from jaxinfer.client import AsyncClient, Client
from jaxinfer.edge_config import SecurityConfig, ServerConfig
from jaxinfer.errors import ConfigError, Forbidden, Unauthenticated
from jaxinfer.server import app, auth, tokens
from jaxinfer.server.tenants import CALLER, Tenants
from jaxinfer.v1 import inference_pb2 as pb
from jaxinfer.v1 import inference_pb2_grpc
from tests.server.fake_engine import expected_text
from tests.server.serving import detail, running, running_in_thread, until

SCOPES = auth.method_scopes() | app.GATEWAY_SCOPES
STATES = ("none", "malformed", "unknown", "revoked", "other scope", "good")
UNDECLARED, MISSING = "/jaxinfer.v1.InferenceService/Undeclared", "/no.such.Service/Method"
LET_IN = (
    grpc.StatusCode.OK,
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.UNIMPLEMENTED,
)


def make_tokens(path) -> dict[str, str]:
    """A file with one token for each scope, and the tokens."""
    made = {scope: tokens.new_token() for scope in tokens.SCOPES}
    for scope, token in made.items():
        entry = tokens.entry_of(token, tenant=f"{scope}er", scopes=(scope,))
        tokens.append(path, scope, entry)
    return made


def credential(state: str, scope: str, made: dict[str, str]) -> tuple[tuple[str, str], ...]:
    """The metadata of a call in one of the states, to a method of this scope."""
    other = next(name for name in tokens.SCOPES if name != scope)
    value = {
        "none": None,
        "malformed": f"Basic {made['generate']}",
        "unknown": f"Bearer {tokens.new_token()}",
        "revoked": f"Bearer {made['revoked']}",
        "other scope": f"Bearer {made[other]}",
        "good": f"Bearer {made.get(scope, made['read'])}",
    }[state]
    return () if value is None else (("authorization", value),)


def wanted(state: str, scope: str) -> tuple[grpc.StatusCode, ...]:
    if scope == auth.OPEN or state == "good":
        return LET_IN
    if state == "other scope":
        return (grpc.StatusCode.PERMISSION_DENIED,)
    return (grpc.StatusCode.UNAUTHENTICATED,)


async def ask(wire, method, metadata=()) -> tuple[grpc.StatusCode, str]:
    """The status of a call of any kind, ended after its first reply.

    Its one message goes out with its headers: gRPC's asyncio client makes a status of its own,
    INTERNAL, of a message written to a call that has been refused meanwhile.
    """
    call = wire.unary_stream(method)(b"", metadata=metadata)
    try:
        await anext(aiter(call), None)
    except grpc.aio.AioRpcError as error:
        return error.code(), error.details()
    finally:
        call.cancel()
    return grpc.StatusCode.OK, ""


async def answer(request, call) -> bytes:
    """A handler that shows who the server thinks has asked."""
    return CALLER.get().tenant.encode()


def every_method(gates) -> grpc.aio.Server:
    """A server with a handler for each declared method, and for one that nobody declared."""
    server = grpc.aio.server(interceptors=gates)
    for path in (*SCOPES, UNDECLARED):
        _, name, method = path.split("/")
        handlers = {method: grpc.unary_unary_rpc_method_handler(answer)}
        server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler(name, handlers)])
    return server


@pytest.fixture
def file(tmp_path):
    return tmp_path / "tokens.toml"


@pytest.fixture
def made(file):
    found = make_tokens(file)
    revoked = tokens.new_token()
    for_all = tokens.entry_of(revoked, tenant="gone", scopes=tokens.SCOPES)
    tokens.append(file, "revoked", for_all)
    tokens.remove(file, "revoked")
    return found | {"revoked": revoked}


@pytest.fixture
def free_port():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


def gated(file, body):
    """Runs `body(channel)` against `every_method` behind the gate."""

    async def main():
        watched = tokens.watch(file, every_s=0.0)
        server = every_method([auth.Gate(watched.now, Tenants(), SCOPES)])
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        try:
            async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as wire:
                return await body(wire)
        finally:
            await server.stop(0)

    return asyncio.run(main())


def test_every_method_answers_every_credential_as_declared(file, made):
    async def body(wire):
        return {
            (method, state): (await ask(wire, method, credential(state, scope, made)))[0]
            for method, scope in SCOPES.items()
            for state in STATES
        }

    found = gated(file, body)
    assert len(found) == 6 * len(SCOPES) and len(SCOPES) >= 19
    wrong = {key: code for key, code in found.items() if code not in wanted(key[1], SCOPES[key[0]])}
    assert not wrong


def test_the_real_server_answers_every_credential_as_declared(file, made):
    methods = {one: scope for one, scope in SCOPES.items() if scope != "admin"}

    async def main():
        async with (
            running(security=SecurityConfig(tokens=str(file))) as server,
            grpc.aio.insecure_channel(server.target) as wire,
        ):
            return {
                (method, state): (await ask(wire, method, credential(state, scope, made)))[0]
                for method, scope in methods.items()
                for state in STATES
            }

    found = asyncio.run(main())
    assert len(methods) >= 11
    wrong = {key: code for key, code in found.items() if code not in wanted(key[1], SCOPES[key[0]])}
    assert not wrong


def test_every_service_of_the_server_has_declared_methods(file, made):
    async def main():
        metadata = credential("good", "read", made)
        async with (
            running(security=SecurityConfig(tokens=str(file))) as server,
            grpc.aio.insecure_channel(server.target) as wire,
        ):
            stub = reflection_pb2_grpc.ServerReflectionStub(wire)
            question = reflection_pb2.ServerReflectionRequest(list_services="")
            call = stub.ServerReflectionInfo(iter([question]), metadata=metadata)
            (reply,) = [reply async for reply in call]
            return {one.name for one in reply.list_services_response.service}

    assert asyncio.run(main()) <= {method.split("/")[1] for method in SCOPES}


def test_a_service_that_nobody_gave_a_scope_stops_the_start(monkeypatch):
    monkeypatch.delitem(auth.SERVICE_SCOPES, "jaxinfer.v1.ModelService")
    with pytest.raises(KeyError, match="ModelService"):
        auth.method_scopes()


def test_what_is_not_declared_is_closed_and_what_is_not_there_needs_a_token_first(file, made):
    good = credential("good", "admin", made)

    async def body(wire):
        return [
            (await ask(wire, method, metadata))[0]
            for method in (UNDECLARED, MISSING)
            for metadata in ((), good)
        ]

    unauthenticated = grpc.StatusCode.UNAUTHENTICATED
    assert gated(file, body) == [
        unauthenticated,
        grpc.StatusCode.PERMISSION_DENIED,
        unauthenticated,
        grpc.StatusCode.UNIMPLEMENTED,
    ]


def test_the_handler_learns_who_asks_and_the_next_call_does_not_inherit_it(file, made):
    method = "/jaxinfer.v1.InferenceService/Tokenize"

    async def body(wire):
        call = wire.unary_unary(method)
        said = await call(b"", metadata=credential("good", "generate", made))
        health = wire.unary_unary("/grpc.health.v1.Health/Check")
        return said, await health(b"")

    assert gated(file, body) == (b"generateer", b"")


def test_a_refusal_does_not_depend_on_how_much_of_a_token_is_right(file, made, monkeypatch):
    token = made["generate"]
    presented = [
        tokens.new_token(),
        token[:-1] + ("A" if token[-1] != "A" else "B"),
        token[:10],
        token + "A",
        "x",
        "é" * 20,
    ]
    found = tokens.read(file)
    compared: list[tuple[int, int]] = []
    real = hmac.compare_digest

    def counting(left, right):
        compared.append((len(left), len(right)))
        return real(left, right)

    monkeypatch.setattr(hmac, "compare_digest", counting)
    for guess in (*presented, token):
        compared.clear()
        assert (found.find(guess) is None) is (guess != token)
        assert compared == [(64, 64)] * len(found.tokens)

    async def body(wire):
        method = "/jaxinfer.v1.InferenceService/Generate"
        ascii_only = [guess for guess in presented if guess.isascii()]
        return {
            await ask(wire, method, (("authorization", f"Bearer {guess}"),)) for guess in ascii_only
        }

    (said,) = gated(file, body)
    assert said[0] is grpc.StatusCode.UNAUTHENTICATED
    assert "jxi_" not in said[1]


def test_two_tokens_in_one_call_are_none(file, made):
    pair = credential("good", "generate", made) * 2

    async def body(wire):
        return (await ask(wire, "/jaxinfer.v1.InferenceService/Generate", pair))[0]

    assert gated(file, body) is grpc.StatusCode.UNAUTHENTICATED


@pytest.mark.parametrize(
    ("scope", "kind", "reason"),
    [("", Unauthenticated, "UNAUTHENTICATED"), ("read", Forbidden, "FORBIDDEN")],
)
def test_clients_get_errors_of_their_own(file, made, scope, kind, reason):
    token = made.get(scope)

    async def main():
        security = SecurityConfig(tokens=str(file))
        async with running(security=security) as server:
            async with AsyncClient(server.target, token=token) as client:
                with pytest.raises(kind) as caught:
                    await client.generate("a")
                info = detail(caught.value.__cause__, error_details_pb2.ErrorInfo)
                assert (info.reason, info.domain) == (reason, "jaxinfer")
                assert await client.health() == "SERVING"
            async with AsyncClient(server.target, token=made["generate"]) as client:
                assert (await client.generate("a", seed=0)).text == expected_text("a", 8)
                events = [event async for event in client.stream("a", seed=0)]
                assert events[-1].completion.text == expected_text("a", 8)

    asyncio.run(main())


def test_the_sync_client_shows_its_token_on_every_call(file, made):
    with running_in_thread(security=SecurityConfig(tokens=str(file))) as server:
        with Client(server.target, token=made["generate"]) as client:
            assert client.generate("a", seed=0).text == expected_text("a", 8)
            assert list(client.stream("a", seed=0))[-1].completion.text == expected_text("a", 8)
            assert client.detokenize(client.tokenize("abc")) == "abc"
            with pytest.raises(Forbidden, match="'read'"):
                client.models()
        with Client(server.target, token=made["read"]) as client:
            assert client.model() == client.models()[0]


def test_a_token_that_was_cut_or_quoted_is_refused_before_it_is_sent():
    for token in ("jxi_a b", "jxi_\n", "“jxi_”"):
        with pytest.raises(ConfigError, match="cut or quoted"):
            Client("127.0.0.1:1", token=token)


def test_a_cancelled_stream_leaves_no_task_behind(file, made):
    metadata = credential("good", "generate", made)

    async def main():
        async with (
            running(security=SecurityConfig(tokens=str(file)), step_s=0.002) as server,
            grpc.aio.insecure_channel(server.target) as wire,
        ):
            stub = inference_pb2_grpc.InferenceServiceStub(wire)
            await stub.Generate(pb.GenerateRequest(text="a"), metadata=metadata)
            await asyncio.sleep(0.05)
            before = asyncio.all_tasks()
            message = pb.GenerateStreamRequest(text="a", stopping={"max_tokens": 400})
            calls = [stub.GenerateStream(message, metadata=metadata) for _ in range(32)]
            refused = [stub.GenerateStream(message) for _ in range(32)]
            for call in calls:
                assert (await anext(aiter(call))).HasField("started")
            assert len(asyncio.all_tasks() - before) >= 32
            for call in (*calls, *refused):
                call.cancel()
            del call, calls, refused
            await until(lambda: len(asyncio.all_tasks()) <= len(before))  # one waits for a call

    asyncio.run(main())


def test_a_new_token_is_taken_and_a_revoked_one_refused_without_a_restart(file, made):
    token = tokens.new_token()
    metadata = (("authorization", f"Bearer {token}"),)
    method = "/jaxinfer.v1.InferenceService/Generate"

    async def body(wire):
        codes = [(await ask(wire, method, metadata))[0]]
        tokens.append(file, "fresh", tokens.entry_of(token, tenant="t", scopes=("generate",)))
        codes.append((await ask(wire, method, metadata))[0])
        file.write_text(file.read_text() + "\n[tokens.broken]\n")  # the ones before it stay
        codes.append((await ask(wire, method, metadata))[0])
        file.write_text(file.read_text().replace("\n[tokens.broken]\n", ""))
        tokens.remove(file, "fresh")
        codes.append((await ask(wire, method, metadata))[0])
        return codes

    ok, refused = grpc.StatusCode.OK, grpc.StatusCode.UNAUTHENTICATED
    assert gated(file, body) == [refused, ok, ok, refused]


def test_the_admin_port_asks_for_a_token_with_its_scope(file, made, free_port):
    config = ServerConfig(port=0, admin_port=free_port)

    async def main():
        async with (
            running(config=config, security=SecurityConfig(tokens=str(file))),
            grpc.aio.insecure_channel(f"127.0.0.1:{free_port}") as wire,
        ):
            method = "/jaxinfer.v1.AdminService/GetLoad"
            return [
                (await ask(wire, method, credential(state, "admin", made)))[0]
                for state in ("none", "other scope", "good")
            ]

    assert asyncio.run(main()) == [
        grpc.StatusCode.UNAUTHENTICATED,
        grpc.StatusCode.PERMISSION_DENIED,
        grpc.StatusCode.OK,
    ]


def test_an_expired_token_is_refused_and_told_so(tmp_path):
    path, token = tmp_path / "tokens.toml", tokens.new_token()
    ends = "2027-01-01T00:00:00+00:00"
    entry = tokens.entry_of(token, tenant="a", scopes=("generate",), expires=ends)
    tokens.append(path, "one", entry)
    now = [datetime.fromisoformat(ends) - timedelta(seconds=1)]
    gate = auth.Gate(tokens.watch(path).now, Tenants(), now=lambda: now[0])

    async def main():
        server = every_method([gate])
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        method = "/jaxinfer.v1.InferenceService/Generate"
        shown = (("authorization", f"Bearer {token}"),)
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as wire:
            before = await ask(wire, method, shown)
            now[0] += timedelta(seconds=1)
            after = await ask(wire, method, shown)
        await server.stop(None)
        return before, after

    (before, _), (after, says) = asyncio.run(main())
    assert before is grpc.StatusCode.OK and after is grpc.StatusCode.UNAUTHENTICATED
    assert f"expired on {ends}" in says and token not in says
