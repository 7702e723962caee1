"""What the terminal shows, from real terminal output."""

from __future__ import annotations

import io
import re
from dataclasses import replace

import pytest
import torch
from rich.console import Console

from megatron_dlm.generation.display import LiveView, print_comparison, print_text, printable
from megatron_dlm.generation.prompts import Prompt
from megatron_dlm.generation.texts import Text
from megatron_dlm.hf.load import load_model


@pytest.fixture
def model(models):
    return load_model(models["masked"])


def text(**changes) -> Text:
    fields = {
        "model": "runs/a", "prompt": "def ", "sample": 0, "text": "go\x1b[2J():", "tokens": [1, 2],
        "is_filled_template": False, "num_evaluations": 7, "batch_size": 1, "seconds": 0.5,
        "tokens_per_second": 4.0, "seed": 0,
    }  # fmt: skip
    return Text(**{**fields, **changes})


def shown(draw) -> str:
    console = Console(file=io.StringIO(), width=80, force_terminal=False)
    draw(console)
    return console.file.getvalue()


def test_texts_with_prompt_and_cost_and_nothing_that_moves_the_cursor():
    output = shown(lambda console: print_text(console, text()))
    assert "def go\ufffd[2J():\n" in output
    assert "2 tokens, 7 function evaluations, 0.50 s, 4.0 tokens/s\n" in output
    template = text(text="def go():", is_filled_template=True, batch_size=3)
    output = shown(lambda console: print_text(console, template))
    assert "\ndef go():\n" in output
    assert "tokens/s (batch of 3)" in output


def test_models_side_by_side():
    other = text(model="runs/b", text="stop():", num_evaluations=2)
    output = shown(lambda console: print_comparison(console, [text(), other]))
    header, row = (
        next(line for line in output.splitlines() if word in line) for word in ("runs/a", "stop")
    )
    assert "runs/b" in header
    assert "def go" in row
    assert "def stop():" in row


def test_printable_keeps_lines_and_letters():
    assert printable("a\tb\nä\x07\x1b") == "a\tb\nä\ufffd\ufffd"


def test_live_view_shows_hidden_new_and_known_tokens(model):
    tokenizer = model.tokenizer
    console = Console(
        file=io.StringIO(), width=60, height=10, force_terminal=True, color_system="standard"
    )
    prompt = Prompt("def ", tokenizer.encode("def "))
    first, second = tokenizer.encode("x")[-1], tokenizer.encode("y")[-1]
    mask = tokenizer.mask_id
    view = LiveView(console, model, pause_seconds=0.0)
    for new in ([mask, first, mask], [second, first, mask], [second, first, second]):
        view.watch(prompt, torch.tensor([*prompt.tokens, *new]))
    view.clear()
    output = console.file.getvalue()
    frames = re.split(r"step (\d), (\d) hidden", output)
    assert frames[1::3] == ["1", "2", "3", "3"]  # rich draws the last one again, then erases it
    assert frames[2::3] == ["2", "1", "0", "0"]
    dim, green, grey = "\x1b[2m", "\x1b[1;32m", "\x1b[90m"
    assert f"{dim}def \x1b[0m" in frames[0]
    assert f"{grey}░\x1b[0m{green}x\x1b[0m{grey}░" in frames[0]
    assert f"{green}y\x1b[0mx{grey}░" in frames[3]
    assert f"yx{green}y" in frames[6]


def test_live_view_of_a_long_text_shows_its_end(model):
    tokenizer = model.tokenizer
    console = Console(file=io.StringIO(), width=40, height=6, force_terminal=True)
    lines = tokenizer.encode("".join(f"line {number}\n" for number in range(20)))
    view = LiveView(console, model, pause_seconds=0.0)
    view.watch(Prompt("", []), torch.tensor(lines))
    view.clear()
    output = console.file.getvalue()
    assert "line 19" in output
    assert "line 3\n" not in output


def test_live_view_needs_a_terminal_and_text(model):
    with pytest.raises(ValueError, match="live needs a terminal"):
        LiveView(Console(file=io.StringIO()), model, pause_seconds=0.0)
    console = Console(file=io.StringIO(), force_terminal=True)
    with pytest.raises(ValueError, match="has no tokenizer"):
        LiveView(console, replace(model, tokenizer=None), pause_seconds=0.0)
