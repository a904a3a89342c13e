"""Frozen settings of everything: their types, their checks, and how they are loaded."""

import difflib
import hashlib
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
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
from jaxinfer.errors import ConfigError

Dtype = Literal["bfloat16", "float32"]
Scheme = Literal["none", "w8a8", "w8a16"]
PREFIX = "JAXINFER_"
ACCESS = ("token", "tls_ca", "tls_cert", "tls_key")
NOT_SETTINGS = {  # variables that set no key of Config
    "JAXINFER_CACHE_DIR",
    "JAXINFER_DEBUG",
    *(f"JAXINFER_{name.upper()}" for name in ACCESS),
}
COMPILER_VARIABLES = ("XLA_FLAGS", "LIBTPU_INIT_ARGS", "NVIDIA_TF32_OVERRIDE")
MIN_ROWS = 8  # below 8 rows a CPU matmul has other bits: design.md section 6


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
class CacheConfig:
    """The page pool."""

    page_size: int = 16
    """Tokens in one page."""
    num_pages: int = 0
    """Pages in the pool, without the trash page; 0 gives every slot its longest sequence."""
    prefix: bool = True
    """Keep the pages of finished requests for others that begin the same way."""
    dtype: Literal["auto", "int8"] = "auto"
    """What keys and values are kept in. auto: engine.compute_dtype. int8: each head of each token
    by a scale of its own, in about half the memory of bfloat16: docs/quantisation.md."""


