"""Opens a Hugging Face folder: config.json, tokenizer, and safetensors in one file or in shards."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from jaxinfer.errors import CheckpointError
from jaxinfer.weights import hf_config, hf_text
from jaxinfer.weights.json_file import read_json
from jaxinfer.weights.source import Source

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
DTYPES = ("BF16", "F16", "F32", "F64")


class SafetensorsStore:
    """The tensors of a folder, mapped into memory and read one at a time."""

    def __init__(self, folder: Path) -> None:
        self._files: dict[str, Any] = {}
        self._homes: dict[str, Path] = {}
        shards = _shards(folder)
        self._default = next(iter(shards)) if len(shards) == 1 else folder / INDEX
        for path, listed in shards.items():
            self._open(path, listed)

    def names(self) -> Iterable[str]:
        return self._homes

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._files[name].get_slice(name).get_shape())

    def read(self, name: str) -> np.ndarray:
        dtype = self._files[name].get_slice(name).get_dtype()
        if dtype not in DTYPES:
            raise CheckpointError(
                f"{self.where(name)} is stored as {dtype}; jaxinfer reads {', '.join(DTYPES)}"
            )
        try:
            return self._files[name].get_tensor(name)
        except SafetensorError as error:
            raise CheckpointError(f"{self.where(name)} can't be read: {error}") from error

    def where(self, name: str) -> str:
        return f"{self._homes.get(name, self._default)}: tensor {name}"

    def num_bytes(self) -> int:
        """Of all the files."""
        return sum(path.stat().st_size for path in set(self._homes.values()))

    def _open(self, path: Path, listed: set[str] | None) -> None:
        try:
            file = safe_open(path, framework="numpy")
            found = set(file.keys())
        except FileNotFoundError as error:
            raise CheckpointError(f"{path} is missing; {INDEX} names it") from error
        except (SafetensorError, OSError) as error:
            raise CheckpointError(
                f"{path} is damaged or cut off: {error}; copy or download it again"
            ) from error
        for name in sorted(found ^ (found if listed is None else listed)):
            there, not_there = (path.name, INDEX) if name in found else (INDEX, path.name)
            raise CheckpointError(f"{path}: tensor {name} is in {there} but not in {not_there}")
        for name in found:
            self._files[name] = file
            self._homes[name] = path


def open_folder(folder: Path) -> tuple[Source, SafetensorsStore]:
    """Reads every header and no weight."""
    path = folder / "config.json"
    text = hf_text.text_assets(folder)
    config = hf_config.translate(read_json(path), path)
    store = SafetensorsStore(folder)
    source = Source(
        name=folder.resolve().name,
        path=folder,
        kind="hugging_face",
        config=hf_text.with_end_tokens(config, folder, text),
        text=text,
        sampling=hf_text.sampling_defaults(folder),
        num_bytes=store.num_bytes(),
    )
    return source, store


def _shards(folder: Path) -> dict[Path, set[str] | None]:
    """Each file with the tensors that the index puts in it; None where there is no index."""
    if (folder / SINGLE).exists():
        return {folder / SINGLE: None}
    path = folder / INDEX
    if not path.exists():
        raise CheckpointError(f"{folder} has neither {SINGLE} nor {INDEX}")
    homes = read_json(path).get("weight_map")
    if not isinstance(homes, dict) or not homes:
        raise CheckpointError(f"{path}: weight_map must map tensors to files")
    listed: dict[Path, set[str]] = {}
    for name, file in sorted(homes.items()):
        if not isinstance(file, str) or Path(file).name != file:
            raise CheckpointError(f"{path}: weight_map puts {name} in {file!r}, not a file here")
        listed.setdefault(folder / file, set()).add(name)
    return dict(listed)
