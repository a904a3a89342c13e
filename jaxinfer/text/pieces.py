"""What each token adds to a text, read once from a tokenizer's decoder.

A text is the join of its tokens' bytes, so that a stream can be exactly the text of the whole:
bytes that are no UTF-8 become one U+FFFD for each damaged part. The `tokenizers` library agrees
wherever the bytes are valid; where byte-fallback tokens aren't, it replaces the whole run of them.
"""

import codecs
import json
import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import tokenizers

from jaxinfer.errors import UnsupportedModel

BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class Piece(NamedTuple):
    """What one token adds; `text` is None where its bytes alone are no whole text."""

    data: bytes
    text: str | None
    skipped: bool = False


SKIPPED = Piece(b"", "", skipped=True)


class JoinRule(NamedTuple):
    """How the tokens of one vocabulary become text: a decoder's JSON as plain fields."""

    byte_level: bool = False  # each character of a token stands for one byte
    byte_fallback: bool = False  # <0x0A> is the byte 10
    replace: tuple[tuple[str, str], ...] = ()
    drop_from_first: str = ""  # a mark that vanishes from the first token
    prefix: str = ""  # before every token
    strip: str = ""  # a character to take from the start of the text ...
    num_strip: int = 0  # ... at most this many times


class PieceTable(dict[int, Piece]):
    """The piece of every token id, found when first asked for; an id without a token is skipped."""

    def __init__(
        self, tokenizer: tokenizers.Tokenizer, *, rule: JoinRule, skip: frozenset[int] = frozenset()
    ) -> None:
        super().__init__()
        self.rule = rule
        self._tokenizer = tokenizer
        self._skip = skip

    def __missing__(self, token_id: int) -> Piece:
        piece = self._make(token_id, self.rule)
        self[token_id] = piece
        return piece

    def first(self, token_id: int) -> Piece:
        """The piece of a token that no other precedes."""
        mark = self.rule.drop_from_first
        if not mark:
            return self[token_id]
        return self._make(token_id, self.rule._replace(replace=((mark, ""), *self.rule.replace)))

    def text(self, token_ids: Iterable[int]) -> str:
        """The whole text of these tokens."""
        kept = [token_id for token_id in token_ids if not self[token_id].skipped]
        if not kept:
            return ""
        data = self.first(kept[0]).data + b"".join([self[token_id].data for token_id in kept[1:]])
        text = data.decode("utf-8", "replace")
        return text[num_stripped(text, self.rule.strip, self.rule.num_strip) :]

    def _make(self, token_id: int, rule: JoinRule) -> Piece:
        token = self._tokenizer.id_to_token(token_id)
        if token is None or token_id in self._skip:
            return SKIPPED
        data = _bytes_of(token, rule)
        text, used = codecs.utf_8_decode(data, "replace", False)
        whole = used == len(data) and text.encode() == data
        return Piece(data, text if whole else None)


def num_stripped(text: str, strip: str, limit: int) -> int:
    """How many of the text's first characters, up to `limit`, are `strip`."""
    count = 0
    while count < min(limit, len(text)) and text[count] == strip:
        count += 1
    return count


def join_rule(tokenizer: tokenizers.Tokenizer) -> JoinRule:
    """Reads a tokenizer's decoder; raises UnsupportedModel on one that isn't a join of tokens."""
    if tokenizer.decoder is None:
        return JoinRule(prefix=" ", strip=" ", num_strip=1)
    # What pickle stores of a decoder is its JSON; nothing else gives it without the vocabulary.
    decoder = json.loads(tokenizer.decoder.__getstate__())
    rule = JoinRule()
    fused = False
    for step in _steps(decoder):
        match step:
            case {"type": "ByteLevel"} if rule == JoinRule():
                rule = rule._replace(byte_level=True)
            case {"type": "ByteFallback"} if not fused and not rule.byte_level:
                rule = rule._replace(byte_fallback=True)
            case {"type": "Replace", "pattern": {"String": str(old)}, "content": str(new)} if (
                not fused and not rule.byte_fallback and not rule.byte_level
            ):
                rule = rule._replace(replace=(*rule.replace, (old, new)))
            case {"type": "Metaspace", "replacement": str(mark)} if not fused:
                dropped = "" if step["prepend_scheme"] == "never" else mark
                replace = (*rule.replace, (mark, " "))
                rule = rule._replace(replace=replace, drop_from_first=dropped)
            case {"type": "Fuse"}:
                fused = True
            case {"type": "Strip", "content": str(char), "start": int(count), "stop": 0} if fused:
                rule = rule._replace(strip=char, num_strip=count)
            case _:
                raise UnsupportedModel(
                    f"the tokenizer's decoder has the step {json.dumps(step)} here: "
                    f"{json.dumps(decoder)}; jaxinfer reads ByteLevel, and Replace or Metaspace, "
                    "ByteFallback, Fuse, Strip (of the start) in this order"
                )
    return rule


def _steps(decoder: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The decoder's steps, nested sequences laid flat."""
    if decoder["type"] != "Sequence":
        return [decoder]
    return [step for inner in decoder["decoders"] for step in _steps(inner)]


def _bytes_of(token: str, rule: JoinRule) -> bytes:
    if rule.byte_level:
        if not BYTE_OF.keys() >= set(token):
            return token.encode()  # an added token with characters that stand for no byte
        return bytes(map(BYTE_OF.__getitem__, token))
    for old, new in rule.replace:
        token = token.replace(old, new)
    match = BYTE_TOKEN.fullmatch(token) if rule.byte_fallback else None
    return bytes([int(match[1], 16)]) if match else (rule.prefix + token).encode()


def _byte_chars() -> dict[str, int]:
    """GPT-2's alphabet: a printable byte is itself, the others follow from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    chars = {chr(byte): byte for byte in printable}
    return chars | {chr(0x100 + place): byte for place, byte in enumerate(others)}


BYTE_OF = _byte_chars()
