"""Quotas on a clock of the test's own, fair turns, and what tenants never share."""

import asyncio
from functools import partial

import grpc
import pytest
from google.rpc import error_details_pb2
from hypothesis import given
from hypothesis import strategies as st

from jaxinfer.client import AsyncClient
from jaxinfer.edge_config import SecurityConfig, ServerConfig
from jaxinfer.engine_config import CacheConfig
from jaxinfer.errors import ConfigError, Forbidden, QueueFull, QuotaExceeded
from jaxinfer.host.request import JAXINFER_DEFAULTS
from jaxinfer.runner import EngineThread
from jaxinfer.server import tokens
from jaxinfer.server.app import Server
from jaxinfer.server.served import ServedModel
from jaxinfer.server.tenants import ANYONE, Bucket, Caller, FairQueue, Quota, Tenants
from jaxinfer.v1 import inference_pb2 as pb
from jaxinfer.v1 import inference_pb2_grpc
from tests import tiny
from tests.server.fake_engine import FakeTokenizer, expected_text
from tests.server.serving import detail, refused, running, until


class Clock:
    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def caller(tenant: str = "a", **quota) -> Caller:
    return Caller(tenant, frozenset({"generate"}), Quota(**quota))


def test_calls_come_at_their_rate_after_a_burst_of_one_second():
    clock = Clock()
    tenants, one = Tenants(clock=clock), caller(requests_per_s=4.0)
    for _ in range(4):
        tenants.count_call(one)
    with pytest.raises(QuotaExceeded, match="tenant 'a'.*requests_per_s = 4") as caught:
        tenants.count_call(one)
    assert caught.value.retry_after_s == pytest.approx(0.25)
    tenants.count_call(caller("b", requests_per_s=4.0))
    clock.now_s += 0.25
    tenants.count_call(one)
    with pytest.raises(QuotaExceeded):
        tenants.count_call(one)


@given(
    rate=st.floats(0.1, 1000.0),
    gaps=st.lists(st.floats(0.0, 2.0), min_size=1, max_size=60),
)
def test_no_pattern_of_calls_gets_more_than_rate_and_burst(rate, gaps):
    clock = Clock()
    tenants, taken = Tenants(clock=clock), 0
    for gap in gaps:
        clock.now_s += gap
        try:
            tenants.count_call(caller(requests_per_s=rate))
            taken += 1
        except QuotaExceeded as error:
            assert 0 < error.retry_after_s <= 1 / rate + 1e-6
    assert taken <= max(1.0, rate) + rate * sum(gaps) + 1e-6


def test_who_waits_as_long_as_told_is_taken():
    clock = Clock()
    bucket = Bucket(100.0, 2.0, 0.0)
    bucket.take(100.0)
    wait_s = bucket.wait_s(30.0, clock())
    assert wait_s == pytest.approx(15.0)
    assert bucket.wait_s(30.0, wait_s + 1e-9) == 0


def test_a_request_larger_than_the_bucket_is_taken_when_it_is_full():
    bucket = Bucket(10.0, 1.0, 0.0)
    assert bucket.wait_s(50.0, 0.0) == 0
    bucket.take(50.0)
    assert bucket.wait_s(1.0, 0.0) == pytest.approx(41.0)


def test_tokens_that_were_asked_for_and_not_made_are_given_back():
    clock = Clock()
    tenants, one = Tenants(clock=clock), caller(tokens_per_minute=100)
    lease = tenants.begin(one, 20, 80)
    with pytest.raises(QuotaExceeded, match="tokens_per_minute = 100"):
        tenants.begin(one, 1, 1)
    lease.num_output_tokens = lambda: 5
    lease.end()
    lease.end()  # twice is once
    tenants.begin(one, 25, 50)
    with pytest.raises(QuotaExceeded) as caught:
        tenants.begin(one, 1, None)
    assert caught.value.retry_after_s == pytest.approx(60 / 100)


