"""Tokens as text, as the pages and the terminal show them."""

from __future__ import annotations

from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from trm_audit.errors import BadInput
from trm_audit.report.decode import TokenText, token_text

TINY = Path(__file__).parents[1] / "sample_data" / "tiny" / "model"


def byte_level() -> TokenText:
    """A byte-level tokenizer as GPT-2's and Llama 3's are, of a few tokens; the last two halves of one character."""
    vocabulary = {"<eos>": 0, "Hi": 1, "Ġthere": 2, "Ċ": 3, "ðŁ": 4, "ĺĢ": 5}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<eos>"])
    return TokenText(tokenizer)


def sentencepiece() -> TokenText:
    """A tokenizer as Llama 2's and Mistral's are: the decoder drops the space of a text's first token."""
    tokenizer = Tokenizer(models.BPE(vocab={"▁a": 0, "b": 1, "<0x0A>": 2}, merges=[], byte_fallback=True))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return TokenText(tokenizer)


def test_byte_level_tokens_keep_their_spaces_and_line_breaks() -> None:
    text = byte_level()
    assert [text.text(i) for i in (1, 2, 3)] == ["Hi", " there", "\n"]


def test_half_a_character_is_shown_as_replacement() -> None:
    assert byte_level().text(4) == "\N{REPLACEMENT CHARACTER}"


def test_sentencepiece_tokens_keep_the_space_that_the_decoder_drops() -> None:
    text = sentencepiece()
    assert [text.text(i) for i in (0, 1, 2)] == [" a", "b", "\n"]


def test_special_tokens_are_shown_and_known_as_such() -> None:
    text = byte_level()
    assert (text.text(0), text.special(0), text.special(1)) == ("<eos>", True, False)


def test_an_id_beyond_the_vocabulary_is_shown_as_a_number() -> None:
    assert byte_level().text(999) == "[999]"


def test_retokenizing_gives_the_ids_of_the_same_text() -> None:
    text = token_text(TINY)
    assert text is not None
    ids = [7, 1, 4]
    assert text.retokenize(ids) == ids
    assert "".join(map(text.text, ids)) == "".join(map(text.text, text.retokenize(ids)))


def test_a_folder_without_a_tokenizer_has_none(tmp_path: Path) -> None:
    assert token_text(tmp_path) is None


def test_a_damaged_tokenizer_is_an_error_that_names_the_flag(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(BadInput, match=r"tokenizer\.json: cannot be read(.|\n)*--tokenizer"):
        token_text(tmp_path)
