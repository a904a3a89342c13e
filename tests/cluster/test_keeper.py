"""What keeps a group running, with processes that only play at being ranks."""

import json
import os
import queue
import signal
import sys
import threading
from collections import defaultdict
from contextlib import contextmanager
from pathlib import Path

import pytest

from jaxinfer.cluster.keeper import Ended, Keeper
from jaxinfer.cluster.process import DONE, WRONG, Spec

WAIT_S = 60.0
RANK = """
import json, os, sys
spec = json.loads(sys.stdin.readline())
def say(event, **facts):
    print(json.dumps({"event": event, **facts}), flush=True)
say("told", spec=spec)
if spec["settings"] == "wrong":
    say("ended", why="no such model")
    sys.exit(2)
if spec["settings"] == "broken" and not spec["is_fresh"]:
    sys.exit(1)
if spec["settings"] == "never":
    sys.exit(1)
if spec["rank"] == 0:
    say("listening", port=4711)
if spec["settings"] != "slow":
    say("ready")
for line in sys.stdin:
    if line == "stop\\n":
        sys.exit(0)
"""


def specs(size, settings="", ranks=None):
    return [
        Spec(rank=rank, size=size, host="127.0.0.1", port=0, key="00", settings=settings)
        for rank in (range(size) if ranks is None else ranks)
    ]


class Kept:
    """A keeper at work, its events, and why it ended."""

    def __init__(self, specs, **options):
        self.events = queue.Queue()
        given = {"start_limit_s": WAIT_S, "max_failed_starts": 3} | options
        self.keeper = Keeper(
            specs, told=self.events.put, command=[sys.executable, "-S", "-c", RANK], **given
        )
        self.kinds = defaultdict(list)  # that nobody waited for yet
        self.ended = []
        self.thread = threading.Thread(target=lambda: self.ended.append(self.keeper.keep()))

    def wait(self, event, count=1):
        """The next so many events of a kind, by rank."""
        while len(self.kinds[event]) < count:
            happened = self.events.get(timeout=WAIT_S)
            self.kinds[happened.event].append(happened)
        found, self.kinds[event] = self.kinds[event][:count], self.kinds[event][count:]
        return {one.rank: one for one in found}


@contextmanager
def keeping(specs, **options):
    kept = Kept(specs, **options)
    kept.thread.start()
    try:
        yield kept
    finally:
        kept.keeper.stop()
        kept.thread.join(WAIT_S)
        assert not kept.thread.is_alive()


def is_gone(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return False


def test_the_others_hear_the_port_that_rank_0_got():
    with keeping(specs(3)) as kept:
        told = kept.wait("told", 3)
        assert {rank: one.facts["spec"]["port"] for rank, one in told.items()} == {
            0: 0,
            1: 4711,
            2: 4711,
        }
        assert not any(one.facts["spec"]["is_fresh"] for one in told.values())
        assert len(kept.keeper.pids) == 3
    assert kept.ended == [Ended(DONE, "")]


@pytest.mark.parametrize("lost", [0, 2])
def test_where_one_is_killed_all_start_again(lost):
    with keeping(specs(3)) as kept:
        kept.wait("ready", 3)
        before = kept.keeper.pids
        os.kill(before[lost], signal.SIGKILL)
        told = kept.wait("told", 3)
        kept.wait("ready", 3)
        assert not set(before.values()) & set(kept.keeper.pids.values())
        assert all(is_gone(pid) for pid in before.values())
        assert not any(one.facts["spec"]["is_fresh"] for one in told.values())
    assert kept.ended == [Ended(DONE, "")]


def test_a_stopped_process_does_not_outlive_its_group():
    with keeping(specs(2)) as kept:
        kept.wait("ready", 2)
        before = kept.keeper.pids
        os.kill(before[1], signal.SIGSTOP)
        os.kill(before[0], signal.SIGKILL)
        kept.wait("ready", 2)
        assert all(is_gone(pid) for pid in before.values())


def test_after_two_starts_that_failed_no_stored_program_is_used():
    with keeping(specs(1, "broken")) as kept:
        for _ in range(2):
            assert not kept.wait("told")[0].facts["spec"]["is_fresh"]
        assert kept.wait("told")[0].facts["spec"]["is_fresh"]
        kept.wait("ready")
        os.kill(kept.keeper.pids[0], signal.SIGKILL)
        assert not kept.wait("told")[0].facts["spec"]["is_fresh"]  # it served meanwhile


def test_what_a_new_start_would_not_mend_is_given_up_at_once():
    kept = Kept(specs(1, "wrong"))
    assert kept.keeper.keep() == Ended(WRONG, "rank 0 can't start: no such model")


def test_starts_that_fail_again_and_again_are_given_up():
    kept = Kept(specs(2, "never"), max_failed_starts=2)
    ended = kept.keeper.keep()
    assert ended.code == 1 and ended.why.startswith("2 starts in a row failed")


def test_a_group_that_is_not_ready_in_time_starts_again():
    kept = Kept(specs(1, "slow"), start_limit_s=0.05, max_failed_starts=1)
    assert kept.keeper.keep().why.startswith("1 starts in a row failed")


def test_ranks_without_a_leader_here_are_told_at_once():
    with keeping(specs(4, ranks=(2, 3))) as kept:
        told = kept.wait("told", 2)
        assert sorted(told) == [2, 3]


def test_a_rank_that_is_told_to_end_by_its_leader_ends_its_keeper():
    kept = Kept(specs(4, ranks=(2,)))
    kept.thread.start()
    kept.wait("ready")
    process = kept.keeper._processes[2]
    process.stdin.write("stop\n")
    process.stdin.flush()
    kept.thread.join(WAIT_S)
    assert kept.ended == [Ended(DONE, "")]


def test_the_key_stands_in_no_argument_and_no_variable():
    secret = "5ec7e7" * 10
    spec = Spec(rank=0, size=1, host="h", port=0, key=secret, settings="")
    with keeping([spec]) as kept:
        kept.wait("ready")
        (pid,) = kept.keeper.pids.values()
        for name in ("cmdline", "environ"):
            assert secret.encode() not in Path(f"/proc/{pid}/{name}").read_bytes()
    assert json.loads(spec.line())["key"] == secret
