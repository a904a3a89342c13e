"""The request log: a line for each request that ended, and never a reason to wait."""

import asyncio
import errno
import io
import json
import threading
from datetime import UTC, datetime

import grpc
import pytest

from jaxinfer.edge_config import ServerConfig
from jaxinfer.errors import ConfigError
from jaxinfer.host.request import FinishReason, Output, Timings
from jaxinfer.server.request_log import RequestLog, open_log
from jaxinfer.v1 import inference_pb2 as pb
from jaxinfer.v1 import inference_pb2_grpc
from tests.server.serving import refused, running


class Kept(io.StringIO):
    """A file that can be read after it was closed."""

    def close(self) -> None:
        self.was_closed = True

    def lines(self) -> list[dict]:
        return [json.loads(line) for line in self.getvalue().splitlines()]


def ended(name: str = "a", reason: FinishReason = FinishReason.EOS, **changes) -> Output:
    plain = {
        "num_prompt_tokens": 7,
        "num_output_tokens": 5,
        "num_cached_tokens": 4,
        "num_preemptions": 1,
        "timings": Timings(10.0, 10.5, 11.0, 13.0),
    }
    return Output(name, (1,), (0.0,), "text", reason, **(plain | changes))


def written(outputs: list[Output], cancelled: frozenset[str] = frozenset(), **options):
    kept = Kept()
    log = RequestLog(lambda: kept, now=lambda: datetime(2030, 1, 2, tzinfo=UTC), **options)
    log.delivered(outputs, cancelled)
    log.close()
    return kept.lines()


def test_a_line_has_counts_and_times_and_no_text():
    assert written([ended()]) == [
        {
            "time": "2030-01-02T00:00:00.000+00:00",
            "request_id": "a",
            "tenant": None,
            "finish_reason": "eos",
            "status": "OK",
            "num_prompt_tokens": 7,
            "num_output_tokens": 5,
            "num_cached_tokens": 4,
            "num_preemptions": 1,
            "queue_s": 0.5,
            "ttft_s": 1.0,
            "tpot_s": 0.5,
            "e2e_s": 3.0,
        }
    ]


def test_outputs_that_end_nothing_leave_no_line():
    assert written([Output("a", (1,), (0.0,), "x"), ended("b")])[0]["request_id"] == "b"


@pytest.mark.parametrize(
    ("reason", "status"),
    [
        (FinishReason.STOP_STRING, "OK"),
        (FinishReason.DEADLINE, "DEADLINE_EXCEEDED"),
        (FinishReason.CANCELLED, "UNAVAILABLE"),
        (FinishReason.ERROR, "INTERNAL"),
    ],
)
def test_the_status_is_what_the_caller_saw(reason, status):
    assert written([ended(reason=reason)])[0]["status"] == status


def test_a_caller_that_left_has_cancelled():
    lines = written([ended(reason=FinishReason.CANCELLED)], frozenset({"a"}))
    assert lines[0]["status"] == "CANCELLED"


def test_the_tenant_stands_before_the_slash_only_where_there_are_tenants():
    (line,) = written([ended("ann/job/7")], has_tenants=True)
    assert (line["tenant"], line["request_id"]) == ("ann", "job/7")
    (line,) = written([ended("ann/job/7")])
    assert (line["tenant"], line["request_id"]) == (None, "ann/job/7")


def test_what_never_happened_is_null():
    (line,) = written([ended(reason=FinishReason.DEADLINE, timings=Timings(1.0))])
    assert [line[key] for key in ("queue_s", "ttft_s", "tpot_s", "e2e_s")] == [None] * 4


def test_a_file_that_blocks_makes_nobody_wait_and_lines_beyond_the_queue_are_counted():
    may_go_on, began = threading.Event(), threading.Event()

    class Slow(Kept):
        def write(self, text: str) -> int:
            began.set()
            assert may_go_on.wait(10)
            return super().write(text)

    kept = Slow()
    log = RequestLog(lambda: kept, max_queued=10)
    log.delivered([ended("first")], set())
    assert began.wait(10)
    log.delivered([ended(str(number)) for number in range(25)], set())
    assert log.num_dropped == 15
    may_go_on.set()
    log.close()
    assert [line["request_id"] for line in kept.lines()] == ["first", *map(str, range(10))]


def test_a_full_disk_costs_lines_and_the_log_goes_on_when_there_is_room(caplog):
    room = threading.Event()

    class Disk(Kept):
        def write(self, text: str) -> int:
            if not room.is_set():
                raise OSError(errno.ENOSPC, "No space left on device")
            return super().write(text)

    files: list[Disk] = []

    def open_file() -> Disk:
        files.append(Disk())
        return files[-1]

    log = RequestLog(open_file)
    log.delivered([ended("lost")], set())
    while not log.num_dropped:
        threading.Event().wait(0.005)
    room.set()
    log.delivered([ended("kept")], set())
    log.close()
    assert [line["request_id"] for file in files for line in file.lines()] == ["kept"]
    assert log.num_dropped == 1 and "No space left" in caplog.text
    assert len(caplog.records) == 1


def test_a_path_that_can_not_be_written_is_said_at_the_start(tmp_path):
    with pytest.raises(ConfigError, match=r"server\.request_log"):
        open_log(str(tmp_path / "nowhere" / "log"))
    assert open_log("") is None


def test_a_server_writes_what_its_clients_did(tmp_path):
    path = tmp_path / "requests.jsonl"

    async def main() -> None:
        config = ServerConfig(port=0, request_log=str(path))
        async with (
            running(config=config, step_s=0.002) as server,
            grpc.aio.insecure_channel(server.target) as wire,
        ):
            stub = inference_pb2_grpc.InferenceServiceStub(wire)
            await stub.Generate(pb.GenerateRequest(text="secret words", request_id="one"))
            late = pb.GenerateRequest(text="b", request_id="two", stopping={"max_tokens": 400})
            call = stub.Generate(late, timeout=0.2)
            await refused(call, grpc.StatusCode.DEADLINE_EXCEEDED)

    asyncio.run(main())
    text = path.read_text()
    lines = {line["request_id"]: line for line in map(json.loads, text.splitlines())}
    assert lines.keys() == {"one", "two"} and "secret" not in text
    assert lines["one"]["status"] == "OK" and lines["one"]["num_output_tokens"] == 8
    assert lines["two"]["status"] in ("DEADLINE_EXCEEDED", "CANCELLED")
    assert lines["one"]["e2e_s"] > lines["one"]["ttft_s"] >= 0
