"""Frozen settings of everything: their types, their checks, and how they are loaded."""

import difflib
import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from jaxinfer import settings
from jaxinfer.edge_config import (
    ClusterConfig,
    JournalConfig,
    SecurityConfig,
    ServerConfig,
    SnapshotConfig,
)
from jaxinfer.engine_config import EngineConfig
from jaxinfer.errors import ConfigError

Scheme = Literal["none", "w8a8", "w8a16"]
PREFIX = "JAXINFER_"
ACCESS = ("token", "tls_ca", "tls_cert", "tls_key")
NOT_SETTINGS = {  # variables that set no key of Config
    "JAXINFER_CACHE_DIR",
    "JAXINFER_DEBUG",
    *(f"JAXINFER_{name.upper()}" for name in ACCESS),
}
COMPILER_VARIABLES = ("XLA_FLAGS", "LIBTPU_INIT_ARGS", "NVIDIA_TF32_OVERRIDE")


@dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are stretched beyond the trained context."""

    kind: Literal["none", "linear", "llama3"] = "none"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_positions: int = 8192


@dataclass(frozen=True)
class ModelConfig:
    """The shape of one model: what its checkpoint says, in jaxinfer's words."""

    architecture: str  # a key of models.ARCHITECTURES: llama, mistral, qwen2, qwen3
    vocab_size: int
    num_layers: int
    d_model: int
    d_ff: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_positions: int
    norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling = RopeScaling()
    tie_embeddings: bool = False
    qkv_bias: bool = False
    output_bias: bool = False
    qk_norm: bool = False
    layer_windows: tuple[int, ...] = ()  # one a layer, 0 = no window; () = no layer has one
    quant: Scheme = "none"  # how the matrices are kept: see jaxinfer.quant
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.num_heads % self.num_kv_heads:
            raise ConfigError(
                f"{self.num_heads} query heads can't share {self.num_kv_heads} kv heads evenly"
            )
        if self.layer_windows and len(self.layer_windows) != self.num_layers:
            raise ConfigError(
                f"layer_windows has {len(self.layer_windows)} entries for {self.num_layers} layers"
            )

    def window(self, layer: int) -> int:
        """The sliding window of one layer in tokens; 0 where it sees everything."""
        return self.layer_windows[layer] if self.layer_windows else 0


@dataclass(frozen=True)
class QuantConfig:
    """How weights are rounded when they are loaded, and how far from the others they may be.

    A checkpoint of `jaxinfer quantize` stays as it is; its quality report is held to the bounds.
    """

    scheme: Scheme = "none"
    """none: as the checkpoint has them. w8a8: int8 weights, a scale for each output, and int8
    activations, a scale for each token. w8a16: the same weights, and activations of two int8."""
    gate: Literal["off", "budget", "report"] = "budget"
    """budget: a report that misses a bound is refused. report: so is a model quantised without a
    report. off: neither."""
    max_kl: float = 0.01
    """Mean divergence from the reference a token, in nats."""
    min_top1: float = 0.97
    """Share of tokens for which both find the same one likeliest."""
    max_perplexity_ratio: float = 1.02
    """Perplexity against the reference's."""


@dataclass(frozen=True)
class MeshConfig:
    """Devices, and which logical axis of an array lies along which mesh axis."""

    shape: tuple[int, ...] = (1,)
    axes: tuple[str, ...] = ("X",)
    rules: tuple[tuple[str, str], ...] = ()
    """(logical axis, mesh axis) pairs; a logical axis without one is whole on every device. `batch`
    stands for replicas: engines beside each other, each with the rest of the mesh."""
    first_device: int = 0
    """Where the mesh begins among the devices of this process."""


