"""The hub: one hand-off a step, one mailbox a request, and never a queue."""

import asyncio
import time

import pytest

from jaxinfer.errors import DuplicateRequest, InvalidRequest
from jaxinfer.host.request import FinishReason, Output, Request, SamplingParams
from jaxinfer.server.hub import MAX_NEWS, Hub


def output(request_id: str, text: str, reason: FinishReason | None = None) -> Output:
    ids = tuple(text.encode())
    return Output(request_id, ids, tuple(0.0 for _ in ids), text, reason)


def test_outputs_between_two_takes_become_one():
    async def body():
        hub = Hub(asyncio.get_running_loop())
        mailbox = hub.open("a")
        for text in ("x", "yz", "!"):
            hub.deliver([output("a", text)])
        await asyncio.sleep(0.01)
        hub.deliver([output("a", "?", FinishReason.LENGTH)])
        await asyncio.sleep(0.01)
        taken = await mailbox.take()
        assert (taken.text, taken.token_ids) == ("xyz!?", tuple(b"xyz!?"))
        assert taken.finish_reason is FinishReason.LENGTH
        assert hub.live == []

    asyncio.run(body())


def test_a_take_brings_only_what_is_new():
    async def body():
        hub = Hub(asyncio.get_running_loop())
        mailbox = hub.open("a")
        hub.deliver([output("a", "x")])
        assert (await mailbox.take()).text == "x"
        hub.deliver([output("a", "y")])
        assert (await mailbox.take()).text == "y"

    asyncio.run(body())


def test_one_hand_off_for_each_step():
    calls = []

    class Loop:
        def is_closed(self):
            return False

        def call_soon_threadsafe(self, *arguments):
            calls.append(arguments)

    async def body():
        hub = Hub(asyncio.get_running_loop())
        hub._loop = Loop()
        hub.deliver([output(str(n), "x") for n in range(32)])
        hub.deliver([])

    asyncio.run(body())
    assert len(calls) == 1


def test_an_id_is_taken_until_the_engine_has_ended_it():
    async def body():
        hub = Hub(asyncio.get_running_loop())
        mailbox = hub.open("a")
        with pytest.raises(DuplicateRequest, match="'a'"):
            hub.open("a")
        assert hub.abandon("a", mailbox)
        with pytest.raises(DuplicateRequest):
            hub.open("a")
        hub.deliver([output("a", "", FinishReason.CANCELLED)])
        await asyncio.sleep(0.01)
        second = hub.open("a")
        assert not hub.abandon("a", mailbox)  # the first one's late goodbye is not the second's
        assert hub.live == ["a"] and hub.abandon("a", second)

    asyncio.run(body())


def test_an_expected_request_keeps_all_it_gets_for_the_first_that_claims_it():
    async def body():
        hub = Hub(asyncio.get_running_loop())
        request = Request("a", (1, 2), SamplingParams(seed=1))
        assert hub.claim(request) is None
        hub.expect(request)
        hub.deliver([output("a", "xy")])
        hub.deliver([output("a", "z", FinishReason.LENGTH)])
        await asyncio.sleep(0.01)
        assert hub.live == []
        with pytest.raises(DuplicateRequest, match="waits for its client"):
            hub.open("a")
        with pytest.raises(InvalidRequest, match="another prompt, seed"):
            hub.claim(Request("a", (1, 3), SamplingParams(seed=2)))
        mailbox = hub.claim(request)
        assert mailbox is not None and (await mailbox.take_all()).text == "xyz"
        assert hub.claim(request) is None and hub.expire() == []

    asyncio.run(body())


def test_what_expires_is_ended_only_where_it_is_live():
    async def body():
        hub = Hub(asyncio.get_running_loop())
        requests = [Request(name, (1,), SamplingParams(seed=1)) for name in "abc"]
        for request in requests:
            hub.expect(request)
        assert hub.claim(requests[2]) is not None
        hub.deliver([output("a", "x", FinishReason.LENGTH)])
        await asyncio.sleep(0.01)
        assert hub.expire() == ["b"] and hub.live == ["b", "c"]
        assert hub.claim(requests[0]) is hub.claim(requests[1]) is None
        hub.open("a")  # its name is free again

    asyncio.run(body())


def test_a_reader_of_the_whole_wakes_up_once_and_has_all_of_it():
    async def body():
        hub = Hub(asyncio.get_running_loop())
        mailbox = hub.open("a")
        reader = asyncio.ensure_future(mailbox.take_all())
        for text in "x" * (2 * MAX_NEWS + 3):
            mailbox.put(output("a", text))
            await asyncio.sleep(0)
        assert not reader.done() and len(mailbox._news) < 2 * MAX_NEWS
        mailbox.put(output("a", "y", FinishReason.LENGTH))
        whole = await reader
        assert whole.text == "x" * (2 * MAX_NEWS + 3) + "y"
        assert whole.token_ids == tuple(whole.text.encode())
        assert len(whole.logprobs) == len(whole.token_ids)

    asyncio.run(body())


def test_a_reader_that_was_cancelled_leaves_the_news_for_the_next_one():
    async def body():
        hub = Hub(asyncio.get_running_loop())
        mailbox = hub.open("a")
        reader = asyncio.ensure_future(mailbox.take())
        await asyncio.sleep(0)
        reader.cancel()
        mailbox.put(output("a", "x"))
        with pytest.raises(asyncio.CancelledError):
            await reader
        assert (await mailbox.take()).text == "x"

    asyncio.run(body())


def test_many_small_outputs_cost_no_more_than_their_size():
    async def body():
        hub = Hub(asyncio.get_running_loop())
        mailbox = hub.open("a")
        for _ in range(20_000):
            mailbox.put(output("a", "x"))
        began_s = time.perf_counter()
        assert len((await mailbox.take()).text) == 20_000
        assert time.perf_counter() - began_s < 0.5

    asyncio.run(body())
