"""The levers: what can be switched, and what off and on mean for each.

A new one joins with an entry of LEVERS: two functions of the settings.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import jax

from jaxinfer import fingerprint
from jaxinfer.config import Config, ModelConfig, Scheme
from jaxinfer.engine_config import MIN_ROWS, EngineConfig
from jaxinfer.errors import ConfigError
from jaxinfer.kernels import paged_attention
from jaxinfer.kernels.products import NATIVE
from jaxinfer.weights.checkpoint import quantised

Change = Callable[[Config], Config]
Missing = Callable[[Config, ModelConfig], str]


@dataclass(frozen=True)
class Lever:
    """One thing that can be left out."""

    name: str
    said: str
    """What it does, in a few words."""
    on: Change
    off: Change
    """The plain form: with all levers off an engine is as simple as this one can be."""
    missing: Missing = lambda config, model: ""
    """Why switching it changes nothing on this machine, or with this model as its checkpoint has
    it; "" where it does."""

    def is_on(self, config: Config) -> bool:
        """Whether switching it off changes anything."""
        return self.off(config) != config


def find(names: tuple[str, ...]) -> tuple["Lever", ...]:
    """The levers of these names, in their own order; all of them where none is named."""
    there = [lever.name for lever in LEVERS]
    unknown = [name for name in names if name not in there]
    if unknown:
        raise ConfigError(f"no lever {unknown[0]!r}; there are: {', '.join(there)}")
    return tuple(lever for lever in LEVERS if not names or lever.name in names)


def usable(
    levers: tuple[Lever, ...], config: Config, model: ModelConfig
) -> tuple[tuple[Lever, ...], dict[str, str]]:
    """Those that make a difference, and why the others don't; `model` is the checkpoint's."""
    reasons = {lever.name: lever.missing(config, model) for lever in levers}
    left_out = {name: reason for name, reason in reasons.items() if reason}
    if levers and len(left_out) == len(levers):
        said = "; ".join(f"{name}: {reason}" for name, reason in left_out.items())
        raise ConfigError(f"no lever is left to switch: {said}")
    return tuple(lever for lever in levers if lever.name not in left_out), left_out


def plain(config: Config, levers: tuple[Lever, ...]) -> Config:
    """The settings with all these levers off."""
    for lever in levers:
        config = lever.off(config)
    return config


def _engine(**changes: Any) -> Change:
    return lambda config: replace(config, engine=replace(config.engine, **changes))


def _cache(**changes: Any) -> Change:
    return lambda config: _engine(cache=replace(config.engine.cache, **changes))(config)


def _quant(scheme: str) -> Change:
    changes: dict[str, Any] = {"scheme": scheme}
    return lambda config: replace(config, quant=replace(config.quant, **changes))


def _unquant(scheme: str) -> Change:
    """None instead of this scheme; another one stays."""
    return lambda config: _quant("none")(config) if config.quant.scheme == scheme else config


def _stored_as(scheme: Scheme) -> Missing:
    return lambda config, model: (
        f"the checkpoint is {scheme} already" if model.quant == scheme else ""
    )


def _own_kernel(config: Config) -> Config:
    is_plain = config.engine.attention == "reference"
    return _engine(attention="auto")(config) if is_plain else config


def _no_own_kernel(config: Config, model: ModelConfig) -> str:
    return paged_attention.why_reference(fingerprint.needs_of(model, config.engine))


def _own_products(config: Config) -> Config:
    return _engine(products="auto")(config) if config.engine.products == "xla" else config


def _no_own_products(config: Config, model: ModelConfig) -> str:
    if config.engine.products not in ("auto", "xla"):
        return ""
    as_loaded = quantised(model, config.quant.scheme)
    engine = replace(config.engine, products="auto")
    found = fingerprint.settle(as_loaded, engine, jax.devices()[:1])
    if found.engine.products == NATIVE:
        return ""
    return found.reason or f"weights in {engine.compute_dtype} are XLA's"


def _one_chunk_size(config: Config) -> Config:
    return _engine(prefill_chunks=config.engine.prefill_chunks[-1:])(config)


def _some_chunk_sizes(config: Config) -> Config:
    """The sizes that there are, or the default ones below the only one."""
    sizes = config.engine.prefill_chunks
    smaller = tuple(size for size in (32, 128) if size < sizes[-1])
    return _engine(prefill_chunks=(*smaller, sizes[-1]))(config) if len(sizes) == 1 else config


def _several_prefill_rows(config: Config) -> Config:
    """The row counts that there are, or the default ones instead of one."""
    is_one = config.engine.prefill_rows == (1,)
    return _engine(prefill_rows=EngineConfig.prefill_rows)(config) if is_one else config


def _no_prefill_rows(config: Config, model: ModelConfig) -> str:
    several = _several_prefill_rows(config).engine
    if several.prefill_row_counts != (1,):
        return ""
    return f"no chunk of {list(several.prefill_chunks)} is small enough to have rows"


def _one_row_count(config: Config) -> Config:
    rows = -(-config.engine.num_slots // MIN_ROWS) * MIN_ROWS
    return _engine(decode_rows=(rows,))(config)


def _some_row_counts(config: Config) -> Config:
    is_one = len(config.engine.row_counts) == 1
    return _engine(decode_rows=())(config) if is_one else config


def _whole_table(config: Config) -> Config:
    """One block as long as the longest sequence: work follows that, not the true lengths."""
    engine = config.engine
    return _engine(attention_block=engine.pages_per_seq * engine.cache.page_size)(config)


def _blocks(config: Config) -> Config:
    page, engine = config.engine.cache.page_size, config.engine
    block = max(page, 128 // page * page)
    return _engine(attention_block=block)(config) if engine.attention_block > block else config


LEVERS = (
    Lever(
        "batching",
        "a slot for the next request as soon as one is free, not once all are",
        on=_engine(batching="continuous"),
        off=_engine(batching="static"),
    ),
    Lever(
        "overlap",
        "the next step is planned and dispatched while one runs",
        on=_engine(overlap=True),
        off=_engine(overlap=False),
    ),
    Lever(
        "prefix cache",
        "pages of prompts that begin alike are kept and shared",
        on=_cache(prefix=True),
        off=_cache(prefix=False),
    ),
    Lever(
        "interleaving",
        "prefills are bounded in each step, so that decodes go on beside them",
        on=_engine(max_prefill_tokens=512, prefill_per_decode=12),
        off=_engine(max_prefill_tokens=2**30, prefill_per_decode=0),
    ),
    Lever(
        "chunk sizes",
        "several prefill programs, so that short prompts are padded less",
        on=_some_chunk_sizes,
        off=_one_chunk_size,
    ),
    Lever(
        "prefill rows",
        "short pieces of prompts side by side in one prefill program, not each in its own",
        on=_several_prefill_rows,
        off=_engine(prefill_rows=(1,)),
        missing=_no_prefill_rows,
    ),
    Lever(
        "row counts",
        "several decode programs, so that few streams need not compute for all slots",
        on=_some_row_counts,
        off=_one_row_count,
    ),
    Lever(
        "true lengths",
        "attention in blocks as far as sequences reach, not over the whole table",
        on=_blocks,
        off=_whole_table,
    ),
    Lever(
        "attention kernel",
        "attention by the platform's own kernel, C++ on a CPU, not by plain JAX",
        on=_own_kernel,
        off=_engine(attention="reference", tiles="", attention_tiles=()),
        missing=_no_own_kernel,
    ),
    Lever(
        "native products",
        "products and the likeliest tokens by C++ that is built here, not by XLA",
        on=_own_products,
        off=_engine(products="xla"),
        missing=_no_own_products,
    ),
    Lever(
        "fast bits",
        "gives up that an answer's bits never depend on its neighbours",
        on=_engine(bits="fast"),
        off=_engine(bits="exact"),
    ),
    Lever(
        "w8a8",
        "int8 weights and activations",
        on=_quant("w8a8"),
        off=_unquant("w8a8"),
        missing=_stored_as("w8a8"),
    ),
    Lever(
        "w8a16",
        "int8 weights, activations of two int8",
        on=_quant("w8a16"),
        off=_unquant("w8a16"),
        missing=_stored_as("w8a16"),
    ),
    Lever(
        "int8 pages",
        "keys and values in int8, a scale for each token and head",
        on=_cache(dtype="int8"),
        off=_cache(dtype="auto"),
    ),
)
