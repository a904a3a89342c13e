"""`jaxinfer generate`: one prompt in, text or one JSON object out."""

import json
import sys
import time
from typing import TYPE_CHECKING, Any

from jaxinfer.cli import progress
from jaxinfer.cli.options import COMMON, NO_PROMPT, UNSET, Common, Json, PromptOptions, Sampling
from jaxinfer.errors import EngineFailed, InvalidRequest
from jaxinfer.host.request import FinishReason, Output, SamplingParams, Timings

if TYPE_CHECKING:
    from jaxinfer.llm import LLM


def generate(
    *,
    prompt: PromptOptions = NO_PROMPT,
    sampling: Sampling = UNSET,
    as_json: Json = False,
    common: Common = COMMON,
) -> None:
    """Continues one prompt, without a server.

    Parameters
    ----------
    as_json
        Prints one JSON object at the end: text, token_ids, finish_reason, usage, timings.
    """
    settings = common.load()
    text = prompt.read()
    if not text:
        raise InvalidRequest("the prompt is empty; give at least one token", field="prompt")
    from jaxinfer.llm import LLM

    started_s = time.monotonic()
    with progress.shown() as show:
        llm = LLM(config=settings, progress=show)
    load_s = time.monotonic() - started_s
    given = prompt.messages(text) if prompt.chat and isinstance(text, str) else text
    if as_json:
        print(json.dumps(answer(llm, given, sampling, load_s=load_s), ensure_ascii=False))
        return
    for output in llm.stream(given, sampling):
        check(output)
        sys.stdout.write(output.text)
        sys.stdout.flush()
    print()


def answer(
    llm: "LLM", prompt: Any, sampling: SamplingParams, *, load_s: float = 0.0
) -> dict[str, Any]:
    """What one prompt got, as JSON has it."""
    outputs = list(llm.stream(prompt, sampling))
    last = outputs[-1]
    check(last)
    return {
        "text": "".join(output.text for output in outputs),
        "token_ids": [token for output in outputs for token in output.token_ids],
        "finish_reason": str(last.finish_reason),
        "usage": {
            "num_prompt_tokens": last.num_prompt_tokens,
            "num_output_tokens": last.num_output_tokens,
            "num_preemptions": last.num_preemptions,
        },
        "timings": {"load_s": round(load_s, 6), **seconds(last.timings, last.num_output_tokens)},
    }


def seconds(timings: Timings, num_tokens: int) -> dict[str, float | None]:
    """How long each part of a request took; None for what never came."""

    def between(start: float | None, end: float | None) -> float | None:
        return None if start is None or end is None else round(end - start, 6)

    decode_s = between(timings.first_token_s, timings.finished_s)
    return {
        "queue_s": between(timings.arrived_s, timings.scheduled_s),
        "prefill_s": between(timings.scheduled_s, timings.first_token_s),
        "decode_s": decode_s,
        "ttft_s": between(timings.arrived_s, timings.first_token_s),
        "tpot_s": round(decode_s / (num_tokens - 1), 6) if decode_s and num_tokens > 1 else None,
        "total_s": between(timings.arrived_s, timings.finished_s),
    }


def check(output: Output) -> None:
    """Raises EngineFailed where a request ended for no fault of its own."""
    if output.finish_reason is FinishReason.ERROR:
        raise EngineFailed(output.error or "the engine failed")
