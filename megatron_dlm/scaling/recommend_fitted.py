"""Recommendations by the files of `scaling fit`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_dlm.scaling.advice import Advice, Choice, Question, Recommendation, decades_outside
from megatron_dlm.scaling.bootstrap import Floats
from megatron_dlm.scaling.law_file import Fit, LawFile, read_law
from megatron_dlm.scaling.parametric_laws import LAWS

_SIZES_BEYOND = 30.0
"""Sizes are searched up to so many times beyond those measured."""
_NUM_SIZES = 200
_NUM_EPOCHS = 80


@dataclass(frozen=True)
class NamedFit:
    """One law of one file."""

    file: LawFile
    fit: Fit
    name: str
    """Objective: the label of the fit, or the study where it has none."""
    path: str

    @property
    def law(self) -> str:
        """For the reader."""
        return f"{self.file.law} of {self.path}"

    @property
    def measured(self) -> str:
        """On what."""
        return f"{self.fit.num_runs} runs of {', '.join(self.file.source.studies)}"

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
    """All fits of the files; ValueError for a file under another convention, or of no use here."""
    found = []
    for path in paths:
        file = read_law(Path(path))
        convention = file.source.convention
        if convention != question.convention and file.law not in ("batch", "learning_rate"):
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
        study = ", ".join(file.source.studies) or Path(path).stem
        found += [NamedFit(file, fit, fit.label or study, path) for fit in file.fits]
    return found


def without_law(laws: Sequence[NamedFit]) -> list[str]:
    """What the files say that they have no law of, a line for each."""
    reasons = {law.path: law.file.without_law for law in laws}
    return [
        f"{label}: no law in {path} ({reason})"
        for path, labels in reasons.items()
        for label, reason in labels.items()
    ]


def recommend_fitted(question: Question, laws: Sequence[NamedFit]) -> list[Recommendation]:
    """One for every objective that a law of sizes knows, with batch and rate where known."""
    found: dict[str, Recommendation] = {}
    for law in laws:
        if law.file.law == "isoflop":
            found.setdefault(law.name, _compute_optimal(question, law))
    for law in laws:
        if law.file.law in LAWS:
            of_law = _by_parametric(question, law)
            # It knows of repetition what a law of fresh data does not.
            if law.name not in found or law.file.law != "chinchilla":
                found[law.name] = of_law
    return [_tuned(recommendation, laws) for recommendation in found.values()]


def choose_fitted(recommendations: Sequence[Recommendation]) -> Choice | None:
    """The lowest expected loss, where intervals do not overlap; None with fewer than two losses."""
    known = [each for each in recommendations if "loss" in each.numbers]
    if len(known) < 2:
        return None
    first, second = sorted(known, key=lambda each: each.numbers["loss"].value)[:2]
    low, high = first.numbers["loss"], second.numbers["loss"]
    assert low.high is not None
    assert high.low is not None
    reasons = [
        f"expected loss {low.value:.4g} ({low.low:.4g} to {low.high:.4g}) of {first.objective} "
        f"against {high.value:.4g} ({high.low:.4g} to {high.high:.4g}) of {second.objective}",
        "the loss of diffusion is a bound: where it is the lower one diffusion is better, the "
        "other way round need not hold",
    ]
    is_clear = low.high < high.low
    if not is_clear:
        reasons.append("the intervals overlap")
    return Choice(first.objective if is_clear else None, tuple(reasons))


def _compute_optimal(question: Question, law: NamedFit) -> Recommendation:
    """By the power laws of compute."""
    compute = question.flops
    outside = law.outside(training_flops=compute)
    numbers = {}
    names = ("flops_per_token", "tokens", "parameters", "loss")
    for place, name in enumerate(names):
        drawn = law.fit.drawn[:, 2 * place] * compute ** law.fit.drawn[:, 2 * place + 1]
        value = law.fit[f"{name}_coefficient"] * compute ** law.fit[f"{name}_exponent"]
        numbers[name] = _advice(law, value, drawn, outside)
    tokens = numbers["tokens"]
    unique = question.unique_tokens
    numbers["epochs"] = _advice(law, tokens.value / unique, None, outside)
    notes = []
    _, seen = law.fit.ranges.get("epochs", (1.0, 1.0))
    if tokens.value > unique * max(seen, 1.0) * 1.01:
        notes.append(
            f"the plan repeats the data {tokens.value / unique:.3g} times and the law was measured "
            f"on up to {seen:.3g} epochs: the loss will be higher; fit --law repeated or overfitted"
        )
    return Recommendation(law.name, numbers, tuple(notes), is_published=False)


def _by_parametric(question: Question, law: NamedFit) -> Recommendation:
    """The size and the epochs of the lowest loss that the FLOPs can pay."""
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
    plans = _plans(question, law)
    of_law = LAWS[law.file.law]()
    theta = law.fit.theta
    best = int(of_law.log_loss(theta, plans)[0].argmin())
    parameters, unique, epochs = (float(value) for value in np.exp(plans[best]))
    drawn_loss = np.exp(of_law.log_loss(law.fit.drawn, plans[best : best + 1])[0][:, 0])
    # One by one: all plans of all resamples at once would be gigabytes.
    places = [int(of_law.log_loss(row, plans)[0].argmin()) for row in law.fit.drawn[:200]]
    drawn_plans = np.exp(plans[places])
    tokens = unique * epochs
    coefficient, exponent = law.fit.flops_per_token
    cost = coefficient * parameters**exponent
    outside = law.outside(parameters=parameters, tokens=tokens, epochs=epochs, unique_tokens=unique)
    loss = float(np.exp(of_law.log_loss(theta, plans)[0][best]))
    numbers = {
        "parameters": _advice(law, parameters, drawn_plans[:, 0], outside),
        "flops_per_token": _advice(law, cost, None, outside),
        "tokens": _advice(law, tokens, drawn_plans[:, 1] * drawn_plans[:, 2], outside),
        "epochs": _advice(law, tokens / question.unique_tokens, None, outside),
        "loss": _advice(law, loss, drawn_loss, outside),
    }
    used = cost * tokens
    notes = []
    if used < 0.9 * question.flops:
        notes.append(
            f"{used:.3g} of {question.flops:.3g} FLOPs are of use: beyond, the loss rises again"
        )
    return Recommendation(law.name, numbers, tuple(notes), is_published=False)


def _plans(question: Question, law: NamedFit) -> Floats:
    """[n, 3]: logarithms of parameters, unique tokens and epochs that the FLOPs can pay."""
    assert law.fit.flops_per_token is not None
    coefficient, exponent = law.fit.flops_per_token
    low, high = law.fit.ranges["parameters"]
    sizes = np.geomspace(low / _SIZES_BEYOND, high * _SIZES_BEYOND, _NUM_SIZES)
    most = question.flops / (coefficient * sizes**exponent)
    shares = np.array([1.0])
    if law.file.law == "overfitted":  # the only one in which fewer tokens can be better
        shares = np.geomspace(1.0, 1e-4, _NUM_EPOCHS)
    tokens = most[:, None] * shares
    unique = np.minimum(tokens, question.unique_tokens)
    columns = (np.broadcast_to(sizes[:, None], tokens.shape), unique, tokens / unique)
    plans: Floats = np.log(np.stack([column.ravel() for column in columns], axis=1))
    return plans


def _tuned(recommendation: Recommendation, laws: Sequence[NamedFit]) -> Recommendation:
    """With batch and rate of the fits for this objective, or for any."""
    tokens = recommendation.numbers["tokens"].value
    found = recommendation
    by_name = {"batch": "batch_tokens", "learning_rate": "learning_rate"}
    for kind in by_name:
        own = [law for law in laws if law.file.law == kind]
        own = [law for law in own if law.fit.label in ("", recommendation.objective)]
        x = tokens if kind == "batch" else None
        if kind == "learning_rate" and "batch_tokens" in found.numbers:
            x = found.numbers["batch_tokens"].value
        if not own or x is None:
            continue
        law = own[0]
        axis = "tokens" if kind == "batch" else "batch_tokens"
        drawn = law.fit.drawn[:, 0] * x ** law.fit.drawn[:, 1]
        value = law.fit["coefficient"] * x ** law.fit["exponent"]
        advice = _advice(law, value, drawn, law.outside(**{axis: x}))
        found = found.with_numbers({by_name[kind]: advice})
        if kind == "batch":
            steps = _advice(law, tokens / value, None, advice.decades)
            found = found.with_numbers({"steps": steps})
    return found


def _advice(law: NamedFit, value: float, drawn: Floats | None, outside: float) -> Advice:
    low, high = (None, None)
    if drawn is not None:
        low, high = (float(end) for end in np.quantile(drawn, [0.025, 0.975]))
    return Advice(float(value), low, high, law.law, law.measured, outside)
