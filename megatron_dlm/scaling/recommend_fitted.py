"""Sizes and lengths by the files of `scaling fit`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_dlm.scaling.advice import Advice, Question, Recommendation, decades_outside
from megatron_dlm.scaling.bootstrap import Floats
from megatron_dlm.scaling.law_file import Fit, LawFile, read_law
from megatron_dlm.scaling.parametric_laws import LAWS
from megatron_dlm.scaling.recommend_plans import Bools, Plans

SIZES = ("overfitted", "repeated", "isoflop", "chinchilla")
"""Laws that recommend a size; those that know of repeated data stand before the others."""
_FRESH = ("isoflop", "chinchilla")
"""Laws that count a token that is seen again as a new one."""
_TAIL = 0.025
SLACK = 1.01
"""Epochs above those measured by this factor are still the same."""


@dataclass(frozen=True)
class NamedFit:
    """One law of one file."""

    file: LawFile
    fit: Fit
    path: str

    @property
    def label(self) -> str:
        """What it was fitted to: its label or the only objective; empty where that is all runs."""
        return self.fit.label or str(self.file.source.settings.get("only.objective") or "")

    @property
    def name(self) -> str:
        """Objective: the label, or the studies where it has none."""
        return self.label or ", ".join(self.file.source.studies) or Path(self.path).stem

    @property
    def law(self) -> str:
        """For the reader."""
        return f"{self.file.law} of {self.path}"

    @property
    def measured(self) -> str:
        """On what."""
        return f"{self.fit.num_runs} runs of {', '.join(self.file.source.studies)}"

    @property
    def measured_epochs(self) -> float:
        """The most epochs of a run; 1 where the tables do not say."""
        return max(self.fit.ranges.get("epochs", (1.0, 1.0))[1], 1.0)

    def outside(self, **values: float) -> float:
        """The largest distance of a value from its measured range, in decades."""
        ranges = self.fit.ranges
        known = [
            decades_outside(value, *ranges[name])
            for name, value in values.items()
            if name in ranges
        ]
        return max(known, default=0.0)


def read_laws(paths: Sequence[str], question: Question) -> list[NamedFit]:
    """All fits of the files.

    Raises ValueError for a file under another convention or of no use here, and for two laws that
    answer the same question.
    """
    found: dict[tuple[str, str], NamedFit] = {}
    for path in paths:
        file = read_law(Path(path))
        convention = file.source.convention
        if convention != question.convention and file.law in SIZES:
            raise ValueError(
                f"{path} counts FLOPs as {convention}, and --flops as {question.convention}; give "
                f"--convention {convention}, or fit the law with --convention {question.convention}"
            )
        if file.law == "power":
            raise ValueError(
                f"{path} is a power law of {file.source.settings.get('x')}, which recommends "
                "nothing; give laws isoflop, chinchilla, repeated, overfitted, batch or "
                "learning_rate"
            )
        for law in (NamedFit(file, fit, path) for fit in file.fits):
            of_whom = law.name if file.law in SIZES else law.label
            other = found.setdefault((file.law, of_whom), law)
            if other is not law:
                raise ValueError(
                    f"{path} and {other.path} both have a law {file.law} of "
                    f"{of_whom or 'all runs'}; give one of them, or fit them with --by or "
                    "--only.objective"
                )
    return list(found.values())


def without_law(laws: Sequence[NamedFit]) -> list[str]:
    """What the files say that they have no law of, a line for each."""
    reasons = {law.path: law.file.without_law for law in laws}
    return [
        f"{label}: no law in {path} ({reason})"
        for path, labels in reasons.items()
        for label, reason in labels.items()
    ]


def size_laws(laws: Sequence[NamedFit]) -> dict[str, NamedFit]:
    """Objective -> the law that recommends its size."""
    found: dict[str, NamedFit] = {}
    for kind in SIZES:
        for law in laws:
            if law.file.law == kind:
                found.setdefault(law.name, law)
    return found


def recommend_fitted(question: Question, laws: Sequence[NamedFit]) -> list[Recommendation]:
    """One for every objective that a law of sizes knows, without batch and rate."""
    return [
        _compute_optimal(question, law)
        if law.file.law == "isoflop"
        else _by_parametric(question, law)
        for law in size_laws(laws).values()
    ]


def _compute_optimal(question: Question, law: NamedFit) -> Recommendation:
    """By the power laws of compute."""
    compute = question.flops
    outside = law.outside(training_flops=compute)
    numbers = {}
    names = ("flops_per_token", "tokens", "parameters", "loss")
    for place, name in enumerate(names):
        drawn = law.fit.drawn[:, 2 * place] * compute ** law.fit.drawn[:, 2 * place + 1]
        value = law.fit[f"{name}_coefficient"] * compute ** law.fit[f"{name}_exponent"]
        numbers[name] = advice_of(law, value, drawn, outside)
    epochs = numbers["tokens"].value / question.unique_tokens
    numbers["epochs"] = advice_of(law, epochs, None, outside)
    return _recommendation(law, numbers, ())


def _by_parametric(question: Question, law: NamedFit) -> Recommendation:
    """The size and the epochs of the lowest loss that the FLOPs can pay."""
    plans = Plans(question.flops, question.unique_tokens, _cost(question, law))
    of_law = LAWS[law.file.law]()
    may_stop = law.file.law == "overfitted"  # the only one in which fewer tokens can be better
    theta = law.fit.theta
    (best,), (is_inside,) = plans.best(of_law, theta[None], may_stop=may_stop)
    if not is_inside:
        raise ValueError(
            f"{law.path}: the law of {law.name} has no best size at {question.flops:.3g} FLOPs; "
            "vary parameters and tokens of its runs apart, or give another law"
        )
    parameters, unique, epochs = (float(value) for value in np.exp(best))
    drawn_loss = np.exp(of_law.log_loss(law.fit.drawn, best[None])[0][:, 0])
    sizes, tokens, notes = _drawn_plans(*plans.best(of_law, law.fit.drawn, may_stop=may_stop))
    coefficient, exponent = plans.flops_per_token
    cost, used = coefficient * parameters**exponent, unique * epochs
    outside = law.outside(parameters=parameters, tokens=used, epochs=epochs, unique_tokens=unique)
    loss = float(np.exp(of_law.log_loss(theta, best[None])[0][0]))
    numbers = {
        "parameters": advice_of(law, parameters, sizes, outside),
        "flops_per_token": advice_of(law, cost, None, outside),
        "tokens": advice_of(law, used, tokens, outside),
        "epochs": advice_of(law, used / question.unique_tokens, None, outside),
        "loss": advice_of(law, loss, drawn_loss, outside),
    }
    if cost * used < 0.9 * question.flops:
        notes = (
            *notes,
            f"{cost * used:.3g} of {question.flops:.3g} FLOPs are of use: beyond, the loss rises "
            "again",
        )
    return _recommendation(law, numbers, notes)


def _cost(question: Question, law: NamedFit) -> tuple[float, float]:
    """FLOPs of a token in the parameters; ValueError for a law that recommends nothing."""
    if law.fit.flops_per_token is None:
        raise ValueError(
            f"{law.path} does not say what a token costs, as its tables lack the column; gather "
            "the study again with this version and fit anew"
        )
    if law.fit["alpha"] <= 0 or law.fit["beta"] <= 0:
        raise ValueError(
            f"{law.path}: alpha is {law.fit['alpha']:.3g} and beta {law.fit['beta']:.3g} for "
            f"{law.name}; a law that does not fall with size and data recommends nothing"
        )
    coefficient, exponent = law.fit.flops_per_token
    if not (exponent > 0 and 0 < coefficient < question.flops):
        raise ValueError(
            f"{law.path}: a token costs {coefficient:.3g} N^{exponent:.3g} of "
            f"{question.flops:.3g} FLOPs for {law.name}; a size needs a cost that grows with it "
            "and FLOPs that pay it"
        )
    return coefficient, exponent


def _drawn_plans(
    plans: Floats, is_inside: Bools
) -> tuple[Floats | None, Floats | None, tuple[str, ...]]:
    """Sizes and tokens of all resamples; neither, but a note, where too many have no best size."""
    share = 1 - is_inside.mean()
    if share >= _TAIL:
        note = f"{share:.0%} of the resamples have no best size: size and tokens have no interval"
        return None, None, (note,)
    return np.exp(plans[:, 0]), np.exp(plans[:, 1] + plans[:, 2]), ()


def _recommendation(
    law: NamedFit, numbers: dict[str, Advice], notes: tuple[str, ...]
) -> Recommendation:
    """Without the loss where data would be repeated and the law takes repeated data for fresh."""
    epochs, seen = numbers["epochs"].value, law.measured_epochs
    if law.file.law in _FRESH and epochs > seen * SLACK:
        numbers = {name: advice for name, advice in numbers.items() if name != "loss"}
        note = (
            f"no loss: the plan repeats the data {epochs:.3g} times and the law was measured on up "
            f"to {seen:.3g} epochs; it would be too low, and the size is a guess. Fit --law "
            "repeated or overfitted"
        )
        notes = (*notes, note)
    return Recommendation(law.name, numbers, notes, is_published=False, measured_epochs=seen)


def advice_of(law: NamedFit, value: float, drawn: Floats | None, outside: float) -> Advice:
    """A number of a law, with its interval where there are resamples [n] of it."""
    low, high = (None, None)
    if drawn is not None:
        low, high = (float(end) for end in np.quantile(drawn, [_TAIL, 1 - _TAIL]))
    return Advice(float(value), low, high, law.law, law.measured, outside)
