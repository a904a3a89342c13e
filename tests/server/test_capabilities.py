"""Every field of a request is registered, documented, and changes what comes back."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from google.protobuf.descriptor import Descriptor

from jaxinfer.engine_config import CacheConfig
from jaxinfer.errors import InvalidRequest, UnknownModel
from jaxinfer.host.request import JAXINFER_DEFAULTS, RANGES
from jaxinfer.server import translate
from jaxinfer.server.capabilities import CAPABILITIES, markdown
from jaxinfer.v1 import inference_pb2 as pb
from tests import tiny
from tests.server.fake_engine import FakeTokenizer
from tests.server.real import serve

ROOT = Path(__file__).parents[2]
BASE = {
    "token_ids": {"ids": [3, 5, 7]},
    "sampling": {"temperature": 1.0, "seed": 11},
    "stopping": {"max_tokens": 12, "ignore_eos": True},
    "output": {"token_ids": True},
}
SAYS = {
    "sampling.temperature": 0.0,
    "sampling.top_k": 1,
    "sampling.top_p": 0.001,
    "sampling.min_p": 1.0,
    "sampling.seed": 12,
    "stopping.max_tokens": 5,
    "output.text": False,
    "output.token_ids": False,
    "output.logprobs": True,
    "token_ids.ids": [3, 5, 8],
}
CHAT = {
    "chat.messages.role": {"messages": [{"role": "system", "content": "hello"}]},
    "chat.messages.content": {"messages": [{"role": "user", "content": "bye"}]},
    "chat.messages.fields_json": {
        "messages": [{"role": "user", "content": "hello", "fields_json": '{"name": "x"}'}]
    },
    "chat.tools_json": {"tools_json": '[{"type": "function"}]'},
    "chat.template_kwargs_json": {"template_kwargs_json": '{"thinking": true}'},
    "chat.add_generation_prompt": {"add_generation_prompt": False},
}
ALONE = {  # have a test of their own below, or where the words are
    "model": "test_another_model_is_refused",
    "request_id": "tests/server/test_service.py",
    "text": "tests/server/test_service.py",
    "priority": "test_a_lower_priority_goes_first",
    "use_prefix_cache": "test_the_prefix_cache_can_be_passed_by",
    "stopping.stop": "test_ends",
    "stopping.stop_token_ids": "test_ends",
    "stopping.min_tokens": "test_ends",
    "stopping.ignore_eos": "test_ends",
    "resume.num_tokens": "tests/server/test_resume.py",
    "resume.num_text_bytes": "tests/server/test_resume.py",
}


def leaves(kind: Descriptor, path: str = "") -> list[str]:
    found = []
    for field in kind.fields:
        if field.message_type is None:
            found.append(path + field.name)
        else:
            found += leaves(field.message_type, f"{path}{field.name}.")
    return found


@pytest.fixture(scope="module")
def engine():
    return tiny.make_engine(cache=CacheConfig(num_pages=64), num_slots=1)


def test_every_field_is_registered_and_every_registered_field_has_a_proof():
    registered = [one.field for one in CAPABILITIES]
    assert sorted(registered) == sorted(leaves(pb.GenerateRequest.DESCRIPTOR))
    assert sorted(registered) == sorted([*SAYS, *CHAT, *ALONE])
    assert all(one.effect and one.allowed for one in CAPABILITIES)


def test_get_model_and_the_documentation_say_the_same():
    assert markdown() in (ROOT / "docs" / "serving.md").read_text()


@pytest.mark.parametrize("name", RANGES)
def test_the_range_is_what_validation_goes_by(name):
    part = "sampling" if name in pb.Sampling.DESCRIPTOR.fields_by_name else "stopping"
    low, high, is_whole = RANGES[name]
    low = 0.001 if name == "top_p" else low

    def said(value: Any) -> Any:
        message = pb.GenerateRequest()
        setattr(getattr(message, part), name, value)
        return getattr(translate.sampling_from(message, JAXINFER_DEFAULTS), name)

    largest = min(high, 2**31 - 1) if name != "seed" else high
    values = [int(low), int(largest)] if is_whole else [low, high]
    if name == "min_tokens":
        values.pop()  # must stay below max_tokens, which has the same range
    assert [said(value) for value in values] == values
    beyond = [-1] if is_whole else [low - 1, high + 0.5, float("nan"), float("inf")]
    for value in [] if name == "seed" else beyond:
        with pytest.raises(InvalidRequest, match=name):
            said(value)


def ask(engine, **changes):
    """What a request with these changes gets, without the echo of what it asked."""

    async def scenario(client):
        message = pb.GenerateRequest(**(BASE | changes))
        return await client._inference.Generate(message)

    found = serve(engine, scenario)
    return found.output, found.finished, found.summary.usage


def changed(path: str, value: Any) -> dict[str, Any]:
    part, name = path.split(".")
    return {part: {**BASE.get(part, {}), name: value}}


@pytest.mark.parametrize("path", SAYS)
def test_a_field_changes_the_answer(engine, path):
    assert ask(engine) == ask(engine)[:]
    assert ask(engine, **changed(path, SAYS[path])) != ask(engine)


@pytest.mark.parametrize("path", CHAT)
def test_a_field_of_a_conversation_reaches_the_template(path):
    seen = []

    class Codec(FakeTokenizer):
        def encode_chat(self, messages, **arguments):
            seen.append((messages, arguments))
            return [1]

    def rendered(**changes):
        chat = {"messages": [{"role": "user", "content": "hello"}], **changes}
        translate.encoder(pb.GenerateRequest(chat=chat), Codec())()
        return seen[-1]

    assert rendered(**CHAT[path]) != rendered()


def test_another_model_is_refused(engine):
    async def scenario(client):
        with pytest.raises(UnknownModel, match="this server has 'tiny'"):
            await client.generate(token_ids=[1], model="other", max_tokens=1)
        assert (await client.generate(token_ids=[1], model="tiny", max_tokens=1)).token_ids

    serve(engine, scenario)


def test_ends(engine):
    output, _, _ = ask(engine)
    third = output.token_ids[2]
    assert third not in output.token_ids[:2], "the seed is chosen so"

    def stopped(**stopping):
        return ask(engine, stopping=BASE["stopping"] | stopping)

    by_token = stopped(stop_token_ids=[third])
    assert by_token[1].reason == pb.FINISH_REASON_STOP_TOKEN
    by_text = stopped(stop=[f"<{third}>"])
    assert by_text[1].reason == pb.FINISH_REASON_STOP_STRING
    held = stopped(stop_token_ids=[third], min_tokens=8)
    assert held[2].num_output_tokens >= 8 > by_token[2].num_output_tokens
    for seed in range(20):
        sampling = BASE["sampling"] | {"seed": seed}
        long = {"max_tokens": 200, "ignore_eos": False}
        if ask(engine, sampling=sampling, stopping=long)[1].reason == pb.FINISH_REASON_EOS:
            break
    on = ask(engine, sampling=sampling, stopping=long | {"ignore_eos": True})
    assert seed < 19 and on[1].reason == pb.FINISH_REASON_LENGTH


def test_the_prefix_cache_can_be_passed_by(engine):
    async def scenario(client):
        options = {"token_ids": list(range(1, 100)), "max_tokens": 1}
        engine.flush_prefix_cache()
        for used in (True, True, False):
            found = await client.generate(**options, use_prefix_cache=used)
            yield found.usage.num_cached_tokens

    async def all_of(client):
        return [count async for count in scenario(client)]

    cold, warm, passed_by = serve(engine, all_of)
    assert (cold, passed_by) == (0, 0) and warm > 0


def test_a_lower_priority_goes_first(engine):
    requests = [
        replace(tiny.make_request(name, [1, 2], max_tokens=3), priority=priority)
        for name, priority in (("first", 0), ("last", 5), ("urgent", -5))
    ]
    ended = []
    tiny.run(
        engine,
        requests,
        each_step=lambda number, outputs: ended.extend(
            output.request_id for output in outputs if output.finish_reason is not None
        ),
    )
    assert ended.index("urgent") < ended.index("last")
