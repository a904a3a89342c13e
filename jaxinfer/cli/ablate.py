"""`jaxinfer ablate`: what each lever of the settings is worth, and what it costs."""

import json
from dataclasses import replace
from pathlib import Path

from jaxinfer.cli import progress
from jaxinfer.cli.bench_offline import Wanted, asked_for, check_page, fitted
from jaxinfer.cli.bench_serve import slo_of
from jaxinfer.cli.console import console
from jaxinfer.cli.options import COMMON, Common, Json
from jaxinfer.errors import ConfigError


def ablate(
    *,
    workload: str = "W3",
    levers: tuple[str, ...] = (),
    rounds: int = 3,
    requests: int | None = None,
    output_tokens: int = 64,
    chat: bool = False,
    quick: bool = False,
    slo: str = "ttft=2,tpot=0.1",
    quality_tokens: int = 4096,
    html: Path | None = None,
    as_json: Json = False,
    common: Common = COMMON,
) -> None:
    """Switches each lever of the settings off, and on alone, and prints the trade-off matrix.

    One that is off in the settings is switched on instead. Every variant runs once in each round,
    in one process. Slots and room are those of `bench offline`, eight slots at most.

    Parameters
    ----------
    workload
        W1 to W5, or a JSONL file of prompts.
    levers
        Only these: batching, overlap, "prefix cache", interleaving, "chunk sizes", "prefill rows",
        "row counts", "true lengths", "attention kernel", "native products", "fast bits", w8a8,
        w8a16, "int8 pages". What makes no difference on this machine is left out, with the reason.
    rounds
        Rounds, after one that does not count; medians and half of the middle half are shown.
    requests
        Only the first so many.
    output_tokens
        For lines of a file that don't say num_output_tokens.
    chat
        Puts the texts of a file through the model's chat template.
    quick
        Leaves out the second half: all levers off, and each on alone.
    slo
        Bounds in seconds that goodput counts.
    quality_tokens
        Tokens of text that rounded weights and pages are judged on; 0 leaves that out.
    html
        Writes a page: one file that loads nothing from elsewhere.
    as_json
        Prints one JSON object, in one line.
    """
    if rounds < 1 or quality_tokens < 0 or output_tokens < 1:
        raise ConfigError("--rounds and --output-tokens must be at least 1, --quality-tokens 0")
    config, keep = common.load(), asked_for(common)
    check_page(html)
    from jaxinfer import weights
    from jaxinfer.bench import page as pages
    from jaxinfer.bench.ablate import levers as table
    from jaxinfer.bench.ablate import shown
    from jaxinfer.bench.ablate.judged import Judge
    from jaxinfer.bench.ablate.measure import measure
    from jaxinfer.bench.variants import Variants

    chosen = table.find(levers)
    if "num_slots" not in keep:  # fewer than requests, so that some have to wait
        slots = replace(config.engine, num_slots=8, decode_rows=())
        config, keep = replace(config, engine=slots), keep | {"num_slots"}
    with progress.shown() as show:
        made = Variants(config.model, progress=show)
        config, load = fitted(made, config, keep, Wanted(workload, requests, output_tokens, chat))
        chosen, left_out = table.usable(chosen, config, weights.shape_of(config.model)[1])
        report = measure(
            made,
            config,
            chosen,
            load,
            model=made.checkpoint(config).name,
            left_out=left_out,
            rounds=rounds,
            alone=not quick,
            slo=slo_of(slo),
            judge=Judge(made, max_tokens=quality_tokens),
            progress=show,
        )
    if html is not None:
        html.write_text(pages.html(shown.page(report)), encoding="utf-8")
    if as_json:
        print(json.dumps(shown.as_dict(report)))
        return
    console().print(shown.matrix(report))
