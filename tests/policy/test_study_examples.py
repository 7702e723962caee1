"""The example configurations of the studies: each with its parts is a run that could start."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from opened import opened_model
from rank_pool import RankPool
from sources import ROOT

from megatron_dlm.config.derive import resolve, total_steps
from megatron_dlm.config.objective import AttentionPattern
from megatron_dlm.config.optimizer import completep_multipliers
from megatron_dlm.config.parse import parse
from megatron_dlm.config.schema import RunConfig
from megatron_dlm.config.validate import check
from megatron_dlm.models.accounting import count_parameters
from megatron_dlm.objectives.base import Objective
from megatron_dlm.objectives.build import build_objective
from megatron_dlm.objectives.hybrid import HybridObjective
from megatron_dlm.objectives.masked import MaskedObjective
from megatron_dlm.objectives.noise import SigmoidNoise, TimeNoise

CONFIGS = ROOT / "examples" / "configs"
QUOKKA = sorted((CONFIGS / "quokka").glob("*.yaml"))
GIDD = CONFIGS / "gidd"
# Parameters without embedding and output layer, as the paper says, and layers, width, heads.
SIZES: dict[str, tuple[float, tuple[int, int, int]]] = {
    "25m": (25.2e6, (8, 512, 8)),
    "50m": (49.2e6, (10, 640, 10)),
    "85m": (85.1e6, (12, 768, 12)),
    "200m": (201.6e6, (16, 1024, 16)),
    "570m": (566.7e6, (20, 1536, 12)),
    "3b_masked": (2.039e9, (18, 3072, 24)),
    "3b_uniform": (2.152e9, (19, 3072, 24)),
    "10b": (8.666e9, (34, 4608, 36)),
}
BIASES = {"masked": -1000, "low_uniform": -2, "balanced": 0, "high_uniform": 2, "uniform": 1000}
RECIPES = {"published": (0.5, 0.2), "released": (0.2, 0.0)}
TOKENS_BILLIONS = {"loss": 300, "schedule": 96, "time": 96, "noise": 96}


def read(*files: str, changes: tuple[str, ...] = ()) -> RunConfig:
    """The resolved configuration of a run from these files, on 8 ranks."""
    flags = [part for file in files for part in ("--config", file)]
    flags += ["--data.tokenizer", "null", *changes]
    config = resolve(parse(RunConfig, flags, prog="x"))
    check(config, 8)
    return config


def objectives_of(config: RunConfig) -> list[Objective]:
    """Of training and of validation."""
    assert config.model.vocab_size is not None
    return [
        build_objective(
            config.objective,
            vocab_size=config.model.vocab_size,
            mask_token_id=config.objective.mask_token_id,
            batch_size=config.train.global_batch_size,
            training=training,
        )
        for training in (True, False)
    ]


@pytest.mark.parametrize("path", QUOKKA, ids=lambda path: path.stem)
def test_quokka(path: Path) -> None:
    config = read("preset:sdl_1b", str(path))
    training, validation = objectives_of(config)
    assert (config.model.num_layers, config.model.vocab_size) == (26, 50_269)
    billions = TOKENS_BILLIONS[path.stem.split("_")[0]]
    assert total_steps(config, 0) == -(-billions * 10**9 // (256 * 2048))
    assert path.stem in config.train.output_dir
    if path.stem == "noise_uniform":
        assert isinstance(training, HybridObjective)
        return
    assert isinstance(training, MaskedObjective)
    assert isinstance(validation, MaskedObjective)
    assert (training.time_curriculum is not None) == (path.stem == "time_curriculum")
    assert validation.time_curriculum is None


def test_the_losses_of_quokka_differ_in_their_weights_only() -> None:
    paths = [path for path in QUOKKA if path.stem.startswith("loss")]
    configs = [read("preset:sdl_1b", str(path)) for path in paths]
    weights = [config.objective.weighting for config in configs]
    assert sorted(weights) == ["elbo", "maskgit", "unweighted"]
    changes = ("--train.output_dir", "x", "--objective.weighting", "elbo")
    same = [read("preset:sdl_1b", str(path), changes=changes) for path in paths]
    assert same[0] == same[1] == same[2]


def gidd(*parts: str, changes: tuple[str, ...] = ()) -> RunConfig:
    return read(*(str(GIDD / f"{part}.yaml") for part in ("base", *parts)), changes=changes)


def test_every_part_of_gidd_is_known() -> None:
    parts = {f"model_{size}" for size in SIZES} | {f"recipe_{recipe}" for recipe in RECIPES}
    parts |= {f"noise_{noise}" for noise in (*BIASES, "time")}
    assert {path.stem for path in GIDD.glob("*.yaml")} == {"base", *parts}


@pytest.mark.parametrize("size", SIZES)
def test_sizes_of_gidd(size: str) -> None:
    config = gidd(f"model_{size}")
    expected, shape = SIZES[size]
    model = config.model
    assert (model.num_layers, model.hidden_size, model.num_attention_heads) == shape
    assert model.ffn_size == 4 * model.hidden_size
    assert model.head_size == (64 if model.hidden_size <= 1024 else 128)
    # The paper rounds, and leaves out most of what is not a matrix.
    count = count_parameters(model).non_embedding
    assert expected * 0.999 < count < expected * 1.003
    multipliers = completep_multipliers(model.num_layers, model.hidden_size)
    assert model.residual_multiplier == multipliers.residual_multiplier
    assert model.output_multiplier == multipliers.output_multiplier


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("noise", [*BIASES, "time"])
@pytest.mark.parametrize("size", SIZES)
def test_every_run_of_gidd_builds(size: str, noise: str, recipe: str) -> None:
    config = gidd(f"model_{size}", f"noise_{noise}", f"recipe_{recipe}")
    training, validation = objectives_of(config)
    assert isinstance(training, HybridObjective)
    path = TimeNoise(0.2) if noise == "time" else SigmoidNoise(1.0, BIASES[noise])
    assert training.path == path
    assert training.weighting == ("dynamic" if noise == "time" else "surrogate")
    shares = training.independent_noise_share, training.empty_token_share
    assert shares == RECIPES[recipe]
    assert (training.prompt_share, training.pad_token_id) == (0.2, 2)
    assert isinstance(validation, HybridObjective)
    assert validation.path == path
    assert validation.attention is AttentionPattern.BIDIRECTIONAL
    optimizer = config.optimizer
    assert (optimizer.kind, optimizer.parametrization) == ("laprop", "completep")
    is_large = config.train.global_batch_size >= 256
    assert optimizer.for_batch(config.train.global_batch_size).adam_beta2 == (
        0.98 if is_large else 0.99
    )


@pytest.mark.parametrize(
    ("size", "tokens_billions", "lr"),
    [("3b_masked", 73.9, 1.44), ("3b_uniform", 70.8, 1.44), ("10b", 182.5, 1.82)],
)
def test_lengths_and_rates_of_the_large_runs(size: str, tokens_billions: float, lr: float) -> None:
    config = gidd(f"model_{size}")
    step = config.train.global_batch_size * config.model.seq_length
    assert total_steps(config, 0) * step == pytest.approx(tokens_billions * 1e9, rel=1e-3)
    assert config.optimizer.lr == lr
    assert lr == pytest.approx(10**-2.06 * step**0.3412, abs=0.01)


def test_the_smallest_of_gidd_trains_a_step(ranks: RankPool) -> None:
    """The 25M network on a small vocabulary: built with its parametrisation, one real update."""
    changes = ("--model.vocab_size", "640", "--model.seq_length", "16", "--train.precision", "fp32")
    config = gidd("model_25m", "noise_balanced", "recipe_published", changes=changes)
    [(count, losses)] = ranks.run(two_steps, config, num_ranks=1)
    assert count == count_parameters(config.model).total
    assert losses[1] < losses[0]


def two_steps(config: RunConfig) -> tuple[int, list[float]]:
    """Parameters of the built model, and nelbo of one batch before and after an update on it."""
    from megatron_dlm.ops.batch import TokenBatch
    from megatron_dlm.training.optimizer import build_optimizer, wrap_data_parallel
    from megatron_dlm.training.step import train_step

    tokens = torch.arange(4 * 17).remainder(600).reshape(4, 17) + 4
    batch = TokenBatch(tokens, torch.ones_like(tokens, dtype=torch.bool), torch.arange(4))
    with opened_model(
        config.parallel, config.model, config.objective, seed=0, optimizer=config.optimizer
    ) as opened:
        wrapped = wrap_data_parallel(opened.chunks, config.parallel, opened.parallel)
        optimizer = build_optimizer(
            wrapped, config.optimizer.for_batch(4), overlap_param_gather=True
        )
        training, _ = objectives_of(config)
        setup = opened.pass_of(wrapped, training)
        losses = []
        for _ in range(2):
            train_step(setup, optimizer, [batch])
            losses.append(setup.metrics.reduce()["nelbo"])
        return sum(weight.numel() for weight in opened.chunk.parameters()), losses
