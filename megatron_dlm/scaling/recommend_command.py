"""`scaling recommend`: what to train with so much data and compute."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from megatron_dlm.config.scaling_commands import ScalingRecommendConfig
from megatron_dlm.runtime.files import write_whole
from megatron_dlm.scaling.advice import Advice, Choice, Question, Recommendation
from megatron_dlm.scaling.published import NOISE_TYPES
from megatron_dlm.scaling.recommend_fitted import (
    choose_fitted,
    read_laws,
    recommend_fitted,
    without_law,
)
from megatron_dlm.scaling.recommend_published import (
    choose_published,
    recommend_autoregressive,
    recommend_diffusion,
    tuning,
)
from megatron_dlm.scaling.short_numbers import with_unit

_ROWS = {
    "parameters": "parameters",
    "flops_per_token": "FLOPs per token",
    "tokens": "tokens",
    "epochs": "epochs",
    "batch_tokens": "batch, tokens",
    "steps": "steps",
    "learning_rate": "learning rate",
    "loss": "loss, nats per token",
}
_FAR_DECADES = 0.05


def recommend_scaling(config: ScalingRecommendConfig) -> None:
    """Print the recommendations; ValueError for a law that cannot be used."""
    question = Question(config.unique_tokens, config.flops, config.convention, config.seq_length)
    laws = read_laws(config.laws, question)
    fitted = recommend_fitted(question, laws)
    recommendations = [_filled(each) for each in fitted]
    if config.convention != "fine":  # no paper counts so
        own = {each.objective for each in recommendations}
        names = [config.noise_type] if config.noise_type else list(NOISE_TYPES)
        published = [recommend_autoregressive(question)]
        published += [recommend_diffusion(question, name) for name in names]
        recommendations += [each for each in published if each.objective not in own]
    choices = choose(question, recommendations)
    content = {
        "question": asdict(question),
        "choices": [asdict(choice) for choice in choices],
        "recommendations": [asdict(each) for each in recommendations],
        "without_law": without_law(laws),
        "assumptions": assumptions(question),
    }
    text = json.dumps(content, indent=1, ensure_ascii=False) + "\n"
    if config.output is not None:
        write_whole(Path(config.output), text)
    if config.json:
        print(text, end="")
    else:
        _tell(question, recommendations, choices, without_law(laws))


def _filled(recommendation: Recommendation) -> Recommendation:
    """With the published batch and rate where no file had a law of them."""
    numbers = recommendation.numbers
    if "learning_rate" in numbers:
        return recommendation
    batch = numbers.get("batch_tokens")
    known = tuning(numbers["tokens"].value, None if batch is None else batch.value)
    return recommendation.with_numbers(known)


def choose(question: Question, recommendations: Sequence[Recommendation]) -> list[Choice]:
    """By laws fitted to runs of one's own, then by the published crossings: where they can."""
    by_name = {each.objective: each for each in recommendations if each.is_published}
    own = choose_fitted([each for each in recommendations if not each.is_published])
    found = [] if own is None else [own]
    if question.convention == "fine":
        return found
    noise = next((name for name in NOISE_TYPES if name in by_name), "masked")
    autoregressive = by_name.get("ar") or recommend_autoregressive(question)
    diffusion = by_name.get(noise) or recommend_diffusion(question, noise)
    return [*found, choose_published(question, diffusion, autoregressive)]


def assumptions(question: Question) -> list[str]:
    """What every number of a paper takes for granted here."""
    return [
        f"{question.flops:.4g} FLOPs count as {question.convention}",
        "parameters are those without embeddings; papers that count all of them (Quokka, SDL, "
        "Chinchilla) are read as if embeddings were nothing, some 9 % at 1B",
        "shapes are those of SBD's grid (P = 12 L d^2), which turn FLOPs per token into parameters",
        f"attention over {question.seq_length} tokens counts where the convention has it; SBD's "
        "laws were measured at 2048",
        "web text of the papers; losses of another text or tokenizer differ",
        "SBD: Scaling Behavior of Discrete Diffusion Language Models; SDL: Diffusion Language "
        "Models are Super Data Learners; Quokka: Training Optimal Large Diffusion Language Models",
    ]


def _tell(
    question: Question,
    recommendations: Sequence[Recommendation],
    choices: Sequence[Choice],
    missing: Sequence[str],
) -> None:
    console = Console()
    console.print(
        f"{question.unique_tokens:.4g} unique tokens, {question.flops:.4g} training FLOPs "
        f"({question.convention})",
        highlight=False,
    )
    for choice in choices:
        verdict = choice.objective or "undecided: run both"
        console.print(f"[bold]objective: {escape(verdict)}[/bold]", highlight=False)
        for reason in choice.reasons:
            console.print(f"  {escape(reason)}", highlight=False, soft_wrap=True)
    console.print(_table(recommendations))
    for line in [*_sources(recommendations), *_notes(recommendations), *missing]:
        console.print(escape(line), highlight=False, soft_wrap=True)
    console.print("Assumed:", style="dim", highlight=False)
    for line in assumptions(question):
        console.print(f"  {escape(line)}", style="dim", highlight=False, soft_wrap=True)


def _table(recommendations: Sequence[Recommendation]) -> Table:
    """A column per objective; 95 % intervals under the numbers that have one."""
    table = Table()
    table.add_column("")
    for each in recommendations:
        table.add_column(escape(each.objective), justify="right")
    for name, title in _ROWS.items():
        found = [each.numbers.get(name) for each in recommendations]
        if any(found):
            table.add_row(title, *(_cell(advice) for advice in found))
    return table


def _cell(advice: Advice | None) -> str:
    if advice is None:
        return "-"
    mark = "*" if advice.decades > _FAR_DECADES else ""
    text = f"{_short(advice.value)}{mark}"
    if advice.low is not None and advice.high is not None:
        text += f"\n{_short(advice.low)} to {_short(advice.high)}"
    return text


def _sources(recommendations: Sequence[Recommendation]) -> list[str]:
    """A line per law: what it says of whom, on what it was measured, how far away that is."""
    names: dict[tuple[str, str], dict[str, None]] = {}
    objectives: dict[tuple[str, str], dict[str, None]] = {}
    decades: dict[tuple[str, str], float] = {}
    for each in recommendations:
        for name, advice in each.numbers.items():
            law = (advice.law, advice.measured)
            names.setdefault(law, {})[_ROWS[name].split(",")[0]] = None
            objectives.setdefault(law, {})[each.objective] = None
            decades[law] = max(decades.get(law, 0.0), advice.decades)
    lines = []
    for law, numbers in names.items():
        far = decades[law]
        mark = f"; * extrapolated by {far:.1f} decades" if far > _FAR_DECADES else ""
        of_whom = ", ".join(objectives[law])
        lines.append(f"{', '.join(numbers)} of {of_whom}: {law[0]}; measured on {law[1]}{mark}")
    return lines


def _notes(recommendations: Sequence[Recommendation]) -> list[str]:
    """Every note once, with the objectives that it is about."""
    objectives: dict[str, list[str]] = {}
    for each in recommendations:
        for note in each.notes:
            objectives.setdefault(note, []).append(each.objective)
    return [f"{', '.join(names)}: {note}" for note, names in objectives.items()]


def _short(number: float) -> str:
    return with_unit(number, digits=3, below=1e15)
