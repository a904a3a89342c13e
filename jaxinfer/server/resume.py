"""An answer that goes on where a cut call ended: what its client has is left out.

The engine gives the same request the same answer, so it does not matter whether the request lived
on or is computed again: the first so many tokens and bytes are the ones that the client has.
"""

from dataclasses import fields, replace
from typing import NamedTuple

from jaxinfer.errors import InvalidRequest
from jaxinfer.host.request import UNFINISHED, Output, Request, SamplingParams
from jaxinfer.v1 import inference_pb2 as pb

COMPARED = ("prompt", "priority", "use_prefix_cache")


class Seen(NamedTuple):
    """How much of an answer a client has."""

    num_tokens: int = 0
    num_text_bytes: int = 0


NOTHING = Seen()


class Rest:
    """What follows after `seen`, output by output."""

    def __init__(self, seen: Seen) -> None:
        self._seen = self._left = seen

    def of(self, output: Output) -> Output:
        """An output without what the client has; InvalidRequest where it can't have that much."""
        left = self._left
        if left == NOTHING:
            return output
        num_text_bytes = 0
        if left.num_text_bytes:
            data = output.text.encode()
            num_text_bytes = min(left.num_text_bytes, len(data))
            output = replace(output, text=self._decoded(data[num_text_bytes:]))
        num_tokens = min(left.num_tokens, len(output.token_ids))
        self._left = Seen(left.num_tokens - num_tokens, left.num_text_bytes - num_text_bytes)
        if output.finish_reason is not None and output.finish_reason not in UNFINISHED:
            self._check_end()
        return replace(
            output,
            token_ids=output.token_ids[num_tokens:],
            logprobs=output.logprobs[num_tokens:],
        )

    def _decoded(self, data: bytes) -> str:
        try:
            return data.decode()
        except UnicodeDecodeError:
            field = "resume.num_text_bytes"
            raise InvalidRequest(
                f"{field} is {self._seen.num_text_bytes}, which is inside a character of the "
                "answer; count the bytes of the text that this request's stream brought",
                field=field,
            ) from None

    def _check_end(self) -> None:
        for name, left, claimed in zip(Seen._fields, self._left, self._seen, strict=True):
            if left:
                raise InvalidRequest(
                    f"resume.{name} is {claimed}, and the whole answer has {claimed - left}; send "
                    "what this request's stream brought, or leave resume out to have all of it",
                    field=f"resume.{name}",
                )


def seen_from(message: pb.GenerateRequest | pb.GenerateStreamRequest) -> Seen | None:
    """What a request says that its client has; None where it does not resume."""
    if not message.HasField("resume"):
        return None
    if not (message.HasField("request_id") and message.sampling.HasField("seed")):
        field = "sampling.seed" if message.HasField("request_id") else "request_id"
        raise InvalidRequest(
            f"resume without {field}; send the one that the first answer's Started had",
            field=field,
        )
    seen = Seen(message.resume.num_tokens, message.resume.num_text_bytes)
    for name, value in zip(Seen._fields, seen, strict=True):
        if value < 0:
            raise InvalidRequest(
                f"resume.{name} is {value}; it must be at least 0", field=f"resume.{name}"
            )
    return seen


def check_same(asked: Request, restored: Request) -> None:
    """Raises InvalidRequest where a request is not the one that is to be resumed.

    It names what differs and not how: an id alone must not show what someone else asked.
    """
    names = [name for name in COMPARED if getattr(asked, name) != getattr(restored, name)]
    names += [
        entry.name
        for entry in fields(SamplingParams)
        if getattr(asked.sampling, entry.name) != getattr(restored.sampling, entry.name)
    ]
    if names:
        raise InvalidRequest(
            f"request {asked.request_id!r} is known here with another {', '.join(names)}; send the "
            "same prompt and the parameters of its Started to go on with it, or use another "
            "request_id",
            field=names[0],
        )
