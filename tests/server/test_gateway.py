"""What the gateway `smg` calls, on a fake engine: each field is applied or refused."""

import asyncio
import io
import json
import zipfile
from dataclasses import replace

import grpc
import pytest
import tokenizers

from jaxinfer.edge_config import SecurityConfig, ServerConfig
from jaxinfer.errors import ConfigError, QueueFull
from jaxinfer.host.request import SamplingParams
from jaxinfer.server import address, gateway_text, openai_door
from jaxinfer.text.assets import TextAssets
from jaxinfer.text.tokenizer import Tokenizer
from jaxinfer.v1 import inference_pb2, inference_pb2_grpc
from tests import cli_model
from tests.server import serving
from tests.server.fake_engine import (
    MODEL,
    expected_logprobs,
    expected_tokens,
    served,
)

pytest.importorskip("smg_grpc_proto")
from smg_grpc_proto.generated import common_pb2, vllm_engine_pb2, vllm_engine_pb2_grpc  # noqa: E402

from jaxinfer.server import auth, gateway  # noqa: E402

pb = vllm_engine_pb2
PROMPT = [1, 104, 105]
BOS = "<s>"
REFUSED = {
    "n": 2,
    "frequency_penalty": 0.5,
    "presence_penalty": -0.5,
    "repetition_penalty": 1.5,
    "prompt_logprobs": 0,
    "logit_bias": {5: 1.0},
    "truncate_prompt_tokens": -1,
    "grammar_from_first_token": True,
    "json_schema": "{}",
    "regex": "a",
    "grammar": "root ::= 'a'",
    "structural_tag": "{}",
    "json_object": True,
    "choice": pb.ChoiceConstraint(choices=["a"]),
    "logprobs": 2,
}
NEUTRAL = {
    "n": 1,
    "frequency_penalty": 0.0,
    "presence_penalty": 0.0,
    "repetition_penalty": 1.0,
    "skip_special_tokens": True,
    "spaces_between_special_tokens": True,
    "include_stop_str_in_output": True,
}


def with_stub(body, **options):
    """Runs `body(stub, server)` against a running server."""

    async def main():
        async with (
            serving.running(**options) as server,
            grpc.aio.insecure_channel(server.target) as wire,
        ):
            await body(vllm_engine_pb2_grpc.VllmEngineStub(wire), server)

    asyncio.run(main())


def ask(*, stream: bool = False, prompt: list[int] | None = None, **sampling):
    return pb.GenerateRequest(
        tokenized=pb.TokenizedInput(input_ids=prompt or PROMPT),
        sampling_params=pb.SamplingParams(**{"max_tokens": 6, "seed": 3} | sampling),
        stream=stream,
    )


async def whole(stub, request):
    """The one answer of a call that does not stream."""
    (answer,) = [answer async for answer in stub.Generate(request)]
    return answer.complete


async def refusal(stub, request, code=grpc.StatusCode.INVALID_ARGUMENT) -> str:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        async for _ in stub.Generate(request):
            pass
    assert caught.value.code() is code, caught.value
    return caught.value.details()


def test_an_answer_in_one_piece_has_all_tokens_and_counts():
    async def body(stub, server):
        complete = await whole(stub, ask(logprobs=0))
        assert list(complete.output_ids) == expected_tokens(PROMPT, 6, seed=3)
        assert complete.finish_reason == "length"
        assert (complete.prompt_tokens, complete.completion_tokens) == (3, 6)
        assert complete.cached_tokens == 1
        assert list(complete.output_logprobs.token_logprobs) == expected_logprobs(6)
        assert list(complete.output_logprobs.token_ids) == list(complete.output_ids)
        assert not complete.output_logprobs.top_logprobs
        assert not (await whole(stub, ask())).HasField("output_logprobs")

    with_stub(body)


def test_a_stream_brings_every_token_once_and_its_counts_grow():
    async def body(stub, server):
        answers = [answer async for answer in stub.Generate(ask(stream=True, max_tokens=40))]
        *chunks, last = answers
        assert all(answer.HasField("chunk") for answer in chunks) and len(chunks) > 1
        tokens = [token for answer in chunks for token in answer.chunk.token_ids]
        assert tokens == expected_tokens(PROMPT, 40, seed=3)
        counts = [answer.chunk.completion_tokens for answer in chunks]
        assert counts == sorted(counts) and counts[-1] == last.complete.completion_tokens == 40
        assert last.complete.finish_reason == "length"

    with_stub(body, step_s=0.002)


