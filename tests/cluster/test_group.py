"""The processes of a group among themselves, as threads of one process, over loopback."""

import queue
import socket
import threading

import pytest

from jaxinfer.cluster import group, wire
from jaxinfer.cluster.wire import Greeting
from jaxinfer.errors import ConfigError, GroupError, GroupRefused, PeerLost

KEY = b"k" * 32
ABOUT = {"code": "abc"}
WAIT_S = 30.0


class Heard:
    """What a callback was told, in order."""

    def __init__(self):
        self.all = queue.Queue()

    def __call__(self, told):
        self.all.put(told)

    def next(self):
        return self.all.get(timeout=WAIT_S)


class Lead:
    """A leader and where it listens, and the ends of those who joined."""

    def __init__(self, size, *, silence_s=30.0):
        self.joined = []
        self.listener = group.listen("127.0.0.1", 0)
        self.address = self.listener.getsockname()[:2]
        self.lost, self.heard = Heard(), Heard()
        self.leader = group.Leader(
            self.listener,
            KEY,
            size=size,
            silence_s=silence_s,
            about=ABOUT,
            lost=self.lost,
            heard=self.heard,
        )
        self.leader.settle()

    def follower(self, rank, *, key=KEY, about=ABOUT, lost=None):
        made = group.Follower(
            self.address, key, rank=rank, about=about, lost=lost or Heard(), timeout_s=WAIT_S
        )
        self.joined.append(made)
        return made

    def close(self):
        for one in self.joined:
            one.close()
        self.leader.close()


@pytest.fixture
def make():
    """Makes leaders, and closes them."""
    made = []

    def make_one(*arguments, **options):
        made.append(Lead(*arguments, **options))
        return made[-1]

    yield make_one
    for one in made:
        one.close()


def at_once(*calls):
    """What each of some calls returns, each on its own thread."""
    found = [None] * len(calls)

    def run(place, call):
        found[place] = call()

    threads = [threading.Thread(target=run, args=one) for one in enumerate(calls)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(WAIT_S)
    return found


def test_followers_hear_the_log_in_order_and_all_agree_in_order_of_rank(make):
    lead = make(3)
    followers = [lead.follower(rank) for rank in (2, 1)]
    lead.leader.wait_for_peers(WAIT_S)
    for step in range(50):
        lead.leader.send(["step", {"now": step}])
    for one in followers:
        assert [one.next() for _ in range(50)] == [["step", {"now": step}] for step in range(50)]
    told = at_once(
        lambda: followers[0].agree("x", "two"),
        lambda: lead.leader.agree("x", "zero"),
        lambda: followers[1].agree("x", "one"),
    )
    assert told == [("zero", "one", "two")] * 3
    again = at_once(
        *(lambda ask=ask: ask("x", 1) for ask in (one.agree for one in (*followers, lead.leader)))
    )
    assert again == [(1, 1, 1)] * 3


def test_agreements_under_several_labels_may_overlap(make):
    lead = make(2)
    follower = lead.follower(1)
    labels = [f"program {number}" for number in range(8)]
    told = at_once(
        *(lambda label=label: lead.leader.agree(label, label) for label in labels),
        *(lambda label=label: follower.agree(label, "f") for label in reversed(labels)),
    )
    assert told[:8] == [(label, "f") for label in labels]


def test_a_step_that_came_out_otherwise_ends_the_group(make):
    lead = make(2)
    follower = lead.follower(1)
    lead.leader.wait_for_peers(WAIT_S)
    for step, own, other in ((0, "a", "a"), (1, "b", "c")):
        lead.leader.digest(step, own)
        follower.digest(step, other)
    assert "step 1 came out otherwise in rank 1" in lead.lost.next()
    assert lead.leader.num_compared == 2


def test_a_lost_peer_ends_the_group_on_both_sides(make):
    lead, lost = make(3), Heard()
    first, second = lead.follower(1), lead.follower(2, lost=lost)
    lead.leader.wait_for_peers(WAIT_S)
    first._link.close()
    assert lead.lost.next() == "rank 1 is gone: the connection ended"
    lead.leader._peers[2].close()
    assert lost.next() == "rank 0 is gone: the connection ended"
    assert isinstance(second, group.Follower)


def test_until_the_group_is_ready_silence_is_forgiven(make):
    lead = make(2, silence_s=0.05)
    lead.leader._is_settled = False
    follower = lead.follower(1)
    follower._link._closed.set()  # it beats no more, as one that compiles
    lead.leader.wait_for_peers(WAIT_S)
    threading.Event().wait(0.2)
    assert lead.lost.all.empty()
    follower.digest(0, "a")
    lead.leader.digest(0, "a")
    lead.leader.settle()
    follower.digest(1, "a")
    assert lead.lost.next() == "rank 1 was silent for 0.05 s"


def test_a_follower_that_fails_says_why(make):
    lead = make(2)
    lead.follower(1).failed("no such model")
    assert lead.lost.next() == "rank 1: no such model"


def test_a_silent_peer_is_a_lost_one(make):
    lead = make(2, silence_s=0.2)
    follower = lead.follower(1)
    follower._link._closed.set()  # it beats no more, as a process that is stopped
    assert lead.lost.next() == "rank 1 was silent for 0.2 s"


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"key": b"o" * 32}, "it has another key"),
        ({"about": {"code": "other"}}, "its code is other, rank 0 has abc"),
        ({"about": {}}, "its code is None, rank 0 has abc"),
        ({"rank": 2}, "no part of a group of 2"),
        ({"rank": 0}, "no part of a group of 2"),
    ],
    ids=["key", "code", "no_code", "rank_beyond", "second_leader"],
)
def test_who_does_not_fit_is_refused_and_nobody_else_is_harmed(make, change, why):
    lead = make(2)
    with pytest.raises(GroupRefused, match=why):
        lead.follower(**({"rank": 1} | change))
    lead.follower(1)
    lead.leader.wait_for_peers(WAIT_S)
    assert lead.lost.all.empty()


