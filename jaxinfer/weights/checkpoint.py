"""Our own checkpoint folder: params by Orbax, everything else as JSON, nothing pickled.

A folder holds

    model.json      format, name, ModelConfig, and size and CRC-32 of every file of weights
    params/         Orbax: one array a leaf, by its dotted path
    tokenizer.json  text.json  sampling.json
"""

import hashlib
import json
import os
import tempfile
import threading
import zlib
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint.experimental.v1 as ocp
from jax.typing import DTypeLike

from jaxinfer import models
from jaxinfer.config import ModelConfig, Scheme
from jaxinfer.errors import CheckpointError, ConfigError, InvalidRequest
from jaxinfer.host.request import SamplingParams
from jaxinfer.nn.heads import regroup
from jaxinfer.quant.leaf import block_of
from jaxinfer.spec import ArraySpec, check, dotted, is_spec, num_bytes, paths
from jaxinfer.text.assets import TextAssets
from jaxinfer.weights.assemble import put_leaf, quantise_leaves
from jaxinfer.weights.json_file import read_json
from jaxinfer.weights.records import from_json
from jaxinfer.weights.source import (
    Checkpoint,
    Fit,
    Progress,
    Sharding,
    Source,
    as_it_is,
    silent,
)

FORMAT = "jaxinfer-checkpoint"
VERSION = 1
MODEL, PARAMS, TOKENIZER = "model.json", "params", "tokenizer.json"
TEXT, SAMPLING = "text.json", "sampling.json"
READ_AHEAD_BYTES = 128 * 1024 * 1024  # that Orbax may hold beside the arrays it fills
AGAIN = "remove the folder and make it again (the demo model then comes back by itself)"
ONE_SAVE = threading.Lock()  # Orbax mixes up two saves in one process
MODEL_KEYS = {"format", "version", "name", "config", "files"}


def save(checkpoint: Checkpoint, path: str | Path, *, keep_existing: bool = False) -> Path:
    """Writes a folder that appears whole or not at all; returns it.

    A checkpoint that is there already is an error, or, with `keep_existing`, stays as it is: so
    two processes may write the same one at once.
    """
    path = Path(path)
    if path.exists() and not (keep_existing and is_checkpoint(path)):
        raise CheckpointError(f"{path} is already there; give a new folder, or remove it first")
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as scratch:
        folder = Path(scratch) / "whole"
        folder.mkdir()
        _write(checkpoint, folder)
        try:
            os.rename(folder, path)
        except OSError as error:
            if not (keep_existing and is_checkpoint(path)):
                raise CheckpointError(f"{path} can't be written: {error.strerror}") from error
    return path


def is_checkpoint(path: Path) -> bool:
    """Whether this folder is one of ours."""
    return (path / MODEL).is_file()


def digest(path: Path) -> str:
    """A short name for exactly these weights and this config."""
    return hashlib.sha256((path / MODEL).read_bytes()).hexdigest()[:16]


def describe(path: Path, *, quant: Scheme = "none") -> Source:
    """Reads the JSON and no weights; `quant` is what becomes of them when they are loaded."""
    model = _read_model(path)
    try:
        tokenizer_json = (path / TOKENIZER).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path / TOKENIZER} can't be read: {error}") from error
    text = read_json(path / TEXT) | {"tokenizer_json": tokenizer_json}
    sampling = read_json(path / SAMPLING)
    try:
        return Source(
            name=model["name"],
            path=path,
            kind="jaxinfer",
            config=quantised(_stored_config(path, model), quant),
            text=from_json(TextAssets, text, where=str(path / TEXT)),
            sampling=from_json(SamplingParams, sampling, where=str(path / SAMPLING)),
            num_bytes=sum(size for size, _ in model["files"].values()),
        )
    except (ConfigError, InvalidRequest) as error:
        raise CheckpointError(f"{path}: {error}") from error