def test_every_sampling_field_reaches_the_engine():
    async def body(stub, server):
        await whole(
            stub,
            ask(
                temperature=0.5,
                top_p=0.75,
                top_k=7,
                min_p=0.25,
                max_tokens=9,
                min_tokens=2,
                seed=11,
                stop=["zz"],
                stop_token_ids=[250],
                ignore_eos=True,
            ),
        )
        (request,) = server.engine.submitted
        assert request.prompt == tuple(PROMPT)
        assert request.sampling == SamplingParams(
            temperature=0.5,
            top_p=0.75,
            top_k=7,
            min_p=0.25,
            max_tokens=9,
            min_tokens=2,
            seed=11,
            stop=("zz",),
            stop_token_ids=(250,),
            ignore_eos=True,
        )

    with_stub(body)


def test_what_is_absent_or_neutral_is_the_models_own_value_and_a_present_0_is_not():
    defaults = SamplingParams(temperature=0.25, top_p=0.5, top_k=9, max_tokens=5)

    async def body(stub, server):
        tokenized = pb.TokenizedInput(input_ids=PROMPT)
        for sampling in (pb.SamplingParams(), pb.SamplingParams(**NEUTRAL, top_p=0.0, top_k=0)):
            await whole(stub, pb.GenerateRequest(tokenized=tokenized, sampling_params=sampling))
        for request in server.engine.submitted:
            assert replace(request.sampling, seed=None) == replace(
                defaults, seed=None, min_p=0.0, min_tokens=0
            )
        seeds = [request.sampling.seed for request in server.engine.submitted]
        assert None not in seeds and len(set(seeds)) == 2
        await whole(stub, ask(temperature=0.0))
        assert server.engine.submitted[-1].sampling.temperature == 0.0

    with_stub(body, defaults=defaults)


@pytest.mark.parametrize("name", REFUSED)
def test_a_sampling_field_that_is_not_served_is_refused_by_name(name):
    async def body(stub, server):
        details = await refusal(stub, ask(**{name: REFUSED[name]}))
        assert f"sampling_params.{name}" in details
        assert not server.engine.submitted

    with_stub(body)


def test_no_field_of_the_protocol_is_left_unjudged():
    known = {*gateway.APPLIED_SAMPLING, *gateway.BY_GATEWAY, *REFUSED}
    assert known == {field.name for field in pb.SamplingParams.DESCRIPTOR.fields}


def test_images_transfers_and_other_ranks_are_refused_and_rank_0_is_not():
    refused = {
        "mm_inputs": pb.MultimodalInputs(im_token_id=1),
        "media_refs": pb.MediaRefs(items=[pb.MediaRef(url="data:,")]),
        "kv_transfer_params_json": "{}",
        "data_parallel_rank": 1,
    }

    async def body(stub, server):
        for name, value in refused.items():
            request = pb.GenerateRequest(tokenized=pb.TokenizedInput(input_ids=PROMPT))
            request.MergeFrom(pb.GenerateRequest(**{name: value}))
            assert name in await refusal(stub, request)
        request = ask()
        request.data_parallel_rank = 0
        assert (await whole(stub, request)).completion_tokens == 6
        assert "no prompt" in await refusal(stub, pb.GenerateRequest())

    with_stub(body)


def test_one_alternative_is_given_where_the_chosen_token_is_the_likeliest():
    async def body(stub, server):
        complete = await whole(stub, ask(temperature=0.0, logprobs=1))
        tops = complete.output_logprobs.top_logprobs
        assert [list(top.token_ids) for top in tops] == [[one] for one in complete.output_ids]
        assert [top.values[0] for top in tops] == expected_logprobs(6)
        assert "logprobs" in await refusal(stub, ask(temperature=1.0, logprobs=1))

    with_stub(body)


