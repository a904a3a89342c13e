"""Eval harnesses, unmodified, through the gateway to a real server with the demo model."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from jaxinfer import demo, weights
from jaxinfer.server import openai_door
from tests.server.demo_server import MODEL, serving

pytest.importorskip("smg")
pytest.importorskip("inspect_ai")
pytest.importorskip("lm_eval")

pytestmark = [
    pytest.mark.full,
    pytest.mark.skipif(not weights.is_ready("smollm2-135m"), reason="the demo model is not here"),
]
CAPITALS = {"France": "Paris", "Italy": "Rome", "Spain": "Madrid", "Japan": "Tokyo"}
SECONDS = 300.0
INSPECT_TASK = """
from inspect_ai import Task, task
from inspect_ai.dataset import Sample
from inspect_ai.scorer import includes
from inspect_ai.solver import generate


@task
def capitals():
    found = {capitals!r}
    samples = [Sample(f"What is the capital of {{one}}?", target=found[one]) for one in found]
    return Task(samples, solver=generate(), scorer=includes())
"""
LM_EVAL_TASK = """
task: capitals
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: generate_until
doc_to_text: "Q: What is the capital of {{{{country}}}}?\\nA: The capital of {{{{country}}}} is"
doc_to_target: " {{{{capital}}}}"
generation_kwargs: {{until: ["\\n", "."], max_gen_toks: 8, do_sample: false}}
metric_list: [{{metric: exact_match, ignore_case: true, ignore_punctuation: true}}]
"""


@pytest.fixture(scope="module")
def door():
    """Where OpenAI's protocol is spoken, and its key."""
    port = openai_door._free_port()
    with serving("--openai", str(port)) as (process, _):
        yield demo._event(process, "openai")


def harness(folder: Path, *command: str, **environment: str) -> str:
    """What a command of a harness says when it has ended well."""
    done = subprocess.run(
        [sys.executable, "-m", *command],
        cwd=folder,
        env=os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(folder)} | environment,
        capture_output=True,
        text=True,
        timeout=SECONDS,
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    return done.stdout


def test_inspect_ai_scores_chats(door, tmp_path):
    (tmp_path / "capitals.py").write_text(INSPECT_TASK.format(capitals=CAPITALS))
    harness(
        tmp_path,
        *("inspect_ai", "eval", "capitals.py", "--model", f"openai-api/jaxinfer/{MODEL}"),
        *("--log-format", "json", "--log-dir", "logs", "--display", "plain"),
        *("--temperature", "0", "--max-tokens", "24"),
        JAXINFER_BASE_URL=door["url"],
        JAXINFER_API_KEY=door["key"],
    )
    (path,) = (tmp_path / "logs").glob("*.json")
    log = json.loads(path.read_text())
    assert log["status"] == "success" and log["results"]["completed_samples"] == len(CAPITALS)
    first = next(one for one in log["samples"] if "France" in one["input"])
    assert first["output"]["completion"] == "The capital of France is Paris."
    assert first["scores"]["includes"]["value"] == "C"


def test_lm_eval_scores_generated_text(door, tmp_path):
    data = tmp_path / "capitals.jsonl"
    lines = [json.dumps({"country": one, "capital": of}) for one, of in CAPITALS.items()]
    data.write_text("\n".join(lines) + "\n")
    (tmp_path / "capitals.yaml").write_text(LM_EVAL_TASK.format(data=data))
    arguments = {
        "model": MODEL,
        "base_url": f"{door['url']}/completions",
        "tokenizer_backend": "None",
        "num_concurrent": 4,
    }
    harness(
        tmp_path,
        *("lm_eval", "--model", "local-completions", "--tasks", "capitals"),
        *("--include_path", ".", "--output_path", "out", "--log_samples"),
        *("--model_args", ",".join(f"{name}={value}" for name, value in arguments.items())),
        OPENAI_API_KEY=door["key"],
    )
    (path,) = (tmp_path / "out").rglob("samples_capitals_*.jsonl")
    samples = [json.loads(line) for line in path.read_text().splitlines()]
    assert len(samples) == len(CAPITALS)
    answers = {one["doc"]["country"]: one["filtered_resps"][0].strip() for one in samples}
    assert answers["France"] == "Paris"
