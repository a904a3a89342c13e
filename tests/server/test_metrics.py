"""/metrics: what a scrape says is what the clients did, under names of a fixed number."""

import asyncio
import re
import socket
import urllib.request
from collections.abc import Callable
from dataclasses import replace

import grpc
import pytest
from prometheus_client.parser import text_string_to_metric_families

from jaxinfer.edge_config import ServerConfig
from jaxinfer.errors import ConfigError
from jaxinfer.host.request import FinishReason, Output, Timings
from jaxinfer.server import metrics
from jaxinfer.server.metrics import Histogram, Metrics, Scraped
from jaxinfer.server.sight import METHODS
from jaxinfer.server.timeline import StepCounts
from jaxinfer.v1 import inference_pb2 as pb
from jaxinfer.v1 import inference_pb2_grpc
from tests.server.serving import refused, running, until

Samples = Callable[..., float]
VLLM = (
    "num_requests_running",
    "num_requests_waiting",
    "kv_cache_usage_perc",
    "gpu_cache_usage_perc",
    "prompt_tokens_total",
    "generation_tokens_total",
    "num_preemptions_total",
    "prefix_cache_queries_total",
    "prefix_cache_hits_total",
    "request_success_total",
    "time_to_first_token_seconds_bucket",
    "inter_token_latency_seconds_bucket",
    "time_per_output_token_seconds_bucket",
    "e2e_request_latency_seconds_bucket",
    "request_queue_time_seconds_bucket",
    "request_prefill_time_seconds_bucket",
    "request_decode_time_seconds_bucket",
    "request_inference_time_seconds_bucket",
    "request_prompt_tokens_bucket",
    "request_generation_tokens_bucket",
)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def parse(text: str) -> Samples:
    found = {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }

    def value(name: str, **labels: str) -> float:
        """The sum over all samples of that name that have these labels."""
        chosen = [v for (n, own), v in found.items() if n == name and labels.items() <= set(own)]
        assert chosen, f"{name} {labels} is not in the scrape"
        return sum(chosen)

    return value


def scrape(port: int) -> str:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as answer:
        return answer.read().decode()


def serving(body, **options) -> None:
    """Runs `body(stub, server, scrape)` against a server with metrics."""
    port = free_port()

    async def main() -> None:
        config = ServerConfig(port=0, metrics_port=port)
        async with (
            running(config=config, **options) as server,
            grpc.aio.insecure_channel(server.target) as wire,
        ):
            stub = inference_pb2_grpc.InferenceServiceStub(wire)
            await body(stub, server, lambda: asyncio.to_thread(scrape, port))

    asyncio.run(main())


def ask(text: str = "abc", **fields) -> pb.GenerateRequest:
    return pb.GenerateRequest(text=text, **fields)


def test_a_scrape_equals_what_clients_did():
    async def body(stub, server, scrape):
        answers = [await stub.Generate(ask("x" * n)) for n in (3, 5, 9)]
        stream = stub.GenerateStream(pb.GenerateStreamRequest(text="hello"))
        events = [event async for event in stream]
        await refused(stub.Generate(ask(model="nobody")), grpc.StatusCode.NOT_FOUND)
        await refused(stub.Generate(ask("")), grpc.StatusCode.INVALID_ARGUMENT)
        value = parse(await scrape())
        lengths = [a.started.num_prompt_tokens for a in answers]
        prompts = sum(lengths) + events[0].started.num_prompt_tokens
        summaries = [*(answer.summary for answer in answers), events[-1].summary]
        tokens = sum(one.usage.num_output_tokens for one in summaries)
        assert tokens == 4 * 8
        assert value("jaxinfer_prompt_tokens_total") == value("vllm:prompt_tokens_total") == prompts
        assert value("jaxinfer_output_tokens_total") == tokens
        assert value("vllm:generation_tokens_total") == tokens
        assert value("vllm:request_success_total", finished_reason="length") == 4
        assert value("vllm:request_success_total") == 4
        assert value("jaxinfer_requests_finished_total", reason="length") == 4
        for name in ("jaxinfer_time_to_first_token_seconds", "jaxinfer_request_seconds"):
            assert value(f"{name}_count") == 4
        assert value("jaxinfer_inter_token_latency_seconds_count") == tokens - 4
        assert value("jaxinfer_time_per_output_token_seconds_count") == 4
        assert value("jaxinfer_request_output_tokens_sum") == tokens
        generate = {"method": "/jaxinfer.v1.InferenceService/Generate"}
        assert value("jaxinfer_calls_total", **generate, code="OK") == 3
        assert value("jaxinfer_calls_total", **generate, code="NOT_FOUND") == 1
        assert value("jaxinfer_calls_total", **generate, code="INVALID_ARGUMENT") == 1
        assert value("jaxinfer_calls_total", code="OK") == 4

    serving(body)


