"""The memory plan: weights, pages and the largest temporary, against what the device has."""

import math
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

from jaxinfer import cache as paged
from jaxinfer import models, spec
from jaxinfer.compile import Shape, shapes
from jaxinfer.config import MeshConfig, ModelConfig
from jaxinfer.engine_config import MIN_ROWS, EngineConfig
from jaxinfer.errors import ConfigError
from jaxinfer.sharding import Layout, is_here, is_plain, layout_of, placement
from jaxinfer.store import ProgramCost

_CGROUP_LIMITS = (
    Path("/sys/fs/cgroup/memory.max"),
    Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"),
)


@dataclass(frozen=True)
class MemoryPlan:
    """What one engine takes on its device; over several, on each of them."""

    weight_bytes: int
    page_bytes: int
    """Of one page, over all layers."""
    page_size: int
    num_pages: int
    """That sequences can own; one more, the trash page, is always there."""
    temp_bytes: int
    """The largest of all programs: they run one after another."""
    is_temp_estimate: bool
    """No program was compiled yet, so that temp_bytes follows a formula."""
    code_bytes: int
    """0 where no program was compiled yet, or where the device does not say."""
    device_bytes: int | None
    """None where the device does not say."""
    num_slots: int
    max_seq_len: int
    score_bytes: int = 0
    """Pages of the one sequence that is scored, where engine.score_chunk asks for it."""

    @property
    def cache_bytes(self) -> int:
        """The page pool with its trash page."""
        return (self.num_pages + 1) * self.page_bytes

    @property
    def fixed_bytes(self) -> int:
        """All but the pages that sequences can own."""
        own = self.weight_bytes + self.temp_bytes + self.code_bytes + self.page_bytes
        return own + self.score_bytes

    @property
    def total_bytes(self) -> int:
        """Everything."""
        return self.fixed_bytes + self.num_pages * self.page_bytes

    @property
    def free_bytes(self) -> int | None:
        """What the device has left; negative where it does not fit."""
        return None if self.device_bytes is None else self.device_bytes - self.total_bytes

    @property
    def max_pages(self) -> int | None:
        """The largest cache.num_pages that the device has memory for."""
        if self.device_bytes is None:
            return None
        return max(0, (self.device_bytes - self.fixed_bytes) // self.page_bytes)

    def num_sequences(self, num_tokens: int) -> int:
        """How many sequences of this length, output included, are held at once as configured."""
        if num_tokens > self.max_seq_len:
            return 0
        return min(self.num_slots, self.num_pages // math.ceil(num_tokens / self.page_size))

    def max_sequences(self, num_tokens: int) -> int | None:
        """How many the device has memory for, whatever num_slots and cache.num_pages say."""
        if self.max_pages is None:
            return None
        return self.max_pages // math.ceil(num_tokens / self.page_size)


def plan_memory(
    model: ModelConfig,
    engine: EngineConfig,
    *,
    params: Any = None,
    programs: Iterable[ProgramCost] = (),
    device_bytes: int | None = None,
) -> MemoryPlan:
    """Adds up what an engine takes on each device, without running anything.

    `params` are arrays or abstract values, for weights that are quantised or spread over devices;
    `programs` are compiled or stored ones, or those of a manifest. Without them the weights are
    those of the model's description and the temporaries an estimate. `device_bytes` stands in for
    the memory of the first device.
    """
    programs = tuple(programs)
    layout = Layout([]) if params is None else layout_of(models.spec_of(model), params)
    part = layout.local(model)
    if programs:
        temp_bytes = max(program.temp_bytes for program in programs)
    else:
        temp_bytes = max(estimate_temp(shape, part, engine) for shape in shapes(engine))
    page_bytes = paged.bytes_per_token(part, engine) * engine.cache.page_size
    return MemoryPlan(
        weight_bytes=_weight_bytes(model, engine, params),
        page_bytes=page_bytes,
        page_size=engine.cache.page_size,
        num_pages=engine.num_pages,
        temp_bytes=temp_bytes,
        is_temp_estimate=not programs,
        code_bytes=sum(program.code_bytes for program in programs),
        device_bytes=_share_of(layout.size) if device_bytes is None else device_bytes,
        num_slots=engine.num_slots,
        max_seq_len=engine.max_seq_len,
        score_bytes=page_bytes * (engine.pages_per_seq + 1) if engine.score_chunk else 0,
    )


def abstract_params(model: ModelConfig, engine: EngineConfig, mesh: MeshConfig) -> Any:
    """The weights as shapes on their devices: programs are built for these as for the real ones.

    For a plan alone the devices of a mesh need not be here. The model is one that fits the mesh.
    """
    single = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    place = (lambda leaf: single) if is_plain(mesh) else placement(mesh, real=is_here(mesh))

    def shape(leaf: spec.ArraySpec) -> jax.ShapeDtypeStruct:
        dtype = leaf.dtype or engine.compute_dtype
        return jax.ShapeDtypeStruct(leaf.shape, dtype, sharding=place(leaf))

    return spec.map_specs(shape, models.spec_of(model))


def check_memory(plan: MemoryPlan) -> None:
    """Raises ConfigError where the device is too small; an estimate alone refuses nothing."""
    needed = plan.total_bytes - (plan.temp_bytes if plan.is_temp_estimate else 0)
    if plan.device_bytes is None or needed <= plan.device_bytes:
        return
    parts = (
        f"{_size(plan.weight_bytes)} of weights + {_size(plan.cache_bytes)} of pages + "
        f"{_size(needed - plan.weight_bytes - plan.cache_bytes)} for programs and their temporaries"
    )
    longest = -(-plan.max_seq_len // plan.page_size)
    room = (plan.device_bytes - (needed - plan.num_pages * plan.page_bytes)) // plan.page_bytes
    if room >= longest:
        hint = f"set engine.cache.num_pages to at most {room} (it is {plan.num_pages})"
    elif room > 0:
        hint = (
            f"there is room for {room} pages: set engine.max_seq_len to at most "
            f"{room * plan.page_size} and engine.cache.num_pages to {room}"
        )
    else:
        hint = "the weights leave no room for pages: take a smaller model or dtype"
    raise ConfigError(
        f"the engine needs {_size(needed)} ({parts}), the device has {_size(plan.device_bytes)}; "
        f"{hint}"
    )


def device_memory() -> int | None:
    """Bytes that programs may use on the first device; a CPU has the machine's or container's."""
    device = jax.local_devices()[0]
    if device.platform != "cpu":
        stats = device.memory_stats()
        return None if stats is None else stats.get("bytes_limit")
    limits = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    for path in _CGROUP_LIMITS:
        text = path.read_text().strip() if path.is_file() else "max"
        if text.isdigit():
            limits.append(int(text))
    return min(limits)


def estimate_temp(shape: Shape, model: ModelConfig, engine: EngineConfig) -> int:
    """Roughly what one step needs beside its arguments: 0.76 to 1.7 times the truth on CPU.

    Fitted to 64 compiled steps of five shapes of model, 2 and 30 layers, both dtypes: either the
    head decides (logits of whole groups of 8 rows, and one group more), or the activations of a
    layer (attention or MLP, in float32) beside the residual of every layer.
    """
    heads, width = model.num_heads + 2 * model.num_kv_heads, model.head_dim
    tokens = shape.rows * shape.tokens
    head = 4 * model.vocab_size * (max(MIN_ROWS, shape.rows) + 8)
    attention = (heads + 2 * model.num_heads) * width
    attention += 2 * model.num_heads * engine.attention_block
    layer = max(attention, 2 * model.d_ff + model.d_model)
    activations = 4 * tokens * (model.num_layers * model.d_model + layer)
    gathered = shape.rows * engine.attention_block * paged.bytes_per_token(model, engine)
    return max(head, activations) + gathered // model.num_layers


def _share_of(num_devices: int) -> int | None:
    """What one of some devices has: virtual ones of a CPU share the machine's memory."""
    found, there = device_memory(), jax.devices()
    if found is None or there[0].platform != "cpu":
        return found
    return found // min(num_devices, len(there))


def _weight_bytes(model: ModelConfig, engine: EngineConfig, params: Any) -> int:
    """On one device."""
    if params is None:
        return spec.num_bytes(models.spec_of(model), engine.compute_dtype)
    total = 0
    for leaf in jax.tree.leaves(params):
        sharding = leaf.sharding
        shape = leaf.shape if sharding is None else sharding.shard_shape(leaf.shape)
        total += math.prod(shape) * leaf.dtype.itemsize
    return total


def _size(count: int) -> str:
    """Bytes for people."""
    return f"{count / 2**30:.2f} GiB" if count >= 2**28 else f"{count / 2**20:.1f} MiB"
