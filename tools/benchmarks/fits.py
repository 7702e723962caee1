"""Intervals of every scaling law: seconds for 1,000 resamples of 500 runs, against plain scipy.

The peer of the parametric laws is the method of Hoffmann et al. 2022: scipy's L-BFGS-B on the Huber
loss with its gradient, one resample after the other, begun at the best fit and stopped by scipy's
own tolerances. Of the other laws it is a loop over resamples with numpy's polyfit, of the hyperbola
scipy's least_squares. A few resamples of the peer are timed and counted up, within the same seconds
as ours, several rounds; both see the same resamples, and the costs they end at are compared.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from measure import environment, print_environment, spread, write_json
from scipy.optimize import least_squares, minimize

from megatron_dlm.scaling.batch_law import IsoLoss, fit_iso_loss
from megatron_dlm.scaling.bootstrap import Floats, case_weights
from megatron_dlm.scaling.descent import HUBER_DELTA, descend
from megatron_dlm.scaling.isoflop import Trained, fit_compute_optimal
from megatron_dlm.scaling.parametric import Observation, fit_law
from megatron_dlm.scaling.parametric_laws import LAWS, Law
from megatron_dlm.scaling.power_law import fit_with_intervals
from megatron_dlm.scaling.published import NOISE_TYPES

_CHINCHILLA = (np.log(1.69), np.log(406.4), np.log(410.7), 0.34, 0.28)
_TRUTHS = {
    "chinchilla": _CHINCHILLA,
    "repeated": (*_CHINCHILLA, np.log(15.4)),
    "overfitted": (*_CHINCHILLA, np.log(15.4), np.log(3e3), 0.55, 0.39, 1.5),
}
_NOISE = 0.01


@dataclass(frozen=True)
class Timing:
    """One law."""

    law: str
    fit_seconds: list[float]
    """Of the law and all resamples, per round."""
    peer_seconds: list[float]
    """Of the peer for as many resamples, counted up from a few, per round."""
    excess_cost: float | None
    """Largest (ours - peer's) / peer's of the Huber losses of the peer's resamples."""

    @property
    def ratios(self) -> list[float]:
        """Per round: how many times faster."""
        pairs = zip(self.fit_seconds, self.peer_seconds, strict=True)
        return [theirs / ours for ours, theirs in pairs]


def main() -> None:
    arguments = _arguments()
    facts = {name: value for name, value in environment().items() if name != "allocator"}
    print_environment(facts)
    timings = [time_parametric(name, arguments) for name in LAWS]
    timings += [time_power(arguments), time_isoflop(arguments), time_hyperbola(arguments)]
    print(f"{arguments.runs} runs, {arguments.resamples} resamples")
    for timing in timings:
        ours, peer = (statistics.median(s) for s in (timing.fit_seconds, timing.peer_seconds))
        excess = "" if timing.excess_cost is None else f", cost {timing.excess_cost:+.1e} of it"
        print(
            f"{timing.law:12} {ours:8.2f} s, peer {peer:8.1f} s: {spread(timing.ratios)} times"
            f"{excess}"
        )
    write_json(arguments.json, {timing.law: asdict(timing) for timing in timings})


def time_parametric(name: str, arguments: argparse.Namespace) -> Timing:
    law, runs = LAWS[name](), _observations(name, arguments.runs)
    inputs = np.log([[run.parameters, run.unique_tokens, run.epochs] for run in runs])
    targets = np.log([run.loss_nats for run in runs])
    weights = case_weights(len(runs), arguments.resamples, 0)[: arguments.peer_resamples]
    theta = np.array(fit_law(name, runs).theta)
    _, costs = descend(law, np.tile(theta, (len(weights), 1)), inputs, targets, weights=weights)
    peers: list[float] = []

    def peer() -> None:
        peers[:] = [_peer_cost(law, theta, inputs, targets, row) for row in weights]

    ours, theirs = _rounds(arguments, lambda: fit_law(name, runs, count=arguments.resamples), peer)
    excess = max(float(ours / peer - 1) for ours, peer in zip(costs, peers, strict=True))
    return Timing(name, ours, theirs, excess)


def time_power(arguments: argparse.Namespace) -> Timing:
    random = np.random.default_rng(0)
    log_x = random.uniform(40, 46, arguments.runs)
    log_y = 1 - 0.05 * log_x + random.normal(0, _NOISE, arguments.runs)

    def peer() -> None:
        for _ in range(arguments.peer_resamples):
            chosen = random.integers(0, len(log_x), len(log_x))
            np.polyfit(log_x[chosen], log_y[chosen], 1)

    def fit() -> object:
        return fit_with_intervals(np.exp(log_x), np.exp(log_y), count=arguments.resamples)

    return Timing("power", *_rounds(arguments, fit, peer), None)


def time_isoflop(arguments: argparse.Namespace) -> Timing:
    random = np.random.default_rng(0)
    law, models = NOISE_TYPES["masked"], []
    budgets = np.geomspace(5e17, 2e20, 10)
    for budget in budgets:
        for offset in np.linspace(-1.2, 1.2, arguments.runs // 10):
            loss = law.loss_nats(budget) + 0.05 * offset**2 + random.normal(0, _NOISE)
            size = law.flops_per_token(budget) * np.exp(offset)
            models.append(Trained(float(budget), float(size), float(loss)))
    log_size = np.log([model.size for model in models]).reshape(10, -1)
    losses = np.array([model.loss_nats for model in models]).reshape(10, -1)

    def peer() -> None:
        for _ in range(arguments.peer_resamples):
            chosen = random.integers(0, losses.shape[1], losses.shape[1])
            fits = [
                np.polyfit(x[chosen] - x.mean(), y[chosen], 2)
                for x, y in zip(log_size, losses, strict=True)
            ]
            best = [x.mean() - b / (2 * a) for x, (a, b, _) in zip(log_size, fits, strict=True)]
            lowest = [np.log(c - b * b / (4 * a)) for a, b, c in fits]
            for values in (best, np.log(budgets) - best, lowest):
                np.polyfit(np.log(budgets), values, 1)

    def fit() -> object:
        return fit_compute_optimal(models, count=arguments.resamples)

    return Timing("isoflop", *_rounds(arguments, fit, peer), None)


def time_hyperbola(arguments: argparse.Namespace) -> Timing:
    """Of 40 batch sizes: there are no 500."""
    random = np.random.default_rng(0)
    truth, batches = IsoLoss(2000.0, 3e4, 0.15), np.geomspace(6e4, 6e6, 40)
    steps = np.array([truth.steps(b) for b in batches]) * np.exp(random.normal(0, _NOISE, 40))

    def residuals(theta: Floats, log_s: Floats, log_b: Floats) -> Floats:
        with np.errstate(over="ignore"):
            excess = np.expm1(np.exp(theta[2]) * (log_b - np.log(batches[0]) + np.exp(theta[1])))
        return theta[0] + np.log1p(1 / excess) / np.exp(theta[2]) - log_s

    def peer() -> None:
        start = (np.log(2000.0), np.log(np.log(2.0)), np.log(0.15))
        for _ in range(arguments.peer_resamples):
            chosen = random.integers(0, 40, 40)
            least_squares(residuals, start, args=(np.log(steps[chosen]), np.log(batches[chosen])))

    def fit() -> object:
        return fit_iso_loss(steps.tolist(), batches.tolist(), count=arguments.resamples)

    return Timing("iso-loss", *_rounds(arguments, fit, peer), None)


def _rounds(
    arguments: argparse.Namespace, fit: Callable[[], object], peer: Callable[[], None]
) -> tuple[list[float], list[float]]:
    ours, theirs = [], []
    for _ in range(arguments.rounds):
        ours.append(_seconds(fit))
        scale = arguments.resamples / arguments.peer_resamples
        theirs.append(_seconds(peer) * scale)
    return ours, theirs


def _seconds(work: Callable[[], object]) -> float:
    """Processor time: the machine may be busy with other things."""
    start = time.process_time()
    work()
    return time.process_time() - start


def _observations(name: str, count: int) -> list[Observation]:
    random = np.random.default_rng(2)
    ranges = ((7, 10), (8, 11), (0, 2.5))
    facts = 10 ** np.stack([random.uniform(*ends, count) for ends in ranges], axis=1)
    values, _ = LAWS[name]().log_loss(np.array(_TRUTHS[name]), np.log(facts))
    losses = np.exp(values + random.normal(0, _NOISE, count))
    table = np.concatenate([facts, losses[:, None]], axis=1)
    return [Observation(*row) for row in table.tolist()]


def _peer_cost(law: Law, start: Floats, inputs: Floats, targets: Floats, weights: Floats) -> float:
    """Mean Huber loss where L-BFGS-B stops; in units in which it is of order one."""
    share = weights / weights.sum() / HUBER_DELTA**2

    def cost(theta: Floats) -> tuple[float, Floats]:
        values, slopes = law.log_loss(theta, inputs)
        residuals = values - targets
        size = np.abs(residuals)
        huber = np.where(
            size <= HUBER_DELTA, residuals**2 / 2, HUBER_DELTA * (size - HUBER_DELTA / 2)
        )
        pull = np.clip(residuals, -HUBER_DELTA, HUBER_DELTA)
        return float(huber @ share), (slopes * pull) @ share

    with np.errstate(over="ignore", invalid="ignore"):
        found = minimize(cost, start, jac=True, method="L-BFGS-B", options={"maxiter": 5000})
    return float(found.fun) * HUBER_DELTA**2


def _arguments() -> argparse.Namespace:
    result = argparse.ArgumentParser(description=__doc__)
    result.add_argument("--runs", type=int, default=500, help="default: %(default)s")
    result.add_argument("--resamples", type=int, default=1000, help="default: %(default)s")
    result.add_argument(
        "--peer_resamples", type=int, default=8, help="timed of the peer (default: %(default)s)"
    )
    result.add_argument("--rounds", type=int, default=3, help="default: %(default)s")
    result.add_argument("--json", type=Path, metavar="FILE", help="write the results to FILE")
    return result.parse_args()


if __name__ == "__main__":
    main()
