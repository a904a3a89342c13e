"""A model's tokenizer: text to token ids and back, whole or as a stream, and chats."""

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

import tokenizers

from jaxinfer.errors import CheckpointError, InvalidRequest
from jaxinfer.text import chat
from jaxinfer.text.assets import TextAssets, check_unicode
from jaxinfer.text.pieces import PieceTable, join_rule
from jaxinfer.text.stream import TextStream


class Tokenizer:
    """Frozen after it is built; safe to use from many threads."""

    __slots__ = (
        "_hf",
        "_pieces",
        "_pieces_without_special",
        "assets",
        "bos_token_id",
        "eos_token_id",
        "vocab_size",
    )

    def __init__(self, assets: TextAssets) -> None:
        """Raises CheckpointError on a damaged JSON, UnsupportedModel on an unknown decoder."""
        self.assets = assets
        self._hf = _read(assets.tokenizer_json)
        self.vocab_size: int = 1 + max(self._hf.get_vocab().values(), default=-1)
        """One above the highest token id; a model's own vocabulary may be padded beyond it."""
        self.bos_token_id: int | None = self._id_or_none(assets.bos_token)
        self.eos_token_id: int | None = self._id_or_none(assets.eos_token)
        if assets.add_bos and self.bos_token_id is None:
            raise CheckpointError(
                f"texts must begin with bos_token, but it is {assets.bos_token!r}, "
                "which the tokenizer's vocabulary lacks"
            )
        rule = join_rule(self._hf)
        added = self._hf.get_added_tokens_decoder()
        special = frozenset(token_id for token_id, token in added.items() if token.special)
        self._pieces = PieceTable(self._hf, rule=rule)
        self._pieces_without_special = PieceTable(self._hf, rule=rule, skip=special)

    def encode(self, text: str, *, add_special: bool = True) -> list[int]:
        """The token ids of a text; a special token's name in the text becomes that token."""
        check_unicode(text, field="text")
        # A batch of one: only a batch lets other threads run meanwhile.
        (found,) = self._hf.encode_batch([text], add_special_tokens=add_special)
        return self._finish(found, add_special)

    def encode_batch(self, texts: Sequence[str], *, add_special: bool = True) -> list[list[int]]:
        """The token ids of many texts, each as if it were alone."""
        for text in texts:
            check_unicode(text, field="text")
        found = self._hf.encode_batch(texts, add_special_tokens=add_special)
        return [self._finish(encoding, add_special) for encoding in found]

    def decode(self, ids: Sequence[int], *, skip_special: bool = True) -> str:
        """The text of these tokens; each damaged part of UTF-8 becomes one U+FFFD."""
        for place, token_id in enumerate(ids):
            if not 0 <= token_id < self.vocab_size:
                raise InvalidRequest(
                    f"token_ids[{place}] is {token_id}; token ids of this tokenizer go from 0 to "
                    f"{self.vocab_size - 1}",
                    field="token_ids",
                )
        return (self._pieces_without_special if skip_special else self._pieces).text(ids)

    def stream(
        self,
        prompt_tail: Sequence[int] = (),
        *,
        stop: Sequence[str] = (),
        skip_special: bool = True,
    ) -> TextStream:
        """A stream of the text that follows `prompt_tail`: the prompt, or its last tokens.

        Give it the whole prompt if at hand: only as much as matters is looked at.
        """
        pieces = self._pieces_without_special if skip_special else self._pieces
        return TextStream(pieces, prompt_tail=prompt_tail, stop=stop)

    def token_id(self, token: str) -> int | None:
        """The id of one token by its exact name; None where there is none."""
        return self._hf.token_to_id(token)

    def token(self, token_id: int) -> str | None:
        """The exact name of one token; None where there is none."""
        return self._hf.id_to_token(token_id) if 0 <= token_id < self.vocab_size else None

    def render_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        now: datetime | None = None,
        **kwargs: Any,
    ) -> str:
        """The prompt that the model's chat template makes of messages.

        `kwargs` are further variables of the template; `now` is the time that a template sees
        (by default the wall clock, which only some templates ask for).
        """
        return chat.render(
            self.assets,
            messages,
            tools=tools,
            add_generation_prompt=add_generation_prompt,
            now=now,
            variables=kwargs,
        )

    def encode_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        now: datetime | None = None,
        **kwargs: Any,
    ) -> list[int]:
        """The token ids of a rendered chat; the template writes the special tokens itself."""
        text = self.render_chat(
            messages, tools=tools, add_generation_prompt=add_generation_prompt, now=now, **kwargs
        )
        return self.encode(text, add_special=False)

    def _id_or_none(self, token: str | None) -> int | None:
        return None if token is None else self.token_id(token)

    def _finish(self, encoding: tokenizers.Encoding, add_special: bool) -> list[int]:
        if add_special and self.assets.add_bos and self.bos_token_id is not None:
            return [self.bos_token_id, *encoding.ids]
        return encoding.ids


def _read(tokenizer_json: str) -> tokenizers.Tokenizer:
    try:
        # from_str raises a bare Exception, from_buffer a ValueError that can be told apart.
        tokenizer = tokenizers.Tokenizer.from_buffer(tokenizer_json.encode())
    except ValueError as error:
        raise CheckpointError(f"tokenizer.json can't be read: {error}") from error
    # A JSON may carry the padding and truncation of somebody's training run.
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer
