"""Prompts and recorded traces: JSONL files, one request a line.

at_s               seconds; all lines have one, or none has
prompt, turns      the text to continue; of turns the first
token_ids          the prompt in tokens, taken as it is
num_prompt_tokens  made-up tokens instead of a text
num_output_tokens  how long the answer is; drawn where it isn't said
num_shared_tokens, group, priority

Lines of Mooncake's traces (timestamp in milliseconds, input_length, output_length, hash_ids) are
read as they are; prompts of equal hash_ids begin alike.
"""

import json
import math
from pathlib import Path
from typing import Any

from jaxinfer.bench.load.calls import Item
from jaxinfer.errors import ConfigError
from jaxinfer.host.workload import Arrival


def read(path: Path) -> tuple[tuple[Item, ...], bool]:
    """The lines in order of time, and whether they say when they came; the first one is at 0."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--workload {path} can't be read: {error}") from error
    rows = [
        _row(f"--workload {path}, line {number}", line)
        for number, line in enumerate(lines, 1)
        if line.strip()
    ]
    times = [row for row in rows if "at_s" in row]
    if not rows or len(times) not in (0, len(rows)):
        raise ConfigError(
            f"--workload {path}: {len(times)} of {len(rows)} lines say when they came; it must be "
            "one request a line, and at_s in all of them or in none"
        )
    first_s = min((row["at_s"] for row in times), default=0.0)
    items = [_item(row, first_s) for row in rows]
    return tuple(sorted(items, key=lambda item: item.arrival.at_s)), bool(times)


def _row(where: str, line: str) -> dict[str, Any]:
    """One line in our own words, each value checked."""
    try:
        row = json.loads(line)
    except ValueError as error:
        raise ConfigError(f"{where} is no JSON: {error}") from error
    if not isinstance(row, dict):
        raise ConfigError(f"{where} must be a JSON object, not {type(row).__name__}")
    found: dict[str, Any] = {}
    if "timestamp" in row and "input_length" in row:
        found["at_s"] = _number(where, "timestamp", row["timestamp"]) / 1e3
    elif "at_s" in row:
        found["at_s"] = _number(where, "at_s", row["at_s"])
    for name, other in (
        ("num_prompt_tokens", "input_length"),
        ("num_output_tokens", "output_length"),
        ("num_shared_tokens", ""),
        ("group", ""),
        ("priority", ""),
    ):
        key = name if name in row else other
        if key in row:
            least = 0 if name in ("num_shared_tokens", "group") else 1
            found[name] = _whole(where, key, row[key], None if name == "priority" else least)
    found["prompt"] = _prompt(where, row)
    found["blocks"] = _ids(where, "hash_ids", row.get("hash_ids", []))
    if found["prompt"] is None and "num_prompt_tokens" not in found:
        raise ConfigError(
            f"{where} has no prompt: it needs prompt or turns (a text), token_ids, or "
            "num_prompt_tokens"
        )
    return found


def _prompt(where: str, row: dict[str, Any]) -> str | tuple[int, ...] | None:
    if "token_ids" in row:
        return _ids(where, "token_ids", row["token_ids"])
    text = row.get("prompt")
    if text is None:
        text = (row.get("turns") or [None])[0]
    if text is not None and not (isinstance(text, str) and text):
        raise ConfigError(f"{where}: the prompt is {text!r:.60}; it must be a text")
    return text


def _item(row: dict[str, Any], first_s: float) -> Item:
    arrival = Arrival(
        row.get("at_s", first_s) - first_s,
        row.get("num_prompt_tokens", 0),
        row.get("num_output_tokens", 0),
        row.get("num_shared_tokens", 0),
        row.get("group", 0),
        row.get("priority", 0),
    )
    return Item(arrival, row["prompt"], row["blocks"])


def _number(where: str, name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ConfigError(f"{where}: {name} is {value!r:.60}; it must be a number")
    return float(value)


def _whole(where: str, name: str, value: Any, least: int | None) -> int:
    is_whole = isinstance(value, int) and not isinstance(value, bool)
    if not is_whole or (least is not None and value < least):
        bound = "" if least is None else f", at least {least}"
        raise ConfigError(f"{where}: {name} is {value!r:.60}; it must be a whole number{bound}")
    return value


def _ids(where: str, name: str, value: Any) -> tuple[int, ...]:
    is_list = isinstance(value, list)
    if not is_list or not all(isinstance(one, int) and one >= 0 for one in value):
        raise ConfigError(f"{where}: {name} is {value!r:.60}; it must be a list of whole numbers")
    return tuple(value)
