"""A group of real processes over gloo: the tokens of one process, and what a lost rank costs."""

import os
import secrets
import signal
import time
from contextlib import contextmanager
from pathlib import Path

import grpc
import pytest

from jaxinfer.client import Client, translate
from jaxinfer.client.admin import AdminClient
from jaxinfer.v1 import inference_pb2 as pb
from jaxinfer.v1 import inference_pb2_grpc
from tests import cli_model, tiny
from tests.cluster.started import Probe, started

pytestmark = pytest.mark.full
PROMPTS = [[3 + number, 5, 7] * (1 + number % 5) for number in range(8)]
HEARTBEAT_S = 5.0
SANE_S = 120.0  # the bar is 30 s, on a machine that has nothing else to do
FEW = ("--set=engine.prefill_chunks=[8]", "--set=engine.decode_rows=[8]")
LONG = {"token_ids": [3, 5, 7], "temperature": 0.0, "max_tokens": 240, "ignore_eos": True}


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A model, its settings, and a folder for programs that all groups share."""
    folder = tmp_path_factory.mktemp("cluster")
    cli_model.save(folder)
    return folder


@pytest.fixture(scope="module")
def expected():
    """What one process on one device says."""
    requests = [
        tiny.make_request(f"r{n}", prompt, temperature=0.8 * (n % 2), seed=n, max_tokens=24)
        for n, prompt in enumerate(PROMPTS)
    ]
    answers = tiny.run(tiny.make_engine(prefill_chunks=(8,), decode_rows=(8,)), requests)
    return [answers[f"r{n}"].tokens for n in range(len(PROMPTS))]


def options_of(home, num_devices, *more):
    return (
        *("-m", str(home / "tiny"), "-c", str(home / "tiny.toml")),
        *("-c", f"mesh/tensor-{num_devices}", *FEW),
        *("--server.port", "0", "--cluster.heartbeat-s", str(HEARTBEAT_S), *more),
    )


@contextmanager
def serving(home, num_processes, num_devices, *more):
    options = ("--processes", str(num_processes), *options_of(home, num_devices, *more))
    with started(*options, cache=home / "cache") as group:
        ready = group.wait("ready")
        assert ready["exact_bits"] and ready["processes"] == num_processes
        group.wait_for_others_than({}, num_processes)
        yield group, ready


def answers_of(client):
    calls = [
        client.generate(
            token_ids=prompt, temperature=0.8 * (n % 2), seed=n, max_tokens=24, ignore_eos=True
        )
        for n, prompt in enumerate(PROMPTS)
    ]
    return [tuple(one.token_ids) for one in calls]


@pytest.mark.parametrize(("num_processes", "num_devices"), [(2, 2), (4, 4), (2, 4)])
def test_tokens_are_those_of_one_process(home, expected, num_processes, num_devices):
    more = ("--engine.score-chunk", "16", "--server.admin-port", "0")
    with (
        serving(home, num_processes, num_devices, *more) as (group, ready),
        Client(ready["target"]) as client,
    ):
        assert answers_of(client) == expected
        text = [*PROMPTS[0], *expected[0]]
        assert all(client.score(token_ids=text).is_likeliest[len(PROMPTS[0]) - 1 :])
        assert answers_of(client) == expected  # scores lie in the log where they were asked
        assert group.stop() == 0


class Killed:
    """A stream that is running, and what came of it when a rank was lost."""

    def __init__(self, target):
        self.target = target
        self.channel = grpc.insecure_channel(target)
        self.probe = Probe(target)
        self.stub = inference_pb2_grpc.InferenceServiceStub(self.channel)
        self.small = translate.to_request(pb.GenerateRequest, None, LONG | {"max_tokens": 1})
        message = translate.to_request(pb.GenerateStreamRequest, None, LONG)
        self.events = self.stub.GenerateStream(message)
        for _ in range(5):
            next(self.events)

    def end(self, pid, number):
        """(seconds until the stream ended, its code, seconds until it serves again)."""
        os.kill(pid, number)
        began_s = time.monotonic()
        with pytest.raises(grpc.RpcError) as ended:
            for _ in self.events:
                pass
        ended_s = time.monotonic() - began_s
        assert not self.probe.says("tiny") and self.probe.says("")  # not ready, and alive
        with pytest.raises(grpc.RpcError) as refused:
            self.stub.Generate(self.small, timeout=SANE_S)
        assert refused.value.code() is grpc.StatusCode.UNAVAILABLE
        assert "start again" in refused.value.details()
        self.probe.wait("tiny")
        again_s = time.monotonic() - began_s
        self.probe.close()
        self.channel.close()
        return ended_s, ended.value.code(), again_s


@pytest.mark.parametrize(
    ("num_processes", "rank", "number"),
    [
        (2, 0, signal.SIGKILL),
        (2, 1, signal.SIGKILL),
        (2, 1, signal.SIGSTOP),
        (4, 0, signal.SIGKILL),
        (4, 2, signal.SIGKILL),
    ],
)
def test_a_lost_rank_ends_streams_and_the_group_serves_again(
    home, expected, num_processes, rank, number, capsys
):
    with serving(home, num_processes, num_processes) as (group, ready):
        for turn in range(3):
            before = dict(group.pids)  # all of them are ready
            ended_s, code, again_s = Killed(ready["target"]).end(before[rank], number)
            with capsys.disabled():
                print(
                    f"\n{num_processes} processes, rank {rank}, {number.name}, turn {turn}: "
                    f"UNAVAILABLE after {ended_s:.2f} s, serving after {again_s:.1f} s"
                )
            assert code is grpc.StatusCode.UNAVAILABLE
            assert ended_s < HEARTBEAT_S + 2.0
            assert again_s < SANE_S
            group.wait_for_others_than(before)
            assert group.process.poll() is None
            with Client(ready["target"]) as client:
                assert answers_of(client) == expected
        assert group.stop() == 0


def test_two_commands_with_one_key_are_one_group(home, expected):
    """As on two machines: each keeps its own rank, and one that is lost takes the other along."""
    key = home / "key"
    key.write_text(secrets.token_hex(32))
    key.chmod(0o600)
    port = free_port()
    both = ("--size", "2", "--leader", "127.0.0.1", "--cluster.key-file", str(key))
    both = (*both, "--cluster.port", str(port))
    options = options_of(home, 2, *both)
    with (
        started("--rank", "1", *options, cache=home / "cache") as second,
        started("--rank", "0", *options, cache=home / "cache") as first,
    ):
        ready = first.wait("ready")
        with Client(ready["target"]) as client:
            assert answers_of(client) == expected
            _, code, _ = Killed(ready["target"]).end(second.pids[1], signal.SIGKILL)
            assert code is grpc.StatusCode.UNAVAILABLE
            assert answers_of(client) == expected
        assert first.stop() == 0
        assert second.process.wait(60) == 0  # the leader has told it


def test_operators_reach_the_engine_through_the_front(home):
    port = free_port()
    more = ("--server.admin-port", str(port), "--set", f"journal.folder={home / 'journal'}")
    with serving(home, 2, 2, *more) as (group, ready):
        with Client(ready["target"]) as client:
            client.generate(token_ids=[5] * 40, request_id="told", max_tokens=4)
        with AdminClient(f"127.0.0.1:{port}") as admin:
            info = admin.info()
            assert info.num_compiles_after_start == 0 and "prefill-1x8" in info.programs
            assert admin.explain("told")
            assert admin.flush() > 0
            assert admin.rotate_journal().endswith(".jsonl")
        assert group.stop() == 0


def test_no_process_outlives_the_server(home):
    with serving(home, 2, 2) as (group, _):
        pids = list(group.pids.values())
        group.process.kill()
        group.process.wait()
        ends_s = time.monotonic() + SANE_S
        while any(Path(f"/proc/{pid}").exists() for pid in pids):
            assert time.monotonic() < ends_s
            time.sleep(0.05)


def test_settings_that_can_not_be_shared_end_the_command(home):
    options = ("--processes", "3", *options_of(home, 4))
    with started(*options, cache=home / "cache") as group:
        assert group.process.wait(60) == 2


def free_port():
    import socket

    with socket.create_server(("127.0.0.1", 0)) as found:
        return found.getsockname()[1]
