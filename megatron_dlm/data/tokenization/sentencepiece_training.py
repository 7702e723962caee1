"""Learn a SentencePiece vocabulary from text."""

from __future__ import annotations

import io
import random
import re
from collections.abc import Iterable, Iterator

import sentencepiece

from megatron_dlm.config.commands import TokenizerConfig
from megatron_dlm.data.tokenization.sentencepiece_model import normalize

# Ids of the reserved pieces; the mask follows them.
_PAD, _BOS, _EOD, _UNKNOWN = range(4)
# A longer line is learnt from in pieces; SentencePiece would drop it.
_SENTENCE_CHARACTERS = 2048


class SentenceSample:
    """A uniform sample of the lines of texts (reservoir, Vitter 1985, algorithm R)."""

    def __init__(self, max_sentences: int, seed: int) -> None:
        self.sentences: list[str] = []
        self._room, self._generator, self._num_seen = max_sentences, random.Random(seed), 0

    def add(self, text: str) -> None:
        for sentence in _sentences(text):
            self._num_seen += 1
            if len(self.sentences) < self._room:
                self.sentences.append(sentence)
            elif (place := self._generator.randrange(self._num_seen)) < self._room:
                self.sentences[place] = sentence


def _sentences(text: str) -> Iterator[str]:
    """Non-blank lines; newline and tab are pieces of their own, and never inside another."""
    for line in re.split(r"[\n\t]+", normalize(text).replace("\0", "")):
        if line.strip():
            for start in range(0, len(line), _SENTENCE_CHARACTERS):
                yield line[start : start + _SENTENCE_CHARACTERS]


def train_model(sentences: Iterable[str], config: TokenizerConfig) -> bytes:
    """The serialized model; its settings keep every blank, so that code survives a round trip.

    Raises ValueError where the text and `config.vocab_size` do not go together.
    """
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(sentences),
            model_writer=model,
            model_type=config.model_type,
            vocab_size=config.vocab_size,
            byte_fallback=config.byte_fallback,
            split_digits=config.split_digits,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            allow_whitespace_only_pieces=True,
            user_defined_symbols=["\n", "\t"],
            # Control pieces: no text is ever encoded to them, the mask least of all.
            control_symbols=[config.mask_token],
            pad_id=_PAD,
            bos_id=_BOS,
            eos_id=_EOD,
            unk_id=_UNKNOWN,
            pad_piece="<pad>",
            bos_piece="<bos>",
            eos_piece="<eod>",
            unk_piece="<unk>",
            max_sentence_length=4 * _SENTENCE_CHARACTERS,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise _explain(error, config) from None
    return model.getvalue()


def _explain(error: RuntimeError, config: TokenizerConfig) -> ValueError:
    """SentencePiece's size complaints in our words."""
    message = str(error)
    too_high = re.search(r"too high.*<= (\d+)", message)
    too_low = re.search(r"smaller than required_chars\. \d+ vs (\d+)", message)
    if too_high:
        return ValueError(
            f"vocab_size {config.vocab_size} is too large for this text, which supports at most "
            f"{too_high[1]}; lower vocab_size or give more text"
        )
    if too_low:
        return ValueError(
            f"vocab_size {config.vocab_size} is too small: bytes and single characters of this "
            f"text alone take {too_low[1]}; raise vocab_size"
        )
    return ValueError(f"SentencePiece could not train on this text: {message}")
