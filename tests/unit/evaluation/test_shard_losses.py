"""Loss on real shards, of block and hybrid models, against the objectives of training."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
from small_models import WINDOW, write_model
from tiny_corpus import TinyCorpus

from megatron_dlm.config.evaluation_commands import EvaluateConfig
from megatron_dlm.config.objective import ObjectiveConfig
from megatron_dlm.data.loader import read_micro_batch
from megatron_dlm.data.open_corpus import CorpusSettings, open_corpus
from megatron_dlm.evaluation.estimates import MaskDraws, Request
from megatron_dlm.evaluation.evaluate import evaluate
from megatron_dlm.evaluation.likelihood import score
from megatron_dlm.evaluation.shards import LevelPoint, LogSNRPoint, evaluate_shards
from megatron_dlm.hf.load import LoadedModel, load_model
from megatron_dlm.objectives.base import micro_batch_loss
from megatron_dlm.objectives.build import build_objective
from megatron_dlm.ops.counter_rng import Stream

NUM_WINDOWS = 6
OBJECTIVES = {
    "chain": ObjectiveConfig(kind="block", block_size=1, weighting="count"),
    "block": ObjectiveConfig(kind="block", block_size=6, weighting="count"),
    "hybrid": ObjectiveConfig(kind="hybrid", noise_type="low_uniform", prompt_share=0.3),
    "time": ObjectiveConfig(kind="hybrid", noise_type="time", uniform_probability=0.2),
}
Paths = dict[str, Path]


@pytest.fixture(scope="module")
def models(tiny_corpus: TinyCorpus, tmp_path_factory: pytest.TempPathFactory) -> Paths:
    root = tmp_path_factory.mktemp("scored")
    return {
        name: write_model(root / name, tiny_corpus.tokenizer, objective, num_layers=1)
        for name, objective in OBJECTIVES.items()
    }


def training_bound(
    model: LoadedModel, objective: ObjectiveConfig, prefix: Path, num_seeds: int
) -> list[float]:
    """The bound of the first windows as validation computes it, for every seed."""
    size, mask = model.model.config.vocab_size, model.mask_token_id
    pure = build_objective(
        objective, vocab_size=size, mask_token_id=mask, batch_size=NUM_WINDOWS, training=False
    )
    settings = CorpusSettings(seq_length=WINDOW, seed=1234, vocab_size=size, mask_token_id=mask)
    corpus = open_corpus({str(prefix): 1.0}, settings)
    batch = read_micro_batch(corpus, 0, NUM_WINDOWS)
    found = []
    for seed in range(num_seeds):
        inputs = pure.prepare(batch, seed, Stream.VALIDATION)
        logits = model.model(inputs.tokens, doubled=objective.kind == "block").logits
        terms = micro_batch_loss(pure, logits[inputs.scored], inputs, None)
        total, count = terms.metrics["nelbo"]
        found.append(float(total / count))
    return found


def test_blocks_of_one_token_have_an_exact_likelihood(
    models: Paths, tiny_corpus: TinyCorpus
) -> None:
    model = load_model(models["chain"])
    (expected,) = training_bound(model, OBJECTIVES["chain"], tiny_corpus.valid, 1)
    found = evaluate_shards(model, str(tiny_corpus.valid), limit=NUM_WINDOWS)
    assert found.metric == "nll"
    assert found.nats_per_token == pytest.approx(expected, rel=1e-5)
    assert (found.noise_standard_error, found.levels, found.num_samples) == (0, [], 1)


@pytest.mark.parametrize("name", ["block", "hybrid", "time"])
def test_the_bound_is_that_of_training(name: str, models: Paths, tiny_corpus: TinyCorpus) -> None:
    model, prefix = load_model(models[name]), tiny_corpus.valid
    trained = training_bound(model, OBJECTIVES[name], prefix, 60)
    found = evaluate_shards(model, str(prefix), limit=NUM_WINDOWS, num_samples=32)
    assert found.metric == "nelbo"
    error = math.hypot(np.std(trained) / math.sqrt(len(trained)), found.noise_standard_error)
    assert error < 0.1 * found.nats_per_token
    assert abs(found.nats_per_token - np.mean(trained)) < 3.5 * error
    assert sum(point.num_draws for point in found.levels) == 32 * NUM_WINDOWS


@pytest.mark.parametrize("name", ["block", "hybrid", "time"])
def test_the_area_under_the_curve_is_the_bound(
    name: str, models: Paths, tiny_corpus: TinyCorpus
) -> None:
    found = evaluate_shards(
        load_model(models[name]), str(tiny_corpus.valid), limit=NUM_WINDOWS, num_samples=64, seed=4
    )
    places, heights = [], []
    for point in found.levels:
        if isinstance(point, LogSNRPoint):
            assert name != "block"
            places.append(point.log_snr)
            heights.append(point.nats_per_token_and_log_snr)
        else:
            assert isinstance(point, LevelPoint)
            assert name == "block"
            places.append(point.level)
            heights.append(point.nats_per_masked_token)
    assert places == sorted(places)
    low, high = (0.0, 1.0) if name == "block" else (-9.3, 9.3)
    assert low < places[0] < places[-1] <= high
    area = float(np.trapezoid(heights, places))
    assert area == pytest.approx(found.nats_per_token, rel=0.2)


REQUESTS = [
    Request((20, 30, 40), (50, 60)),
    Request((21,), (22, 23, 24, 25, 26, 27, 28)),
    Request((25, 26, 27, 28, 29, 30, 31), (99,)),
]


@pytest.mark.parametrize("name", ["chain", "block", "hybrid"])
def test_answers(name: str, models: Paths) -> None:
    """Through `score`, on real weights: prompts count, and texts of any length share a batch."""
    model = load_model(models[name])
    together = score(model, REQUESTS, draws=MaskDraws(6), batch_size=4, with_greedy=True)
    for request, one in zip(REQUESTS, together, strict=True):
        (alone,) = score(model, [request], draws=MaskDraws(6), batch_size=1)
        assert alone.log_prob == pytest.approx(one.log_prob, rel=1e-4)
        assert one.log_prob < 0
    bare = score(model, [Request((), REQUESTS[0].answer)], draws=MaskDraws(6))
    assert bare[0].log_prob != pytest.approx(together[0].log_prob, rel=1e-3)


def test_the_command(
    models: Paths,
    tiny_corpus: TinyCorpus,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    pytest.importorskip("matplotlib")
    for name, title in (("hybrid", "nats/token/log-SNR"), ("block", "nats/masked token")):
        output = tmp_path / name
        config = EvaluateConfig(
            model=str(models[name]),
            data=[str(tiny_corpus.valid)],
            limit=3,
            output_dir=str(output),
            device="cpu",
        )
        evaluate(config)
        assert title in capsys.readouterr().out
        assert (output / "noise_levels.png").stat().st_size > 10_000
        report = json.loads((output / "data.json").read_text())
        assert report["objective"] == name
        key = "log_snr" if name == "hybrid" else "level"
        assert all(key in point for point in report["data"][0]["levels"])
    config = EvaluateConfig(
        model=str(models["chain"]), data=[str(tiny_corpus.valid)], limit=2, device="cpu",
        output_dir=str(tmp_path / "chain"),
    )  # fmt: skip
    evaluate(config)
    assert "NLL, exact" in capsys.readouterr().out
    assert not (tmp_path / "chain" / "noise_levels.png").exists()
