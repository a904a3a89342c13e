"""A tiny server with OpenAI's streaming API, from the standard library."""

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

Answer = Callable[[dict[str, Any], str], list[str]]
Handle = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


@asynccontextmanager
async def served(answer: Answer, seen: list[dict[str, Any]]) -> AsyncIterator[str]:
    """Answers each POST with the lines of `answer(body, path)`; a first line may be a status."""

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while head := await _head(reader):
            line, *fields = head.split("\r\n")
            method, path, _ = line.split(" ")
            headers = dict(field.lower().split(": ", 1) for field in fields if field)
            body = await reader.readexactly(int(headers.get("content-length", 0)))
            if method == "GET":
                _reply(writer, 200, json.dumps({"data": [{"id": "tiny"}, {"id": "other"}]}))
            else:
                request = json.loads(body)
                seen.append({"path": path, "headers": headers, **request})
                await _stream(writer, answer(request, path))
            if writer.is_closing():
                return
            await writer.drain()

    async with listening(handle) as url:
        yield url


@asynccontextmanager
async def listening(handle: Handle) -> AsyncIterator[str]:
    """A server on loopback whose connections have all ended when it has."""
    tasks: list[asyncio.Task[None] | None] = []

    async def connection(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        tasks.append(asyncio.current_task())
        await handle(reader, writer)
        writer.close()
        await writer.wait_closed()

    server = await asyncio.start_server(connection, "127.0.0.1", 0)
    try:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    finally:
        server.close()
        await asyncio.gather(*(task for task in tasks if task is not None))


def text_event(text: str, *, is_chat: bool, finish: str | None = None) -> str:
    """One part of an answer."""
    part = {"delta": {"content": text}} if is_chat else {"text": text}
    return "data: " + json.dumps({"choices": [{**part, "finish_reason": finish}]})


def usage_event(num_prompt: int, num_output: int) -> str:
    """What comes after the answer, where it was asked for."""
    usage = {
        "prompt_tokens": num_prompt,
        "completion_tokens": num_output,
        "prompt_tokens_details": {"cached_tokens": 2},
    }
    return "data: " + json.dumps({"choices": [], "usage": usage})


async def _head(reader: asyncio.StreamReader) -> str:
    try:
        return (await reader.readuntil(b"\r\n\r\n")).decode()
    except asyncio.IncompleteReadError:
        return ""


async def _stream(writer: asyncio.StreamWriter, lines: list[str]) -> None:
    if lines[0].isdecimal():
        _reply(writer, int(lines[0]), lines[1])
        return
    writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n")
    writer.write(b"Transfer-Encoding: chunked\r\n\r\n")
    for line in lines:
        if line == "cut":
            writer.close()
            return
        data = f"{line}\n\n".encode()
        writer.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")
        await writer.drain()
    writer.write(b"0\r\n\r\n")


def _reply(writer: asyncio.StreamWriter, status: int, text: str) -> None:
    data = text.encode()
    head = f"HTTP/1.1 {status} Said\r\nContent-Type: application/json\r\n"
    writer.write(f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data)