def test_clients_that_leave_and_late_ones_are_counted_by_reason():
    async def body(stub, server, scrape):
        stream = stub.GenerateStream(
            pb.GenerateStreamRequest(text="a", stopping={"max_tokens": 400})
        )
        await stream.read()
        await stream.read()
        stream.cancel()
        late = stub.Generate(ask("b", stopping={"max_tokens": 400}), timeout=0.2)
        await refused(late, grpc.StatusCode.DEADLINE_EXCEEDED)

        async def reasons() -> tuple[float, float]:
            value = parse(await scrape())
            return (
                value("vllm:request_success_total", finished_reason="abort"),
                value("jaxinfer_calls_total", code="CANCELLED"),
            )

        async with asyncio.timeout(30):
            while (await reasons())[0] < 2:
                await asyncio.sleep(0.02)
        assert (await reasons())[1] >= 1

    serving(body, step_s=0.005)


def test_the_vllm_set_is_there_before_the_first_request():
    async def body(stub, server, scrape):
        value = parse(await scrape())
        for name in VLLM:
            assert value(f"vllm:{name}", model_name="fake", engine="0") >= 0

    serving(body)


def test_no_client_can_add_a_label():
    async def body(stub, server, scrape):
        async def names() -> set[str]:
            text = await scrape()
            return {line.rpartition(" ")[0] for line in text.splitlines() if line[0] != "#"}

        await stub.Generate(ask("a"))
        await refused(stub.Generate(ask("a", model="m")), grpc.StatusCode.NOT_FOUND)
        before = await names()
        for number in range(20):
            await stub.Generate(ask("a", request_id=f"id-{number}"))
            unknown = ask("a", model=f"model-{number}")
            await refused(stub.Generate(unknown), grpc.StatusCode.NOT_FOUND)
        assert await names() == before
        assert not any("id-" in name or "model-" in name for name in before)

    serving(body)


def test_methods_that_do_not_exist_share_one_label():
    numbers = Metrics(METHODS)
    for number in range(50):
        numbers.call_ended(f"/a.B/C{number}", "UNIMPLEMENTED")
    assert list(numbers.calls) == [(metrics.OTHER_METHOD, "UNIMPLEMENTED")]
    assert "/jaxinfer.v1.InferenceService/GenerateStream" in METHODS


def test_a_taken_port_is_said_with_the_setting():
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]

        async def body() -> None:
            async with running(config=ServerConfig(port=0, metrics_port=port)):
                raise AssertionError("it started")

        with pytest.raises(ConfigError, match=r"server\.metrics_port"):
            asyncio.run(body())


def test_a_stopped_server_frees_the_port():
    port = free_port()

    async def once() -> None:
        async with running(config=ServerConfig(port=0, metrics_port=port)):
            assert "jaxinfer_slots" in await asyncio.to_thread(scrape, port)

    asyncio.run(once())
    asyncio.run(once())


def test_a_histogram_counts_up_to_and_with_its_bounds():
    histogram = Histogram((1.0, 2.0))
    for value in (0.5, 1.0, 1.5, 2.0, 3.0):
        histogram.observe(value)
    assert histogram.buckets() == ([("1.0", 2), ("2.0", 4), ("+Inf", 5)], 8.0)


def output(name: str, count: int, times: Timings, reason: FinishReason | None = None) -> Output:
    return Output(
        name,
        tuple(range(count)),
        (0.0,) * count,
        "",
        reason,
        num_prompt_tokens=4,
        num_output_tokens=count,
        timings=times,
    )


def test_times_are_those_of_the_outputs():
    now = iter((20.0, 20.5, 20.75))
    numbers = Metrics(METHODS, clock=lambda: next(now))
    first = Timings(10.0, 11.0, 13.0)
    numbers.delivered([output("a", 2, first)], set())
    numbers.delivered([output("a", 1, first)], set())
    last = output("a", 5, replace(first, finished_s=17.0), FinishReason.EOS)
    numbers.delivered([last], set())
    sums = {name: getattr(numbers.times, name).buckets()[1] for name in numbers.times._fields}
    assert sums == {
        "ttft": 3.0,
        "itl": 0.75,
        "tpot": 1.0,
        "queue": 1.0,
        "prefill": 2.0,
        "decode": 4.0,
        "inference": 6.0,
        "e2e": 7.0,
        "prompt": 4.0,
        "output": 5.0,
    }
    assert not numbers._told_s


def test_padding_and_gaps_are_there_where_the_engine_tells_its_steps():
    async def body(stub, server, scrape):
        stats = server.engine.stats()
        steps = StepCounts(num_useful_tokens=30, num_computed_tokens=64, gap_s=0.5)
        told = Scraped(Metrics(METHODS), lambda: stats, model="m", steps=lambda: steps)
        families = {family.name: family for family in told.collect()}
        assert families["jaxinfer_computed_tokens"].samples[0].value == 64
        assert families["jaxinfer_useful_tokens"].samples[0].value == 30
        assert families["jaxinfer_host_gap_seconds"].samples[0].value == 0.5
        plain = {family.name for family in Scraped(Metrics(()), lambda: stats, model="m").collect()}
        assert families.keys() - plain and plain <= families.keys()
        assert all(re.fullmatch(r"(jaxinfer_|vllm:)\w+", name) for name in families)

    serving(body)


def test_without_a_port_nothing_listens_and_nothing_observes():
    async def body() -> None:
        async with running() as server:
            assert server.server._sight.observers == []
            await until(lambda: True)

    asyncio.run(body())
