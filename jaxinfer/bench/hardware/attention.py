"""Attention alone over batch and context: its share of the copy bandwidth, beside its peers."""

import math
from collections.abc import Callable
from dataclasses import replace
from statistics import median

from jaxinfer.bench import kernel_cases
from jaxinfer.bench.hardware import peers_here
from jaxinfer.bench.hardware.part import Part, needs_of
from jaxinfer.bench.hardware.sizes import Load, Sizes, Turns
from jaxinfer.bench.kernel_cases import Case
from jaxinfer.bench.probes import Probes
from jaxinfer.engine_config import CacheConfig, EngineConfig
from jaxinfer.kernels import paged_attention

_MOST_LAYERS = 32
_LAYERS_OF_MANY_QUERIES = 8


def measure(part: Part) -> None:
    """A row a load and kernel; those of one load take turns in the same rounds."""
    probes = Probes(part.sizes.probe_bytes)
    for load in part.sizes.loads:
        if part.is_late:
            part.skip(said(load), "no time was left for it")
            continue
        cases = [case for case in _ours(part, load) + _peers(part, load) if case is not None]
        kept = [case for case in cases if part.attempt(_name(case), case.run) is not None]
        if not kept:
            continue
        found = part.attempt(
            said(load),
            lambda kept=kept: kernel_cases.in_rounds(
                kept, probes, part.sizes.rounds, is_late=lambda: part.is_late
            ),
        )
        if found is None:
            continue
        for case, times in zip(kept, found.times, strict=True):
            timing = kernel_cases.timing(case, times, found.copies)
            part.add(
                kernel=case.kernel,
                size=case.size,
                page_size=load.page_size,
                us=timing.us,
                gb_per_s=timing.floor_bytes / timing.us / 1e3,
                of_copy=timing.share,
                tflops=timing.gflops / 1e3,
                copy_gb_per_s=median(found.copies) / 1e9,
            )


def engine_of(part: Part, load: Load, attention: str, pages: str = "auto") -> EngineConfig:
    """The settings under which a kernel attends here."""
    sizes = part.sizes
    cache = CacheConfig(page_size=load.page_size, dtype="int8" if pages == "int8" else "auto")
    settings = EngineConfig(
        compute_dtype="float32" if sizes.dtype == "float32" else "bfloat16",
        attention_block=sizes.block,
        cache=cache,
    )
    return replace(settings, attention=attention)


def turns_of(sizes: Sizes, load: Load) -> Turns:
    """So many pools that no cache keeps them, so often that the start of a program does not show.

    Where there are many queries their products take the time.
    """
    one = 4 * load.batch * load.context * sizes.heads.num_kv_heads * sizes.heads.head_dim
    if load.queries > 1:
        return Turns(_LAYERS_OF_MANY_QUERIES, 1)
    layers = min(_MOST_LAYERS, max(1, math.ceil(sizes.cold_bytes / one)))
    return Turns(layers, max(1, math.ceil(sizes.moved_bytes / one / layers)))


def said(load: Load) -> str:
    """A load in words."""
    return f"{load.batch} x {load.context}, {load.queries} queries, pages of {load.page_size}"


def _name(case: Case) -> str:
    return f"{case.kernel}, {case.size}"


def _ours(part: Part, load: Load) -> list[Case | None]:
    """Each kernel with each kind of pages that it can serve."""
    return [
        _one(part, load, backend, pages)
        for backend in paged_attention.BACKENDS
        for pages in ("auto", "int8")
    ]


def _one(part: Part, load: Load, backend: str, pages: str) -> Case | None:
    engine = engine_of(part, load, backend, pages)
    place = part.kernel(backend, needs_of(engine, head_dim=part.sizes.heads.head_dim))
    if place is None:
        return None

    def build() -> Case:
        return kernel_cases.attention(
            part.sizes.heads,
            engine,
            load.batch,
            load.context,
            queries=load.queries,
            **turns_of(part.sizes, load)._asdict(),
        )

    with place():
        return part.attempt(f"{backend} {pages}, {said(load)}", build)


def _peers(part: Part, load: Load) -> list[Case | None]:
    found = []
    for name, peer in peers_here.PEERS.items():

        def build(name: str = name, peer: Callable[..., Case] = peer) -> Case:
            return peer(name, part.sizes, load, turns_of(part.sizes, load))

        found.append(part.attempt(f"{name}, {said(load)}", build))
    return found
