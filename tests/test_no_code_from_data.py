"""A model's files are data: nothing in them is run, and a server reaches out to nobody.

The one exception is the program store: jax frames its executables with pickle. They are machine
code in any case, so the folder belongs to this user alone, and a file is read only after its
checksum and key were found right; tests/test_store.py has the refusals.
"""

import ast
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
GOLDEN = ROOT / "tests" / "golden" / "smollm2"
MODULES = ("pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve")
CALLS = ("eval", "exec", "__import__")
METHODS = ("yaml.load", "torch.load", "runpy.run_path", "runpy.run_module", "code.interact")
EXCEPTION = {"jaxinfer/store.py": {"import pickle"}}  # for the name of pickle's error

PROBE = """
import asyncio, json, sys
folder, store = sys.argv[1:]
seen = {"opened": [], "connected": [], "unpickled": [], "marshalled": [], "executed": []}

def outside(frame):
    while frame is not None and "importlib" in frame.f_code.co_filename:
        frame = frame.f_back
    return frame

def by(frame):
    return frame.f_code.co_filename if frame is not None else ""

def hook(event, arguments):
    if event == "open" and str(arguments[0]).startswith(folder):
        seen["opened"].append(str(arguments[0]))
    elif event in ("socket.connect", "socket.getaddrinfo"):
        seen["connected"].append([event, repr(arguments[1:] if event == "socket.connect"
                                              else arguments[:1])])
    elif event == "pickle.find_class":
        seen["unpickled"].append(by(sys._getframe(1)))
    elif event == "marshal.loads":
        caller = by(sys._getframe(1))
        if "importlib" not in caller:
            seen["marshalled"].append(caller)
    elif event == "exec" and arguments[0].co_filename.startswith(folder):
        seen["executed"].append(arguments[0].co_filename)
    elif event == "import" and "evil" in str(arguments[0]):
        seen["executed"].append(str(arguments[0]))

sys.addaudithook(hook)

from functools import partial
from jaxinfer import config
from jaxinfer.client import AsyncClient
from jaxinfer.llm import load_engine
from jaxinfer.runner import EngineThread
from jaxinfer.server.app import Server
from jaxinfer.server.served import ServedModel

settings = config.load(
    f"model={folder}", "server.port=0", "engine.compute_dtype=float32", "engine.max_seq_len=128",
    "engine.num_slots=1", "engine.prefill_chunks=[32]", "engine.bits=fast",
    environ={},
)
load_engine(settings)
before = len(seen["unpickled"])
loaded = load_engine(settings)

async def serve():
    served = ServedModel(
        loaded.name, loaded.model, loaded.tokenizer, loaded.engine.limits, loaded.defaults
    )
    server = Server(served, partial(EngineThread, loaded.engine), settings.server)
    port = await server.start()
    await server.set_serving(True)
    async with AsyncClient(f"127.0.0.1:{port}") as client:
        done = await client.generate("abc", max_tokens=3, ignore_eos=True)
    await server.stop(1.0)
    return len(done.token_ids)

seen["num_tokens"] = asyncio.run(serve())
seen["first_load"] = before
print(json.dumps(seen))
"""


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> dict:
    """What a process did that loaded a model with code beside it, twice, and served it."""
    root = tmp_path_factory.mktemp("model")
    folder = root / "model"
    shutil.copytree(GOLDEN, folder)
    document = json.loads((folder / "config.json").read_text())
    document["auto_map"] = {"AutoModelForCausalLM": "modeling_evil.Evil"}
    (folder / "config.json").write_text(json.dumps(document))
    for name in ("modeling_evil.py", "__init__.py", "sitecustomize.py", "jax.py"):
        (folder / name).write_text("raise SystemExit('code from data')\n")
    environ = {
        **os.environ,
        "JAXINFER_CACHE_DIR": str(root / "cache"),
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": str(ROOT),
    }
    ended = subprocess.run(
        [sys.executable, "-c", PROBE, str(folder), str(root)],
        capture_output=True,
        text=True,
        env=environ,
        cwd=folder.parent,
        timeout=300,
    )
    assert ended.returncode == 0, ended.stderr[-3000:]
    return json.loads(ended.stdout.splitlines()[-1])


def test_the_model_was_loaded_and_answered(found):
    assert found["num_tokens"] == 3
    assert "config.json" in {Path(name).name for name in found["opened"]}  # so the hook works


def test_no_code_of_the_models_folder_is_opened_or_run(found):
    suffixes = {Path(name).suffix for name in found["opened"]}
    assert suffixes <= {".json", ".jinja", ".safetensors"}
    assert found["executed"] == []


def test_nothing_is_unpickled_but_what_jax_wrote_into_the_store(found):
    assert found["first_load"] == 0, "a first load has no store to read"
    callers = {Path(name).name for name in found["unpickled"]}
    assert callers == {"serialize_executable.py"}
    assert found["marshalled"] == []


def test_a_server_connects_to_nobody(found):
    hosts = ("'127.0.0.1'", "'::1'", "'localhost'")
    assert [one for one in found["connected"] if not any(host in one[1] for host in hosts)] == []


def offences(path: str, text: str) -> Iterator[str]:
    """Ways to run data as code, in one file."""
    for node in ast.walk(ast.parse(text)):
        match node:
            case ast.Import(names=names):
                yield from (f"import {one.name}" for one in names if one.name in MODULES)
            case ast.ImportFrom(module=str(module)) if module in MODULES:
                yield f"import {module}"
            case ast.Call(func=ast.Name(id=name)) if name in CALLS:
                yield name
            case ast.Attribute(value=ast.Name(id=left), attr=right):
                if f"{left}.{right}" in METHODS:
                    yield f"{left}.{right}"
            case ast.keyword(arg="allow_pickle", value=value):
                if not (isinstance(value, ast.Constant) and value.value is False):
                    yield "allow_pickle"
            case _:
                continue


def test_no_file_has_a_way_to_run_data():
    found: dict[str, set[str]] = {}
    for path in sorted((ROOT / "jaxinfer").rglob("*.py")):
        name = path.relative_to(ROOT).as_posix()
        if some := set(offences(name, path.read_text())):
            found[name] = some
    assert found == EXCEPTION


def test_the_exception_uses_the_name_of_an_error_only():
    tree = ast.parse((ROOT / "jaxinfer" / "store.py").read_text())
    used = {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute)
        and isinstance(node.value, ast.Name)
        and node.value.id == "pickle"
    }
    assert used == {"UnpicklingError"}


@pytest.mark.parametrize(
    "text",
    [
        "import pickle",
        "from marshal import loads",
        "eval('1')",
        "exec(source)",
        "__import__(name)",
        "import yaml\nyaml.load(text)",
        "np.load(path, allow_pickle=True)",
        "np.load(path, allow_pickle=flag)",
    ],
)
def test_a_planted_way_is_found(text):
    assert list(offences("jaxinfer/planted.py", text))
