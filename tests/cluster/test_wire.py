"""Connections of a group: a key is needed on both ends, and silence is an end."""

import socket
import threading

import pytest

from jaxinfer.cluster import wire
from jaxinfer.cluster.wire import Greeting
from jaxinfer.errors import GroupRefused, PeerLost

KEY, OTHER = b"k" * 32, b"o" * 32
WHO = Greeting("rank", 1, {"code": "abc"})


def joined(ends, *, key=KEY, silence_s=30.0):
    """Both ends, greeted: (the listening one, what it was told), (the joining one, its news)."""
    found = []

    def take():
        greeting, proof = wire.challenge(ends[0], KEY)
        link = wire.welcome(ends[0], proof, name="b", silence_s=silence_s, more=["news"])
        found.append((link, greeting))

    thread = threading.Thread(target=take)
    thread.start()
    other = wire.greet(ends[1], key, WHO, name="a")
    thread.join()
    return found[0], other


def tcp_pair():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        left = socket.create_connection(listener.getsockname())
        right, _ = listener.accept()
    return right, left


def test_two_that_have_the_key_hear_each_other_in_order():
    (near, greeting), (far, more) = joined(tcp_pair())
    assert greeting == WHO and more == ["news"]
    for number in range(100):
        far.send(["step", number])
    assert [near.receive() for _ in range(100)] == [["step", number] for number in range(100)]
    near.send(["text", "é漢🙂", [1.5, None, True]])
    assert far.receive() == ["text", "é漢🙂", [1.5, None, True]]
    near.close()
    with pytest.raises(PeerLost, match="is gone"):
        far.receive()
    far.close()


@pytest.mark.parametrize("has_key", ["joins", "takes"])
def test_without_the_key_nothing_is_said(has_key):
    ends = tcp_pair()
    errors = []

    def take():
        try:
            wire.challenge(ends[0], KEY if has_key == "takes" else OTHER)
        except GroupRefused as error:
            errors.append(error)

    thread = threading.Thread(target=take)
    thread.start()
    with pytest.raises(GroupRefused, match="another key"):
        wire.greet(ends[1], KEY if has_key == "joins" else OTHER, WHO, name="a")
    thread.join()
    assert "another key" in str(errors[0])
    for end in ends:
        end.close()


def test_a_listener_that_only_pretends_to_have_the_key_is_refused():
    ends = tcp_pair()

    def pretend():
        ends[0].sendall(wire.pack(["challenge", wire.PROTOCOL, "00"]))
        wire.read(ends[0], wire.MAX_GREETING_BYTES)
        ends[0].sendall(wire.pack(["welcome", "f" * 64, 1.0]))

    thread = threading.Thread(target=pretend)
    thread.start()
    with pytest.raises(GroupRefused, match="another key"):
        wire.greet(ends[1], KEY, WHO, name="a")
    thread.join()
    for end in ends:
        end.close()


def test_a_greeting_can_not_be_sent_again_nor_changed():
    """A listener's challenge is new each time, and rank and facts are under the proof."""
    first, second = tcp_pair(), tcp_pair()
    sent = []

    def join(connection):
        kind, _, nonce = wire.read(connection, wire.MAX_GREETING_BYTES)
        assert kind == "challenge"
        proof = wire._proof(KEY, "joins", nonce, "11", WHO)
        sent.append(["greeting", *WHO, "11", proof])
        connection.sendall(wire.pack(sent[-1]))

    for ends in (first, second):
        thread = threading.Thread(target=join, args=(ends[1],))
        thread.start()
        assert wire.challenge(ends[0], KEY)[0] == WHO
        thread.join()
    assert sent[0][-1] != sent[1][-1]
    for changed in ([*sent[0][:2], 2, *sent[0][3:]], sent[0]):
        ends = tcp_pair()
        ends[1].sendall(wire.pack(changed))
        with pytest.raises(GroupRefused):
            wire.challenge(ends[0], KEY)
        for end in ends:
            end.close()
    for end in (*first, *second):
        end.close()


@pytest.mark.parametrize(
    "frame",
    [
        b"GET / HTTP/1.1\r\n\r\n",
        (2**31).to_bytes(4, "big"),
        b"\x00\x00\x00\x02{}",
        b"\x00\x00\x00\x03[1]",
        b"\x00\x00\x00\x02\xff\xfe",
        (15_000).to_bytes(4, "big") + b"[" * 15_000,
        b'\x00\x00\x00\x0c["greeting"]',
    ],
    ids=["http", "huge", "no_list", "no_kind", "no_text", "deep", "short"],
)
def test_what_is_no_greeting_ends_the_connection(frame):
    ends = tcp_pair()
    ends[1].sendall(frame)
    with pytest.raises((ValueError, OSError)):
        wire.challenge(ends[0], KEY)
    for end in ends:
        end.close()


def test_silence_is_an_end():
    (near, _), (far, _) = joined(tcp_pair(), silence_s=0.2)
    far._closed.set()  # it lives, and says nothing
    with pytest.raises(PeerLost, match="silent for 0.2 s"):
        near.receive()
    near.close()
    far.close()


def test_who_has_nothing_to_say_beats_and_beats_are_no_messages():
    ends = tcp_pair()
    link = wire.Link(ends[0], "b", silence_s=0.2)
    assert [wire.read(ends[1], 100) for _ in range(3)] == [wire.BEAT] * 3
    for message in (wire.BEAT, wire.BEAT, ["step", 1]):
        ends[1].sendall(wire.pack(message))
    assert link.receive() == ["step", 1]
    link.close()
    ends[1].close()
