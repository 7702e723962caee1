"""Every study under examples/studies: each of its runs could start, and the smallest one trains.

The full sizes are checked against what the papers say of them, the toys against the full sizes.
"""

from __future__ import annotations

import random
import re
import runpy
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
from rank_pool import RankPool
from sources import ROOT
from tiny_corpus import TinyCorpus

from megatron_dlm.config.derive import resolve, step_tokens, total_steps
from megatron_dlm.config.parse import parse
from megatron_dlm.config.schema import RunConfig
from megatron_dlm.models.accounting import count_parameters, training_flops_per_token
from megatron_dlm.scaling.study import Study, read_study
from megatron_dlm.training.schedule import learning_rate

FOLDER = ROOT / "examples/studies"
NAMES = [path.stem for path in sorted(FOLDER.glob("*.yaml")) if "_base" not in path.stem]
FULL = [name for name in NAMES if not name.startswith("toy_")]
TOYS = [name for name in NAMES if name.startswith("toy_")]
# Of unique_budgets.yaml, and of noise_grid.yaml, which has too many axes for one toy.
PARTS = {"toy_accuracy", "toy_isoflop", "toy_learning_rate_transfer", "toy_noise_types"}
SDL_STEPS = 183_106  # the paper's 183,105 with the last one whole


@pytest.fixture(scope="module", autouse=True)
def place(tiny_corpus: TinyCorpus, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working folder with the tokenizer that the toys name."""
    folder = tmp_path_factory.mktemp("studies")
    shutil.copytree(tiny_corpus.tokenizer, folder / "toy/tokenizer")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for name in NAMES:
            configs_of(name)
    return folder


@cache
def study_of(name: str) -> Study:
    return read_study(FOLDER / f"{name}.yaml")


@cache
def configs_of(name: str) -> dict[str, RunConfig]:
    study = study_of(name)
    return study.configs(Path("runs"), study.num_gpus)


def steps_of(config: RunConfig) -> int:
    windows = -(-(config.data.unique_tokens or 0) // config.model.seq_length)
    return total_steps(config, windows)


def from_files(*files: str) -> RunConfig:
    """The configuration of these examples, with the output directory of no study."""
    flags = [word for file in files for word in ("--config", file)]
    return resolve(parse(RunConfig, flags, "test"))


def anywhere(config: RunConfig) -> RunConfig:
    return replace(config, train=replace(config.train, output_dir="x"))


@pytest.mark.parametrize("name", NAMES)
def test_its_runs_could_start(name: str) -> None:
    study, configs = study_of(name), configs_of(name)
    assert study.name == name
    assert study.question.endswith("?")
    assert len(configs) == len(study.runs)
    assert study.figures, "a study says what is drawn of it"


@pytest.mark.parametrize("name", NAMES)
def test_checkpoints_that_it_goes_on_from_are_kept(name: str) -> None:
    configs = configs_of(name)
    for run in study_of(name).runs:
        start = configs[run.name].train.start_from
        assert bool(run.after) == (start is not None)
        if start is None:
            continue
        (parent,) = (configs[parent] for parent in run.after)
        step = int(start[-7:])
        kept = parent.checkpoint
        is_kept = kept.keep_every_steps and step % kept.keep_every_steps == 0
        assert step == steps_of(parent) or (step % kept.interval_steps == 0 and is_kept)
        assert step < steps_of(configs[run.name])
        same = ("model", "data", "objective", "optimizer")
        for section in same:
            assert getattr(parent, section) == getattr(configs[run.name], section)
        rates = [rate_at(config, step) for config in (parent, configs[run.name])]
        assert rates[0] == rates[1], "the decay begins where the other run is left"
        assert rate_at(configs[run.name], step + 1) < rates[0]


def rate_at(config: RunConfig, step: int) -> float:
    return learning_rate(step, steps_of(config), config.optimizer, config.schedule)


def test_every_study_has_a_toy() -> None:
    assert {f"toy_{name}" for name in FULL} | PARTS == set(TOYS)
    for name in FULL:
        axes, of_toy = study_of(name).axes, study_of(f"toy_{name}").axes
        assert set(axes) <= {*of_toy, "size"}, name  # toy_cooldown has one size
        assert set(of_toy) <= {*axes, "seed"}, name


@pytest.mark.parametrize("document", ["examples/studies/README.md", "docs/science.md"])
def test_documents_name_every_study(document: str) -> None:
    named = set(re.findall(r"`(\w+)\.yaml`", (ROOT / document).read_text(encoding="utf-8")))
    assert set(NAMES) <= named


@pytest.mark.parametrize("name", TOYS)
def test_the_smallest_run_of_a_toy_trains(
    name: str, ranks: RankPool, tiny_corpus: TinyCorpus, tmp_path: Path
) -> None:
    configs = [config for config in configs_of(name).values() if config.train.start_from is None]
    smallest = min(
        configs,
        key=lambda config: (
            training_flops_per_token(config.model, config.objective).total * steps_of(config)
        ),
    )
    config = replace(
        smallest,
        data=replace(
            smallest.data,
            train={str(tiny_corpus.train): 1.0},
            valid={str(tiny_corpus.valid): 1.0},
            tokenizer=str(tiny_corpus.tokenizer),
            unique_tokens=512,
        ),
        schedule=replace(smallest.schedule, kind="constant", warmup_steps=1),
        train=replace(smallest.train, steps=2, epochs=None, output_dir=str(tmp_path / "run")),
        validation=replace(smallest.validation, interval_steps=2, num_samples=2),
    )
    ranks.run(train_here, config, num_ranks=1)
    lines = (tmp_path / "run/metrics.jsonl").read_text().splitlines()
    assert '"split":"valid"' in lines[-1]
    assert (tmp_path / "run/checkpoints/iter_0000002").is_dir()


def train_here(config: RunConfig) -> None:
    from megatron_dlm.runtime.device import open_device
    from megatron_dlm.runtime.parallel import laid_out
    from megatron_dlm.training.train import train

    device = open_device("cpu")
    with laid_out(config.parallel) as parallel:
        train(config, device, parallel)


def test_unique_budgets() -> None:
    configs = configs_of("unique_budgets")
    assert len(configs) == 10
    files = {
        "0.5b-192e": "0b5_192e",
        "1b-96e": "1b_96e",
        "1.5b-64e": "1b5_64e",
        "10b-9.6e": "10b_9e6",
        "96b-1e": "96b_1e",
    }
    for budget, file in files.items():
        for kind in ("ar", "masked"):
            example = f"{ROOT}/examples/configs/super_data_learners/{file}_{kind}.yaml"
            ours = configs[f"u{budget}_{kind}"]
            assert anywhere(ours) == anywhere(from_files("preset:sdl_1b", example))
            assert count_parameters(ours.model).non_embedding == pytest.approx(0.996e9, rel=1e-3)
            assert steps_of(ours) == SDL_STEPS
            assert steps_of(ours) * step_tokens(ours) == pytest.approx(96e9, rel=1e-5)


def test_data_quality() -> None:
    configs = configs_of("data_quality")
    assert len({tuple(config.data.train) for config in configs.values()}) == 3
    assert {steps_of(config) for config in configs.values()} == {SDL_STEPS}


def test_model_size() -> None:
    configs = configs_of("model_size")
    sizes = {"1b": 1.086e9, "2b": 2.03e9, "4b": 4.01e9, "8b": 7.92e9}
    for size, parameters in sizes.items():
        for kind in ("ar", "masked"):
            config = configs[f"{size}_{kind}"]
            assert count_parameters(config.model).total == pytest.approx(parameters, rel=2e-3)
            assert config.model.head_size == 128
            assert steps_of(config) == SDL_STEPS


def test_sparsity() -> None:
    configs = configs_of("sparsity")
    for kind in ("ar", "masked"):
        example = f"{ROOT}/examples/configs/moe/8b1a_1b_96e_{kind}.yaml"
        ours = configs[f"moe-8b1a_{kind}"]
        assert anywhere(ours) == anywhere(from_files("preset:sdl_1b", example))
        large = configs_of("model_size")[f"8b_{kind}"]
        assert anywhere(configs[f"dense-8b_{kind}"]) == anywhere(large)


@pytest.mark.parametrize(
    ("name", "field", "rates", "unique"),
    [
        (
            "ar_input_masking",
            lambda config: config.objective.input_masking_ratio,
            [0.0, 0.1, 0.3, 0.5, 0.7, 0.9],
            10**9,
        ),
        (
            "ar_dropout",
            lambda config: config.model.hidden_dropout,
            [0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.7, 0.9],
            5 * 10**8,
        ),
    ],
)
def test_what_is_done_to_ar(
    name: str, field: Callable[[RunConfig], float], rates: list[float], unique: int
) -> None:
    for study, scale in ((name, 1.0), (f"toy_{name}", None)):
        configs = configs_of(study).values()
        ar = [config for config in configs if config.objective.kind == "autoregressive"]
        assert sorted({field(config) for config in ar}) == rates
        for config in ar:
            assert config.model.attention_dropout == config.model.hidden_dropout
        others = {field(config) for config in configs if config.objective.kind == "masked"}
        assert others == {0.0}
        if scale is not None:
            assert {config.data.unique_tokens for config in configs} == {unique}
            assert {steps_of(config) for config in configs} == {SDL_STEPS}


def test_coder_two_stage() -> None:
    configs = configs_of("coder_two_stage")
    for kind in ("ar", "masked"):
        constant, anneal = configs[f"{kind}_constant"], configs[f"{kind}_anneal"]
        assert count_parameters(anneal.model).total == pytest.approx(1.733e9, rel=1e-3)
        assert step_tokens(anneal) == 2**22
        assert steps_of(constant) == 319_456
        assert steps_of(constant) * 2**22 == pytest.approx(134 * 10e9, rel=1e-3)
        assert steps_of(anneal) * 2**22 == pytest.approx(144 * 10e9, rel=1e-5)
        assert rate_at(anneal, steps_of(anneal)) == pytest.approx(2e-5)


def test_epochs() -> None:
    (long,) = configs_of("epochs_480").values()
    assert steps_of(long) == 915_529  # the paper's 915,527; here windows and steps are whole
    assert long.objective.kind == "masked"
    for study, low, high in (("epochs_optimum", 60, 580), ("toy_epochs_optimum", 135, 535)):
        for config in configs_of(study).values():
            unique, size = config.data.unique_tokens, count_parameters(config.model).total
            assert unique is not None
            best = 1100 * (unique / 1e12) ** 0.39 / (size / 1e10) ** 0.55
            assert low * 0.98 < best < high * 1.02
            epochs = steps_of(config) * step_tokens(config) / unique
            assert epochs == pytest.approx(1024 if study == "epochs_optimum" else 640, rel=1e-3)


def test_the_noise_grid_is_the_released_list_of_runs() -> None:
    published = {
        8: {0.1, 0.2, 0.3},
        16: {0.2, 0.3, 0.5},
        32: {0.2, 0.3, 0.5},
        64: {0.3, 0.5, 1.0},
        128: {0.3, 0.5, 1.0},
        256: {0.5, 1.0},
        512: {0.5, 1.0, 2.0},
        1024: {1.0, 2.0},
    }
    configs = configs_of("noise_grid").values()
    found: dict[int, set[float]] = {}
    for config in configs:
        batch = config.train.global_batch_size
        found.setdefault(batch, set()).add(config.optimizer.lr)
        assert config.train.steps == (50_000 if batch >= 256 else 100_000)
        beta2 = config.optimizer.for_batch(batch).adam_beta2
        assert beta2 == (0.98 if batch >= 256 else 0.99)
        assert config.schedule.kind == "constant"
    assert found == published
    pairs = sum(len(rates) for batch, rates in published.items() if batch < 1024)
    assert len(configs) == 510 == 5 * 5 * pairs + 5 * len(published[1024])
    large = [config for config in configs if config.train.global_batch_size == 1024]
    assert {config.model.hidden_size for config in large} == {1536}
    assert len({config.objective.noise_type for config in configs}) == 5
    sizes = {round(count_parameters(config.model).non_embedding / 1e5) for config in configs}
    assert [size / 252 for size in sorted(sizes)] == pytest.approx(
        [1, 492 / 252, 851 / 252, 2016 / 252, 5667 / 252], rel=5e-3
    )


def test_scaled_runs() -> None:
    configs = configs_of("scaled_runs")
    tokens = {
        name: steps_of(config) * step_tokens(config) / 1e9 for name, config in configs.items()
    }
    assert tokens == pytest.approx(
        {"3b-masked": 73.9, "3b-uniform": 70.8, "10b-uniform": 182.5}, rel=1e-3
    )
    for config in configs.values():
        assert config.schedule.decay_fraction == 0.2
        assert config.optimizer.lr == pytest.approx(
            10**-2.06 * step_tokens(config) ** 0.3412, abs=0.01
        )


def test_cooldown() -> None:
    configs = configs_of("cooldown").values()
    assert len(configs) == 80
    assert {steps_of(config) * config.train.global_batch_size for config in configs} == {2_048_000}
    cooled = [config for config in configs if config.train.start_from]
    assert len(cooled) == 40
    assert {rate_at(config, steps_of(config)) for config in cooled} == {0.0}
    for batch, rates in {16: {0.1, 0.2, 0.3, 0.5}, 256: {0.3, 0.5, 1.0, 2.0}}.items():
        of_batch = [config for config in configs if config.train.global_batch_size == batch]
        assert {config.optimizer.lr for config in of_batch} == rates


def test_the_toys_keep_the_epochs() -> None:
    """Unique tokens, and how often they are seen, are those of the full size."""
    for name in (
        *("unique_budgets", "data_quality", "model_size", "sparsity", "ar_input_masking"),
        *("ar_dropout", "epochs_480"),
    ):
        full, toy = (
            sorted({epochs_of(config) for config in configs_of(study).values()})
            for study in (name, f"toy_{name}")
        )
        assert toy == pytest.approx(full, rel=2e-3), name
    coder = configs_of("toy_coder_two_stage").values()
    assert {round(epochs_of(config)) for config in coder} == {134, 144}


def epochs_of(config: RunConfig) -> float:
    assert config.data.unique_tokens is not None
    return steps_of(config) * step_tokens(config) / config.data.unique_tokens


def test_the_toy_budgets_are_five_by_two_by_three() -> None:
    study = study_of("toy_unique_budgets")
    assert study.axes == ("seed", "unique", "objective")
    assert len(study.runs) == 30


def test_the_tiers_of_quality_keep_all_words() -> None:
    shuffled = runpy.run_path(str(FOLDER / "toy_tiers.py"))["shuffled"]
    text = "\n".join(f"def word{n}(a{n}): return  {n} + a{n}" for n in range(500))
    assert shuffled(text, share=0.0, generator=random.Random(0)) == text
    for share in (0.1, 0.3):
        result = shuffled(text, share=share, generator=random.Random(0))
        assert result == shuffled(text, share=share, generator=random.Random(0))
        words, others = (re.findall(r"\w+", each) for each in (text, result))
        assert sorted(words) == sorted(others)
        assert re.sub(r"\w+", "w", result) == re.sub(r"\w+", "w", text)
        changed = sum(word != other for word, other in zip(words, others, strict=True))
        # "def" and "return", two of seven words, may take each other's place unseen.
        assert 0.75 * share < changed / len(words) < 1.1 * share


def test_the_toy_task_asks_for_the_next_word() -> None:
    questions = runpy.run_path(str(FOLDER / "toy_task.py"))["questions"]
    generator = random.Random(1)
    words = ["".join(generator.choices("abcdef", k=3 + n % 3)) for n in range(200)]
    texts = ["x" * 200 + " " + " ".join(generator.choices(words, k=60)) for _ in range(600)] + [
        "short text"
    ]
    found = questions(texts)
    assert found == questions(texts)
    assert len(found) == 500
    for question in found:
        options = question["options"]
        assert len({*options}) == 4
        assert len({len(option) for option in options}) == 1
        assert len(question["context"]) == 32
        whole = question["context"] + options[question["right"]]
        assert any(whole in text for text in texts)
        assert not any(len(word) > 5 for word in options)
    counts = [[question["right"] for question in found].count(place) for place in range(4)]
    assert min(counts) > 80, "125 each but for chance"
    assert {question["context"].endswith(" ") for question in found} == {True}
