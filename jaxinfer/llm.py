"""The engine without a server: load a model, give it prompts, get text."""

import gc
import itertools
import secrets
import time
from collections.abc import Callable, Generator, Mapping
from collections.abc import Sequence as Items
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import jax

from jaxinfer import compile as programs_of
from jaxinfer import config as settings
from jaxinfer import sharding, weights
from jaxinfer.config import Config, ModelConfig
from jaxinfer.engine import Engine
from jaxinfer.errors import ConfigError
from jaxinfer.host.loop import Phase
from jaxinfer.host.request import (
    JAXINFER_DEFAULTS,
    EngineStats,
    FinishReason,
    Output,
    Request,
    SamplingParams,
    Timings,
)
from jaxinfer.plan import abstract_params
from jaxinfer.quality import gate
from jaxinfer.recording import open_journal
from jaxinfer.replicas import numbered
from jaxinfer.scoring import Scored, score
from jaxinfer.store import Agree, alone, find_store
from jaxinfer.text.tokenizer import Tokenizer

Prompt = str | Items[int]
Messages = Items[Mapping[str, Any]]


class LoadedEngine(NamedTuple):
    """An engine that is ready, and what its edge needs to know."""

    engine: Engine
    tokenizer: Tokenizer
    model: ModelConfig
    name: str
    defaults: SamplingParams  # what a request means where it says nothing; only the seed is unset


@dataclass(frozen=True)
class Completion:
    """One finished answer."""

    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    finish_reason: FinishReason
    num_prompt_tokens: int
    sampling: SamplingParams
    """The parameters that were used: nothing is unset but, perhaps, max_tokens."""
    timings: Timings
    error: str = ""


class LLM:
    """A model that answers in this process. One thread at a time.

    llm = LLM("smollm2-135m")
    print(llm.generate(["The sky is"], SamplingParams(max_tokens=16))[0].text)
    """

    def __init__(
        self,
        model: str | None = None,
        *,
        config: Config | None = None,
        progress: programs_of.Progress = lambda stage, done, total: None,
    ) -> None:
        config = config or Config()
        self.config = config if model is None else replace(config, model=model)
        loaded = load_engine(self.config, progress=progress)
        self.engine, self.tokenizer, self.model, self.name, self.defaults = loaded
        self._names = (f"llm-{number}" for number in itertools.count())

    def generate(
        self, prompts: Prompt | Items[Prompt], sampling: SamplingParams | None = None
    ) -> list[Completion]:
        """Continues each prompt, text or token ids, all of them batched; in the order given."""
        many: Items[Any] = [prompts] if _is_prompt(prompts) else prompts
        return self._finish([self._request(self._ids(prompt), sampling) for prompt in many])

    def chat(
        self, messages: Messages, sampling: SamplingParams | None = None, **template: Any
    ) -> Completion:
        """Answers a conversation: [{"role": "user", "content": "..."}]."""
        prompt = self.tokenizer.encode_chat(messages, **template)
        return self._finish([self._request(prompt, sampling)])[0]

    def stream(
        self, prompt: Prompt | Messages, sampling: SamplingParams | None = None
    ) -> Generator[Output, None, None]:
        """Yields what each step brings for one prompt or conversation; closing it cancels."""
        given: Any = prompt
        ids = self.tokenizer.encode_chat(given) if _is_chat(given) else self._ids(given)
        request = self._request(ids, sampling)
        self.engine.submit(request)
        ended = False
        try:
            while not ended:
                for output in self.engine.step():
                    ended = output.finish_reason is not None
                    yield output
        finally:
            if not ended:
                self.engine.cancel(request.request_id)
                self._run_dry()

    def score(self, prompt: Prompt) -> Scored:
        """How likely the model finds each token of a text but the first, given those before it.

        Raises ConfigError where the model was loaded without `engine.score_chunk`.
        """
        if self.engine.scorer is None:
            raise ConfigError("nothing scores here; load with engine.score_chunk, such as 128")
        return score(self.engine.scorer, self._ids(prompt))

    def stats(self) -> EngineStats:
        """Counts since the model was loaded."""
        return self.engine.stats()

    def _ids(self, prompt: Any) -> list[int]:
        return self.tokenizer.encode(prompt) if isinstance(prompt, str) else list(prompt)

    def _request(self, prompt: list[int], sampling: SamplingParams | None) -> Request:
        effective = (sampling or SamplingParams()).or_else(self.defaults)
        if effective.seed is None:
            effective = replace(effective, seed=secrets.randbits(64))
        return Request(next(self._names), tuple(prompt), effective)

    def _finish(self, requests: list[Request]) -> list[Completion]:
        parts: dict[str, list[Output]] = {request.request_id: [] for request in requests}
        try:
            for request in requests:
                self.engine.submit(request)
            self._run_dry(parts)
        finally:
            for request in requests:
                self.engine.cancel(request.request_id)
            self._run_dry()
        return [_completion(request, parts[request.request_id]) for request in requests]

    def _run_dry(self, parts: dict[str, list[Output]] | None = None) -> None:
        while self.engine.has_work:
            for output in self.engine.step():
                if parts is not None:
                    parts[output.request_id].append(output)


