"""Every law of `scaling fit`: measured runs in, numbers with intervals out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from megatron_dlm.config.scaling_commands import ScalingFitConfig
from megatron_dlm.scaling.bootstrap import Floats, intervals
from megatron_dlm.scaling.isoflop import (
    ComputeOptimal,
    TrainingCurve,
    at_budgets,
    budgets_of,
    fit_compute_optimal,
    lowest_models,
    unreached,
)
from megatron_dlm.scaling.law_file import NUMBERS, Fit
from megatron_dlm.scaling.measured_runs import MeasuredRun
from megatron_dlm.scaling.minima import reasons
from megatron_dlm.scaling.parametric import Observation, fit_law
from megatron_dlm.scaling.power_law import (
    PowerLawFit,
    fit_power_law,
    fit_with_intervals,
    r_squared,
)
from megatron_dlm.scaling.tuned_laws import (
    GridRun,
    TunedLaw,
    fit_batch_law,
    fit_learning_rate_law,
)

_Runs = Sequence[MeasuredRun]


def fit_runs(config: ScalingFitConfig, label: str, runs: _Runs) -> Fit:
    """The law of one kind of run; ValueError where the runs cannot fix it."""
    return _FITS[config.law](config, label, runs)


def _isoflop(config: ScalingFitConfig, label: str, runs: _Runs) -> Fit:
    curves = _curves(runs, "flops_per_token")
    budgets = config.budgets or budgets_of(
        [curves], config.num_budgets, one_per_size=config.models == "best"
    )
    silent = unreached(at_budgets(curves, budgets), budgets)
    main, by_parameters, left_out = _both_sizes(config, runs, budgets, silent)
    laws = {
        "flops_per_token": (main.size, main.drawn["size"]),
        "tokens": (main.data, main.drawn["data"]),
        "parameters": (by_parameters.size, by_parameters.drawn["size"]),
        "loss": (main.loss, main.drawn["loss"]),
    }
    points = tuple(
        {
            "training_flops": optimum.compute_flops,
            "flops_per_token": optimum.size,
            "tokens": optimum.data,
            "loss": optimum.loss_nats,
            "num_models": float(optimum.num_models),
        }
        for optimum in main.optima
    )
    compute = np.array([point["training_flops"] for point in points])
    goodness = {
        f"{name}_r_squared": r_squared(
            laws[name][0], compute, np.array([point[name] for point in points])
        )
        for name in ("flops_per_token", "tokens", "loss")
    }
    return _fit(
        config,
        label,
        runs,
        values=[v for law, _ in laws.values() for v in (law.coefficient, law.exponent)],
        drawn=np.concatenate([drawn for _, drawn in laws.values()], axis=1),
        goodness=goodness,
        ranges=_ranges(runs) | {"training_flops": (float(compute.min()), float(compute.max()))},
        points=points,
        notes=tuple(f"{b:.3g} FLOPs left out: {why}" for b, why in sorted(left_out.items())),
    )


def _both_sizes(
    config: ScalingFitConfig, runs: _Runs, budgets: Sequence[float], left_out: dict[float, str]
) -> tuple[ComputeOptimal, ComputeOptimal, dict[float, str]]:
    """Laws in FLOPs per token and in parameters, and the budgets that are left out, with why.

    A budget that has a best size in one of them only is left out of both: they then share the runs
    and the seed, and a row of one is the same resample as that of the other.
    """
    kept = [budget for budget in budgets if budget not in left_out]
    if len(kept) < 2:
        why = reasons({f"{budget:.3g} FLOPs": left_out[budget] for budget in sorted(left_out)})
        raise ValueError(f"{len(kept)} budgets are left; laws need two: {why}")
    main, by_parameters = (
        _compute_optimal(config, runs, size, kept) for size in ("flops_per_token", "parameters")
    )
    found = left_out | {
        budget: f"{why} (sizes in {unit})"
        for law, unit in ((by_parameters, "parameters"), (main, "FLOPs per token"))
        for budget, why in law.left_out.items()
    }
    if main.left_out.keys() == by_parameters.left_out.keys():
        return main, by_parameters, found
    return _both_sizes(config, runs, budgets, found)


def _compute_optimal(
    config: ScalingFitConfig, runs: _Runs, size: str, budgets: Sequence[float]
) -> ComputeOptimal:
    models = at_budgets(_curves(runs, size), budgets)
    if config.models == "best":
        models = lowest_models(models)
    is_weighted = config.weighting == "precision"
    return fit_compute_optimal(
        models, count=config.resamples, seed=config.seed, weighted=is_weighted
    )


def _curves(runs: _Runs, size: str) -> list[TrainingCurve]:
    """Up to the validation that counts."""
    found = []
    for run in runs:
        until = run.scored + 1
        per_token = run.flops_per_token
        of_size = per_token if size == "flops_per_token" else run.parameters
        found.append(
            TrainingCurve(run.name, of_size, per_token, run.tokens[:until], run.losses[:until])
        )
    return found


def _parametric(config: ScalingFitConfig, label: str, runs: _Runs) -> Fit:
    observations = [
        Observation(run.parameters, *run.unique_and_epochs, loss_nats=run.loss) for run in runs
    ]
    found = fit_law(config.law, observations, count=config.resamples, seed=config.seed)
    predicted = [found.loss(o.parameters, o.unique_tokens, o.epochs) for o in observations]
    errors = np.abs(np.log(predicted) - np.log([run.loss for run in runs]))
    goodness = {
        "mean_huber": found.huber,
        "median_relative_error": float(np.median(errors)),
        "largest_relative_error": float(errors.max()),
    }
    unique, epochs = zip(*(run.unique_and_epochs for run in runs), strict=True)
    seen = {"unique_tokens": _ends(unique), "epochs": _ends(epochs)}
    ranges = _ranges(runs) | seen
    # A loss that rises with size or data is no scaling law but a fit to too little.
    notes = tuple(
        f"the interval of {name} holds 0: the runs do not fix it; vary parameters and tokens apart"
        for name in ("alpha", "beta")
        if found.intervals[name].low <= 0
    )
    return _fit(
        config,
        label,
        runs,
        values=list(found.theta),
        drawn=found.drawn,
        goodness=goodness,
        ranges=ranges,
        notes=notes,
    )


def _power(config: ScalingFitConfig, label: str, runs: _Runs) -> Fit:
    assert config.x is not None
    x = [run.fact(config.x) for run in runs]
    y = [run.loss if config.y is None else run.fact(config.y) for run in runs]
    found = fit_with_intervals(x, y, count=config.resamples, seed=config.seed)
    return _line(config, label, runs, found, ranges={config.x: _ends(x)})


def _batch(config: ScalingFitConfig, label: str, runs: _Runs) -> Fit:
    found = fit_batch_law(
        _grid(runs, needs_rates=False),
        num_levels=config.num_levels,
        count=config.resamples,
        seed=config.seed,
    )
    return _tuned(config, label, runs, found, ("tokens", "batch_tokens"))


def _learning_rate(config: ScalingFitConfig, label: str, runs: _Runs) -> Fit:
    found = fit_learning_rate_law(
        _grid(runs, needs_rates=True), count=config.resamples, seed=config.seed
    )
    return _tuned(config, label, runs, found, ("batch_tokens", "learning_rate"))


def _grid(runs: _Runs, *, needs_rates: bool) -> list[GridRun]:
    """Where no rate is needed and none was changed, all runs have the same."""
    column = "optimizer.lr"
    is_known = needs_rates or any(row.get(column) is not None for r in runs for row in r.rows)
    return [
        GridRun(
            run=run.name,
            setting=f"{run.parameters:.6g} parameters",
            batch_tokens=run.batch_tokens,
            learning_rate=run.fact(column) if is_known else 1.0,
            score=run.loss,
            tokens=run.tokens,
            loss_nats=run.losses,
        )
        for run in runs
    ]


def _tuned(
    config: ScalingFitConfig, label: str, runs: _Runs, found: TunedLaw, names: tuple[str, str]
) -> Fit:
    return _line(
        config,
        label,
        runs,
        found,
        ranges=dict(zip(names, map(_ends, zip(*found.points, strict=True)), strict=True)),
        points=tuple(dict(zip(names, point, strict=True)) for point in found.points),
        notes=tuple(f"left out: {name}" for name in found.left_out),
    )


def _line(
    config: ScalingFitConfig,
    label: str,
    runs: _Runs,
    found: PowerLawFit,
    *,
    ranges: dict[str, tuple[float, float]],
    points: tuple[Mapping[str, float], ...] = (),
    notes: tuple[str, ...] = (),
) -> Fit:
    return _fit(
        config,
        label,
        runs,
        values=[found.law.coefficient, found.law.exponent],
        drawn=found.drawn,
        goodness={"r_squared": found.r_squared},
        ranges=_ranges(runs) | ranges,
        points=points,
        notes=notes,
    )


def _ranges(runs: _Runs) -> dict[str, tuple[float, float]]:
    """Of the facts that all runs have."""
    facts: dict[str, Callable[[MeasuredRun], float]] = {
        "parameters": lambda run: run.parameters,
        "unique_tokens": lambda run: run.fact("unique_tokens"),
        "tokens": lambda run: float(run.tokens[run.scored]),
        "epochs": lambda run: run.unique_and_epochs[1],
        "training_flops": lambda run: run.flops_per_token * float(run.tokens[run.scored]),
        "batch_tokens": lambda run: run.batch_tokens,
        "learning_rate": lambda run: run.fact("optimizer.lr"),
        "loss": lambda run: run.loss,
    }
    found = {}
    for name, fact in facts.items():
        try:
            found[name] = _ends([fact(run) for run in runs])
        except ValueError:
            continue
    return found


def _cost(runs: _Runs) -> tuple[float, float] | None:
    """FLOPs per token as a power law of the parameters of these runs."""
    try:
        sizes = [run.parameters for run in runs]
        costs = [run.flops_per_token for run in runs]
    except ValueError:
        return None
    if max(sizes) / min(sizes) < 1 + 1e-6:
        return costs[0] / sizes[0], 1.0
    law = fit_power_law(sizes, costs)
    return law.coefficient, law.exponent


def _ends(values: Sequence[float]) -> tuple[float, float]:
    return float(min(values)), float(max(values))


def _fit(
    config: ScalingFitConfig,
    label: str,
    runs: _Runs,
    *,
    values: Sequence[float],
    drawn: Floats,
    goodness: Mapping[str, float],
    ranges: Mapping[str, tuple[float, float]],
    points: tuple[Mapping[str, float], ...] = (),
    notes: tuple[str, ...] = (),
) -> Fit:
    found = intervals(values, drawn)
    lost = int((~np.isfinite(drawn).all(axis=1)).sum())
    if lost:
        notes = (*notes, f"{lost} of {len(drawn)} resamples could not be fitted and are left out")
    return Fit(
        label=label,
        numbers=dict(zip(NUMBERS[config.law], found, strict=True)),
        drawn=drawn[np.isfinite(drawn).all(axis=1)],
        goodness=goodness,
        num_runs=len(runs),
        flops_per_token=_cost(runs),
        ranges=ranges,
        points=points,
        notes=notes,
    )


_FITS: dict[str, Callable[[ScalingFitConfig, str, _Runs], Fit]] = {
    "isoflop": _isoflop,
    "chinchilla": _parametric,
    "repeated": _parametric,
    "overfitted": _parametric,
    "power": _power,
    "batch": _batch,
    "learning_rate": _learning_rate,
}
