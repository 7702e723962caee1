"""What kind `crossover` says about its settings: numbers, a small table, and sentences."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_dlm.scaling.figures.crossover_settings import Setting
from megatron_dlm.scaling.figures.crossover_spec import CrossoverSpec
from megatron_dlm.scaling.figures.drawn import in_short
from megatron_dlm.scaling.figures.families import smoothing_words

NUMBERS = (
    *("num_first", "num_second", "outcome", "crossing", "crossing_low", "crossing_high"),
    *("share_of_resamples", "start_of_range", "end_of_range", "passages"),
    *("best_first", "best_first_x", "best_second", "best_second_x"),
    *("best_difference", "best_difference_low", "best_difference_high"),
)
_SHORT = {"epoch": "epoch", "tokens": "tokens", "training_flops": "FLOPs", "step": "step"}


def numbers_of(one: Setting) -> tuple[float | str | None, ...]:
    """NUMBERS of a setting; an end of the interval is inf or -inf where it is out of the range."""
    found, difference = one.found, one.difference
    crossing = found.crossing.value if one.outcome == "crosses" else None
    spread = (difference.low, difference.high) if one.has_interval else (None, None)
    return (
        *(len(one.first), len(one.second), one.outcome, crossing, *(one.interval or (None, None))),
        *(found.share if one.has_interval else None, found.start, found.end),
        ";".join(f"{passage.x:.6g}" for passage in found.passages),
        *(found.best_first.value, found.best_first.x),
        *(found.best_second.value, found.best_second.x),
        *(difference.value, *spread),
    )


def header_of(spec: CrossoverSpec) -> tuple[str, ...]:
    """Of the small table, behind the labels of the setting."""
    return (
        *(f"crosses at {_SHORT[spec.x]}", "95 % interval", "share"),
        *(f"best {spec.first}", f"best {spec.second}", "difference"),
    )


def row_of(one: Setting) -> tuple[str, ...]:
    """A setting in the small table."""
    found, difference = one.found, one.difference
    place = {
        "crosses": in_short(found.crossing.value),
        "from the start": f"before {in_short(found.start)}",
        "not yet": f"not before {in_short(found.end)}",
    }[one.outcome]
    interval = "" if one.interval is None else " to ".join(_end(one, x) for x in one.interval)
    gain = f"{difference.value:+.3f}"
    if one.has_interval:
        gain += f" ({difference.low:+.3f} to {difference.high:+.3f})"
    return (
        *(place, interval if one.has_interval else "one seed"),
        f"{found.share:.0%}" if one.has_interval else "",
        *(f"{found.best_first.value:.3f}", f"{found.best_second.value:.3f}", gain),
    )


def notes_of(spec: CrossoverSpec, settings: Sequence[Setting]) -> tuple[str, ...]:
    """What a crossing is, where the intervals come from, and what to know about single settings."""
    words = spec.direction
    turn = "down" if spec.higher_is_better else "up"
    notes = [
        f"A crossing is where the mean of {spec.second} passes {words.past} that of {spec.first} "
        f"and stays there, by straight lines between validations. {_about_seeds(spec, settings)}",
        f"A ring is the {words.superlative} point of a mean. The best of a run is its "
        f"{words.superlative} validation, what early stopping keeps; a crossing alone may only "
        f"say that the other curve has turned {turn}.",
        "Curves are not smoothed."
        if spec.smoothing == 0
        else f"Before they are compared, curves are averaged over "
        f"{smoothing_words(spec.smoothing)}; they are drawn as they are.",
    ]
    if spec.highest is not None:
        notes.append(f"Values above {in_short(spec.highest)} are not shown in the picture.")
    remarks = [(one.title, _remark(spec, one)) for one in settings]
    return (*notes, *(f"{title}: {remark}" for title, remark in remarks if remark))


def _end(one: Setting, x: float) -> str:
    """An end of the interval; beyond the range only a bound is known."""
    if x == float("inf"):
        return f"> {in_short(one.found.end)}"
    return f"< {in_short(one.found.start)}" if x == float("-inf") else in_short(x)


def _about_seeds(spec: CrossoverSpec, settings: Sequence[Setting]) -> str:
    """Where the intervals come from."""
    seeds = sorted({len(family) for one in settings for family in (one.first, one.second)})
    if seeds[-1] == 1:
        return "There is one seed, and no interval."
    counted = " or ".join(str(number) for number in seeds)
    return (
        f"Thin lines are seeds ({counted} in each setting), thick ones their mean. Intervals are "
        f"percentiles over {spec.resamples:,} resamples of the seeds; those that do not cross "
        f"count as later than the end (>), those that are {spec.direction.past} all along as "
        "earlier than the start (<), and the share is of the others. With so few seeds intervals "
        "are too narrow rather than too wide."
    )


def _remark(spec: CrossoverSpec, one: Setting) -> str:
    """What is a bound, where the curves cross more than once, and which run cuts them short."""
    parts = []
    if one.outcome == "not yet":
        end = in_short(one.found.end)
        parts.append(f"no crossing for good up to {end}, where the range ends")
    elif one.outcome == "from the start":
        start = in_short(one.found.start)
        parts.append(f"{spec.second} is {spec.direction.comparative} all along, from {start} on")
    passages = one.found.passages
    if passages and (len(passages) > 1 or one.outcome == "not yet"):
        parts.append(f"the means cross at {', '.join(in_short(each.x) for each in passages)}")
    if one.ends:
        parts.append(f"{one.ends}; crossings, rings and bests are of what all have reached")
    return f"{'; '.join(parts)}." if parts else ""
