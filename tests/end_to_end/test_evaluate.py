"""`megatron-dlm evaluate` on trained runs: against validation in training, and through lm-eval."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command_line import arguments, metrics, run_here, start
from tiny_corpus import TinyCorpus

from megatron_dlm.config.objective import ObjectiveConfig
from megatron_dlm.data.loader import read_micro_batch
from megatron_dlm.data.open_corpus import CorpusSettings, open_corpus
from megatron_dlm.data.tokenization.tokenizer import load_tokenizer
from megatron_dlm.evaluation.likelihood import MaskDraws, Request, score
from megatron_dlm.evaluation.shards import evaluate_shards
from megatron_dlm.hf.load import load_model
from megatron_dlm.launch.quickstart_corpus import write_corpus
from megatron_dlm.launch.quickstart_tasks import write_tasks
from megatron_dlm.objectives.base import micro_batch_loss
from megatron_dlm.objectives.build import build_objective
from megatron_dlm.ops.counter_rng import Stream
from megatron_dlm.scaling.run_evaluations import with_evaluations

ROOT = Path(__file__).resolve().parents[2]
EXAMPLE = ROOT / "examples" / "04_evaluate"
NUM_WINDOWS = 24
Runs = dict[str, Path]


@pytest.fixture(scope="module")
def runs(tiny_corpus: TinyCorpus, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """Tiny trained runs; `packed` keeps attention inside documents."""
    root = tmp_path_factory.mktemp("evaluated")
    kinds: dict[str, dict[str, Any]] = {
        "ar": {"objective__kind": "autoregressive"},
        "masked": {"objective__weighting": "count"},
        "hybrid": {"objective__kind": "hybrid"},
        "block": {"objective__kind": "block", "objective__block_size": 4},
        "ar_packed": {"objective__kind": "autoregressive", "data__packing": "pack"},
        "packed": {"objective__weighting": "count", "data__packing": "pack"},
    }
    for name, changes in kinds.items():
        settings = {"train__steps": 40, "validation__num_samples": NUM_WINDOWS, **changes}
        settings |= {"validation__interval_steps": 40, "checkpoint__interval_steps": 40}
        assert run_here(arguments(tiny_corpus, root / name, **settings)) == 0
    return {name: root / name for name in kinds}


@pytest.mark.parametrize("name", ["ar", "ar_packed"])
def test_the_nll_is_that_of_trainings_validation(
    name: str, runs: Runs, tiny_corpus: TinyCorpus
) -> None:
    trained = metrics(runs[name], "valid")[40]["nelbo"]
    score = evaluate_shards(load_model(runs[name]), str(tiny_corpus.valid), limit=NUM_WINDOWS)
    assert score.metric == "nll"
    assert score.nats_per_token == pytest.approx(trained, rel=1e-5)
    assert score.perplexity == pytest.approx(math.exp(trained), rel=1e-4)
    assert (score.noise_standard_error, score.levels) == (0, [])
    assert score.standard_error > 0
    # Rows of one batch, or each by itself, and whatever comes after: the same numbers.
    alone = evaluate_shards(
        load_model(runs[name]), str(tiny_corpus.valid), limit=NUM_WINDOWS, batch_size=1
    )
    assert alone.nats_per_token == pytest.approx(score.nats_per_token, rel=1e-6)


@pytest.mark.parametrize("name", ["masked", "packed"])
def test_the_nelbo_agrees_with_trainings_validation(
    name: str, runs: Runs, tiny_corpus: TinyCorpus
) -> None:
    trained = metrics(runs[name], "valid")[40]["nelbo"]
    model, prefix = load_model(runs[name]), str(tiny_corpus.valid)
    score = evaluate_shards(model, prefix, limit=NUM_WINDOWS, num_samples=16)
    assert score.metric == "nelbo"
    # Training's has one draw per window, as the 16 here: an error larger by the root of 16.
    error = score.noise_standard_error * math.sqrt(16 + 1)
    assert 0 < error < 0.2 * trained
    assert abs(score.nats_per_token - trained) < 3 * error
    assert score.standard_error > score.noise_standard_error > 0
    more = evaluate_shards(model, prefix, limit=NUM_WINDOWS, num_samples=64, seed=1)
    spread = math.hypot(score.noise_standard_error, more.noise_standard_error)
    assert abs(score.nats_per_token - more.nats_per_token) < 3 * spread
    assert 0.35 < more.noise_standard_error / score.noise_standard_error < 0.7  # the half
    levels = [point.level for point in more.levels]
    assert len(levels) == 20
    assert levels == sorted(levels)
    draws = np.array([point.num_draws for point in more.levels])
    assert draws.sum() == NUM_WINDOWS * 64
    loss = np.array([point.nats_per_masked_token for point in more.levels])
    tolerance = 1e-9 if name == "masked" else 0.02  # packed windows differ in their tokens
    assert (loss * draws).sum() / draws.sum() == pytest.approx(more.nats_per_token, rel=tolerance)


def test_the_bound_is_that_of_the_time_form(runs: Runs, tiny_corpus: TinyCorpus) -> None:
    """The 1/t bound of the objective itself, at many seeds, without our count form."""
    model, num_windows = load_model(runs["masked"]), 8
    assert model.mask_token_id is not None
    size, mask = model.model.config.vocab_size, model.mask_token_id
    objective = build_objective(
        ObjectiveConfig(weighting="elbo"),
        vocab_size=size,
        mask_token_id=mask,
        batch_size=num_windows,
        training=False,
    )
    settings = CorpusSettings(seq_length=32, seed=1234, vocab_size=size, mask_token_id=mask)
    corpus = open_corpus({str(tiny_corpus.valid): 1.0}, settings)
    batch = read_micro_batch(corpus, 0, num_windows)
    found = []
    for seed in range(200):
        inputs = objective.prepare(batch, seed, Stream.VALIDATION)
        logits = model.model(inputs.tokens).logits[inputs.scored]
        total, count = micro_batch_loss(objective, logits, inputs, None).metrics["nelbo"]
        found.append(float(total / count))
    score = evaluate_shards(model, str(tiny_corpus.valid), limit=num_windows, num_samples=64)
    error = math.hypot(np.std(found) / math.sqrt(len(found)), score.noise_standard_error)
    assert abs(score.nats_per_token - np.mean(found)) < 3 * error
    assert error < 0.03 * score.nats_per_token


def test_bits_per_byte_count_the_bytes_of_the_scored_text(
    runs: Runs, tiny_corpus: TinyCorpus
) -> None:
    """By hand: the bytes that the tokens decode to, one by one."""
    model, tokenizer = load_model(runs["masked"]), load_tokenizer(tiny_corpus.tokenizer)
    score = evaluate_shards(model, str(tiny_corpus.valid), limit=3)
    size = model.model.config.vocab_size
    settings = CorpusSettings(
        seq_length=32, seed=1234, vocab_size=size, mask_token_id=model.mask_token_id
    )
    corpus = open_corpus({str(tiny_corpus.valid): 1.0}, settings)
    batch = read_micro_batch(corpus, 0, 3)
    scored = batch.tokens[:, :-1][batch.valid[:, :-1]].tolist()
    assert score.num_tokens == len(scored) == 3 * 32
    around = tokenizer.encode("a")  # a blank at the beginning is text too, inside a document
    text = [tokenizer.decode([*around, token])[1:] for token in scored]
    assert score.num_bytes == sum(len(part.encode()) for part in text)
    assert score.bits_per_byte == pytest.approx(
        score.nats_per_token * score.num_tokens / score.num_bytes / math.log(2)
    )


def test_the_command_writes_what_it_prints(
    runs: Runs, tiny_corpus: TinyCorpus, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--data", str(tiny_corpus.valid), str(tiny_corpus.other), "--limit=6"]
    for name, metric in (("ar", "nll"), ("masked", "nelbo")):
        output = tmp_path / name
        command = ["evaluate", "--model", str(runs[name]), *flags, "--output_dir", str(output)]
        assert run_here(command) == 0
        shown = capsys.readouterr().out
        report = json.loads((output / "data.json").read_text())
        assert [row["prefix"] for row in report["data"]] == [
            str(tiny_corpus.valid),
            str(tiny_corpus.other),
        ]
        for row in report["data"]:
            assert row["metric"] == metric
            assert row["num_windows"] == 6
            assert f"{row['nats_per_token']:.4f} ± {row['standard_error']:.4f}" in shown
        assert ("by noise level" in shown) == (name == "masked")
        figure = output / "noise_levels.png"
        assert figure.exists() == (name == "masked")
        if name == "masked":
            assert figure.read_bytes().startswith(b"\x89PNG")
            assert len(report["data"][0]["levels"]) > 10


def test_bad_input_is_named(
    runs: Runs, tiny_corpus: TinyCorpus, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, data = ["--model", str(runs["ar"])], ["--data", str(tiny_corpus.valid)]
    cases: list[tuple[list[str], str]] = [
        (model, "nothing to evaluate; give data (prefixes of shards) or tasks"),
        (["--model", str(tmp_path / "no"), *data], "no is no directory"),
        ([*model, "--data", str(tmp_path / "none")], "none"),
        ([*model, *data, "--limit=0"], "evaluate.limit is 0"),
        ([*model, *data, "--num_samples=-1"], "evaluate.num_samples is -1"),
        ([*model, *data, "--num_fewshot=2"], "num_fewshot has no meaning without tasks"),
    ]
    for flags, message in cases:
        assert run_here(["evaluate", *flags]) == 2
        error = capsys.readouterr().err
        assert message in error
        assert len(error.strip().splitlines()) == 1


def test_a_diffusion_model_without_mask_is_refused(runs: Runs, tiny_corpus: TinyCorpus) -> None:
    model = replace(load_model(runs["masked"]), mask_token_id=None)
    with pytest.raises(ValueError, match="is a masked model but names no mask id"):
        evaluate_shards(model, str(tiny_corpus.valid))


def test_answers_that_cannot_be_scored_are_refused(runs: Runs) -> None:
    ar, masked = load_model(runs["ar"]), load_model(runs["masked"])
    word = (10,) * 20
    for model, request, message in (
        (masked, Request((5,), ()), "an answer is empty"),
        (ar, Request((), (5,)), "needs a prompt of at least one token"),
        (masked, Request((5,) * 13, word), "33 tokens; .* takes 32"),
        (ar, Request((5,) * 14, word), "34 tokens; .* takes 33"),
    ):
        with pytest.raises(ValueError, match=message):
            score(model, [request])
    assert score(masked, [Request((5,) * 12, word)])[0].log_prob < 0
    assert score(ar, [Request((5,) * 13, word)])[0].log_prob < 0


@pytest.mark.parametrize("name", ["ar", "masked", "hybrid", "block"])
def test_the_adapter_answers_as_the_likelihood_does(name: str, runs: Runs) -> None:
    pytest.importorskip("lm_eval", reason="lm-eval is the extra [eval]")
    from lm_eval.api.instance import Instance

    from megatron_dlm.evaluation.lm_eval_adapter import MegatronDLM

    model, draws = load_model(runs[name]), MaskDraws(6, seed=2)
    adapter = MegatronDLM.of(model, draws=draws, batch_size=5, max_new_tokens=8)
    tokenizer = model.tokenizer
    assert tokenizer is not None
    assert tokenizer.eod_id is not None

    def ask(kind: Any, *pairs: Any) -> list[Any]:
        requests = [Instance(kind, {}, pair, 0) for pair in pairs]
        return getattr(adapter, kind)(requests)

    long = "def insort_right(a, x, lo=0, hi=None, *, key=None):\n    return a " * 6
    whole = tuple(tokenizer.encode("import heapq"))
    length = len(tokenizer.encode("import"))
    expected = score(
        model,
        [Request(whole[:length], whole[length:]), Request((tokenizer.eod_id,), whole)],
        draws=draws,
        with_greedy=True,
    )
    found = ask(
        "loglikelihood", ("import ", "heapq"), ("", "import heapq"), (long, "x"), ("x", long)
    )
    for (log_prob, is_greedy), one in zip(found, expected, strict=False):
        assert log_prob == pytest.approx(one.log_prob, rel=1e-5)
        assert is_greedy == one.is_greedy
    assert all(math.isfinite(log_prob) and log_prob < 0 for log_prob, _ in found)
    rolling = ask("loglikelihood_rolling", ("import heapq",), (long,))
    assert rolling[0] == pytest.approx(expected[1].log_prob, rel=1e-5)
    assert rolling[1] < rolling[0]
    texts = ask(
        "generate_until",
        ("import ", {"until": ["e"], "max_gen_toks": 6}),
        (long, {"until": [], "max_gen_toks": 6}),
        ("", {}),
        ("import ", {"do_sample": True, "temperature": 0.7, "max_gen_toks": 6}),
    )
    assert "e" not in texts[0]
    assert all(len(tokenizer.encode(text)) <= 10 for text in texts)
    assert texts == ask(
        "generate_until",
        ("import ", {"until": "e", "max_gen_toks": 6}),
        (long, {"max_gen_toks": 6}),
        ("", {"max_gen_toks": 8}),
        ("import ", {"do_sample": True, "temperature": 0.7, "max_gen_toks": 6}),
    )


@pytest.fixture(scope="module")
def offline(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Environment of a process that reads tasks: nothing from the network, no cache of the user."""
    pytest.importorskip("lm_eval", reason="lm-eval is the extra [eval]")
    cache = tmp_path_factory.mktemp("cache")
    return {"HF_HOME": str(cache), "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tasks of the quickstart."""
    root = tmp_path_factory.mktemp("tasks")
    write_corpus(root / "train.jsonl", root / "valid.jsonl")
    write_tasks(root / "valid.jsonl", root / "tasks")
    return root / "tasks"


def test_the_example_shows_what_it_says(
    runs: Runs, tiny_corpus: TinyCorpus, tasks: Path, tmp_path: Path, offline: dict[str, str]
) -> None:
    """Both models through lm-eval: options, whole texts and generation."""
    command = [sys.executable, str(EXAMPLE / "run.py"), "--limit=6"]
    command += [f"--ar={runs['ar']}", f"--masked={runs['masked']}"]
    command += [f"--data={tiny_corpus.valid}", f"--tasks={tasks}", f"--output={tmp_path / 'out'}"]
    ended = subprocess.run(
        command, env={**os.environ, **offline}, capture_output=True, text=True, check=False
    )
    assert ended.returncode == 0, ended.stderr + ended.stdout

    def shape(text: str) -> list[str]:
        lines = [re.sub(r"-?\d+\.\d+", "N", line).split() for line in text.splitlines()]
        return [" ".join(line) for line in lines if line][:-1]  # the last one names a path

    expected = (EXAMPLE / "expected_output.txt").read_text()
    assert shape(ended.stdout) == shape(expected)
    for name in ("autoregressive", "masked"):
        directory = tmp_path / "out" / name
        report = json.loads((directory / "tasks.json").read_text())
        results = report["results"]
        assert 0 <= results["next_line"]["acc,none"] <= 1
        assert results["library_text"]["bits_per_byte,none"] > 0
        assert results["say_it_again"]["exact_match,none"] >= 0
        assert report["delta_nll"]["next_line"]["num_questions"] == 6
        samples = (directory / "samples_next_line.jsonl").read_text().splitlines()
        assert len(samples) == 6
        assert all(float(answer[0]) < 0 for answer in json.loads(samples[0])["filtered_resps"])
        texts = (directory / "samples_say_it_again.jsonl").read_text().splitlines()
        assert all("\n" not in json.loads(line)["resps"][0][0] for line in texts)


def test_lm_evals_own_command_line_gives_the_same(
    runs: Runs,
    tasks: Path,
    tmp_path: Path,
    offline: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    flags = ["--tasks", "next_line", "--include_path", str(tasks), "--limit", "5"]
    module = "megatron_dlm.evaluation.lm_eval_command"
    command = [sys.executable, "-m", module, "--model", "megatron_dlm", *flags]
    command += ["--model_args", f"path={runs['masked']},num_samples=4,seed=3"]
    command += ["--batch_size", "7", "--output_path", str(tmp_path / "theirs")]
    environment = {**os.environ, **offline}
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    (path,) = (tmp_path / "theirs").rglob("results_*.json")
    theirs = json.loads(path.read_text())
    assert theirs["config"]["objective"] == "masked"
    own = ["evaluate", "--model", str(runs["masked"]), *flags, "--num_samples=4", "--seed=3"]
    for name, value in offline.items():
        monkeypatch.setenv(name, value)
    job = start([*own, "--every_checkpoint", "true"], tmp_path / "log")
    assert job.end().code == 0
    written = runs["masked"] / "evaluations" / "iter_0000040" / "tasks.json"
    ours = json.loads(written.read_text())
    (row,) = with_evaluations([{"step": 40, "split": "valid"}], runs["masked"], [])
    for name in ("acc", "acc_norm"):
        expected = theirs["results"]["next_line"][f"{name},none"]
        assert ours["results"]["next_line"][f"{name},none"] == expected
        assert row[f"next_line/{name}"] == expected, "a column of the table of a study"
    assert row["next_line/delta_nll"] == ours["delta_nll"]["next_line"]["nats"]


def test_every_checkpoint_of_a_run(
    tiny_corpus: TinyCorpus, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each into its folder; again, only what is new; other settings are not mixed in."""
    settings = {"train__steps": 4, "checkpoint__interval_steps": 2, "checkpoint__keep_last": 0}
    train = arguments(tiny_corpus, tmp_path / "run", objective__kind="autoregressive", **settings)
    assert run_here(train) == 0
    capsys.readouterr()
    command = ["evaluate", "--model", str(tmp_path / "run"), "--every_checkpoint", "true"]
    command += ["--data", str(tiny_corpus.valid), "--limit"]
    assert run_here([*command, "3"]) == 0
    assert f"{tmp_path / 'run'}: 2 of 2 checkpoints to evaluate" in capsys.readouterr().out
    folder = tmp_path / "run" / "evaluations"
    paths = [folder / f"iter_000000{step}" / "data.json" for step in (2, 4)]
    reports = [json.loads(path.read_text()) for path in paths]
    assert [report["step"] for report in reports] == [2, 4]
    for report in reports:
        model = load_model(tmp_path / "run", step=report["step"])
        alone = evaluate_shards(model, str(tiny_corpus.valid), limit=3)
        assert report["data"][0]["nats_per_token"] == pytest.approx(alone.nats_per_token, rel=1e-9)
    assert reports[0]["data"][0]["nats_per_token"] > reports[1]["data"][0]["nats_per_token"]
    before = paths[0].stat()
    paths[1].unlink()
    assert run_here([*command, "3"]) == 0
    assert "1 of 2 checkpoints to evaluate\nstep 4\n" in capsys.readouterr().out
    assert json.loads(paths[1].read_text()) == reports[1]
    assert paths[0].stat() == before
    assert run_here([*command, "2"]) == 2
    error = capsys.readouterr().err
    remedy = "give another output_dir, or remove it"
    assert error.endswith(f"{paths[0]} was made with limit 3, not 2; {remedy}\n")
    paths[0].write_text("{")
    assert run_here([*command, "3"]) == 2
    assert f"{paths[0]} does not say how it was made; {remedy}" in capsys.readouterr().err
    assert run_here([*command, "3", "--step=2"]) == 2
    assert "step 2 and every_checkpoint exclude each other" in capsys.readouterr().err