def test_text_is_encoded_here_and_ends_are_told():
    async def body(stub, server):
        tokens = expected_tokens([1, *b"hi"], 6, seed=3)
        request = pb.GenerateRequest(
            text="hi",
            sampling_params=pb.SamplingParams(seed=3, max_tokens=6, stop=[chr(tokens[2])]),
        )
        complete = await whole(stub, request)
        assert list(complete.output_ids) == tokens[: tokens.index(tokens[2]) + 1]
        assert (complete.finish_reason, complete.matched_stop_str) == ("stop", chr(tokens[2]))
        complete = await whole(stub, ask(stop_token_ids=[tokens[1]], prompt=[1, *b"hi"]))
        assert (complete.finish_reason, complete.matched_token_id) == ("stop", tokens[1])

    with_stub(body)


def test_abort_ends_the_named_request_and_no_other():
    async def body(stub, server):
        async def run(name):
            request = ask(stream=True, max_tokens=400)
            request.request_id = name
            return [answer async for answer in stub.Generate(request)]

        one, other = asyncio.create_task(run("one")), asyncio.create_task(run("other"))
        await serving.until(lambda: len(server.engine.submitted) == 2)
        await stub.Abort(pb.AbortRequest(request_ids=["one", "nobody"]))
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await one
        assert caught.value.code() is grpc.StatusCode.CANCELLED
        assert server.engine.cancelled == ["one"]
        assert (await other)[-1].complete.completion_tokens == 400

    with_stub(body, step_s=0.002)


def test_leaving_a_call_ends_its_request():
    async def body(stub, server):
        call = stub.Generate(ask(stream=True, max_tokens=400))
        await call.read()
        call.cancel()
        await serving.until(lambda: server.engine.cancelled)
        (request,) = server.engine.submitted
        assert server.engine.cancelled == [request.request_id]

    with_stub(body, step_s=0.005)


def test_a_full_queue_and_a_failed_engine_have_the_statuses_that_the_gateway_maps():
    async def body(stub, server):
        server.engine.submit_error = QueueFull("8 requests are waiting")
        await refusal(stub, ask(), grpc.StatusCode.RESOURCE_EXHAUSTED)
        server.engine.submit_error = None
        server.engine.fail_with = "a step failed"
        await refusal(stub, ask(), grpc.StatusCode.INTERNAL)
        server.engine.refuse()
        await refusal(stub, ask(), grpc.StatusCode.UNAVAILABLE)

    with_stub(body)


def test_both_protocols_share_one_space_of_request_ids():
    async def body(stub, server):
        request = ask(stream=True, max_tokens=400)
        request.request_id = "same"
        call = stub.Generate(request)
        await call.read()
        async with grpc.aio.insecure_channel(server.target) as wire:
            message = inference_pb2.GenerateRequest(request_id="same", text="hi")
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await inference_pb2_grpc.InferenceServiceStub(wire).Generate(message)
        assert caught.value.code() is grpc.StatusCode.ALREADY_EXISTS
        call.cancel()

    with_stub(body, step_s=0.005)


def test_it_says_what_it_is_and_how_busy():
    async def body(stub, server):
        model = await stub.GetModelInfo(pb.GetModelInfoRequest())
        assert (model.served_model_name, model.max_context_length) == (MODEL, 512)
        assert model.is_generation and not model.supports_vision
        assert list(model.eos_token_ids) == [0]
        assert json.loads(model.default_sampling_params_json) == {"top_p": 0.5, "max_tokens": 8}
        call = stub.Generate(ask(stream=True, max_tokens=400))
        await call.read()
        (load,) = (await stub.GetLoads(pb.GetLoadsRequest())).loads
        assert (load.num_running_reqs, load.max_running_requests) == (1, 8)
        assert (await stub.GetServerInfo(pb.GetServerInfoRequest())).active_requests == 1
        call.cancel()
        assert (await stub.HealthCheck(pb.HealthCheckRequest())).healthy
        await server.server.set_serving(False)
        assert not (await stub.HealthCheck(pb.HealthCheckRequest())).healthy

    with_stub(body, step_s=0.005, defaults=SamplingParams(top_p=0.5, max_tokens=8))


