"""Confidence-parallel decoding with block-wise caches against LLaDA's loop, on one trained model.

The baseline is written here after LLaDA's published procedure (arXiv 2502.09992): blocks from left
to right, a fixed number of tokens per step, those of the highest confidence kept, every step a pass
over the whole row without a cache. The model learns a made-up language in minutes on a CPU; the
quality of a text is the share of its words that are in the lexicon. Temperature 1 everywhere.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from measure import CLOCKS, environment, parser, print_environment, spread, write_json
from torch import Tensor
from word_model import MASK_ID, WINDOW, Language, Quality, train

from megatron_dlm.generation.masked_samplers import Cache, MaskedDecoding, sample_masked

_SEED = 1
_PROMPT_TOKENS, _BLOCK_SIZE = 64, 32
_NEW_TOKENS = WINDOW - _PROMPT_TOKENS
_BASELINE = "LLaDA's loop, 1 per step"

Sample = Callable[[Tensor, int], tuple[Tensor, float]]
"""(prompts int64 [b, P], seed) -> rows int64 [b, L], mean function evaluations of a row."""


@dataclass
class Result:
    """One contender over all rounds."""

    seconds: list[float] = field(default_factory=list)
    evaluations: list[float] = field(default_factory=list)
    texts: list[Tensor] = field(default_factory=list)

    def tokens_per_second(self, batch_size: int) -> float:
        """Median over the rounds."""
        return batch_size * _NEW_TOKENS / statistics.median(self.seconds)

    def num_evaluations(self) -> float:
        """Mean of a row."""
        return statistics.mean(self.evaluations)


def main() -> None:
    arguments = _arguments()
    torch.set_num_threads(arguments.threads)
    facts = environment()
    print_environment(facts)
    language = Language(_SEED)
    print(f"training for {arguments.train_steps} steps:")
    model = train(language, arguments.train_steps, seed=_SEED)
    prompts = language.texts(arguments.batch_size, _PROMPT_TOKENS)
    results = _measure(_contenders(model, arguments.threshold), prompts, arguments)
    rows = [_summary(name, results, language, arguments.batch_size) for name in results]
    _print_table(rows, language.quality(language.texts(64, WINDOW)))
    write_json(arguments.json, {"environment": facts, "clock": arguments.clock, "results": rows})


def _arguments() -> argparse.Namespace:
    options = parser(__doc__, rounds=3)
    options.add_argument(
        "--batch-size", type=int, default=16, help="rows at once (default: %(default)s)"
    )
    options.add_argument(
        "--train-steps", type=int, default=2500, help="updates (default: %(default)s)"
    )
    options.add_argument(
        "--threshold", type=float, default=0.9, help="confidence (default: %(default)s)"
    )
    return options.parse_args()


def _contenders(model: Any, threshold: float) -> dict[str, Sample]:
    caches: tuple[Cache, ...] = ("none", "prefix", "dual")
    return {
        **{
            f"LLaDA's loop, {num_tokens} per step": llada_loop(model, num_tokens)
            for num_tokens in (1, 2, 4)
        },
        **{f"threshold, cache {cache}": our_sampler(model, threshold, cache) for cache in caches},
    }


def llada_loop(model: Any, tokens_per_step: int) -> Sample:
    """LLaDA's sampling with low-confidence remasking, in our own words."""
    steps_per_block = _BLOCK_SIZE // tokens_per_step

    def sample(prompts: Tensor, seed: int) -> tuple[Tensor, float]:
        generator = torch.Generator().manual_seed(seed)
        masks = prompts.new_full((len(prompts), _NEW_TOKENS), MASK_ID)
        rows = torch.cat([prompts, masks], dim=1)
        for stop in range(_PROMPT_TOKENS + _BLOCK_SIZE, WINDOW + 1, _BLOCK_SIZE):
            for _ in range(steps_per_block):
                logits = model(rows).logits.double()
                logits[..., MASK_ID] = float("-inf")
                noise = torch.rand(logits.shape, generator=generator, dtype=torch.float64)
                drawn = (logits - (-noise.log()).log()).argmax(-1)  # Gumbel noise
                confidence = logits.softmax(-1).gather(-1, drawn[..., None])[..., 0]
                confidence[rows != MASK_ID] = float("-inf")
                confidence[:, stop:] = float("-inf")
                kept = confidence.topk(tokens_per_step).indices
                rows.scatter_(1, kept, drawn.gather(1, kept))
        return rows, _NEW_TOKENS / tokens_per_step

    return sample


def our_sampler(model: Any, threshold: float, cache: Cache) -> Sample:
    """`sample_masked`: every token surer than the threshold, at least one per step."""
    decoding = MaskedDecoding(
        "low_confidence", block_size=_BLOCK_SIZE, threshold=threshold, cache=cache
    )

    def sample(prompts: Tensor, seed: int) -> tuple[Tensor, float]:
        samples = sample_masked(
            model.denoiser(),
            prompts,
            mask_id=MASK_ID,
            num_tokens=_NEW_TOKENS,
            decoding=decoding,
            seed=seed,
        )
        return samples.tokens, float(samples.num_evaluations.double().mean())

    return sample


def _measure(
    contenders: Mapping[str, Sample], prompts: Tensor, arguments: argparse.Namespace
) -> dict[str, Result]:
    """All contenders one after the other in every round, each round starting with another one."""
    clock, names = CLOCKS[arguments.clock], list(contenders)
    results = {name: Result() for name in names}
    for sample in contenders.values():
        sample(prompts[:1], 0)  # warm-up
    for number in range(arguments.rounds):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            started = clock()
            rows, num_evaluations = contenders[name](prompts, number)
            results[name].seconds.append(clock() - started)
            results[name].evaluations.append(num_evaluations)
            results[name].texts.append(rows[:, _PROMPT_TOKENS:])
    return results


def _summary(
    name: str, results: Mapping[str, Result], language: Language, batch_size: int
) -> dict[str, Any]:
    ours, baseline = results[name], results[_BASELINE]
    pairs = zip(ours.seconds, baseline.seconds, strict=True)
    return {
        "name": name,
        "tokens_per_second": ours.tokens_per_second(batch_size),
        "times_baseline_speed": [theirs / own for own, theirs in pairs],
        "evaluations": ours.num_evaluations(),
        "times_fewer_evaluations": baseline.num_evaluations() / ours.num_evaluations(),
        "quality": asdict(language.quality(torch.cat(ours.texts))),
    }


def _print_table(rows: Sequence[Mapping[str, Any]], reference: Quality) -> None:
    print(
        f"\n{_NEW_TOKENS} tokens behind prompts of {_PROMPT_TOKENS}, blocks of {_BLOCK_SIZE}; "
        f"words of the language itself: entropy {reference.word_entropy_nats:.2f} nats\n"
    )
    print(_row("", "tokens/s", "x speed", "passes", "x fewer", "valid words", "entropy"))
    for row in rows:
        quality = row["quality"]
        print(
            _row(
                row["name"],
                f"{row['tokens_per_second']:.0f}",
                spread(row["times_baseline_speed"]),
                f"{row['evaluations']:.1f}",
                f"{row['times_fewer_evaluations']:.2f}",
                f"{quality['valid_share']:.1%} +- {quality['standard_error']:.1%}",
                f"{quality['word_entropy_nats']:.2f}",
            )
        )


def _row(*cells: str) -> str:
    widths = (25, 9, 20, 7, 8, 17, 8)
    return " ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)).rstrip()


if __name__ == "__main__":
    main()
