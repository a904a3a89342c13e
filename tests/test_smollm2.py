"""The demo model against reference tokens and logits made with transformers in float32."""

import asyncio
import dataclasses
import json
import threading
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinfer import cache, step, weights
from jaxinfer.client import Client
from jaxinfer.compile import compile_function
from jaxinfer.config import EngineConfig, ServerConfig
from jaxinfer.host.request import SamplingParams
from jaxinfer.inputs import inert_batch
from jaxinfer.runner import EngineThread
from jaxinfer.server.app import Server
from jaxinfer.server.served import ServedModel
from tests import demo_model

FOLDER = Path(__file__).parent / "golden" / "smollm2-135m"
ITEMS = json.loads((FOLDER / "reference.json").read_text())["items"]
CLOSE_CALL = 1e-3  # float32 rounding may turn over what is closer than this
GREEDY = SamplingParams(temperature=0.0, max_tokens=64, ignore_eos=True)

pytestmark = demo_model.needed


@pytest.fixture(scope="module")
def llm():
    return demo_model.shared_llm("float32")


def test_its_config_is_known_before_it_is_here(monkeypatch):
    there = weights.shape_of("smollm2-135m")
    monkeypatch.setattr(weights, "is_ready", lambda alias: False)
    assert weights.shape_of("smollm2-135m") == there


def must_agree(item):
    """Reference tokens up to the first close call."""
    close = [place for place, margin in enumerate(item["margin"]) if margin < CLOSE_CALL]
    return item["out_ids"][: close[0]] if close else item["out_ids"]


def assert_agrees(tokens, item):
    expected = must_agree(item)
    assert list(tokens[: len(expected)]) == expected
    assert len(tokens) == 64


def logits_of(dtype, sequences, params):
    """The logits after every token of each sequence, one program for all."""
    model = weights.describe("smollm2-135m").config
    engine = EngineConfig(num_slots=1, max_seq_len=512, compute_dtype=dtype)
    run = partial(step.score, model=model, engine=engine)
    compiled = None
    for tokens in sequences:
        batch = inert_batch(
            1, 512, pages_per_seq=engine.pages_per_seq, trash_slot=1, trash_page=engine.num_pages
        )
        batch.tokens[0, : len(tokens)] = tokens
        batch.lengths[0] = len(tokens)
        batch.page_table[0] = np.arange(engine.pages_per_seq)
        arguments = (params, cache.make(model, engine), jax.tree.map(jnp.asarray, batch))
        compiled = compiled or compile_function(run, *arguments)
        yield np.asarray(compiled(*arguments)[1][0, : len(tokens)])


def test_tokenizer_and_template_give_the_reference_tokens(llm):
    for item in ITEMS:
        if item["kind"] == "chat":
            assert llm.tokenizer.encode_chat(item["messages"]) == item["ids"]
        else:
            assert llm.tokenizer.encode(item["text"]) == item["ids"]


def test_float32_logits_at_the_last_prompt_token(llm):
    reference = np.load(FOLDER / "logits.npz")["logits"]
    found = logits_of("float32", [item["ids"] for item in ITEMS], llm.engine.device.params)
    for logits, expected in zip(found, reference, strict=True):
        assert np.abs(logits[-1] - expected).max() < 2e-3
        assert logits[-1].argmax() == expected.argmax()


def test_greedy_float32_alone_and_all_at_once(llm):
    together = llm.generate([item["ids"] for item in ITEMS], GREEDY)
    for item, completion in zip(ITEMS, together, strict=True):
        assert_agrees(completion.token_ids, item)
        alone = llm.generate([item["ids"]], GREEDY)[0]
        assert alone.token_ids == completion.token_ids
        assert alone.logprobs == completion.logprobs, "the same bits, alone or among others"
        if len(must_agree(item)) == 64:
            said = llm.tokenizer.decode(completion.token_ids, skip_special=False)
            assert said == item["out_text"]
        assert completion.text == llm.tokenizer.decode(completion.token_ids)


def test_stops_at_the_end_token_where_the_reference_does(llm):
    for item in ITEMS:
        if item["first_eos_at"] is not None and item["first_eos_at"] < len(must_agree(item)):
            sampling = dataclasses.replace(GREEDY, ignore_eos=False)
            completion = llm.generate([item["ids"]], sampling)[0]
            assert completion.finish_reason == "eos"
            assert list(completion.token_ids) == item["out_ids"][: item["first_eos_at"] + 1]


def test_bfloat16_agrees_with_float32_on_95_steps_in_100(llm):
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), llm.engine.device.params)
    fed = [item["ids"] + item["out_ids"][:-1] for item in ITEMS]
    agree = []
    for item, logits in zip(ITEMS, logits_of("bfloat16", fed, params), strict=True):
        agree += list(logits[len(item["ids"]) - 1 :].argmax(-1) == np.array(item["out_ids"]))
    assert len(agree) == 640
    assert np.mean(agree) >= 0.95


def test_all_at_once_through_grpc(llm):
    served = ServedModel(llm.name, llm.model, llm.tokenizer, llm.engine.limits, llm.defaults)
    found, begun, over = {}, threading.Event(), threading.Event()

    async def serve():
        server = Server(served, partial(EngineThread, llm.engine), ServerConfig(port=0))
        found["port"] = await server.start()
        await server.set_serving(True)
        begun.set()
        await asyncio.to_thread(over.wait)
        await server.stop(1.0)

    server = threading.Thread(target=lambda: asyncio.run(serve()))
    server.start()
    assert begun.wait(30)
    answers = {}

    def ask(number):
        item = ITEMS[number]
        with Client(f"127.0.0.1:{found['port']}") as client:
            answers[number] = client.generate(
                token_ids=item["ids"], temperature=0.0, max_tokens=64, ignore_eos=True
            )

    clients = [threading.Thread(target=ask, args=(number,)) for number in range(len(ITEMS))]
    try:
        for client in clients:
            client.start()
        for client in clients:
            client.join(120)
    finally:
        over.set()
        server.join(30)
    for number, item in enumerate(ITEMS):
        assert_agrees(answers[number].token_ids, item)