def test_an_answer_without_a_bound_is_paid_for_when_it_is_there():
    clock = Clock()
    tenants, one = Tenants(clock=clock), caller(tokens_per_minute=60)
    lease = tenants.begin(one, 10, None)
    lease.num_output_tokens = lambda: 100
    lease.end()
    with pytest.raises(QuotaExceeded) as caught:
        tenants.begin(one, 1, None)
    assert caught.value.retry_after_s == pytest.approx(51.0)
    clock.now_s = 51.1
    tenants.begin(one, 1, None)


def test_what_the_engine_did_not_take_costs_nothing():
    tenants, one = Tenants(clock=Clock()), caller(tokens_per_minute=100, concurrent=1)
    for _ in range(3):
        with pytest.raises(QueueFull), tenants.begin(one, 60, 40):
            raise QueueFull("full")
    assert tenants.num_live("a") == 0


def test_so_many_at_once_and_no_more():
    tenants, one = Tenants(clock=Clock()), caller(concurrent=2)
    first, _ = (tenants.begin(one, 5, 5) for _ in range(2))
    with pytest.raises(QuotaExceeded, match="concurrent = 2"):
        tenants.begin(one, 5, 5)
    tenants.begin(caller("b", concurrent=2), 5, 5)
    first.end()
    tenants.begin(one, 5, 5)


def test_a_quota_below_zero_or_without_end_is_refused():
    for wrong in ({"concurrent": -1}, {"requests_per_s": float("inf")}):
        with pytest.raises(ConfigError):
            Quota(**wrong)


def test_turns_interleave_tenants_by_what_they_asked_for():
    queue, live = FairQueue(), []
    for number in range(10):
        live.append(queue.turn("a", 100, live))
        assert live[-1] == 100 * number
    assert queue.turn("b", 300, live) == 0
    assert queue.turn("b", 300, live) == 300
    live = live[4:]
    assert queue.turn("c", 10, live) == 400, "who was away saves nothing up"
    assert queue.turn("a", 100, live) == 1000


def test_one_tenant_alone_is_served_in_order_and_so_is_nobody():
    queue = FairQueue()
    turns = [queue.turn("a", 7) for _ in range(5)]
    assert turns == sorted(turns) and len(set(turns)) == 5
    tenants = Tenants(clock=Clock())
    assert {tenants.begin(ANYONE, 10, 10).turn for _ in range(5)} == {0}


def test_what_ended_moves_the_turns_of_those_who_come():
    tenants = Tenants(clock=Clock())
    leases = [tenants.begin(caller("a"), 50, 50) for _ in range(4)]
    assert tenants.begin(caller("b"), 5, 5).turn == 0
    tenants = Tenants(clock=Clock())
    leases = [tenants.begin(caller("a"), 50, 50) for _ in range(4)]
    leases[0].end()
    leases[1].end()
    assert tenants.begin(caller("b"), 5, 5).turn == leases[2].turn == 200


def test_the_line_always_has_room_for_one_more_tenant():
    tenants = Tenants(clock=Clock(), line=12)

    def flood(name: str) -> int:
        for count in range(100):
            try:
                tenants.begin(caller(name), 5, 5)
            except QuotaExceeded as error:
                assert "share of the line" in str(error)
                return count
        raise AssertionError("no end")

    assert [flood(name) for name in ("a", "b", "c")] == [6, 3, 2]
    unnamed = Tenants(clock=Clock(), line=2)
    assert {unnamed.begin(ANYONE, 5, 5).turn for _ in range(9)} == {0}


def test_salts_and_ids_of_tenants_never_meet():
    names = ["a", "b", "a:", "1", "1:a", ""]
    callers = [Caller(name) for name in names]
    salts = {(name.salt(salt)) for name in callers for salt in ("", "a", "1:a", ":")}
    authed = {name.salt(salt) for name in callers[:-1] for salt in ("", "a", "1:a", ":")}
    assert len(authed) == 5 * 4 and len(salts) >= len(authed)
    assert {one.request_id("x") for one in callers[:2]} == {"a/x", "b/x"}
    assert ANYONE.request_id("x") == "x" and ANYONE.salt("s") == "s"


