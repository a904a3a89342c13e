"""`jaxinfer compile` and `jaxinfer plan`: what they build, count, refuse, and never load."""

import contextlib
import io
import json
import shutil

import pytest

from jaxinfer import cli, config, llm, weights
from jaxinfer import compile as programs_of
from jaxinfer.cli.plan import size, token_counts
from jaxinfer.errors import ConfigError
from jaxinfer.plan import plan_memory
from tests import cli_model, tiny


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    cli_model.save(path)
    return path


def options_of(folder):
    return ("-m", str(folder / "tiny"), "-c", str(folder / "tiny.toml"))


@pytest.fixture
def options(folder, tmp_path, monkeypatch):
    """The tiny model, with an empty store of its own."""
    monkeypatch.setenv("JAXINFER_CACHE_DIR", str(tmp_path / "cache"))
    return options_of(folder)


@pytest.fixture(scope="module")
def compiled(folder, tmp_path_factory):
    """A folder with the store that `compile` has filled without any weights, and what it said."""
    cache, out = tmp_path_factory.mktemp("compiled"), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out):
        patch.setenv("JAXINFER_CACHE_DIR", str(cache))
        patch.setattr(weights, "load", None)
        assert cli.run(("compile", *options_of(folder), "--json")) == 0
    return cache, json.loads(out.getvalue())


@pytest.fixture
def stored(options, compiled, tmp_path):
    """The tiny model, with a store of its own that is filled."""
    shutil.copytree(compiled[0], tmp_path / "cache")
    return options


def run(capsys, *argv):
    code = cli.run(argv)
    out, err = capsys.readouterr()
    return code, out, err


def test_what_is_compiled_is_stored(capsys, stored, compiled):
    _, first = compiled
    names = [program["name"] for program in first["programs"]]
    assert first["num_stored"] == 0
    assert {"prefill-1x8", "prefill-1x16", "decode-8x1", "allocate"} <= set(names)
    again = json.loads(run(capsys, "compile", *stored, "--json")[1])
    assert again["num_stored"] == len(names)
    assert again["digest"] == first["digest"]


def test_an_engine_started_afterwards_compiles_nothing(stored, folder):
    stages = []
    settings = config.load(f"model={folder / 'tiny'}", str(folder / "tiny.toml"))
    loaded = llm.load_engine(settings, progress=lambda stage, *_: stages.append(stage))
    assert "programs" in stages and "compile" not in stages
    assert loaded.engine.stats().num_programs > 0


def test_compile_says_what_is_stored_and_what_changed(capsys, stored, compiled, tmp_path):
    manifest, count = tmp_path / "manifest.json", len(compiled[1]["programs"])
    code, out, _ = run(capsys, "compile", *stored, "-o", str(manifest))
    assert code == 0 and f"{count} programs, {count} were stored" in out
    assert max(map(len, out.splitlines())) <= 100
    code, out, _ = run(capsys, "compile", *stored, "--check", str(manifest))
    assert code == 0 and f"{count} were stored" in out and "nothing has changed" in out
    changed = ("--engine.num-slots", "9", "--check", str(manifest))
    code, out, _ = run(capsys, "compile", *stored, *changed)
    assert code == 1 and ", 0 were stored" in out
    assert "engine.num_slots: 8 -> 9" in out and "decode-16x1: new" in out
    assert json.loads(run(capsys, "compile", *stored, *changed, "--json")[1])["changes"]


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ("compile --check /nowhere.json", "--check /nowhere.json: the manifest can't be read"),
        ("compile -o /nowhere/manifest.json", "--out /nowhere/manifest.json: there is no folder"),
        ("compile -m /nowhere", "no model '/nowhere'"),
        ("compile --mesh.rules [['heads','X']] --mesh.axes ['Y']", "mesh.rules"),
        ("plan --tokens 3x", "--tokens is '3x'; it must be numbers"),
        ("plan --tokens 0", "--tokens is '0'"),
        ("plan --device-gib -1", "--device-gib is -1.0; it must be above 0"),
        ("plan --device-gib nan", "--device-gib is nan"),
    ],
)
def test_bad_input_is_refused(capsys, options, argv, words):
    code, out, err = run(capsys, *argv.split(" "))
    assert (code, out) == (2, "")
    assert err.startswith("error: ") and err.count("\n") == 1
    assert words in err


def test_a_damaged_manifest_is_refused(capsys, options, tmp_path):
    path = tmp_path / "manifest.json"
    path.write_text("{}")
    code, _, err = run(capsys, "compile", *options, "--check", str(path))
    assert code == 2 and "is damaged" in err


def test_token_counts_read_thousands():
    assert token_counts("32k, 2048,1K") == (32768, 2048, 1024)
    for text in ("", "k", "1.5k", "-1", "1,,2"):
        with pytest.raises(ConfigError, match="--tokens is"):
            token_counts(text)


def test_a_plan_counts_sequences_without_running(capsys, options, folder):
    argv = ("plan", *options, "--tokens", "32k,128", "--device-gib", "0.5")
    code, out, _ = run(capsys, *argv, "--json")
    found = json.loads(out)
    settings = config.load(str(folder / "tiny.toml"))
    memory = plan_memory(tiny.MODEL, settings.engine, device_bytes=2**29)
    assert code == 0 and found["is_temp_estimate"]
    assert found["total_bytes"] == memory.total_bytes
    assert found["sequences"] == [
        {
            "num_tokens": length,
            "num_configured": memory.num_sequences(length),
            "num_possible": memory.max_sequences(length),
        }
        for length in (32768, 128)
    ]
    assert found["sequences"][0]["num_configured"] == 0  # engine.max_seq_len is less
    text = run(capsys, *argv)[1]
    assert "an estimate" in text and "engine.max_seq_len = 256" in text
    assert "as --device-gib says" in text
    assert max(map(len, text.splitlines())) <= 100


def test_a_plan_takes_the_temporaries_of_stored_programs(capsys, stored):
    before = programs_of.num_compiles()
    found = json.loads(run(capsys, "plan", *stored, "--json")[1])
    temps = found["temp_bytes_by_program"]
    assert not found["is_temp_estimate"]
    assert found["temp_bytes"] == max(temps.values()) > 0
    assert {"prefill-1x16", "decode-8x1", "allocate"} <= set(temps)
    assert programs_of.num_compiles() == before
    inspected = json.loads(run(capsys, "inspect", *stored, "--json")[1])["memory"]
    about = {"model": None, "num_replicas": 1}
    assert {**found, "model": None} == {**inspected, **about}
    assert "the largest, of" in run(capsys, "plan", *stored)[1]


def test_a_model_that_is_not_here_is_planned_and_not_fetched(capsys, options, tmp_path):
    code, out, _ = run(capsys, "plan", "-m", "smollm2-135m", "--device-gib", "141", "--json")
    found = json.loads(out)
    assert (code, found["model"]) == (0, "smollm2-135m")
    assert found["weight_bytes"] == 2 * 134_515_008
    assert not (tmp_path / "cache" / "models").exists()
    assert "it does not fit" in run(capsys, "plan", "--device-gib", "0.1")[1]


def test_sizes_below_zero_read_well():
    assert size(-3 << 30) == "-3.0 GiB"
