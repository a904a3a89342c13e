"""The server with the real engine on a tiny model: streams, leavers, deadlines, bad neighbours."""

import asyncio

import pytest

from jaxinfer.client import Completed, Delta
from jaxinfer.engine_config import CacheConfig
from jaxinfer.errors import DeadlinePassed, InvalidRequest, OutOfTurn
from jaxinfer.scoring import score
from jaxinfer.v1 import inference_pb2 as pb
from tests import tiny
from tests.server.real import serve

PROMPTS = [[3 + number, 5, 7] * (1 + number % 5) for number in range(24)]
GREEDY = {"temperature": 0.0, "max_tokens": 12, "ignore_eos": True}


@pytest.fixture(scope="module")
def engine():
    return tiny.make_engine(cache=CacheConfig(num_pages=64))


async def until_idle(engine):
    async with asyncio.timeout(30):
        while engine.stats().num_running or engine.stats().num_waiting:
            await asyncio.sleep(0.01)


def test_streams_of_many_clients_give_what_the_engine_gives(engine):
    async def one(client, prompt):
        events = [event async for event in client.stream(token_ids=prompt, **GREEDY)]
        assert isinstance(events[-1], Completed)
        deltas = [event for event in events if isinstance(event, Delta)]
        assert "".join(event.text for event in deltas) == events[-1].completion.text
        return tuple(events[-1].completion.token_ids)

    async def all_of_them(client):
        return await asyncio.gather(*(one(client, prompt) for prompt in PROMPTS))

    requests = [
        tiny.make_request(f"r{number}", prompt, max_tokens=12)
        for number, prompt in enumerate(PROMPTS)
    ]
    expected = tiny.run(engine, requests)
    found = serve(engine, all_of_them)
    assert found == [expected[f"r{number}"].tokens for number in range(len(PROMPTS))]


def test_a_client_that_leaves_frees_its_slot_and_pages(engine):
    async def leave(client):
        stream = client.stream(token_ids=[9, 9, 9], **(GREEDY | {"max_tokens": 250}))
        async for event in stream:
            if isinstance(event, Delta):
                break
        await stream.aclose()
        await until_idle(engine)

    steps = engine.stats().num_steps
    serve(engine, leave)
    stats = engine.stats()
    assert stats.num_free_pages == stats.num_pages
    assert stats.num_steps - steps < 200, "it went on without its client"


def test_a_deadline_ends_a_stream_and_frees_its_pages(engine):
    async def late(client):
        with pytest.raises(DeadlinePassed):
            for _ in range(20):  # a tiny model may be done in time once or twice
                await client.generate(
                    token_ids=[8, 8], timeout_s=0.05, **(GREEDY | {"max_tokens": 250})
                )
        await until_idle(engine)

    serve(engine, late)
    assert engine.stats().num_free_pages == engine.stats().num_pages


def test_bad_requests_do_not_disturb_the_others(engine):
    async def mixed(client):
        good = asyncio.gather(
            *(client.generate(token_ids=prompt, **GREEDY) for prompt in PROMPTS[:6])
        )
        for bad in (
            {"token_ids": []},
            {"token_ids": [1] * 300},
            {"token_ids": [tiny.MODEL.vocab_size]},
            {"token_ids": [1], "temperature": float("nan")},
            {"token_ids": [1], "max_tokens": -1},
            {"token_ids": [1], "top_p": 2.0},
        ):
            with pytest.raises(InvalidRequest):
                await client.generate(**bad)
        return [tuple(done.token_ids) for done in await good]

    requests = [tiny.make_request(f"r{n}", p, max_tokens=12) for n, p in enumerate(PROMPTS[:6])]
    expected = tiny.run(engine, requests)
    assert serve(engine, mixed) == [expected[f"r{number}"].tokens for number in range(6)]


def test_answers_cut_anywhere_go_on_restored_or_computed_again(engine):
    requests = [
        tiny.make_request(f"r{n}", prompt, max_tokens=12, temperature=0.8, seed=n)
        for n, prompt in enumerate(PROMPTS[:13])
    ]
    expected = tiny.run(engine, requests)
    for request in requests:
        engine.submit(request)
    for _ in range(20):
        engine.step()
    snapshot = engine.snapshot()
    assert any(saved.tokens for saved in snapshot.requests)
    for request in requests:
        engine.cancel(request.request_id)
    while engine.has_work:
        engine.step()

    async def one(client, number, request):
        whole, cut = expected[request.request_id], min(number, 12)
        text = "".join(f"<{token}>" for token in whole.tokens[:cut])
        message = pb.GenerateStreamRequest(
            request_id=request.request_id,
            token_ids={"ids": request.prompt},
            sampling={"temperature": 0.8, "seed": number},
            stopping={"max_tokens": 12, "ignore_eos": True},
            output={"token_ids": True, "logprobs": True},
            resume={"num_tokens": cut, "num_text_bytes": len(text)},
        )
        events = [event async for event in client._inference.GenerateStream(message)]
        assert text + "".join(event.delta.text for event in events) == whole.text
        ids = [token for event in events for token in event.delta.token_ids]
        assert tuple(ids) == whole.tokens[cut:]
        logprobs = [value for event in events for value in event.delta.logprobs]
        assert tuple(logprobs) == whole.logprobs[cut:]

    async def all_of_them(client):
        await asyncio.gather(*(one(client, n, request) for n, request in enumerate(requests)))

    restored = engine.restore(snapshot)
    assert 0 < len(restored) < len(requests)  # the others had ended, and are computed again
    serve(engine, all_of_them, restored)
    assert engine.stats().num_free_pages == engine.stats().num_pages


def test_scores_come_beside_streams_and_are_those_of_the_scorer():
    engine = tiny.make_engine(score_chunk=16, num_slots=8)
    texts = [[3 + number, 5, 7, 11] * 9 for number in range(5)]
    wanted = [score(engine.scorer, tokens) for tokens in texts]

    async def scenario(client):
        stream = asyncio.create_task(client.generate(token_ids=PROMPTS[0], **GREEDY))
        found = await asyncio.gather(*(client.score(token_ids=tokens) for tokens in texts))
        return found, await stream

    found, completion = serve(engine, scenario)
    assert len(completion.token_ids) == GREEDY["max_tokens"]
    for tokens, one, own in zip(texts, found, wanted, strict=True):
        assert list(one.token_ids) == tokens
        assert one.logprobs == tuple(own.logprobs.tolist())
        assert one.is_likeliest == tuple(own.is_likeliest.tolist())


@pytest.mark.parametrize(
    ("tokens", "words"),
    [([], "the prompt is empty"), ([1, 999], "token ids of this model"), ([1] * 300, "300 tokens")],
)
def test_a_text_that_can_not_be_scored_is_refused(engine, tokens, words):
    async def scenario(client):
        with pytest.raises(InvalidRequest, match=words):
            await client.score(token_ids=tokens)
        with pytest.raises(OutOfTurn, match=r"start it with engine\.score_chunk"):
            await client.score(token_ids=[1, 2])

    serve(engine, scenario)