class Tokens:
    """A file with a token for each tenant, and the quotas."""

    def __init__(self, path, quotas: str = "", *, scopes=("generate",)) -> None:
        self.path, self.by_tenant = path, {}
        for tenant in ("acme", "beta"):
            self.by_tenant[tenant] = tokens.new_token()
            entry = tokens.entry_of(self.by_tenant[tenant], tenant=tenant, scopes=scopes)
            tokens.append(path, tenant, entry)
        path.write_text(path.read_text() + quotas)

    @property
    def security(self) -> SecurityConfig:
        return SecurityConfig(tokens=str(self.path))

    def metadata(self, tenant: str = "acme"):
        return (("authorization", f"Bearer {self.by_tenant[tenant]}"),)


def over_the_wire(known: Tokens, body, **options):
    async def main():
        async with (
            running(security=known.security, **options) as server,
            grpc.aio.insecure_channel(server.target) as wire,
        ):
            await body(inference_pb2_grpc.InferenceServiceStub(wire), server)

    asyncio.run(main())


@pytest.mark.parametrize(
    ("quota", "key", "longest_s"),
    [
        ("requests_per_s = 0.01", "requests_per_s", 100.0),
        ("tokens_per_minute = 6000", "tokens_per_minute", 60.0),
        ("concurrent = 1", "concurrent", 1.0),
    ],
)
def test_a_quota_over_the_wire_says_when_to_ask_again(tmp_path, quota, key, longest_s):
    known = Tokens(tmp_path / "tokens.toml", f"\n[tenants.acme]\n{quota}\n")

    async def body(stub, server):
        message = pb.GenerateStreamRequest(text="a", stopping={"max_tokens": 400})
        first = stub.GenerateStream(message, metadata=known.metadata())
        assert (await anext(aiter(first))).HasField("started")
        server.server._tenants._tokens.get(("acme", 6000), Bucket(0.0, 1.0, 0.0)).take(9000.0)
        again = stub.Generate(pb.GenerateRequest(text="a"), metadata=known.metadata())
        error = await refused(again, grpc.StatusCode.RESOURCE_EXHAUSTED)
        assert detail(error, error_details_pb2.ErrorInfo).reason == "QUOTA_EXCEEDED"
        retry_s = detail(error, error_details_pb2.RetryInfo).retry_delay.ToTimedelta()
        assert 0 < retry_s.total_seconds() <= longest_s
        (violation,) = detail(error, error_details_pb2.QuotaFailure).violations
        assert violation.subject == "tenant:acme" and key in violation.description
        pushback = dict(error.trailing_metadata())["grpc-retry-pushback-ms"]
        assert retry_s.total_seconds() * 1000 <= int(pushback) <= 1000 * longest_s + 1
        other = stub.Generate(pb.GenerateRequest(text="a"), metadata=known.metadata("beta"))
        assert (await other).finished.reason
        first.cancel()

    over_the_wire(known, body, step_s=0.005)


def test_a_place_comes_free_when_its_call_ends_however_it_ends(tmp_path):
    known = Tokens(tmp_path / "tokens.toml", "\n[tenants.acme]\nconcurrent = 1\n")

    async def body(stub, server):
        tenants = server.server._tenants
        message = pb.GenerateStreamRequest(text="a", stopping={"max_tokens": 300})
        for _ in range(3):
            call = stub.GenerateStream(message, metadata=known.metadata())
            await anext(aiter(call))
            assert tenants.num_live("acme") == 1
            call.cancel()
            await until(lambda: tenants.num_live("acme") == 0)
        bad = stub.Generate(pb.GenerateRequest(text="a" * 600), metadata=known.metadata())
        await refused(bad, grpc.StatusCode.INVALID_ARGUMENT)
        assert tenants.num_live("acme") == 0
        late = stub.Generate(
            pb.GenerateRequest(text="a", stopping={"max_tokens": 300}),
            metadata=known.metadata(),
            timeout=0.1,
        )
        await refused(late, grpc.StatusCode.DEADLINE_EXCEEDED)
        await until(lambda: tenants.num_live("acme") == 0)
        assert await stub.Generate(pb.GenerateRequest(text="a"), metadata=known.metadata())

    over_the_wire(known, body, step_s=0.005)


