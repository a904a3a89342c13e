"""transformers with torch on the same shapes: a static cache and a CUDA graph, and serving."""

import importlib
import time
from collections.abc import Callable
from functools import partial
from statistics import median
from typing import Any

from jaxinfer.bench.hardware.part import Part
from jaxinfer.bench.hardware.sizes import Asked, work
from jaxinfer.config import ModelConfig


def measure(part: Part) -> None:
    """A row a model and load; nothing where torch or transformers is not installed."""
    try:
        torch: Any = importlib.import_module("torch")
        transformers: Any = importlib.import_module("transformers")
    except ImportError as error:
        part.skip("transformers with torch", f"not installed: {error}")
        return
    device = "cuda" if torch.cuda.is_available() else "cpu"
    part.fact(
        torch=torch.__version__,
        transformers=transformers.__version__,
        device=torch.cuda.get_device_name() if device == "cuda" else "cpu",
    )
    for name, model in part.sizes.models:
        made = part.attempt(
            f"{name}: weights", partial(_model, torch, transformers, model, device, part)
        )
        if made is None:
            continue
        for rows in part.sizes.batches:
            part.attempt(
                f"{name}: decode of {rows}",
                partial(_decode, part, torch, transformers, made, name, rows, device),
            )
        part.attempt(f"{name}: prefill", partial(_prefill, part, torch, made, name, device))
        if name == part.sizes.models[0][0]:
            part.attempt(f"{name}: serving", partial(_serve, part, transformers, made, name))


def _model(torch: Any, transformers: Any, model: ModelConfig, device: str, part: Part) -> Any:
    config = transformers.LlamaConfig(
        vocab_size=model.vocab_size,
        hidden_size=model.d_model,
        intermediate_size=model.d_ff,
        num_hidden_layers=model.num_layers,
        num_attention_heads=model.num_heads,
        num_key_value_heads=model.num_kv_heads,
        head_dim=model.head_dim,
        max_position_embeddings=model.max_positions,
        rope_theta=model.rope_theta,
        tie_word_embeddings=model.tie_embeddings,
        attn_implementation="sdpa",
    )
    torch.set_default_dtype(getattr(torch, part.sizes.dtype))
    with torch.device(device):
        made = transformers.LlamaForCausalLM(config)
    return made.eval()


def _decode(
    part: Part, torch: Any, transformers: Any, made: Any, name: str, rows: int, device: str
) -> None:
    context = part.sizes.context
    cache = transformers.StaticCache(
        config=made.config,
        max_batch_size=rows,
        max_cache_len=context,
        device=device,
        dtype=getattr(torch, part.sizes.dtype),
    )
    tokens = torch.ones((rows, 1), dtype=torch.long, device=device)
    place = torch.tensor([context - 1], device=device)

    def step() -> None:
        out = made(
            input_ids=tokens,
            position_ids=place.expand(rows, 1),
            cache_position=place,
            past_key_values=cache,
            use_cache=True,
        )
        tokens.copy_(out.logits[:, -1:].argmax(-1))

    with torch.inference_mode():
        run, way = _captured(torch, step, device)
        times = _seconds(torch, part, run, device, part.sizes.steps)
    part.add(
        peer="transformers",
        model=name,
        program=f"decode of {rows}",
        context=context,
        way=way,
        ms=1e3 * median(times),
        tokens_per_s=rows / median(times),
    )


def _prefill(part: Part, torch: Any, made: Any, name: str, device: str) -> None:
    tokens = torch.ones((1, part.sizes.context), dtype=torch.long, device=device)

    def step() -> None:
        made(input_ids=tokens, use_cache=True, logits_to_keep=1)

    with torch.inference_mode():
        times = _seconds(torch, part, step, device, 1)
    part.add(
        peer="transformers",
        model=name,
        program="prefill",
        context=part.sizes.context,
        way="eager",
        ms=1e3 * median(times),
        tokens_per_s=part.sizes.context / median(times),
    )


def _serve(part: Part, transformers: Any, made: Any, name: str) -> None:
    """The requests of the part `serving` through continuous batching, all of them at once."""
    size = part.sizes.serving
    asked = work(size, made.config.vocab_size)
    longest = size.longest_prompt + size.longest_answer
    page_size = 32
    made.set_attn_implementation("paged|sdpa")
    settings = transformers.GenerationConfig(
        max_new_tokens=size.longest_answer, do_sample=False, eos_token_id=-1, pad_token_id=0
    )
    paged = transformers.ContinuousBatchingConfig(
        page_size=page_size,
        num_blocks=-(-size.slots * longest // page_size),
        max_batch_tokens=max(size.slots, size.prefill_chunks[-1]),
        allow_block_sharing=False,
    )
    with made.continuous_batching_context_manager(
        generation_config=settings, continuous_batching_config=paged
    ) as manager:
        _answers(manager, asked[: size.slots], "warm")
        started = time.perf_counter()
        count = _answers(manager, asked, "timed")
        seconds = time.perf_counter() - started
    part.add(
        peer="transformers",
        model=name,
        program=f"serving {len(asked)} requests",
        way="continuous batching",
        ms=1e3 * seconds,
        tokens_per_s=count / seconds,
    )


def _answers(manager: Any, asked: list[Asked], label: str) -> int:
    """Tokens of all answers."""
    for number, one in enumerate(asked):
        manager.add_request(
            list(one.prompt),
            request_id=f"{label}{number}",
            max_new_tokens=one.num_out,
            eos_token_id=-1,
        )
    count = done = 0
    while done < len(asked):
        result = manager.get_result(timeout=30)
        if result is None:
            raise RuntimeError("continuous batching told nothing for 30 s")
        if result.error:
            raise RuntimeError(str(result.error))
        if result.is_finished():
            done += 1
            count += len(result.generated_tokens)
    return count


def _captured(torch: Any, step: Callable[[], None], device: str) -> tuple[Callable[[], None], str]:
    """A replay of the step's CUDA graph; the step as it is where it can't be captured."""
    if device != "cuda":
        return step, "eager"
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            step()
    except RuntimeError as error:
        torch.cuda.synchronize()
        return step, f"eager: {str(error)[:100]}"
    return graph.replay, "CUDA graph"


def _seconds(
    torch: Any, part: Part, run: Callable[[], None], device: str, steps: int
) -> list[float]:
    """Of a step, in each round."""

    def wait() -> None:
        if device == "cuda":
            torch.cuda.synchronize()

    run()
    times = []
    for _ in range(part.sizes.rounds):
        wait()
        started = time.perf_counter()
        for _ in range(steps):
            run()
        wait()
        times.append((time.perf_counter() - started) / steps)
        if part.is_late:
            break
    return times
