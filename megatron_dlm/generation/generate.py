"""The `generate` command: texts from one model, or from several side by side."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TextIO

from rich.console import Console

from megatron_dlm.config.generation_commands import GenerateConfig, kinds_of_option
from megatron_dlm.generation.display import LiveView, print_comparison, print_text
from megatron_dlm.generation.hybrid_samplers import HybridDecoding
from megatron_dlm.generation.masked_samplers import MaskedDecoding, RevealOrder
from megatron_dlm.generation.prompts import read_prompts
from megatron_dlm.generation.samplers import TokenChoice
from megatron_dlm.generation.texts import Sampling, Text, generate_texts
from megatron_dlm.hf.load import LoadedModel, load_model
from megatron_dlm.runtime.device import choose_device


def generate(config: GenerateConfig) -> None:
    """Print texts for every prompt, and write them as JSON lines if asked to."""
    sampling_of(config)  # what contradicts itself does so whatever the model
    prompts = read_prompts(config)
    console = Console(highlight=False)
    with _output(config.output) as lines:
        if config.compare:
            _compare(config, prompts, console, lines)
            return
        for text in _texts(config, str(config.model), prompts, console):
            _write(lines, text)
            if config.output != "-":
                print_text(console, text)


def sampling_of(config: GenerateConfig) -> Sampling:
    """The options in the samplers' words; ValueError where they contradict each other."""
    decoding = MaskedDecoding(
        order=_order(config),
        num_steps=config.num_steps,
        block_size=config.block_size,
        threshold=config.threshold,
        guidance=config.guidance,
        cache=config.cache,
    )
    hybrid = HybridDecoding(
        method=config.method,
        num_steps=config.num_steps,
        schedule=config.schedule,
        prior=config.prior,
        tokens_per_step=config.tokens_per_step,
        patience=config.patience,
        correction_steps=config.correction_steps,
        correction_temperature=config.correction_temperature,
        correction_patience=config.correction_patience,
    )
    return Sampling(
        num_tokens=config.num_tokens,
        infill=config.infill,
        choice=TokenChoice(config.temperature, config.top_k, config.top_p),
        decoding=decoding,
        hybrid=hybrid,
        keeps_keys=config.cache != "none",
        stop=config.stop,
        seed=config.seed,
    )


def _order(config: GenerateConfig) -> RevealOrder:
    if config.order != "auto":
        return config.order
    if config.threshold is not None:
        return "low_confidence"
    return "first_hitting" if config.num_steps is None else "ancestral"


def _compare(
    config: GenerateConfig, prompts: Sequence[str], console: Console, lines: TextIO | None
) -> None:
    """One model after the other, so that only one has to fit; then prompt by prompt."""
    columns = []
    for path in config.compare:
        columns.append(list(_texts(config, path, prompts, console)))
        for text in columns[-1]:
            _write(lines, text)
    if config.output != "-":
        for row in zip(*columns, strict=True):
            print_comparison(console, row)


def _texts(
    config: GenerateConfig, path: str, prompts: Sequence[str], console: Console
) -> Iterator[Text]:
    dtype = None if config.precision == "checkpoint" else config.precision
    device = choose_device(config.device)
    model = load_model(path, device=device, dtype=dtype, step=config.step)
    if not config.compare:
        _refuse_options_of_others(config, model)
    pause_seconds = config.live_pause_seconds
    view = LiveView(console, model, pause_seconds=pause_seconds) if config.live else None
    try:
        for text in generate_texts(
            model,
            prompts,
            sampling_of(config.of_kind(model.objective_kind)),
            num_samples=config.num_samples,
            batch_size=config.batch_size if view is None else 1,
            watch=None if view is None else view.watch,
        ):
            if view is not None:
                view.clear()
            yield text
    finally:
        if view is not None:
            view.clear()  # an interruption must not leave the terminal without a cursor


def _refuse_options_of_others(config: GenerateConfig, model: LoadedModel) -> None:
    kind = model.objective_kind
    for name, value in config.foreign_options(kind).items():
        kinds = " and ".join(kinds_of_option(name))
        raise ValueError(
            f"{name} is {value}, which is for {kinds} models; {model.source} is {kind}: "
            f"remove {name}"
        )


@contextmanager
def _output(path: str | None) -> Iterator[TextIO | None]:
    """Where JSON lines go: nowhere, to standard output, or to a file, opened before any work."""
    if path is None or path == "-":
        yield None if path is None else sys.stdout
        return
    with Path(path).open("w", encoding="utf-8") as stream:
        yield stream


def _write(lines: TextIO | None, text: Text) -> None:
    if lines is not None:
        print(json.dumps(asdict(text), ensure_ascii=False), file=lines, flush=True)