def _is_prompt(given: Any) -> bool:
    return isinstance(given, str) or bool(given) and isinstance(given[0], int)


def _is_chat(given: Any) -> bool:
    return not isinstance(given, str) and bool(given) and isinstance(given[0], Mapping)


def load_engine(
    config: Config,
    *,
    progress: programs_of.Progress = lambda stage, done, total: None,
    clock: Callable[[], float] = time.monotonic,
    faults: Callable[[Phase], None] = lambda phase: None,
    agree: Agree = alone,
) -> LoadedEngine:
    """Loads a model and builds its engine: every program is compiled when this returns.

    A folder of compiled programs that can't be used costs time and a warning, not the start.
    Processes that share the model `agree` on which programs to load.
    """
    ahead = _Ahead(config, agree)
    checkpoint = gate.load(
        config,
        sharding=None if sharding.is_plain(config.mesh) else sharding.placement(config.mesh),
        fit=partial(sharding.fit, config=config.mesh),
        progress=progress,
        described=ahead.begin,
    )
    tokenizer = Tokenizer(checkpoint.text)
    engine = Engine(
        checkpoint.params,
        checkpoint.config,
        tokenizer,
        config.engine,
        clock=clock,
        store=ahead.store,
        progress=progress,
        faults=faults,
    )
    jax.block_until_ready(checkpoint.params)
    engine.journal = open_journal(config, engine, checkpoint.name)
    gc.collect()
    gc.freeze()  # what is loaded now stays: the collector need not look at it between steps
    defaults = checkpoint.sampling.or_else(JAXINFER_DEFAULTS)
    return LoadedEngine(engine, tokenizer, checkpoint.config, checkpoint.name, defaults)


def load_replicas(
    config: Config, *, progress: programs_of.Progress = lambda stage, done, total: None
) -> tuple[LoadedEngine, ...]:
    """An engine for each place along the axis of the rule `batch`; one where there is no such rule.

    Each keeps a journal of its own, in a folder with its number.
    """
    meshes = sharding.replicas(config.mesh)
    folders = (numbered(config.journal.folder, at, len(meshes)) for at in range(len(meshes)))
    return tuple(
        load_engine(
            replace(config, mesh=mesh, journal=replace(config.journal, folder=folder)),
            progress=progress,
        )
        for mesh, folder in zip(meshes, folders, strict=True)
    )


class _Ahead:
    """What can begin as soon as a model is described, while its weights are read."""

    def __init__(self, config: Config, agree: Agree) -> None:
        self._config = config
        self.store = find_store(settings.cache_dir() / "programs")
        if not all(agree("a store", self.store is not None)):
            self.store = None
        if self.store is not None:
            self.store = replace(self.store, agree=agree)

    def begin(self, source: weights.Source) -> None:
        """Loads the stored programs on other threads."""
        if self.store is not None:
            engine, mesh = self._config.engine, self._config.mesh
            model = sharding.fit(source.config, mesh)
            params = abstract_params(model, engine, mesh)
            self.store = programs_of.load_ahead(model, engine, self.store, params)


def _completion(request: Request, outputs: list[Output]) -> Completion:
    last = outputs[-1]
    assert last.finish_reason is not None
    return Completion(
        text="".join(output.text for output in outputs),
        token_ids=tuple(token for output in outputs for token in output.token_ids),
        logprobs=tuple(value for output in outputs for value in output.logprobs),
        finish_reason=last.finish_reason,
        num_prompt_tokens=last.num_prompt_tokens,
        sampling=request.sampling,
        timings=last.timings,
        error=last.error,
    )
