"""How long a start takes, from a new process to a ready engine: cold, or with programs on disk.

python -m jaxinfer.bench.start --model smollm2-135m --rounds 3
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from jaxinfer import config as settings
from jaxinfer.config import Config

WAYS = ("cold", "stored", "jax_cache")


@dataclass(frozen=True)
class StartTiming:
    """One way to start, the median of all rounds, in seconds."""

    way: str
    process_s: float
    """From the launch of the process to a ready engine."""
    cpu_s: float
    """Of all its threads: what a busy machine changes least."""
    import_s: float
    weights_s: float
    programs_s: float
    """Tracing and compiling, or loading."""
    rest_s: float
    """The page pool and one run of every program."""
    num_compiles: int


def measure(sources: Sequence[str] = (), *, model: str = "", rounds: int = 3) -> list[StartTiming]:
    """Starts a process for each way and round; `model` "" takes SmolLM2's shape, random weights.

    "cold" finds nothing on disk, "stored" the executables, "jax_cache" what jax itself keeps.
    """
    found: dict[str, list[dict[str, Any]]] = {way: [] for way in WAYS}
    with tempfile.TemporaryDirectory() as name:
        for number in range(rounds):
            folder = Path(name, str(number))
            for way, arguments in (
                ("cold", ("--store", str(folder / "store"))),
                ("stored", ("--store", str(folder / "store"))),
                ("fill", ("--jax-cache", str(folder / "xla"))),
                ("jax_cache", ("--jax-cache", str(folder / "xla"))),
            ):
                timing = _start([*arguments, "--model", model, *sources])
                if way in found:
                    found[way].append(timing)
    return [_median(way, timings) for way, timings in found.items()]


def start_here(
    config: Config, *, model: str, store: str, jax_cache: str
) -> tuple[dict[str, float], int]:
    """Builds an engine in this process; returns seconds by part and the number of compiles."""
    started = time.perf_counter()
    import jax

    from jaxinfer import compile as programs_of
    from jaxinfer import models, spec
    from jaxinfer.engine import Engine
    from jaxinfer.quality import gate
    from jaxinfer.store import open_store
    from jaxinfer.weights.demo import DEMOS

    marks = {"import_s": time.perf_counter() - started}
    if jax_cache:
        programs_of.use_compilation_cache(Path(jax_cache))
    started = time.perf_counter()
    shape, dtype = DEMOS["smollm2-135m"].config, config.engine.compute_dtype
    if model:
        checkpoint = gate.load(replace(config, model=model))
        shape, params = checkpoint.config, checkpoint.params
    else:
        params = spec.initialise(models.module_of(shape).spec(shape), jax.random.key(0), dtype)
    jax.block_until_ready(params)
    marks["weights_s"] = time.perf_counter() - started
    before, started = programs_of.num_compiles(), time.perf_counter()
    engine = Engine(
        params,
        shape,
        _NoText(),
        config.engine,
        store=open_store(Path(store)) if store else None,
        progress=lambda stage, done, total: marks.update(programs_s=time.perf_counter() - started),
    )
    marks["rest_s"] = time.perf_counter() - started - marks["programs_s"]
    marks["cpu_s"] = time.process_time()
    assert engine.stats().num_compiles_after_start == 0
    return marks, programs_of.num_compiles() - before


class _NoText:
    """Stands in for a tokenizer: nothing is generated here."""

    def stream(self, prompt_tail: Sequence[int] = (), stop: tuple[str, ...] = ()) -> Any:
        raise NotImplementedError


def _start(arguments: list[str]) -> dict[str, Any]:
    started = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", __spec__.name, "--here", *arguments],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    )
    return {"process_s": time.perf_counter() - started, **json.loads(done.stdout)}


def _median(way: str, timings: list[dict[str, Any]]) -> StartTiming:
    return StartTiming(
        way=way, **{name: statistics.median(one[name] for one in timings) for name in timings[0]}
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Prints one line a way; with --here, starts once in this process."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="", help="an alias or a path; none: random weights")
    parser.add_argument("--rounds", type=int, default=3)
    for hidden in ("--store", "--jax-cache"):
        parser.add_argument(hidden, default="", help=argparse.SUPPRESS)
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("sources", nargs="*", help="settings: a file or engine.num_slots=32")
    asked = parser.parse_args(argv)
    if asked.here:
        marks, num_compiles = start_here(
            settings.load(*asked.sources),
            model=asked.model,
            store=asked.store,
            jax_cache=asked.jax_cache,
        )
        print(json.dumps({**marks, "num_compiles": num_compiles}))
        return
    for timing in measure(asked.sources, model=asked.model, rounds=asked.rounds):
        _, *parts = vars(timing).items()
        print(f"{timing.way:<10} " + "  ".join(f"{name} {value:.2f}" for name, value in parts))


if __name__ == "__main__":
    main()