@dataclass(frozen=True)
class Config:
    """Everything a run needs; `jaxinfer config show` prints it."""

    model: str = "smollm2-135m"
    """An alias, a Hugging Face folder, a GGUF file, or a folder that jaxinfer wrote."""
    engine: EngineConfig = field(default_factory=EngineConfig)
    server: ServerConfig = field(default_factory=ServerConfig)
    security: SecurityConfig = field(default_factory=SecurityConfig)
    journal: JournalConfig = field(default_factory=JournalConfig)
    snapshot: SnapshotConfig = field(default_factory=SnapshotConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    quant: QuantConfig = field(default_factory=QuantConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)


def load(*sources: str | Path, environ: Mapping[str, str] | None = None) -> Config:
    """The settings that `sources` and the environment make of the defaults.

    A source is a TOML file, the name of a preset in configs/ (`cpu-32`, `engine/cpu-32`), or an
    override (`engine.cache.page_size=32`). Files go left to right, then the environment
    (`JAXINFER_ENGINE__CACHE__PAGE_SIZE`), then overrides left to right; a later one wins.
    """
    return settings.apply(Config(), gather(*sources, environ=environ))


def load_over(
    text: str, *sources: str | Path, name: str, environ: Mapping[str, str] | None = None
) -> Config:
    """The same on top of settings that were kept as TOML; `name` says where."""
    kept = settings.apply(Config(), settings.from_text(text, name=name))
    return settings.apply(kept, gather(*sources, environ=environ))


def gather(*sources: str | Path, environ: Mapping[str, str] | None = None) -> settings.Settings:
    """What `load` applies: every value that was set, and by whom."""
    overrides = [text for text in sources if isinstance(text, str) and "=" in text]
    files = [find(source) for source in sources if source not in overrides]
    variables = os.environ if environ is None else environ
    return settings.merge(
        *(settings.from_file(path, name=name) for name, path in files),
        settings.from_environment(variables, prefix=PREFIX, reserved=NOT_SETTINGS),
        *(settings.from_override(text) for text in overrides),
    )


def override(config: Any, *overrides: str) -> Any:
    """A new value of a settings dataclass, with `key=value` texts applied."""
    return settings.apply(config, settings.merge(*map(settings.from_override, overrides)))


def to_toml(config: Any) -> str:
    """Every setting as TOML; `load` reads it back to the same value."""
    return settings.to_toml(config)


def digest(config: Any) -> str:
    """A short name of exactly these settings."""
    return hashlib.sha256(to_toml(config).encode()).hexdigest()[:12]


def presets() -> dict[str, Path]:
    """The files of configs/ by name: `engine/cpu-8`."""
    root = presets_dir()
    files = sorted(root.rglob("*.toml"))
    return {path.relative_to(root).with_suffix("").as_posix(): path for path in files}


def presets_dir() -> Path:
    """Where configs/ lies: inside an installed package, or beside the package in a checkout."""
    package = Path(__file__).parent
    installed = package / "_configs"
    return installed if installed.is_dir() else package.parent / "configs"


def find(source: str | Path) -> tuple[str, Path]:
    """What to call a settings file, and where it is: a path, or the name of a preset."""
    path = Path(source)
    if path.is_file():
        return str(source), path
    known = presets()
    name = path.as_posix().removeprefix("configs/").removesuffix(".toml")
    matches = [full for full in known if name in (full, full.rpartition("/")[2])]
    if len(matches) == 1:
        return f"configs/{matches[0]}.toml", known[matches[0]]
    near = difflib.get_close_matches(name, [*known, *(full.rpartition("/")[2] for full in known)])
    hint = f"did you mean {near[0]}?" if near else f"the presets are {', '.join(known)}"
    if matches:
        hint = f"it could be {' or '.join(matches)}"
    raise ConfigError(f"no settings file {str(source)!r}; {hint}")


def cache_dir(environ: Mapping[str, str] | None = None) -> Path:
    """Where downloads and converted weights are kept: JAXINFER_CACHE_DIR, or the user's cache."""
    variables = os.environ if environ is None else environ
    if chosen := variables.get("JAXINFER_CACHE_DIR"):
        return Path(chosen).expanduser()
    base = variables.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "jaxinfer"


def access(environ: Mapping[str, str] | None = None) -> dict[str, str]:
    """How commands show a server who they are: keyword arguments of `Client`.

    JAXINFER_TOKEN, JAXINFER_TLS_CA, JAXINFER_TLS_CERT and JAXINFER_TLS_KEY; a flag would show the
    token to everyone who lists processes.
    """
    variables = os.environ if environ is None else environ
    found = {name: variables.get(f"{PREFIX}{name.upper()}", "") for name in ACCESS}
    return {name: value for name, value in found.items() if value}


def otlp_protocol(environ: Mapping[str, str] | None = None) -> str:
    """How spans are sent; OpenTelemetry's libraries read their other variables themselves."""
    variables = os.environ if environ is None else environ
    names = ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")
    return next((variables[name] for name in names if variables.get(name)), "grpc")


def is_debug(environ: Mapping[str, str] | None = None) -> bool:
    """Whether JAXINFER_DEBUG asks for tracebacks."""
    return (os.environ if environ is None else environ).get("JAXINFER_DEBUG", "0") not in ("", "0")


def compiler_flags(environ: Mapping[str, str] | None = None) -> dict[str, str]:
    """The environment variables that change what XLA compiles, where they are set."""
    variables = os.environ if environ is None else environ
    return {name: variables[name] for name in COMPILER_VARIABLES if variables.get(name)}
