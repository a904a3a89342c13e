"""The list of all programs of a config, with their numbers, as a JSON file."""

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jax

from jaxinfer.config import EngineConfig, ModelConfig
from jaxinfer.errors import ProgramRefused
from jaxinfer.fingerprint import environment
from jaxinfer.store import Devices, ProgramCost, read_cost

FORMAT = 1


@dataclass(frozen=True)
class Manifest:
    """What one engine can run, where, and what it takes."""

    environment: Mapping[str, str]
    model: Mapping[str, Any]
    engine: Mapping[str, Any]
    programs: tuple[ProgramCost, ...]

    @property
    def digest(self) -> str:
        """The hash of the program set; how long compiling took is no part of it."""
        keys = sorted((cost.shape.name, cost.key) for cost in self.programs)
        return hashlib.sha256(json.dumps(keys).encode()).hexdigest()


def describe(
    programs: Iterable[ProgramCost],
    model: ModelConfig,
    engine: EngineConfig,
    *,
    devices: Devices | None = None,
) -> Manifest:
    """The manifest of programs that are built, or that are stored."""
    return Manifest(
        environment=environment(devices or jax.devices()[:1]),
        model=_plain(asdict(model)),
        engine=_plain(asdict(engine)),
        programs=tuple(read_cost(vars(cost)) for cost in programs),
    )


def write(manifest: Manifest, path: Path) -> None:
    """Writes the file, all of it or nothing."""
    content = {
        "format": FORMAT,
        "digest": manifest.digest,
        **{name: vars(manifest)[name] for name in ("environment", "model", "engine")},
        "programs": [{"name": cost.shape.name, **asdict(cost)} for cost in manifest.programs],
    }
    text = json.dumps({**content, "checksum": _checksum(content)}, indent=1) + "\n"
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(text)
    partial.replace(path)


def read(path: Path) -> Manifest:
    """Reads the file; raises ProgramRefused where it is damaged or of another format."""
    try:
        content = json.loads(path.read_text())
        checksum = content.pop("checksum")
        found = content["format"]
        manifest = Manifest(
            environment=content["environment"],
            model=content["model"],
            engine=content["engine"],
            programs=tuple(read_cost(entry) for entry in content["programs"]),
        )
    except OSError as error:
        raise ProgramRefused(f"the manifest can't be read: {error}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ProgramRefused(f"the manifest {path} is damaged: {error!r}") from error
    if found != FORMAT:
        raise ProgramRefused(f"the manifest {path} has format {found!r}, this is {FORMAT}")
    if checksum != _checksum(content):
        raise ProgramRefused(f"the manifest {path} is damaged: its checksum differs")
    return manifest


def compare(old: Manifest, new: Manifest) -> tuple[str, ...]:
    """What differs, one line each; nothing where the programs are the same."""
    lines = []
    for part in ("environment", "model", "engine"):
        before, after = vars(old)[part], vars(new)[part]
        for name in sorted({*before, *after}):
            if before.get(name) != after.get(name):
                lines.append(f"{part}.{name}: {before.get(name)} -> {after.get(name)}")
    were = {cost.shape.name: cost for cost in old.programs}
    are = {cost.shape.name: cost for cost in new.programs}
    lines += [f"{name}: gone" for name in were if name not in are]
    lines += [f"{name}: new" for name in are if name not in were]
    for name, cost in are.items():
        if name in were and cost.key != were[name].key:
            lines.append(f"{name}: {_change(were[name], cost)}")
    return tuple(lines)


def _change(old: ProgramCost, new: ProgramCost) -> str:
    changes = [
        f"{name} {vars(old)[name]} -> {vars(new)[name]}"
        for name in ("argument_bytes", "output_bytes", "alias_bytes", "temp_bytes", "code_bytes")
        if vars(old)[name] != vars(new)[name]
    ]
    return ", ".join(changes) or "another program of the same size"


def _checksum(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _plain(tree: dict[str, Any]) -> dict[str, Any]:
    """The same as JSON gives it back: lists for tuples."""
    return json.loads(json.dumps(tree))