def test_the_archive_makes_the_tokenizer_that_we_use():
    text = TextAssets(tokenizer_json=cli_model.tokenizer_json(), chat_template="{{ messages }}")

    async def body(stub, server):
        request = common_pb2.GetTokenizerRequest()
        chunks = [chunk async for chunk in stub.GetTokenizer(request)]
        assert [bool(chunk.sha256) for chunk in chunks] == [False] * (len(chunks) - 1) + [True]
        archive = zipfile.ZipFile(io.BytesIO(b"".join(chunk.data for chunk in chunks)))
        found = tokenizers.Tokenizer.from_str(archive.read("tokenizer.json").decode())
        assert found.encode("Héllo 漢").ids == Tokenizer(text).encode("Héllo 漢")
        settings = json.loads(archive.read("tokenizer_config.json"))
        assert settings["chat_template"] == "{{ messages }}" and not settings["add_bos_token"]
        assert json.loads(archive.read("config.json"))["model_type"] == "llama"

    with_stub(body, text=text)


def test_the_archive_puts_the_first_token_where_our_tokenizer_does():
    document = json.loads(cli_model.tokenizer_json())
    document["added_tokens"] = [
        {"id": 256, "content": BOS, "special": True, "single_word": False, "lstrip": False}
        | {"rstrip": False, "normalized": False}
    ]
    text = TextAssets(tokenizer_json=json.dumps(document), bos_token=BOS, add_bos=True)
    for processor in (None, {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}):
        document["post_processor"] = processor
        text = replace(text, tokenizer_json=json.dumps(document))
        found = tokenizers.Tokenizer.from_str(gateway_text.tokenizer_json(text))
        assert found.encode("hi").ids == Tokenizer(text).encode("hi") == [256, *b"hi"]
        bare = found.encode("hi", add_special_tokens=False).ids
        assert bare == Tokenizer(text).encode("hi", add_special=False)
    archive = gateway_text.archive(replace(served(), text=text))
    assert archive == gateway_text.archive(replace(served(), text=text))


def test_every_method_has_a_scope():
    scopes = gateway.scopes(generate="generate", read="read", is_open=auth.OPEN)
    methods = pb.DESCRIPTOR.services_by_name["VllmEngine"].methods
    assert set(scopes) == {f"/{gateway.NAME}/{method.name}" for method in methods}
    assert scopes[f"/{gateway.NAME}/Abort"] == "generate"


def test_the_door_refuses_settings_that_it_can_not_serve(tmp_path, monkeypatch):
    server = ServerConfig(openai_port=8000)
    openai_door.check(ServerConfig(), SecurityConfig(tokens="t.toml"))
    with pytest.raises(ConfigError, match=r"security\.tokens"):
        openai_door.check(server, SecurityConfig(tokens="t.toml"))
    with pytest.raises(ConfigError, match=r"security\.tls_cert.*without TLS and tokens"):
        openai_door.check(server, SecurityConfig(tls_cert="a.pem", tls_key="a.key"))
    key = tmp_path / "key"
    key.write_text("short")
    key.chmod(0o600)
    with pytest.raises(ConfigError, match="at least 16"):
        openai_door.check(server, SecurityConfig(openai_key=str(key)))
    key.write_text("k" * 20 + "\n")
    assert openai_door.read_key(SecurityConfig(openai_key=str(key))) == "k" * 20
    key.chmod(0o644)
    with pytest.raises(ConfigError, match="chmod 600"):
        openai_door.check(server, SecurityConfig(openai_key=str(key)))
    monkeypatch.setattr(openai_door, "PACKAGES", ("no_such_package",))
    with pytest.raises(ConfigError, match=r"pip install 'jaxinfer\[gateway\]'"):
        openai_door.check(server, SecurityConfig())


def test_the_door_needs_a_port_of_its_own():
    port = openai_door._free_port()
    with pytest.raises(ConfigError, match=r"server\.openai_port"):
        address.check_address(ServerConfig(port=port, openai_port=port))


def test_a_gateway_finds_a_server_that_listens_everywhere():
    urls = {"127.0.0.1": "127.0.0.1", "0.0.0.0": "127.0.0.1", "::": "[::1]", "fe80::1": "[fe80::1]"}
    for host, url in urls.items():
        assert openai_door.worker_url(host, 5) == f"grpc://{url}:5"
