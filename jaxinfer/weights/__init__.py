"""Models on disk -> params: Hugging Face folders, GGUF files, our own folders, the demo model."""

import difflib
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import jax
from jax.typing import DTypeLike

from jaxinfer.config import ModelConfig, Scheme
from jaxinfer.errors import CheckpointError, UnknownModel
from jaxinfer.quant import Factors, Rounding, round_to_nearest
from jaxinfer.weights import assemble, checkpoint, demo, hf
from jaxinfer.weights.checkpoint import save
from jaxinfer.weights.source import (
    Checkpoint,
    Fit,
    Progress,
    Sharding,
    Source,
    TensorStore,
    as_it_is,
    silent,
)

__all__ = [
    "ALIASES",
    "Checkpoint",
    "Progress",
    "Sharding",
    "Source",
    "describe",
    "is_ready",
    "load",
    "locate",
    "quantised",
    "save",
    "shape_of",
]

ALIASES = tuple(demo.DEMOS)
GGUF_MAGIC = b"GGUF"


def load(
    model: str | Path,
    *,
    dtype: DTypeLike,
    quant: Scheme = "none",
    sharding: Sharding = None,
    fit: Fit = as_it_is,
    progress: Progress = silent,
    described: Callable[[Source], None] = lambda source: None,
) -> Checkpoint:
    """Loads a model: an alias, a folder of ours or of Hugging Face's, or a GGUF file.

    `described` is told what `describe` would say, before the weights are read.

    Every leaf of `params` has `dtype`, but for matrices that are stored quantised or that `quant`
    quantises; the weights are never twice in memory. Its config is what `fit` makes of the model's,
    for a mesh. The demo model is
    fetched and converted when it is first asked for; nothing else touches the network.
    """
    path = locate(model, progress=progress)
    if checkpoint.is_checkpoint(path):
        described(checkpoint.describe(path, quant=quant))
        return checkpoint.load(
            path, dtype=dtype, quant=quant, sharding=sharding, fit=fit, progress=progress
        )
    source, store = _open(path)
    source = replace(source, config=checkpoint.quantised(source.config, quant))
    described(source)
    return Checkpoint(
        name=source.name,
        config=fit(source.config),
        params=assemble.load_params(
            store, source.config, dtype=dtype, sharding=sharding, fit=fit, progress=progress
        ),
        text=source.text,
        sampling=source.sampling,
    )


def quantised(
    model: Checkpoint,
    scheme: Scheme,
    *,
    rounding: Rounding = round_to_nearest,
    factors: Mapping[str, Factors] = assemble.NO_FACTORS,
    progress: Progress = silent,
) -> Checkpoint:
    """The same model with quantised weights, beside the one given.

    What calibration has learnt is in `rounding`, and in `factors`: see quality.calibrate.
    """
    config = checkpoint.quantised(model.config, scheme)
    leaves, tree = jax.tree.flatten(model.params)
    made = assemble.quantise_leaves(
        leaves, config, rounding=rounding, factors=factors, progress=progress
    )
    return replace(model, config=config, params=jax.tree.unflatten(tree, made))


def describe(model: str | Path, *, quant: Scheme = "none", progress: Progress = silent) -> Source:
    """What `load` would load: config, text and advice on sampling. Reads no weights."""
    path = locate(model, progress=progress)
    if checkpoint.is_checkpoint(path):
        return checkpoint.describe(path, quant=quant)
    source = _open(path)[0]
    return replace(source, config=checkpoint.quantised(source.config, quant))


def shape_of(model: str | Path, *, quant: Scheme = "none") -> tuple[str, ModelConfig]:
    """Name and config of a model, without fetching one that is not here yet."""
    if model in ALIASES and not is_ready(str(model)):
        return str(model), checkpoint.quantised(demo.DEMOS[str(model)].config, quant)
    source = describe(model, quant=quant)
    return source.name, source.config


def is_ready(alias: str) -> bool:
    """Whether a demo model is here already, so that loading it needs no network."""
    return checkpoint.is_checkpoint(demo.place(alias))


def locate(model: str | Path, *, progress: Progress = silent) -> Path:
    """The folder or file of a model; UnknownModel where there is none.

    An alias comes before a folder of the same name, which `./NAME` still means.
    """
    if model in ALIASES:
        return demo.ensure(str(model), progress=progress)
    path = Path(model).expanduser()
    if not str(model) or not path.exists():
        near = difflib.get_close_matches(str(model), ALIASES, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]}? " if near else ""
        raise UnknownModel(
            f"no model {str(model)!r}: {hint}Give an alias ({', '.join(ALIASES)}), a Hugging Face "
            "folder, a GGUF file, or a folder that jaxinfer wrote; jaxinfer downloads no others",
            field="model",
        )
    return path


def _open(path: Path) -> tuple[Source, TensorStore]:
    """Opens what is not ours."""
    if path.is_dir():
        if not (path / "config.json").exists():
            raise CheckpointError(
                f"{path} has neither a config.json (Hugging Face) nor a {checkpoint.MODEL} "
                "(jaxinfer); give the folder that holds one"
            )
        return hf.open_folder(path)
    with path.open("rb") as stream:
        is_gguf = stream.read(len(GGUF_MAGIC)) == GGUF_MAGIC
    if not is_gguf and path.suffix != ".gguf":
        raise CheckpointError(f"{path} is no GGUF file; for safetensors give the folder around it")
    from jaxinfer.weights import gguf  # only here, so that a start without GGUF does not pay for it

    return gguf.open_file(path)
