"""The whole engine over virtual devices: every way to sample, failures, restarts, and a server."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxinfer.client import Client
from jaxinfer.compile import Shape
from jaxinfer.config import load
from jaxinfer.engine import Engine
from jaxinfer.engine_config import CacheConfig
from jaxinfer.errors import ConfigError
from jaxinfer.host.request import FinishReason, SamplingParams
from jaxinfer.llm import LLM
from tests import cli_model, demo_model, tiny
from tests.mesh.spread import bytes_by_device, collectives, spread

pytestmark = pytest.mark.full
ROOT = Path(__file__).parents[2]
GOLDEN = ROOT / "tests" / "golden" / "smollm2-135m" / "reference.json"
REQUESTS = tiny.random_requests(24, seed=1)
PROMPTS = [[3 + number, 5, 7] * (1 + number % 5) for number in range(16)]
FEW = {"prefill_chunks": (8, 64), "decode_rows": (8,)}  # programs take long to build
CLOSE_CALL = 1e-3  # float32 rounding may turn over what is closer than this


def make_engine(num_devices, model=tiny.MODEL, **changes):
    wide, params = spread(num_devices, model)
    config = tiny.engine_config(**(FEW | changes))
    return Engine(params, wide, tiny.TokenText(), config, store=tiny.store())


def tokens_of(answers):
    return {name: answer.tokens for name, answer in answers.items()}


@pytest.fixture(scope="module")
def answers():
    return tiny.run(make_engine(1), REQUESTS)


@pytest.fixture(scope="module", params=[2, 4, 8])
def engine(request):
    return make_engine(request.param, cache=CacheConfig(num_pages=32))


def test_every_way_to_sample_gives_the_tokens_of_one_device(engine, answers):
    assert engine.self_test.is_exact
    found = tiny.run(engine, REQUESTS, arrivals_per_step=2)
    assert engine.stats().num_preemptions > 0
    assert engine.stats().num_compiles_after_start == 0
    assert tokens_of(found) == tokens_of(answers)
    alone = tiny.run(engine, [REQUESTS[3]])
    assert alone["r3"].logprobs == found["r3"].logprobs


def test_banned_tokens_are_banned_on_whichever_device_they_lie(engine):
    free = tiny.run(engine, [tiny.make_request("one", [11, 12, 13])])["one"]
    for stop in sorted(set(free.tokens))[:4]:
        request = tiny.make_request("one", [11, 12, 13], stop_token_ids=(stop,), min_tokens=8)
        assert stop not in tiny.run(engine, [request])["one"].tokens[:8]


def test_a_failed_step_is_survived(engine, answers):
    shape = Shape("decode", 8, 1)
    program, calls = engine.programs[shape], []

    def fail_once(params, cache, packed):
        calls.append(1)
        result = program.run(params, cache, packed)
        if len(calls) == 20:
            jax.block_until_ready(result)
            raise jax.errors.JaxRuntimeError("INTERNAL: planted")
        return result

    engine.programs[shape] = replace(program, run=fail_once)
    try:
        assert tokens_of(tiny.run(engine, REQUESTS)) == tokens_of(answers)
    finally:
        engine.programs[shape] = program
    assert engine.stats().num_recoveries == 1


def test_a_row_without_finite_logits_ends_alone(engine, answers):
    params = engine.device.params
    poisoned = params._replace(embedding=params.embedding.at[255].set(np.nan))
    other = Engine(poisoned, engine.model, tiny.TokenText(), engine.config, store=tiny.store())
    good = [one for one in REQUESTS if 255 not in (*one.prompt, *answers[one.request_id].tokens)]
    bad = tiny.make_request("bad", [1, 255, 2])
    mixed = tiny.run(other, [*good[:3], bad, *good[3:6]])
    assert mixed["bad"].last.finish_reason is FinishReason.ERROR
    assert "not finite" in mixed["bad"].last.error
    for request in good[:6]:
        assert mixed[request.request_id].tokens == answers[request.request_id].tokens


def test_a_snapshot_goes_on(engine, answers):
    for request in REQUESTS:
        engine.submit(request)
    for _ in range(30):
        engine.step()
    snapshot = engine.snapshot()
    for request in REQUESTS:
        engine.cancel(request.request_id)
    while engine.has_work:
        engine.step()
    restored = engine.restore(snapshot)
    tokens: dict[str, list[int]] = {request.request_id: [] for request in restored}
    while engine.has_work:
        for output in engine.step():
            tokens[output.request_id] += output.token_ids
    assert tokens
    for name, own in tokens.items():
        assert tuple(own) == answers[name].tokens[len(answers[name].tokens) - len(own) :]


@pytest.mark.parametrize(
    ("model", "changes"),
    [
        (
            {"qkv_bias": True, "output_bias": True, "qk_norm": True, "layer_windows": (24, 0)},
            {},
        ),
        (
            {"num_heads": 8, "num_kv_heads": 1, "tie_embeddings": True},
            {"cache": CacheConfig(dtype="int8")},
        ),
    ],
    ids=("biases_norms_and_windows", "one_kv_head_in_int8_pages"),
)
def test_other_models_and_pages_give_the_tokens_of_one_device(model, changes):
    other = replace(tiny.MODEL, **model)
    one, four = (tiny.run(make_engine(n, other, **changes), REQUESTS[:12]) for n in (1, 4))
    assert tokens_of(one) == tokens_of(four)


@pytest.mark.parametrize("quant", ["w8a8", "w8a16"])
def test_int8_weights_are_split_with_their_scales(tmp_path, quant):
    model = replace(tiny.MODEL, num_heads=16, num_kv_heads=4, d_ff=256)  # of 128 channels a device
    folder = cli_model.save(tmp_path, model)
    options = ("engine.prefill_chunks=[8]", "engine.decode_rows=[8]", "quant.gate=off")
    files = (tmp_path / "tiny.toml", "mesh/tensor-2", f"model={folder}", *options)
    with pytest.raises(ConfigError, match="use fewer devices"):
        LLM(config=load(*files, "mesh.shape=[8]", f"quant.scheme={quant}", environ={}))
    llm = LLM(config=load(*files, f"quant.scheme={quant}", environ={}))
    assert llm.engine.self_test.is_exact
    held = bytes_by_device((llm.engine.device.params, llm.engine.device.cache)).values()
    plan = llm.engine.device.memory
    for own in held:
        assert own == pytest.approx(plan.weight_bytes + plan.cache_bytes, rel=0.05)
    greedy = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)
    together = llm.generate(PROMPTS, greedy)
    assert [llm.generate([one], greedy)[0].token_ids for one in PROMPTS] == [
        one.token_ids for one in together
    ]


@contextmanager
def serving(*options: str, num_replicas: int = 1) -> Iterator[str]:
    """A server's address, until the end of the block; it has eight virtual devices."""
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"}
    process = subprocess.Popen(
        [sys.executable, "-m", "jaxinfer", "serve", "--server.port", "0", "--json", *options],
        cwd=ROOT,
        env=os.environ | flags,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        ready = json.loads(process.stdout.readline())
        assert ready["exact_bits"] and ready["num_replicas"] == num_replicas
        yield ready["target"]
        process.terminate()
        assert process.wait(timeout=60) == 0
    finally:
        process.kill()
        process.communicate()


def test_a_server_over_four_devices_answers_as_one_device_does(tmp_path, monkeypatch):
    monkeypatch.setenv("JAXINFER_CACHE_DIR", str(tmp_path / "cache"))
    folder = cli_model.save(tmp_path)
    files = ("-m", str(folder), "-c", str(tmp_path / "tiny.toml"), "-c", "mesh/tensor-4")
    few = ("--set=engine.prefill_chunks=[8]", "--set=engine.decode_rows=[8]")
    expected = tiny.run(
        make_engine(1),
        [
            tiny.make_request(f"r{n}", prompt, temperature=0.8 * (n % 2), seed=n, max_tokens=24)
            for n, prompt in enumerate(PROMPTS[:8])
        ],
    )
    for _ in range(2):  # the second one loads its programs
        with (
            serving(*files, *few, "--engine.score-chunk", "16") as target,
            Client(target) as client,
        ):
            for number, prompt in enumerate(PROMPTS[:8]):
                found = client.generate(
                    token_ids=prompt,
                    temperature=0.8 * (number % 2),
                    seed=number,
                    max_tokens=24,
                    ignore_eos=True,
                )
                assert tuple(found.token_ids) == expected[f"r{number}"].tokens
            text = [*PROMPTS[0], *expected["r0"].tokens]
            assert all(client.score(token_ids=text).is_likeliest[len(PROMPTS[0]) - 1 :])
    flags = "--xla_force_host_platform_device_count=8"
    planned = subprocess.run(
        [sys.executable, "-m", "jaxinfer", "plan", *files, *few, "--json"],
        env=os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
        cwd=ROOT,
        stdout=subprocess.PIPE,
        check=True,
    )
    assert not json.loads(planned.stdout)["is_temp_estimate"]  # that of the programs it left


@pytest.mark.parametrize("mesh", ["mesh/replicas-2", "mesh/replicas-2-tensor-4"])
def test_a_server_of_replicas_answers_as_one_engine_does_and_each_replays(
    tmp_path, monkeypatch, mesh
):
    monkeypatch.setenv("JAXINFER_CACHE_DIR", str(tmp_path / "cache"))
    folder = cli_model.save(tmp_path)
    files = ("-m", str(folder), "-c", str(tmp_path / "tiny.toml"), "-c", mesh)
    few = ("--set=engine.prefill_chunks=[8]", "--set=engine.decode_rows=[8]")
    kept = ("--journal.folder", str(tmp_path / "journal"))
    expected = tiny.run(
        make_engine(1), [tiny.make_request(f"r{n}", one) for n, one in enumerate(PROMPTS)]
    )
    with serving(*files, *few, *kept, num_replicas=2) as target, Client(target) as client:

        def ask(prompt: list[int]) -> tuple[int, ...]:
            found = client.generate(
                token_ids=prompt, temperature=0.0, seed=0, max_tokens=16, ignore_eos=True
            )
            return tuple(found.token_ids)

        with ThreadPoolExecutor(8) as pool:
            found = list(pool.map(ask, PROMPTS))
    assert found == [expected[f"r{n}"].tokens for n in range(len(PROMPTS))]
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"}
    for number in range(2):
        replayed = subprocess.run(
            [sys.executable, "-m", "jaxinfer", "replay", str(tmp_path / f"journal-{number}")],
            env=os.environ | flags,
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=True,
        )
        assert "the same: every plan, page, batch, token" in replayed.stdout, replayed.stdout
        assert " 0 tokens" not in replayed.stdout


@demo_model.needed
@pytest.mark.parametrize("num_devices", [2, 4, 8])
def test_smollm2_says_the_same_on_any_number_of_devices(num_devices):
    config = load(
        f"mesh/tensor-{num_devices}",
        "engine.compute_dtype=float32",
        "engine.max_seq_len=512",
        "engine.prefill_chunks=[32, 128]",
        "engine.decode_rows=[8]",
        environ={},
    )
    llm = LLM(config=config)
    assert llm.model.num_heads == {2: 12, 4: 12, 8: 16}[num_devices]
    plan, held = (
        llm.engine.device.memory,
        bytes_by_device((llm.engine.device.params, llm.engine.device.cache)),
    )
    assert len(held) == num_devices
    for own in held.values():
        assert own == pytest.approx(plan.weight_bytes + plan.cache_bytes, rel=0.05)
    text = llm.engine.programs[Shape("decode", 8, 1)].text()
    assert collectives(text)["all-reduce", "f32[8,1,576]"] == 2 * 30 + 1
    items = json.loads(GOLDEN.read_text())["items"]
    greedy = SamplingParams(temperature=0.0, max_tokens=64, ignore_eos=True)
    for item, found in zip(items, llm.generate([i["ids"] for i in items], greedy), strict=True):
        close = [place for place, margin in enumerate(item["margin"]) if margin < CLOSE_CALL]
        sure = item["out_ids"][: close[0]] if close else item["out_ids"]
        assert list(found.token_ids[: len(sure)]) == sure
