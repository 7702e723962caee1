"""Texts in a terminal: one below the other, models side by side, and tokens as they appear."""

from __future__ import annotations

import time
from collections.abc import Sequence
from itertools import groupby

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text as Styled
from torch import Tensor

from megatron_dlm.generation.prompts import Prompt
from megatron_dlm.generation.texts import Text
from megatron_dlm.hf.load import LoadedModel

_GIVEN, _OLD, _NEW, _HIDDEN = "dim", "", "bold green", "bright_black"
_HIDDEN_MARK = "░"


def printable(text: str) -> str:
    """The text without what would reprogram a terminal: a young model emits any byte."""
    return "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in text)


def print_text(console: Console, text: Text) -> None:
    """One text behind its prompt, then what it cost."""
    console.rule(style="dim")
    console.print(styled(text), soft_wrap=True)
    console.print(cost(text), style="dim")


def print_comparison(console: Console, texts: Sequence[Text]) -> None:
    """Texts of one prompt, a column per model."""
    table = Table(expand=True, show_lines=True)
    for text in texts:
        table.add_column(text.model, ratio=1, overflow="fold")
    table.add_row(*(styled(text) for text in texts))
    table.add_row(*(Styled(cost(text), style="dim") for text in texts))
    console.print(table)


def styled(text: Text) -> Styled:
    """The prompt, dim, and the text; a filled template alone."""
    shown = Styled()
    if not text.is_filled_template:
        shown.append(printable(text.prompt), style=_GIVEN)
    return shown.append(printable(text.text))


def cost(text: Text) -> str:
    """Tokens, time, speed and forward passes in one line."""
    of_batch = "" if text.batch_size == 1 else f" (batch of {text.batch_size})"
    return (
        f"{len(text.tokens)} tokens, {text.num_evaluations} function evaluations, "
        f"{text.seconds:.2f} s, {text.tokens_per_second:.1f} tokens/s{of_batch}"
    )


class LiveView:
    """Draws one text again after every step: what is new, what was there, what is hidden."""

    def __init__(self, console: Console, model: LoadedModel, *, pause_seconds: float) -> None:
        if not console.is_terminal:
            raise ValueError("live needs a terminal to draw in; leave it out")
        if model.tokenizer is None:
            raise ValueError(f"{model.source} has no tokenizer; text needs one")
        self._console, self._tokenizer = console, model.tokenizer
        self._mask_id = model.mask_token_id
        self._pause_seconds = pause_seconds
        self._live: Live | None = None
        self._before: list[int] = []
        self._num_steps = 0

    def watch(self, prompt: Prompt, tokens: Tensor) -> None:
        """Draw the tokens (int64 [s]) of a prompt; those of another step stand out."""
        now = tokens.tolist()
        if self._live is None:
            self._live = Live(console=self._console, auto_refresh=False, transient=True)
            self._live.start()
        self._num_steps += 1
        self._live.update(self._drawing(prompt, now), refresh=True)
        self._before = now
        time.sleep(self._pause_seconds)

    def clear(self) -> None:
        """Take the drawing away: the text is complete and can be printed."""
        if self._live is not None:
            self._live.stop()
        self._live, self._before, self._num_steps = None, [], 0

    def _drawing(self, prompt: Prompt, now: list[int]) -> Styled:
        drawing = Styled()
        place = 0
        for style, run in groupby(self._styles(prompt, now)):
            length = len(list(run))
            part = now[place : place + length]
            hidden = style == _HIDDEN
            shown = _HIDDEN_MARK * length if hidden else printable(self._tokenizer.decode(part))
            drawing.append(shown, style=style)
            place += length
        num_hidden = now.count(-1 if self._mask_id is None else self._mask_id)
        lines = list(drawing.wrap(self._console, self._console.width))
        # What does not fit into the window is left out at the top: new text is mostly below.
        lines = lines[-max(1, self._console.height - 2) :]
        lines.append(Styled(f"step {self._num_steps}, {num_hidden} hidden", style="dim"))
        return Styled("\n").join(lines)

    def _styles(self, prompt: Prompt, now: list[int]) -> list[str]:
        """Of every token: given, known before this step, new, or hidden."""
        styles = []
        for place, token in enumerate(now):
            given = place < len(prompt.tokens) and prompt.tokens[place] != self._mask_id
            before = self._before[place] if place < len(self._before) else self._mask_id
            if token == self._mask_id:
                styles.append(_HIDDEN)
            elif given:
                styles.append(_GIVEN)
            else:
                styles.append(_OLD if token == before else _NEW)
        return styles
