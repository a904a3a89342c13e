"""Options that several commands share."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from jaxinfer import config as settings
from jaxinfer.errors import InvalidRequest
from jaxinfer.host.request import SamplingParams
from jaxinfer.settings import from_override

Json = Annotated[bool, Parameter(name="--json")]
Sampling = Annotated[SamplingParams, Parameter(name="*")]
UNSET = SamplingParams()


@Parameter(name="*")
@dataclass(frozen=True)
class Common:
    """Which model, and which settings."""

    model: Annotated[str | None, Parameter(name=["--model", "-m"])] = None
    """An alias (smollm2-135m), a Hugging Face folder, a GGUF file, or a folder of jaxinfer's."""
    quant: Annotated[str | None, Parameter(name="--quant")] = None
    """Quantises the weights as they are loaded: w8a8 or w8a16; short for --quant.scheme."""
    files: Annotated[tuple[str, ...], Parameter(name=["--config", "-c"])] = ()
    """A TOML file or a preset (cpu-8, cpu-32, exact-f32); repeatable, a later one wins."""
    overrides: Annotated[tuple[str, ...], Parameter(name="--set")] = ()
    """One setting, key=value; `--engine.num-slots 32` is short for it."""
    debug: bool = False
    """Shows the traceback of an error."""

    def load(self) -> settings.Config:
        """The settings that these options, the environment and the defaults make."""
        return settings.load(*self.sources())

    def sources(self) -> tuple[str, ...]:
        """What `config.load` takes."""
        for text in self.overrides:
            from_override(text)  # without a = it would pass for a file
        model = () if self.model is None else (f"--model={self.model}",)
        quant = () if self.quant is None else (f"--quant.scheme={self.quant}",)
        return (*self.files, *model, *quant, *self.overrides)

    def arguments(self) -> tuple[str, ...]:
        """The same options for the command line of another process."""
        files = (part for file in self.files for part in ("-c", file))
        model = () if self.model is None else ("--model", self.model)
        debug = ("--debug",) if self.debug else ()
        quant = () if self.quant is None else ("--quant", self.quant)
        return (*files, *model, *quant, *(f"--set={text}" for text in self.overrides), *debug)


@Parameter(name="*")
@dataclass(frozen=True)
class PromptOptions:
    """What to continue."""

    prompt: Annotated[str | None, Parameter(alias="-p", allow_leading_hyphen=True)] = None
    """The text to continue; `-` reads it from stdin."""
    prompt_file: Path | None = None
    """A UTF-8 file with the text to continue."""
    token_ids: str | None = None
    """Token ids to continue, with commas: 1,2,3."""
    chat: bool = False
    """Puts the prompt into the model's chat template, as a user's message."""
    system: str | None = None
    """With --chat: what the model is told first."""

    def read(self) -> str | list[int]:
        """The prompt; InvalidRequest where there is none, or more than one."""
        given = [self.prompt is not None, self.prompt_file is not None, self.token_ids is not None]
        if sum(given) != 1:
            raise InvalidRequest(
                "give one prompt: --prompt TEXT (- for stdin), --prompt-file or --token-ids",
                field="prompt",
            )
        if self.token_ids is not None:
            if self.chat:
                raise InvalidRequest("--chat wraps text; it can't take --token-ids", field="prompt")
            return _token_ids(self.token_ids)
        if self.prompt_file is not None:
            return _read_file(self.prompt_file)
        return (
            _decoded(sys.stdin.buffer.read(), "stdin") if self.prompt == "-" else str(self.prompt)
        )

    def messages(self, text: str) -> list[dict[str, str]]:
        """The prompt as a conversation."""
        return [*opening(self.system), {"role": "user", "content": text}]


COMMON = Common()
NO_PROMPT = PromptOptions()


def opening(system: str | None) -> list[dict[str, str]]:
    """How a conversation starts: with what the system says, if anything."""
    return [] if system is None else [{"role": "system", "content": system}]


def _read_file(path: Path) -> str:
    try:
        return _decoded(path.read_bytes(), str(path))
    except OSError as error:
        raise InvalidRequest(
            f"--prompt-file {path} can't be read: {error.strerror}", field="prompt"
        ) from error


def _decoded(data: bytes, name: str) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InvalidRequest(
            f"{name} is not UTF-8 text: {error.reason} at byte {error.start}", field="prompt"
        ) from error


def _token_ids(text: str) -> list[int]:
    try:
        return [int(part) for part in text.strip("[] ").split(",")]
    except ValueError as error:
        raise InvalidRequest(
            f"--token-ids is {text!r}; it must be whole numbers with commas: 1,2,3", field="prompt"
        ) from error
