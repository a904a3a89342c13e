"""The command line: what it answers, what it refuses, and that it stays quick."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from jaxinfer import cli
from jaxinfer.cli import chat, doctor, generate, inspect, options, plan
from jaxinfer.cli.app import with_settings
from jaxinfer.errors import InvalidRequest
from jaxinfer.host.request import FinishReason, Output, SamplingParams, Timings
from tests import cli_model

ROOT = Path(__file__).parent.parent


def run(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, str, str]:
    """Exit code, stdout, stderr."""
    code = cli.run(argv)
    out, err = capsys.readouterr()
    return code, out, err


@pytest.mark.parametrize("argv", [["--help"], [], ["generate", "--help"], ["config", "show"]])
def test_help_and_settings_need_no_jax(argv):
    code = (
        "import sys; from jaxinfer import cli; "
        f"code = cli.run({argv!r}); "
        "heavy = {'jax', 'jaxlib', 'orbax', 'grpc', 'tokenizers'} & set(sys.modules); "
        "sys.exit(f'imported {heavy}' if heavy else code)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_every_command_describes_its_options(capsys, command):
    code, out, _ = run(capsys, command, "--help")
    assert code == 0
    assert cli.COMMANDS[command].split()[0] in out
    assert command in run(capsys, "--help")[1]


def test_version(capsys):
    code, out, _ = run(capsys, "--version")
    assert (code, out) == (0, "0.1.0\n")


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ("gnerate", 'Unknown command "gnerate". Did you mean "generate"?'),
        ("generate --promt x", "Unknown option: --promt. Did you mean --prompt?"),
        ("generate", "give one prompt: --prompt TEXT"),
        ("generate --prompt x --token-ids 1", "give one prompt"),
        ("generate --prompt=", "the prompt is empty"),
        ("generate --token-ids 1,x", "--token-ids is '1,x'"),
        ("generate --token-ids 1 --chat", "--chat wraps text"),
        ("generate --prompt-file /nowhere", "/nowhere can't be read: No such file"),
        ("generate --prompt x --temperature -1", "temperature is -1.0; it must be from 0.0"),
        ("generate --prompt x --temperature nan", "temperature is nan"),
        ("generate --prompt x --max-tokens -1", "max_tokens is -1; it must be from 1"),
        (
            "generate --prompt x --max-tokens y",
            'Invalid value for --max-tokens: unable to convert "y"',
        ),
        ("config show -c cpu-9", "no settings file 'cpu-9'; did you mean cpu-8?"),
        ("config show --engine.num-slot 3", "--engine.num-slot: unknown key engine.num_slot; did"),
        ("config show --engine.num-slots", "engine.num_slots is ''; it must be a whole number"),
        ("config show --set engine", "'engine' sets nothing"),
        ("serve --stats-json /nowhere/x", "there is no folder /nowhere"),
        ("demo --engine.num-slots x", "--engine.num-slots: engine.num_slots is 'x'"),
    ],
)
def test_bad_input_is_one_line_and_exit_2(capsys, argv, words):
    code, out, err = run(capsys, *argv.split(" "))
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert words in err
    assert err.count("\n") == 1


def test_debug_shows_the_traceback():
    with pytest.raises(InvalidRequest, match="give one prompt"):
        cli.run(["generate", "--debug"])


def test_text_that_is_no_utf8_is_refused(capsys, tmp_path):
    (tmp_path / "prompt").write_bytes(b"ab\xff")
    code, _, err = run(capsys, "generate", "--prompt-file", str(tmp_path / "prompt"))
    assert code == 2
    assert "prompt is not UTF-8 text: invalid start byte at byte 2" in err


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        ("show --a.b 1", "show --set=--a.b=1"),
        ("show --a.b=1 -x", "show --set=--a.b=1 -x"),
        ("--a.b-c.d -1", "--set=--a.b-c.d=-1"),
        ("--engine.overlap --json", "--set=--engine.overlap=true --json"),
        ("--engine.overlap false --json", "--set=--engine.overlap=false --json"),
        ("--a.b --json", "--set=--a.b= --json"),
        ("--prompt a.b --temperature 0.5", "--prompt a.b --temperature 0.5"),
        ("--x -- --a.b 1", "--x -- --a.b 1"),
    ],
)
def test_dotted_flags_become_settings(argv, expected):
    assert " ".join(with_settings(argv.split())) == expected


def test_config_show_prints_what_config_reads(capsys, tmp_path):
    code, out, _ = run(capsys, "config", "show", "-c", "cpu-32", "--engine.max-waiting", "5")
    assert code == 0
    assert "max_waiting = 5" in out
    (tmp_path / "again.toml").write_text(out)
    assert run(capsys, "config", "show", "-c", str(tmp_path / "again.toml"))[1] == out
    values = json.loads(run(capsys, "config", "show", "-m", "here", "--json")[1])
    assert values["model"] == "here"


def test_config_diff_says_who_set_what(capsys):
    _, out, _ = run(capsys, "config", "diff", "-c", "cpu-32", "--server.port", "0")
    assert "engine.num_slots = 32  # configs/engine/cpu-32.toml; default: 8\n" in out
    assert "server.port = 0  # --server.port; default: 50051\n" in out
    _, out, _ = run(capsys, "config", "diff", "--against", "cpu-32", "-c", "cpu-32", "--json")
    assert json.loads(out) == {}


def test_config_schema_is_json(capsys):
    _, out, _ = run(capsys, "config", "schema")
    assert json.loads(out)["additionalProperties"] is False


def test_options_survive_the_way_to_another_process():
    common = options.Common(model="m", files=("a", "b"), overrides=("--server.port=1",))
    argv = ["config", "show", *common.arguments()]
    assert argv[2:] == ["-c", "a", "-c", "b", "--model", "m", "--set=--server.port=1"]


class FakeLLM:
    """Answers every prompt with three words, one a step."""

    name = "fake"

    def __init__(self) -> None:
        self.asked: list[Any] = []
        self.num_closed = 0

    def stream(self, prompt: Any, sampling: SamplingParams) -> Iterator[Output]:
        if prompt == "too long":
            raise InvalidRequest("the prompt has 9 tokens", field="prompt")
        self.asked.append(prompt)
        try:
            for number, word in enumerate(("one", " two", " three")):
                reason = FinishReason.LENGTH if number == 2 else None
                yield Output(
                    "r",
                    (number,),
                    (0.0,),
                    word,
                    reason,
                    num_prompt_tokens=4,
                    num_output_tokens=number + 1,
                    timings=Timings(1.0, 1.5, 2.0, 4.0),
                )
        finally:
            self.num_closed += 1


def test_an_answer_as_json():
    llm: Any = FakeLLM()
    got = generate.answer(llm, "hello", SamplingParams(), load_s=0.5)
    assert got == {
        "text": "one two three",
        "token_ids": [0, 1, 2],
        "finish_reason": "length",
        "usage": {"num_prompt_tokens": 4, "num_output_tokens": 3, "num_preemptions": 0},
        "timings": {
            "load_s": 0.5,
            "queue_s": 0.5,
            "prefill_s": 0.5,
            "decode_s": 2.0,
            "ttft_s": 1.0,
            "tpot_s": 1.0,
            "total_s": 3.0,
        },
    }


def test_chat_remembers_until_reset(capsys):
    llm = FakeLLM()
    lines = iter(["hello\n", "\n", "again\n", "/zork\n", "/reset\n", "new\n", "/quit\n", "never\n"])
    chat.talk(llm, lines, SamplingParams(), system="be kind")  # type: ignore[arg-type]
    said = [[message["content"] for message in messages] for messages in llm.asked]
    assert said == [
        ["be kind", "hello"],
        ["be kind", "hello", "one two three", "again"],
        ["be kind", "new"],
    ]
    out, err = capsys.readouterr()
    assert out == "one two three\n" * 3
    assert "/zork is no command" in err


def test_ctrl_c_ends_the_answer_and_not_the_program(capsys):
    llm = FakeLLM()
    stream = llm.stream

    def interrupted(prompt: Any, sampling: SamplingParams) -> Iterator[Output]:
        for output in stream(prompt, sampling):
            if output.num_output_tokens == 2:
                signal.raise_signal(signal.SIGINT)
            yield output

    llm.stream = interrupted  # type: ignore[method-assign]
    assert chat.reply(llm, [], SamplingParams()) == "one two"  # type: ignore[arg-type]
    assert capsys.readouterr().out == "one two [stopped]\n"
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_message_that_can_not_be_served_is_forgotten(capsys):
    llm = FakeLLM()

    def picky(prompt: Any, sampling: SamplingParams) -> Iterator[Output]:
        if prompt[-1]["content"] == "long":
            raise InvalidRequest("the prompt has 9 tokens", field="prompt")
        return FakeLLM.stream(llm, prompt, sampling)

    llm.stream = picky  # type: ignore[method-assign]
    chat.talk(llm, iter(["long", "short"]), SamplingParams())  # type: ignore[arg-type]
    assert [len(messages) for messages in llm.asked] == [1]
    assert "error: the prompt has 9 tokens (/reset starts over)" in capsys.readouterr().err


def test_inspect_takes_equal_layers_together():
    leaves = [
        ("embedding", (4, 2), "bfloat16"),
        *((f"layers.{layer}.mlp.up", (2, 3), "float32") for layer in (0, 1, 3)),
        ("layers.2.mlp.up", (2, 3), "bfloat16"),
    ]
    assert inspect.grouped(leaves) == [
        inspect.Parameters("embedding", (4, 2), "bfloat16", 1, 16),
        inspect.Parameters("layers.0-1,3.mlp.up", (2, 3), "float32", 3, 72),
        inspect.Parameters("layers.2.mlp.up", (2, 3), "bfloat16", 1, 12),
    ]


def test_sizes_read_well():
    assert [plan.size(value) for value in (0, 1023, 1536, 3 << 30)] == [
        "0 B",
        "1023 B",
        "1.5 KiB",
        "3.0 GiB",
    ]


def test_inspect_shows_the_tree_and_the_plan(capsys, tmp_path):
    model = cli_model.save(tmp_path)
    argv = ("inspect", "-m", str(model), "-c", str(tmp_path / "tiny.toml"))
    code, out, _ = run(capsys, *argv, "--json")
    facts = json.loads(out)
    memory = facts["memory"]
    assert (code, facts["architecture"]) == (0, "llama")
    assert memory["weight_bytes"] == 4 * facts["num_parameters"]
    fixed = memory["weight_bytes"] + memory["temp_bytes"] + memory["code_bytes"]
    assert memory["total_bytes"] == fixed + memory["cache_bytes"]
    one_token = 2 * 2 * 2 * 16 * 4  # k and v, layers, kv heads, head, f32
    assert memory["page_bytes"] == one_token * memory["page_size"]
    assert "layers.0-1.mlp.down" in run(capsys, *argv)[1]


def test_doctor_finds_what_is_wrong(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("JAXINFER_CACHE_DIR", str(tmp_path))
    code, out, _ = run(capsys, "doctor", "--json", "--server.port", "0")
    found = {check["name"]: check for check in json.loads(out)["checks"]}
    assert code == 0, out
    assert found["model"]["state"] == "note"  # not fetched yet, and doctor does not fetch it
    assert "x cpu" in found["devices"]["value"]
    code, out, _ = run(capsys, "doctor", "--engine.num-slots", "0", "--server.port", "0")
    assert code == 1
    assert "broken" in out
    code, out, _ = run(capsys, "doctor", "-m", str(tmp_path / "none"), "--server.port", "0")
    assert code == 1


def test_doctor_notes_a_taken_port():
    import socket

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        check = doctor.port("127.0.0.1", taken.getsockname()[1])
    assert check.state == "note"
    assert "--server.port" in check.advice


def test_generate_streams_or_prints_json(tmp_path):
    model = cli_model.save(tmp_path)
    plain = ["-m", str(model), "-c", str(tmp_path / "tiny.toml"), "--temperature", "0"]
    environ = {**os.environ, "JAXINFER_CACHE_DIR": str(tmp_path / "cache"), "JAX_PLATFORMS": "cpu"}

    def generated(*argv: str) -> SimpleNamespace:
        command = [sys.executable, "-m", "jaxinfer", "generate", *plain, *argv]
        done = subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, input=b"hi")
        assert (done.returncode, done.stderr) == (0, b"")
        return SimpleNamespace(out=done.stdout.decode())

    answer = json.loads(generated("--prompt", "-", "--max-tokens", "6", "--json").out)
    assert set(answer) == {"text", "token_ids", "finish_reason", "usage", "timings"}
    assert len(answer["token_ids"]) == answer["usage"]["num_output_tokens"] <= 6
    assert answer["usage"]["num_prompt_tokens"] == 2
    ids = ",".join(str(byte) for byte in b"hi")
    assert generated("--token-ids", ids, "--max-tokens", "6").out == answer["text"] + "\n"