def test_a_rank_can_be_there_only_once(make):
    lead = make(2)
    kept = lead.follower(1)
    lead.leader.wait_for_peers(WAIT_S)
    with pytest.raises(GroupRefused, match="here already"):
        lead.follower(1)
    lead.leader.send(["step", {}])
    assert kept.next() == ["step", {}]


def test_noise_on_the_port_is_closed_and_the_group_forms_all_the_same(make):
    lead = make(2)
    for noise in (b"GET / HTTP/1.1\r\n\r\n", b"", b"\xff" * 64):
        with socket.create_connection(lead.address) as stranger:
            stranger.sendall(noise)
    lead.follower(1)
    lead.leader.wait_for_peers(WAIT_S)
    assert lead.lost.all.empty()


def test_connections_that_say_nothing_are_bounded_and_free_their_places(make, monkeypatch):
    monkeypatch.setattr(group, "MAX_GREETINGS", 2)
    lead = make(2)
    silent = [socket.create_connection(lead.address) for _ in range(2)]
    for one in silent:
        assert wire.read(one, 1000)[0] == "challenge"
    with socket.create_connection(lead.address) as third:
        assert third.recv(1) == b""  # closed as it came
    for one in silent:
        one.close()
    lead.follower(1)
    lead.leader.wait_for_peers(WAIT_S)


def test_missing_ranks_are_named(make):
    lead = make(4)
    lead.follower(2)
    with pytest.raises(GroupError, match=r"rank 1, 3 did not come within .* = 0.1"):
        lead.leader.wait_for_peers(0.1)


def test_a_leader_that_is_not_there_is_told_with_its_address():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = taken.getsockname()[:2]
    with pytest.raises(PeerLost, match=r"rank 0 can't be reached at \[\"127.0.0.1\", \d+\]"):
        group.join(address, KEY, Greeting("rank", 1, ABOUT), name="rank 0", timeout_s=0.1)


def test_the_front_is_heard_and_hears(make):
    lead = make(1)
    link, _ = group.join(
        lead.address, KEY, Greeting("front", 0, {}), name="rank 0", timeout_s=WAIT_S
    )
    link.send(["hello"])
    assert lead.heard.next() == ["hello"]
    lead.leader.tell_front(["ready", {}])
    assert link.receive() == ["ready", {}]
    link.close()
    assert lead.lost.next() == "the server is gone: the connection ended"
    assert wire.PROTOCOL == 1


def test_an_address_that_can_not_be_had_is_told_with_its_setting(monkeypatch):
    monkeypatch.setattr(group, "NAME_S", 0.0)
    with pytest.raises(ConfigError, match="no known name"):
        group.listen("no-such-host.invalid", 0)
    with (
        group.listen("127.0.0.1", 0) as taken,
        pytest.raises(ConfigError, match=r"can't listen on '127.0.0.1', cluster.port = \d+"),
    ):
        group.listen("127.0.0.1", taken.getsockname()[1])
