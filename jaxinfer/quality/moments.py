"""Second moments of what each product of a model is given over some text, to calibrate with."""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jaxinfer import cache as paged
from jaxinfer import models, step
from jaxinfer.compile import Progress, compile_function
from jaxinfer.config import EngineConfig, ModelConfig
from jaxinfer.errors import ConfigError
from jaxinfer.inputs import unpack
from jaxinfer.quality.compare import Model, one_chunk, pack_window
from jaxinfer.quant import Watched
from jaxinfer.spec import ArraySpec, paths

BYTES_AT_ONCE = 1 << 30  # of moments that are summed in one pass over the text


def moments(
    model: Model,
    tokens: Sequence[np.ndarray],
    *,
    engine: EngineConfig,
    progress: Progress = lambda stage, done, total: None,
) -> dict[str, np.ndarray]:
    """sum(x x^T) of the inputs of each matrix, f32 [K, K], by its dotted path.

    The tokens are windows of one length, each run as its prefill would be served. A table that is
    embedding and head has the moments of the head's inputs. Where the moments of all matrices are
    large, the text is run several times.
    """
    sizes = {len(window) for window in tokens}
    if len(sizes) != 1:
        raise ConfigError("calibration needs windows of one length, and at least one")
    (size,) = sizes
    config = one_chunk(engine, size)
    packed = [jnp.asarray(pack_window(window, config, size)) for window in tokens]
    specs = paths(models.module_of(model.config).spec(model.config))
    groups = list(_groups({path: spec for path, spec in specs.items() if spec.contract}))
    held = model.params, paged.make(model.config, config)
    found: dict[str, np.ndarray] = {}
    for number, group in enumerate(groups):
        sums = {path: jnp.zeros((width, width), jnp.float32) for path, width in group.items()}
        add = compile_function(
            _adder(model.config, config, size), sums, held, packed[0], donated=(0,)
        )
        for place, batch in enumerate(packed, start=1):
            sums = jax.block_until_ready(add(sums, held, batch))
            progress("calibrate", number * len(packed) + place, len(groups) * len(packed))
        found |= {path: np.asarray(one) for path, one in sums.items()}
    return found


def _groups(specs: Mapping[str, ArraySpec]) -> Iterator[dict[str, int]]:
    """The width of each matrix, by its path, as many at a time as their moments may take."""
    group: dict[str, int] = {}
    for path, spec in specs.items():
        width = math.prod(spec.shape[len(spec.shape) - spec.contract :])
        if group and 4 * sum(one**2 for one in (*group.values(), width)) > BYTES_AT_ONCE:
            yield group
            group = {}
        group[path] = width
    yield group


def _adder(model: ModelConfig, engine: EngineConfig, size: int) -> Any:
    """A function of moments so far, of weights and an empty cache, and of a packed window."""
    module = models.module_of(model)
    names = list(paths(module.spec(model)))

    def add(sums: dict[str, Array], held: tuple[Any, Any], packed: Any) -> dict[str, Array]:
        params, cache = held
        leaves, tree = jax.tree.flatten(params)
        watched = {
            name: Watched(leaf) for name, leaf in zip(names, leaves, strict=True) if name in sums
        }
        both = [watched.get(name, leaf) for name, leaf in zip(names, leaves, strict=True)]
        seeing = jax.tree.unflatten(tree, both)
        batch = unpack(packed[:, :-size], tokens=size)
        x = step.hidden(seeing, cache, batch, model=model, engine=engine)[1]
        module.head(seeing, x, config=model, exact=engine.bits == "exact")
        return {name: sums[name] + _squares(one.seen) for name, one in watched.items()}

    return add


def _squares(seen: Sequence[Array]) -> Array:
    """A matrix that nothing is multiplied with (an embedding by itself) has none."""
    rows = [x.astype(jnp.float32) for x in seen]
    return sum((x.T @ x for x in rows), start=jnp.float32(0))
