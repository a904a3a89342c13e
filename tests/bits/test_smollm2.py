"""The demo model gives real prompts the same bits alone and 32 at a time."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from jaxinfer.host.request import SamplingParams
from jaxinfer.llm import LLM, Completion
from tests import demo_model
from tests.bits import world
from tests.bits.world import Answer, Kind
from tests.demo_model import shared_llm

FILE = Path(__file__).parent.parent / "golden" / "spec_bench" / "prompts.jsonl"
BATCH, NUM_TOKENS = demo_model.NUM_SLOTS, 16

pytestmark = demo_model.needed


def prompts(llm: LLM) -> list[list[int]]:
    lines = FILE.read_text().splitlines()
    messages = [[{"role": "user", "content": json.loads(line)["text"]}] for line in lines]
    return [llm.tokenizer.encode_chat(message) for message in messages]


def sampling(number: int) -> SamplingParams:
    """Every other prompt is answered greedily."""
    plain = SamplingParams(temperature=0.0, max_tokens=NUM_TOKENS, ignore_eos=True, seed=number)
    return plain if number % 2 else replace(plain, temperature=0.8, top_p=0.95)


def ask(llm: LLM, many: dict[int, list[int]]) -> dict[int, Answer]:
    """All of them at once, each with its own way of sampling."""
    llm.engine.flush_prefix_cache()
    requests = {number: llm._request(prompt, sampling(number)) for number, prompt in many.items()}
    found = llm._finish(list(requests.values()))
    return {number: _answer(one) for number, one in zip(requests, found, strict=True)}


def _answer(completion: Completion) -> Answer:
    return Answer(completion.token_ids, completion.logprobs, completion.finish_reason)


NATIVE = [
    pytest.param(kind, marks=[pytest.mark.full, world.native_only], id=str(kind))
    for kind in world.NATIVE_KINDS
]


def test_a_batch_of_32_gives_a_few_prompts_the_bits_that_each_gets_alone() -> None:
    check_batches(Kind("bfloat16"), 10)


@pytest.mark.full
@pytest.mark.parametrize(
    "kind", [*(pytest.param(Kind(name), id=name) for name in ("bfloat16", "float32")), *NATIVE]
)
def test_a_batch_of_32_gives_each_prompt_the_bits_that_it_gets_alone(kind: Kind) -> None:
    check_batches(kind, 200)


def check_batches(kind: Kind, count: int) -> None:
    """Fails where one of `count` prompts has other bits than alone."""
    llm = shared_llm(**kind._asdict())
    every = prompts(llm)
    assert len(every) == 200
    step = len(every) // count
    some = {number: every[number] for number in range(0, step * count, step)}
    numbers = list(some)
    together: dict[int, Answer] = {}
    for start in range(0, count, BATCH):
        together |= ask(llm, {number: some[number] for number in numbers[start : start + BATCH]})
    differing = {}
    for number, prompt in some.items():
        alone = ask(llm, {number: prompt})[number]
        assert len(alone.tokens) == NUM_TOKENS
        if bits := world.differing_bits(together[number], alone):
            differing[number] = bits
    print(kind, count, "prompts,", len(differing), "differ")
    assert not differing


@pytest.mark.parametrize(
    "kind", [*(pytest.param(Kind(name), id=name) for name in ("float32", "bfloat16")), *NATIVE]
)
def test_a_prefill_of_each_prefix_samples_what_a_decode_did(kind: Kind) -> None:
    """What a preemption, a failure or a restart computes again: one row here, eight there."""
    llm = shared_llm(**kind._asdict())
    prompt = prompts(llm)[0][:90]
    plain = SamplingParams(temperature=0.0, max_tokens=40, ignore_eos=True, seed=0)
    whole = _answer(llm._finish([llm._request(prompt, plain)])[0])
    single = replace(plain, max_tokens=1)
    again = [
        replace(
            llm._request([*prompt, *whole.tokens[:count]], single),
            use_prefix_cache=False,
        )
        for count in range(len(whole.tokens))
    ]
    found = [_answer(one) for one in llm._finish(again)]
    decoded = list(zip(whole.tokens, whole.logprobs, strict=True))
    assert [(one.tokens[0], one.logprobs[0]) for one in found] == decoded