@dataclass(frozen=True)
class EngineConfig:
    """What one engine can hold and how it steps."""

    num_slots: int = 8
    """Sequences that decode at once."""
    max_seq_len: int = 2048
    """Longest sequence, prompt and output together, in tokens."""
    decode_rows: tuple[int, ...] = ()
    """Row counts of the decode programs; () means 1, 8, 32, 128... up to num_slots."""
    prefill_chunks: tuple[int, ...] = (32, 128, 512)
    """Token counts of the prefill programs, ascending; prompts are cut at the largest."""
    max_prefill_tokens: int = 512
    """Prefill work between two decode steps, in padded tokens (one chunk is always allowed)."""
    prefill_per_decode: int = 12
    """The same on average, for prompts of several chunks behind requests that decode: the next
    chunk waits until so many tokens for each decode step make up for the last one. 0: no wait."""
    shared_prefill_tokens: int = 64
    """The same in one step for a tenant that holds its share of the slots while others ask too."""
    max_waiting: int = 256
    """Requests that may wait; one more is refused."""
    batching: Literal["continuous", "static"] = "continuous"
    """continuous: a request gets a slot as soon as one is free. static: only once all are, and
    with all prompts of a batch in one step; to compare with."""
    compute_dtype: Dtype = "bfloat16"
    attention: Literal[
        "auto", "reference", "native", "pallas_tpu", "pallas_triton", "pallas_gpu"
    ] = "reference"
    """The kernel that attends: docs/kernels.md says which are proven where. auto: the platform's
    best that can serve the model. One that is named and can't is refused at the start."""
    attention_block: int = 128
    """Tokens that attention reduces at a time: a multiple of the page size."""
    tiles: str = ""
    """A file of `jaxinfer tune`: the kernel takes the tile sizes that were fastest on this device
    for these heads and pages; without an entry for them it is refused. Empty: sizes by rule."""
    attention_tiles: tuple[int, ...] = ()
    """The sizes themselves, before any file; `jaxinfer tune` names those of each kernel. [] leaves
    them to `tiles`, or to the rule."""
    products: Literal["auto", "native", "xla", "pallas_gpu"] = "auto"
    """Who multiplies. native: C++ built here, for CPUs: int8 (AVX-512 VNNI) and bfloat16 (BF16).
    pallas_gpu: a kernel for few rows on Hopper GPUs, with the sums of xla."""
    overlap: bool = True
    """Plan and dispatch step n+1 while step n runs."""
    score_chunk: int = 0
    """Tokens at a time of the program that gives prompts their log probabilities; 0 leaves it out.
    It has pages of its own for one sequence."""
    strict_compiles: bool = True
    """A program that is compiled in a step ends the engine; otherwise it is counted and logged."""
    bits: Literal["exact", "fast"] = "exact"
    """exact: an answer's bits never depend on its neighbours, tested at the start. fast: not
    promised and not tested, and row and chunk counts below 8 are allowed."""
    cache: CacheConfig = field(default_factory=CacheConfig)

    def __post_init__(self) -> None:
        check_engine(self)

    @property
    def pages_per_seq(self) -> int:
        """Entries of a page table row: whole attention blocks that cover max_seq_len."""
        blocks = -(-self.max_seq_len // self.attention_block)
        return blocks * (self.attention_block // self.cache.page_size)

    @property
    def prefix_step(self) -> int:
        """A cached prefix ends at a multiple of this many tokens: a chunk edge, and a page edge."""
        return math.lcm(self.prefill_chunks[0], self.cache.page_size)

    @property
    def num_pages(self) -> int:
        """Pages that sequences can own; the device holds one more, the trash page."""
        longest = -(-self.max_seq_len // self.cache.page_size)
        return self.cache.num_pages or self.num_slots * longest

    @property
    def scoring(self) -> "EngineConfig":
        """The same for the one sequence whose prompt is scored."""
        pages = replace(self.cache, num_pages=self.pages_per_seq, prefix=False)
        return replace(self, num_slots=1, decode_rows=(1,), cache=pages)

    @property
    def row_counts(self) -> tuple[int, ...]:
        """Row counts of the decode programs, ascending; the last one covers all slots."""
        if self.decode_rows:
            return self.decode_rows
        counts, rows = [1], MIN_ROWS
        while rows < self.num_slots:
            counts.append(rows)
            rows *= 4
        if self.num_slots > 1:
            counts.append(-(-self.num_slots // MIN_ROWS) * MIN_ROWS)
        return tuple(counts)


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


def check_engine(config: EngineConfig) -> None:
    """Raises ConfigError, naming the key, where an engine could not be built."""
    page_size = config.cache.page_size
    for key, value in (
        ("num_slots", config.num_slots),
        ("max_seq_len", config.max_seq_len),
        ("max_prefill_tokens", config.max_prefill_tokens),
        ("shared_prefill_tokens", config.shared_prefill_tokens),
        ("max_waiting", config.max_waiting),
        ("cache.page_size", page_size),
    ):
        if value < 1:
            raise ConfigError(f"engine.{key} is {value}; it must be at least 1")
    if config.attention_block < 1 or config.attention_block % page_size:
        raise ConfigError(
            f"engine.attention_block is {config.attention_block}; it must be a multiple of "
            f"engine.cache.page_size, which is {page_size}"
        )
    if config.prefill_per_decode < 0:
        raise ConfigError(
            f"engine.prefill_per_decode is {config.prefill_per_decode}; it must be at least 0"
        )
    longest = -(-config.max_seq_len // page_size)
    if config.cache.num_pages < 0 or 0 < config.cache.num_pages < longest:
        raise ConfigError(
            f"engine.cache.num_pages is {config.cache.num_pages}; one sequence of "
            f"engine.max_seq_len = {config.max_seq_len} tokens needs {longest}"
        )
    chunks = config.prefill_chunks
    if not chunks or list(chunks) != sorted(set(chunks)) or chunks[0] < 1:
        raise ConfigError(
            f"engine.prefill_chunks is {list(chunks)}; it must be ascending, each at least 1"
        )
    if config.score_chunk < 0 or config.score_chunk % MIN_ROWS:
        raise ConfigError(
            f"engine.score_chunk is {config.score_chunk}; it must be a multiple of {MIN_ROWS}, or 0"
        )
    rows = config.row_counts
    if list(rows) != sorted(set(rows)) or rows[0] < 1 or rows[-1] < config.num_slots:
        raise ConfigError(
            f"engine.decode_rows is {list(rows)}; it must be ascending, each at least 1, "
            f"and the last must cover engine.num_slots = {config.num_slots}"
        )
