"""What a request may ask for, field by field: GetModel, the documentation and tests read this."""

from typing import NamedTuple

from jaxinfer.host.request import MAX_STOP_CHARS, MAX_STOP_IDS, MAX_STOP_STRINGS, RANGES
from jaxinfer.server import bounds

MAX_ID_CHARS = 256


class Capability(NamedTuple):
    """One field that is applied; what is not listed is refused as an unknown field."""

    field: str
    """Its path in GenerateRequest."""
    effect: str
    allowed: str
    """The values that it may have, in words."""


def _range(name: str) -> str:
    low, high, _ = RANGES[name]
    most = {2**31 - 1: "2^31 - 1", 2**64 - 1: "2^64 - 1"}.get(int(high), f"{high:g}")
    return f"{low:g} to {most}"


_JSON = f"JSON of up to {bounds.MAX_JSON_CHARS} characters, {bounds.MAX_JSON_DEPTH} levels deep"

CAPABILITIES = (
    Capability(
        "request_id",
        "names the request; a live one's name is taken",
        f"1 to {MAX_ID_CHARS} characters; drawn where unset",
    ),
    Capability("model", "must be the one that is served", "its name, or unset"),
    Capability("text", "the prompt, tokenised here", "what fits into max_seq_len tokens"),
    Capability("token_ids.ids", "the prompt as tokens", "0 to vocab_size - 1"),
    Capability(
        "chat.messages.role", "who speaks, for the model's template", "what the template knows"
    ),
    Capability("chat.messages.content", "what is said", "any text"),
    Capability("chat.messages.fields_json", "more fields of the message, for the template", _JSON),
    Capability("chat.tools_json", "tools that the template shows to the model", _JSON),
    Capability("chat.template_kwargs_json", "variables of the template", _JSON),
    Capability("chat.add_generation_prompt", "opens the model's turn", "true where unset"),
    Capability("sampling.temperature", "0 takes the likeliest token", _range("temperature")),
    Capability("sampling.top_k", "keeps the k likeliest tokens; 0 keeps all", _range("top_k")),
    Capability(
        "sampling.top_p",
        "keeps the likeliest tokens that reach this probability",
        f"above {_range('top_p')}",
    ),
    Capability(
        "sampling.min_p", "drops tokens below this share of the likeliest's", _range("min_p")
    ),
    Capability("sampling.seed", "the same seed gives the same tokens", _range("seed")),
    Capability("stopping.max_tokens", "ends the answer after so many", _range("max_tokens")),
    Capability("stopping.min_tokens", "holds end tokens back until then", _range("min_tokens")),
    Capability(
        "stopping.stop",
        "ends the answer before any of these texts",
        f"up to {MAX_STOP_STRINGS} of 1 to {MAX_STOP_CHARS} characters",
    ),
    Capability(
        "stopping.stop_token_ids", "ends the answer at any of these tokens", f"up to {MAX_STOP_IDS}"
    ),
    Capability("stopping.ignore_eos", "goes on after the model's end token", "false where unset"),
    Capability("output.text", "sends text", "true where unset"),
    Capability("output.token_ids", "sends token ids", "false where unset"),
    Capability("output.logprobs", "sends each token's log probability", "false where unset"),
    Capability("priority", "lower goes first", "-2^31 to 2^31 - 1"),
    Capability("use_prefix_cache", "reads and leaves cached prefixes", "true where unset"),
    Capability("resume.num_tokens", "goes on after so many tokens of the answer", "0 or more"),
    Capability("resume.num_text_bytes", "goes on after so much of its text", "0 or more"),
)


def markdown() -> str:
    """The table of the documentation."""
    rows = [f"| `{one.field}` | {one.effect} | {one.allowed} |" for one in CAPABILITIES]
    return "\n".join(["| field | effect | allowed |", "|---|---|---|", *rows])