def test_a_tenant_can_neither_meet_nor_take_another_ones_request(tmp_path):
    known = Tokens(tmp_path / "tokens.toml")

    async def body(stub, server):
        message = pb.GenerateStreamRequest(
            request_id="mine", text="a", sampling={"seed": 0}, stopping={"max_tokens": 60}
        )
        first = stub.GenerateStream(message, metadata=known.metadata())
        begun = await anext(aiter(first))
        assert begun.started.request_id == "mine"
        again = stub.Generate(
            pb.GenerateRequest(request_id="mine", text="a"), metadata=known.metadata()
        )
        await refused(again, grpc.StatusCode.ALREADY_EXISTS)
        other = await stub.Generate(
            pb.GenerateRequest(request_id="mine", text="a", sampling={"seed": 0}),
            metadata=known.metadata("beta"),
        )
        assert other.output.text == expected_text("a", 8)
        assert other.started.request_id == "mine"
        text = "".join([event.delta.text async for event in first])
        assert text == expected_text("a", 60)

    over_the_wire(known, body, step_s=0.005)


@pytest.mark.parametrize(
    ("scopes", "is_taken"), [(("generate",), False), (("generate", "admin"), True)]
)
def test_going_before_other_tenants_needs_the_scope_admin(tmp_path, scopes, is_taken):
    known = Tokens(tmp_path / "tokens.toml", scopes=scopes)

    async def main():
        token = known.by_tenant["acme"]
        async with (
            running(security=known.security) as server,
            AsyncClient(server.target, token=token) as client,
        ):
            assert (await client.generate("a", seed=0, priority=3)).text
            if is_taken:
                assert (await client.generate("a", seed=0, priority=-1)).text
            else:
                with pytest.raises(Forbidden, match="before other tenants"):
                    await client.generate("a", seed=0, priority=-1)

    asyncio.run(main())


def test_tenants_share_no_cached_prefix_and_a_tenant_shares_its_own(tmp_path):
    known = Tokens(tmp_path / "tokens.toml")
    engine = tiny.make_engine(cache=CacheConfig(num_pages=64))
    prompt = [3 + number % 40 for number in range(100)]
    options = {"temperature": 0.0, "max_tokens": 4, "ignore_eos": True}

    async def main():
        served = ServedModel("tiny", tiny.MODEL, FakeTokenizer(), engine.limits, JAXINFER_DEFAULTS)
        config = ServerConfig(port=0, prefix_salt="servers' own")
        server = Server(served, partial(EngineThread, engine), config, security=known.security)
        port = await server.start()
        await server.set_serving(True)
        cached = []
        try:
            for tenant in ("acme", "acme", "beta", "beta", "acme"):
                token = known.by_tenant[tenant]
                async with AsyncClient(f"127.0.0.1:{port}", token=token) as client:
                    done = await client.generate(token_ids=prompt, **options)
                    cached.append((done.usage.num_cached_tokens, tuple(done.token_ids)))
        finally:
            await server.stop(2.0)
        return cached

    found = asyncio.run(main())
    assert len({answer for _, answer in found}) == 1
    counts = [count for count, _ in found]
    assert counts[0] == counts[2] == 0
    assert counts[1] == counts[3] == counts[4] > 0


def test_restored_turns_come_before_new_ones():
    tenants = Tenants(clock=Clock(), newest_turn=500)
    assert tenants.begin(caller("a"), 5, 5).turn == 500


def test_a_client_learns_when_to_come_back(tmp_path):
    known = Tokens(tmp_path / "tokens.toml", "\n[tenants.acme]\nrequests_per_s = 0.5\n")

    async def main():
        token = known.by_tenant["acme"]
        async with (
            running(security=known.security) as server,
            AsyncClient(server.target, token=token) as client,
        ):
            await client.tokenize("a")
            with pytest.raises(QuotaExceeded, match="requests_per_s") as caught:
                await client.tokenize("a")
            assert 1.0 < caught.value.retry_after_s <= 2.0

    asyncio.run(main())
