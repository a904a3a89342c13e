"""`jaxinfer replay`: a journal, run again on the model or on the scheduler alone."""

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table

from jaxinfer import config
from jaxinfer.cli import progress
from jaxinfer.cli.console import console
from jaxinfer.cli.options import COMMON, Common, Json
from jaxinfer.host import segments
from jaxinfer.host.plain import engine_from_plain
from jaxinfer.host.rehearsal import names

if TYPE_CHECKING:
    from jaxinfer.host.segments import Segment
    from jaxinfer.replay import Report

DIFFERENT = 1


def replay(
    journal: Path,
    *,
    segment: int | None = None,
    schedule: bool = False,
    as_json: Json = False,
    common: Common = COMMON,
) -> int:
    """Runs a journal again, with its own settings, and points at the first difference.

    Settings that are given here replace those of the journal, to see what they would have changed.
    Exit status 0 says that every plan, batch, token and log probability came out the same, 1 that
    one did not.

    Parameters
    ----------
    journal
        A journal's folder, or one of its segments.
    segment
        Which segment of the folder; the newest one where none is named.
    schedule
        Runs the scheduler alone, with the tokens of the journal: no model is loaded.
    as_json
        Prints one JSON object.
    """
    found = segments.read(segments.find(journal.expanduser(), number=segment))
    from jaxinfer.replay import on_schedule

    with progress.shown() as show:
        if schedule:
            report, notes = on_schedule(found, progress=show), []
        else:
            report, notes = _on_model(found, common, show)
    if found.is_torn:
        notes.append("the last line was not written to the end, and was left out")
    if as_json:
        print(json.dumps(_as_dict(found, report, notes)))
    else:
        _write(found, report, notes, schedule=schedule)
    return 0 if report.difference is None else DIFFERENT


def _on_model(found: "Segment", common: Common, show: progress.Show) -> tuple["Report", list[str]]:
    from jaxinfer import recording
    from jaxinfer.llm import load_engine
    from jaxinfer.replay import Conditions, check_kept, on_model

    check_kept(found)
    rows = engine_from_plain(found.header["engine"]).prefill_rows  # older settings don't say
    sources = (f"engine.prefill_rows={list(rows)}", *common.sources())
    kept = config.load_over(found.header["settings"], *sources, name=str(found.path))
    settings = replace(kept, journal=config.JournalConfig(), snapshot=config.SnapshotConfig())
    conditions = Conditions()
    loaded = load_engine(settings, progress=show, clock=conditions.clock, faults=conditions.fault)
    notes = []
    is_same_model = recording.identity(loaded.model, loaded.name) == found.header["identity"]
    if not is_same_model:
        notes.append("the model is another one: only the schedule was compared")
    elif engine_from_plain(found.header["engine"]) != loaded.engine.config:
        notes.append("the engine's settings are not those of the journal: batches are not compared")
    elif recording.programs_digest(loaded.engine) != found.header["programs"]:
        notes.append("the programs are not those of the journal: other ones may give other bits")
    report = on_model(found, loaded.engine, conditions, tokens=is_same_model, progress=show)
    return report, notes


def _as_dict(found: "Segment", report: "Report", notes: list[str]) -> dict[str, Any]:
    difference = report.difference
    return {
        "segment": str(found.path),
        "model": found.header["model"],
        **asdict(report),
        "difference": None if difference is None else difference._asdict(),
        "notes": notes,
    }


def _write(found: "Segment", report: "Report", notes: list[str], *, schedule: bool) -> None:
    screen = console()
    where = "the scheduler alone" if schedule else found.header["model"]
    did = (
        f"{found.path.name} on {where}: steps {report.num_steps}, requests {report.num_requests}, "
        f"tokens {report.num_tokens}, {report.seconds:.1f} s"
    )
    screen.print(did, highlight=False)
    for note in notes:
        screen.print(f"note: {note}", highlight=False)
    difference = report.difference
    if difference is None:
        screen.print(f"the same: every {report.compared}", style="green", highlight=False)
        return
    screen.print(f"different from step {difference.step} on", style="red", highlight=False)
    table = Table("what", "in the journal", "now")
    table.add_row(difference.what, str(difference.was), str(difference.now))
    screen.print(table)
    known, orders = names(found), _orders(difference.was) | _orders(difference.now)
    called = [f"{order} is {known[order]}" for order in sorted(orders & known.keys())]
    if called and difference.what.startswith(("plan", "pages", "ended")):
        screen.print("requests: " + ", ".join(called), highlight=False)


def _orders(part: Any) -> set[int]:
    """The requests in one part of a record: it lists their order of arrival, alone or first."""
    entries = part if isinstance(part, list) else []
    return {entry[0] if isinstance(entry, list) else entry for entry in entries if entry}
