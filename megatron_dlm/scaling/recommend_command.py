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
from megatron_dlm.scaling.recommend_choice import choose_fitted, choose_published
from megatron_dlm.scaling.recommend_fitted import (
    SIZES,
    NamedFit,
    read_laws,
    recommend_fitted,
    size_laws,
    without_law,
)
from megatron_dlm.scaling.recommend_limits import within_reach
from megatron_dlm.scaling.recommend_published import recommend_autoregressive, recommend_diffusion
from megatron_dlm.scaling.recommend_tuning import tuned, tuning_law
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
    plans = _plans(config, question, laws)
    recommendations = [_answer(plan, laws) for plan in plans]
    missing, set_aside = without_law(laws), unused(laws, [plan.objective for plan in plans])
    choices = choose(question, recommendations, config.noise_type or "masked")
    content = {
        "question": asdict(question),
        "choices": [asdict(choice) for choice in choices],
        "recommendations": [asdict(each) for each in recommendations],
        "without_law": missing,
        "unused_laws": set_aside,
        "assumptions": assumptions(question),
    }
    text = json.dumps(content, indent=1, ensure_ascii=False) + "\n"
    if config.output is not None:
        write_whole(Path(config.output), text)
    if config.json:
        print(text, end="")
    else:
        _tell(question, recommendations, choices, [*missing, *set_aside])


def _plans(
    config: ScalingRecommendConfig, question: Question, laws: Sequence[NamedFit]
) -> list[Recommendation]:
    """Sizes by the files, and by papers for the other objectives."""
    plans = recommend_fitted(question, laws)
    if config.convention != "fine":  # no paper counts so
        own = {plan.objective for plan in plans}
        names = [config.noise_type] if config.noise_type else list(NOISE_TYPES)
        published = [recommend_autoregressive(question)]
        published += [recommend_diffusion(question, name) for name in names]
        plans += [plan for plan in published if plan.objective not in own]
    if not plans:
        raise ValueError(
            f"no law of {', '.join(config.laws)} recommends a size, and no paper counts FLOPs as "
            f"fine does; give a law {', '.join(SIZES)}, or another --convention"
        )
    return plans


def _answer(plan: Recommendation, laws: Sequence[NamedFit]) -> Recommendation:
    """With batch and rate, where the plan has a length; without what no law can say."""
    known = within_reach(plan)
    return within_reach(tuned(known, laws)) if "tokens" in known.numbers else known


def unused(laws: Sequence[NamedFit], objectives: Sequence[str]) -> list[str]:
    """A line for every law that no number rests on."""
    sizes = size_laws(laws)
    found = []
    for law in laws:
        if law.file.law in SIZES:
            before = sizes[law.name]
            if before is not law:
                found.append(f"{law.law}, of {law.name}, is not used: {before.law} stands before")
        elif all(tuning_law(laws, law.file.law, each) is not law for each in objectives):
            of_whom = law.label or "all runs"
            plans = ", ".join(objectives)
            found.append(f"{law.law}, of {of_whom}, is not used: no plan of {plans} needs it")
    return found


def choose(
    question: Question, recommendations: Sequence[Recommendation], noise: str
) -> list[Choice]:
    """By laws fitted to runs of one's own, then by the published crossings: where they can."""
    own = choose_fitted([each for each in recommendations if not each.is_published])
    found = [] if own is None else [own]
    if question.convention == "fine":
        return found
    return [*found, choose_published(question, recommend_diffusion(question, noise))]


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
    without_use: Sequence[str],
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
    if any(each.numbers for each in recommendations):
        console.print(_table(recommendations))
    for line in [*_sources(recommendations), *_notes(recommendations), *without_use]:
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
    return with_unit(number, digits=3)
