"""Text of token ids, from the `tokenizer.json` of a checkpoint: without torch, without transformers, without code."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from trm_audit.errors import BadInput

TOKENIZER_FILE = "tokenizer.json"


class TokenText:
    """What token ids say, and what the same text would be tokenized to."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        added = tokenizer.get_added_tokens_decoder()
        self._special = {number for number, token in added.items() if token.special}
        self._text = lru_cache(maxsize=None)(self._decode)

    def text(self, token: int) -> str:
        """Text of one token id, leading space included; bytes that are no whole character are replacement characters.

        An id that the tokenizer does not know reads `[id]`.
        """
        return self._text(token)

    def retokenize(self, ids: Sequence[int]) -> list[int]:
        """Ids of the text that `ids` decode to, special tokens kept as text."""
        text = self._tokenizer.decode(list(ids), skip_special_tokens=False)
        return list(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def special(self, token: int) -> bool:
        """Whether the id is a special token (end of sequence, roles of a chat)."""
        return token in self._special

    def _decode(self, token: int) -> str:
        piece = self._tokenizer.id_to_token(token)
        if piece is None:
            return f"[{token}]"
        # Decoders drop the space at the start of a text: between two others the token keeps it.
        alone: str = self._tokenizer.decode([token], skip_special_tokens=False)
        spaced = piece.startswith(("▁", "Ġ")) and not alone.startswith(" ")
        return f" {alone}" if spaced else alone or piece


def token_text(folder: Path) -> TokenText | None:
    """The tokenizer of a checkpoint folder, None where it has no `tokenizer.json`.

    Raises:
        BadInput: the file cannot be read as a tokenizer.
    """
    file = folder / TOKENIZER_FILE
    if not file.is_file():
        return None
    from tokenizers import Tokenizer

    try:
        return TokenText(Tokenizer.from_file(str(file)))
    except Exception as error:
        raise BadInput(
            f"cannot be read as a tokenizer: {error}",
            place=str(file),
            next_step="Name another folder with --tokenizer, or none for token ids.",
        ) from error