def load(
    path: Path,
    *,
    dtype: DTypeLike,
    quant: Scheme = "none",
    sharding: Sharding = None,
    fit: Fit = as_it_is,
    progress: Progress = silent,
) -> Checkpoint:
    """Reads every leaf straight into its dtype and onto its devices; then, if asked, quantises.

    Leaves that `fit` changes pass through the host.
    """
    source, model = describe(path, quant=quant), _read_model(path)
    config, stored = fit(source.config), _stored_config(path, model)
    is_asked = stored.quant == "none" != source.config.quant
    read = stored if is_asked else source.config
    specs = models.spec_of(fit(read))
    total = num_bytes(specs, dtype)
    progress("load", 0, total)
    _check_files(path, model["files"])
    leaves: list[Any] = _restore(path / PARAMS, read, fit(read), dtype=dtype, sharding=sharding)
    if is_asked:
        leaves = quantise_leaves(leaves, config, sharding=sharding, progress=progress)
    params = jax.tree.unflatten(jax.tree.structure(specs, is_leaf=is_spec), leaves)
    check(models.spec_of(config), params, dtype)
    progress("load", total, total)
    return Checkpoint(
        name=source.name,
        config=config,
        params=params,
        text=source.text,
        sampling=source.sampling,
    )


def quantised(config: ModelConfig, scheme: Scheme) -> ModelConfig:
    """The config of a model that is loaded with `scheme`; one that is quantised stays so.

    The codes of w8a8 and w8a16 are the same, so that each can be run as the other.
    """
    return config if scheme == "none" else replace(config, quant=scheme)


def _stored_config(path: Path, model: dict[str, Any]) -> ModelConfig:
    """Folders from before there was quantisation don't say that they have none."""
    config = model["config"]
    if isinstance(config, dict):
        config = {"quant": "none", **config}
    return from_json(ModelConfig, config, where=f"{path / MODEL}: config")


def _write(checkpoint: Checkpoint, folder: Path) -> None:
    leaves = {dotted(path): leaf for path, leaf in jax.tree.flatten_with_path(checkpoint.params)[0]}
    context = ocp.Context()
    context.array.saving.use_compression = False  # loads faster, for a third more disk
    with ONE_SAVE, context:
        ocp.save(str((folder / PARAMS).absolute()), leaves)
    text = asdict(checkpoint.text)
    (folder / TOKENIZER).write_text(text.pop("tokenizer_json"), encoding="utf-8")
    _write_json(folder / TEXT, text)
    _write_json(folder / SAMPLING, asdict(checkpoint.sampling))
    model = {
        "format": FORMAT,
        "version": VERSION,
        "name": checkpoint.name,
        "config": asdict(checkpoint.config),
        "files": _measure(folder, folder / PARAMS),
    }
    _write_json(folder / MODEL, model)


def _write_json(path: Path, document: Mapping[str, Any]) -> None:
    text = json.dumps(document, indent=2, ensure_ascii=False)
    path.write_text(f"{text}\n", encoding="utf-8")


def _read_model(path: Path) -> dict[str, Any]:
    model = read_json(path / MODEL)
    if model.get("format") != FORMAT or model.get("version") != VERSION:
        raise CheckpointError(
            f"{path / MODEL}: format {model.get('format')!r} version {model.get('version')!r}; "
            f"this jaxinfer reads {FORMAT!r} version {VERSION}"
        )
    for key in sorted(MODEL_KEYS ^ set(model)):
        state = "is missing" if key in MODEL_KEYS else "is not a key of this version"
        raise CheckpointError(f"{path / MODEL}: {key} {state}")
    if not isinstance(model["name"], str) or not _is_measure(model["files"]):
        raise CheckpointError(f"{path / MODEL}: name must be a string, files a table of sizes")
    return model


def _is_measure(files: Any) -> bool:
    entries = list(files.values()) if isinstance(files, dict) else [None]
    return all(
        isinstance(entry, list) and [type(number) for number in entry] == [int, int]
        for entry in entries
    )


def _measure(folder: Path, inside: Path) -> dict[str, list[int]]:
    """[bytes, CRC-32] of every file inside, by its path from `folder`."""
    files = sorted(file for file in inside.rglob("*") if file.is_file())
    with ThreadPoolExecutor() as threads:
        checksums = list(threads.map(_checksum, files))
    return {
        file.relative_to(folder).as_posix(): [file.stat().st_size, checksum]
        for file, checksum in zip(files, checksums, strict=True)
    }


def _checksum(file: Path) -> int:
    checksum = 0
    with file.open("rb") as stream:
        while piece := stream.read(1 << 20):
            checksum = zlib.crc32(piece, checksum)
    return checksum


def _check_files(path: Path, files: dict[str, list[int]]) -> None:
    """Finds a lost, cut or changed file before Orbax does, which would not name it."""
    for name, (size, _) in files.items():
        if not (path / name).is_file():
            raise CheckpointError(f"{path / name} is missing; {AGAIN}")
        found = (path / name).stat().st_size
        if found != size:
            raise CheckpointError(f"{path / name} has {found} bytes instead of {size}; {AGAIN}")
    measured = _measure(path, path / PARAMS)
    for name, entry in files.items():
        if measured.get(name) != entry:
            raise CheckpointError(f"{path / name} is damaged: its CRC-32 differs; {AGAIN}")


def _restore(
    path: Path, stored: ModelConfig, wide: ModelConfig, *, dtype: DTypeLike, sharding: Sharding
) -> list[jax.Array]:
    """The leaves that `wide` describes, in its order; Orbax casts while it reads."""
    _check_codes(path, stored, wide)
    specs, fitted = paths(models.spec_of(stored)), paths(models.spec_of(wide))
    wanted = {
        name: _abstract(spec, dtype, sharding)
        if spec.shape == fitted[name].shape
        else np.empty(spec.shape, spec.dtype or dtype)
        for name, spec in specs.items()
    }
    largest = max(leaf.size * leaf.dtype.itemsize for leaf in wanted.values())
    context = ocp.Context()
    context.memory.read_concurrent_bytes = max(READ_AHEAD_BYTES, 2 * largest)
    try:
        _check_shapes(path, specs)
        with context:
            restored = ocp.load(str(path.absolute()), wanted)
    except (ValueError, OSError, KeyError, TypeError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{path} can't be read: {str(error)[:500]}; {AGAIN}") from error
    leaves = []
    for name, spec in fitted.items():
        leaf = restored.pop(name)
        if isinstance(leaf, np.ndarray):
            leaf = put_leaf(regroup(leaf, spec.axes, stored, wide), spec, sharding)
        leaves.append(leaf)
    return leaves


def _check_codes(path: Path, stored: ModelConfig, wide: ModelConfig) -> None:
    """Heads that are stored quantised can be moved where each was rotated by itself."""
    if stored.quant == "none" or stored.num_heads == wide.num_heads:
        return
    before, after = (block_of(one.num_heads * one.head_dim) for one in (stored, wide))
    if before != after or stored.head_dim % before:
        raise ConfigError(
            f"{path} holds {stored.quant} weights that mix {before} channels of {stored.num_heads} "
            f"heads, which the {wide.num_heads} heads of this mesh can't keep; take the model "
            f"that it was made from, with --quant {stored.quant}"
        )


def _abstract(spec: ArraySpec, dtype: DTypeLike, sharding: Sharding) -> jax.ShapeDtypeStruct:
    default = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    where = default if sharding is None else sharding(spec)
    return jax.ShapeDtypeStruct(spec.shape, spec.dtype or dtype, sharding=where)


def _check_shapes(path: Path, specs: dict[str, ArraySpec]) -> None:
    """Compares names and shapes before Orbax does, which would not say what the config asks."""
    stored = ocp.metadata(str(path.absolute())).metadata
    for name in sorted({*stored, *specs}):
        there = list(stored[name].shape) if name in stored else "missing"
        asked = list(specs[name].shape) if name in specs else "no such parameter"
        if there != asked:
            raise CheckpointError(
                f"{path}: parameter {name} is {there}, but the config in {MODEL} asks for {asked}"
            )
