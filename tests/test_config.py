"""Settings: what wins, what is refused, and what an error says."""

from dataclasses import dataclass, field
from pathlib import Path

import pytest

from jaxinfer import config, settings
from jaxinfer.config import Config
from jaxinfer.errors import ConfigError

ROOT = Path(__file__).parent.parent
NONE: dict[str, str] = {}


def load(*sources: str | Path, environ: dict[str, str] = NONE) -> Config:
    return config.load(*sources, environ=environ)


def write(folder: Path, text: str, name: str = "mine.toml") -> Path:
    path = folder / name
    path.write_text(text)
    return path


def refusal(*sources: str | Path, environ: dict[str, str] = NONE) -> str:
    with pytest.raises(ConfigError) as caught:
        load(*sources, environ=environ)
    return str(caught.value)


def test_nothing_given_means_the_defaults():
    assert load() == Config()


def test_later_sources_win(tmp_path):
    first = write(
        tmp_path, "[engine]\nnum_slots = 2\nmax_waiting = 2\n[server]\nport = 2\n", "1.toml"
    )
    second = write(tmp_path, "[engine]\nmax_waiting = 3\n[server]\nport = 3\n", "2.toml")
    environ = {"JAXINFER_SERVER__PORT": "4", "JAXINFER_ENGINE__MAX_SEQ_LEN": "4"}
    # Overrides win wherever they stand.
    loaded = load("engine.max_seq_len=640", first, second, environ=environ)
    assert loaded.engine.num_slots == 2
    assert loaded.engine.max_waiting == 3
    assert loaded.server.port == 4
    assert loaded.engine.max_seq_len == 640


def test_an_empty_variable_or_table_is_still_checked(tmp_path):
    assert load(write(tmp_path, "[engine]\n")) == Config()
    assert "unknown key engin" in refusal(write(tmp_path, "[engin]\n"))
    assert "engine.num_slots is ''" in refusal(environ={"JAXINFER_ENGINE__NUM_SLOTS": ""})


@pytest.mark.parametrize(
    ("text", "key", "value"),
    [
        ("engine.num_slots=32", "engine.num_slots", 32),
        ("--engine.cache.page-size=32", "engine.cache.page_size", 32),
        ("engine.overlap=false", "engine.overlap", False),
        ("engine.overlap=1", "engine.overlap", True),
        ("server.drain_grace_s=3", "server.drain_grace_s", 3.0),
        ("server.host=::1", "server.host", "::1"),
        ("model=a=b", "model", "a=b"),
        ("engine.compute_dtype=float32", "engine.compute_dtype", "float32"),
        ("engine.prefill_chunks=16,64", "engine.prefill_chunks", (16, 64)),
        ("engine.prefill_chunks=[16, 64]", "engine.prefill_chunks", (16, 64)),
        ("mesh.axes=X,Y", "mesh.axes", ("X", "Y")),
        ("mesh.rules=[['ffw', 'X']]", "mesh.rules", (("ffw", "X"),)),
    ],
)
def test_texts_are_read_as_what_their_key_wants(text, key, value):
    assert dict(settings.flatten(load(text)))[key] == value


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[engine]\nnum_slot = 8", ["engine.num_slot;", "did you mean engine.num_slots?"]),
        ("[engin]\nnum_slots = 8", ["engin.num_slots;", "did you mean engine.num_slots?"]),
        ("page_size = 8", ["page_size;", "did you mean engine.cache.page_size?"]),
        (
            "zork = 1",
            ["unknown key zork", "the keys are model, engine, server, security, journal, snapshot"],
        ),
        ("[engine.cache]\nzork = 1", ["engine.cache has page_size, num_pages"]),
        ('[engine]\nnum_slots = "8"', ['engine.num_slots is "8" (a string)', "a whole number"]),
        ("[engine]\nnum_slots = true", ["(true or false)", "a whole number"]),
        ("[engine]\nnum_slots = 8.0", ["8.0 (a number)", "a whole number"]),
        ("[engine]\noverlap = 1", ["1 (a whole number)", "true or false"]),
        ("[engine]\nprefill_chunks = [32, 'a']", ['[32, "a"]', "each item a whole number"]),
        ("[engine]\ncompute_dtype = 'f16'", ['"f16"', "one of bfloat16, float32"]),
        ("[mesh]\nrules = [['a']]", ["each item a list of 2: a string, a string"]),
        ("model = {}", ["model is {} (a section)", "a string"]),
        ("engine = 3", ["engine is a section", "engine.num_slots"]),
        ("[engine.num_slots]\nx = 1", ["engine.num_slots is a whole number, not a section"]),
        ("[engine", ["not valid TOML", "at end of document"]),
        ("[engine]\nnum_slots = 0", ["at least 1", "engine.num_slots comes from"]),
    ],
)
def test_a_wrong_file_is_refused_by_name_and_key(tmp_path, text, words):
    path = write(tmp_path, text)
    message = refusal(path)
    assert str(path) in message
    for word in words:
        assert word in message


