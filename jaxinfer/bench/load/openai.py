"""Any server with OpenAI's completions API as a target: streamed over HTTP, through httpx."""

import asyncio
import json
from collections.abc import AsyncIterator
from types import TracebackType
from typing import Any

from jaxinfer.bench.load.calls import Call
from jaxinfer.bench.load.target import Ask, CallFailed, End, Part
from jaxinfer.errors import ConfigError, InvalidRequest, Unreachable

try:
    import httpx
except ImportError as missing:
    raise ConfigError(
        "--openai needs httpx, which is not installed here: pip install 'jaxinfer[load]'"
    ) from missing

CONNECT_S = 10.0


class OpenAiTarget:
    """`async with` it inside the running loop; the model is the first one that the server lists."""

    def __init__(self, url: str, ask: Ask, *, model: str = "", key: str = "") -> None:
        if not url.startswith(("http://", "https://")):
            raise ConfigError(f"--openai is {url!r}; it must be a URL: http://127.0.0.1:8000")
        base = url.rstrip("/")
        self._url = base if base.endswith("/v1") else f"{base}/v1"
        self._ask = ask
        self.model = model
        self._http = httpx.AsyncClient(
            headers={"Authorization": f"Bearer {key}"} if key else {},
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=None),
            timeout=httpx.Timeout(ask.timeout_s, connect=CONNECT_S, pool=None),
            trust_env=False,
        )

    async def __aenter__(self) -> "OpenAiTarget":
        if not self.model:
            self.model = await self._first_model()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self._http.aclose()

    async def stream(self, call: Call) -> AsyncIterator[Part | End]:
        """Sends a call and yields its answer."""
        path = "chat/completions" if self._ask.is_chat else "completions"
        try:
            async with (
                asyncio.timeout(self._ask.timeout_s),
                self._http.stream("POST", f"{self._url}/{path}", json=self._body(call)) as response,
            ):
                if response.status_code != httpx.codes.OK:
                    said = (await response.aread()).decode(errors="replace")
                    raise CallFailed(f"HTTP {response.status_code}", said[:500])
                async for event in _events(response):
                    yield event
        except httpx.HTTPError as error:
            raise CallFailed(type(error).__name__, str(error)) from error
        except TimeoutError as error:
            raise CallFailed("TIMEOUT", f"no end within {self._ask.timeout_s:g} s") from error

    async def _first_model(self) -> str:
        try:
            response = await self._http.get(f"{self._url}/models")
            response.raise_for_status()
            return str(response.json()["data"][0]["id"])
        except httpx.ConnectError as error:
            await self._http.aclose()
            raise Unreachable(f"no server answers at {self._url}: {error}") from error
        except (httpx.HTTPError, ValueError, LookupError, TypeError) as error:
            await self._http.aclose()
            raise InvalidRequest(
                f"{self._url}/models names no model ({error}); give --model-name NAME"
            ) from error

    def _body(self, call: Call) -> dict[str, Any]:
        prompt = call.prompt if isinstance(call.prompt, str) else list(call.prompt)
        asked = {"messages": [{"role": "user", "content": prompt}]}
        body = {
            "model": self.model,
            **(asked if self._ask.is_chat else {"prompt": prompt}),
            "max_tokens": call.num_output_tokens,
            "temperature": self._ask.temperature,
            "seed": call.number,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        # No part of OpenAI's own API, so it is sent only where it says something.
        return body | ({"ignore_eos": True} if self._ask.ignore_eos else {})


async def _events(response: "httpx.Response") -> AsyncIterator[Part | End]:
    usage: dict[str, Any] = {}
    is_done = False
    async for line in response.aiter_lines():
        if not line.startswith("data:"):
            continue
        data = line.removeprefix("data:").strip()
        if data == "[DONE]":  # read on: a response read to its end gives its connection back
            is_done = True
            continue
        event = _parsed(data)
        usage = event.get("usage") or usage
        for choice in event.get("choices") or ():
            is_done = is_done or choice.get("finish_reason") is not None
            if _text(choice):
                yield Part()
    if not is_done:
        raise CallFailed("CUT", "the stream ended before the answer did")
    details = usage.get("prompt_tokens_details") or {}
    yield End(
        num_prompt_tokens=usage.get("prompt_tokens"),
        num_output_tokens=usage.get("completion_tokens"),
        num_cached_tokens=details.get("cached_tokens") or 0,
    )


def _parsed(data: str) -> dict[str, Any]:
    try:
        event = json.loads(data)
    except ValueError as error:
        raise CallFailed("NOT_JSON", f"the stream holds {data!r:.200}") from error
    if not isinstance(event, dict) or event.get("error"):
        raise CallFailed("STREAM_ERROR", str(data)[:500])
    return event


def _text(choice: dict[str, Any]) -> str:
    delta = choice.get("delta") or {}
    return choice.get("text") or delta.get("content") or delta.get("reasoning_content") or ""
