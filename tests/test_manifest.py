"""The manifest: what it lists, what it compares, and when it is refused."""

import json
import re

import pytest

from jaxinfer import compile as programs_of
from jaxinfer import manifest
from jaxinfer.errors import ProgramRefused
from jaxinfer.store import open_store
from tests import tiny
from tests.closed_world import every_program, kept, make_engine


def test_the_manifest_lists_everything_and_comes_back_the_same(tmp_path):
    engine = kept().engine
    config = engine.config
    written = manifest.describe(every_program(engine), tiny.MODEL, config)
    path = tmp_path / "manifest.json"
    manifest.write(written, path)
    assert manifest.read(path) == written
    entries = json.loads(path.read_text())["programs"]
    (entry,) = (one for one in entries if one["name"] == "decode-8x1")
    assert (entry["phase"], entry["rows"], entry["tokens"]) == ("decode", 8, 1)
    assert all(entry[f"{part}_bytes"] > 0 for part in ("argument", "output", "alias", "temp"))
    stored = programs_of.stored_costs(tiny.MODEL, config, open_store(kept().folder)).values()
    again = manifest.describe(stored, tiny.MODEL, config)
    assert (again.digest, manifest.compare(written, again)) == (written.digest, ())


def test_manifests_say_what_differs():
    engine = kept().engine
    one = manifest.describe(every_program(engine), tiny.MODEL, engine.config)
    other_engine = make_engine(num_slots=9)
    other = manifest.describe(every_program(other_engine), tiny.MODEL, other_engine.config)
    lines = manifest.compare(one, other)
    assert lines[0] == "engine.num_slots: 8 -> 9"
    assert "decode-16x1: new" in lines
    assert "decode-16x1: gone" in manifest.compare(other, one)
    assert any(re.match(r"prefill-1x8: argument_bytes \d+ -> \d+", line) for line in lines)
    assert one.digest != other.digest


def test_a_damaged_manifest_is_refused(tmp_path):
    path = tmp_path / "manifest.json"
    manifest.write(
        manifest.describe(every_program(kept().engine), tiny.MODEL, kept().engine.config), path
    )
    text = path.read_text()
    for wrong in (
        *("", "[]", "{}", text[:-20]),
        text.replace('"num_slots": 8', '"num_slots": 7'),
        text.replace('"format": 1', '"format": 2'),
        text.replace('"temp_bytes"', '"tmp_bytes"'),
    ):
        path.write_text(wrong)
        with pytest.raises(ProgramRefused):
            manifest.read(path)
    with pytest.raises(ProgramRefused, match="can't be read"):
        manifest.read(tmp_path / "none.json")