def test_other_wrong_files_are_refused(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_bytes(b"model = '\xff'")
    assert f"{path}: not UTF-8" in refusal(path)
    assert "can't be read" in refusal_of_folder(tmp_path)
    assert "did you mean cpu-8?" in refusal("cpu-9")
    assert "the presets are engine/cpu-32" in refusal("nothing-like-it")


def refusal_of_folder(folder: Path) -> str:
    with pytest.raises(ConfigError) as caught:
        settings.from_file(folder, name="folder")
    return str(caught.value)


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("JAXINFER_ENGINE__NUM_SLOT", "8", "did you mean engine.num_slots?"),
        ("JAXINFER_ENGINE_NUM_SLOTS", "8", "did you mean engine.num_slots?"),
        ("JAXINFER_ENGINE__NUM_SLOTS", "3.5", "engine.num_slots is '3.5'; it must be a whole"),
        (
            "JAXINFER_ENGINE__OVERLAP",
            "maybe",
            "engine.overlap is 'maybe'; it must be true or false",
        ),
    ],
)
def test_a_wrong_variable_is_refused_by_name(name, value, words):
    message = refusal(environ={name: value})
    assert message.startswith(f"{name}: ")
    assert words in message


def test_variables_that_are_no_settings_are_left_alone():
    environ = {"JAXINFER_CACHE_DIR": "/x", "JAXINFER_DEBUG": "1", "HOME": "/y"}
    assert load(environ=environ) == Config()
    assert config.cache_dir(environ) == Path("/x")
    assert config.cache_dir({"XDG_CACHE_HOME": "/z"}) == Path("/z/jaxinfer")
    assert config.is_debug(environ)
    assert not config.is_debug({})


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("--engine.num-slot=8", "--engine.num-slot: unknown key engine.num_slot; did you mean"),
        ("engine.num_slots=x", "override: engine.num_slots is 'x'; it must be a whole number"),
        ("engine.prefill_chunks=a,b", "each item a whole number"),
        ("=3", "unknown key"),
        ("--server.port=70000", "server.port is 70000; it must be from 0 to 65535"),
        ("server.drain_grace_s=nan", "server.drain_grace_s is nan; it must be at least 0"),
        ("server.max_message_bytes=0", "server.max_message_bytes is 0; it must be at least 1"),
    ],
)
def test_a_wrong_override_is_refused_by_name(text, words):
    assert words in refusal(text)


def test_an_error_of_the_dataclass_says_who_set_the_key():
    message = refusal("cpu-8", "--engine.attention-block=100")
    assert "engine.attention_block comes from --engine.attention-block" in message


def test_override_returns_a_new_value():
    before = Config()
    after = config.override(before, "engine.cache.page_size=32", "server.port=0")
    assert (after.engine.cache.page_size, after.server.port) == (32, 0)
    assert before == Config()
    with pytest.raises(ConfigError, match="write key=value"):
        config.override(before, "server.port")


@dataclass(frozen=True)
class Inner:
    note: str = ""
    limit: float = 1.0


@dataclass(frozen=True)
class Outer:
    names: tuple[str, ...] = ()
    seed: int | None = None
    """Where chance starts."""
    inner: Inner = field(default_factory=Inner)


def test_toml_reads_back_to_the_same_value(tmp_path):
    first = load("cpu-32", "engine.overlap=false", "mesh.rules=[['ffw', 'X']]")
    assert load(write(tmp_path, config.to_toml(first))) == first
    odd = Outer(names=('"', "\\\n\t\x7f", "é\U0001f600"), seed=3, inner=Inner("\x00", float("inf")))
    path = write(tmp_path, settings.to_toml(odd))
    assert settings.apply(Outer(), settings.from_file(path, name="odd")) == odd


def test_optional_values_may_be_absent(tmp_path):
    assert "seed" not in settings.to_toml(Outer())
    assert settings.apply(Outer(seed=3), settings.from_override("seed=none")).seed is None
    assert settings.apply(Outer(), settings.from_override("seed=3")).seed == 3
    with pytest.raises(ConfigError, match="seed is 'x'; it must be a whole number"):
        settings.apply(Outer(), settings.from_override("seed=x"))


def test_digest_names_the_settings():
    assert config.digest(Config()) == config.digest(load("engine.num_slots=8"))
    assert config.digest(Config()) != config.digest(load("engine.num_slots=9"))
    assert len(config.digest(Config())) == 12


def test_schema_describes_every_key():
    schema = settings.schema(Config)
    assert list(schema["properties"]) == [
        "model",
        "engine",
        "server",
        "security",
        "journal",
        "snapshot",
        "mesh",
        "quant",
        "cluster",
    ]
    slots = schema["properties"]["engine"]["properties"]["num_slots"]
    assert slots == {
        "type": "integer",
        "default": 8,
        "description": "Sequences that decode at once.",
    }
    assert settings.schema(Outer)["properties"]["seed"]["description"] == "Where chance starts."


def test_every_file_in_configs_loads():
    names = list(config.presets())
    assert {"engine/cpu-8", "engine/cpu-32", "engine/exact-f32", "mesh/single"} <= set(names)
    for name in names:
        by_name, by_path = load(name), load(config.presets()[name])
        assert by_name == by_path == load(f"configs/{name}.toml"), name
    assert load("cpu-32").engine.num_slots == 32
    assert load("cpu-32").engine.max_seq_len == 2048
    assert load("exact-f32").engine.compute_dtype == "float32"
    assert load("single").mesh == Config().mesh


def test_preset_names_are_unambiguous():
    short = [name.rpartition("/")[2] for name in config.presets()]
    assert len(short) == len(set(short))
    assert config.presets_dir() == ROOT / "configs"
