"""The command line as users meet it: speed, exit status, one-line errors."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import megatron_dlm
from megatron_dlm import cli
from megatron_dlm.runtime.files import write_whole

ROOT = Path(megatron_dlm.__file__).parents[1]


def run(*argv: str, **environment: str) -> subprocess.CompletedProcess[str]:
    # The caller may itself be one rank of many.
    inherited = {
        k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "RANK", "WORLD_"))
    }
    return subprocess.run(
        [sys.executable, "-m", "megatron_dlm", *argv],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**inherited, **environment},
        timeout=240,
        check=False,
    )


def test_version_overview_and_unknown_command() -> None:
    assert run("--version").stdout == f"megatron-dlm {megatron_dlm.__version__}\n"
    overview = run("--help")
    assert overview.returncode == 0
    assert all(f"\n  {name} " in overview.stdout for name in cli.COMMANDS)
    assert run().returncode == 2
    unknown = run("trian")
    assert unknown.returncode == 2
    assert "unknown command; did you mean train?" in unknown.stderr


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_help_of_every_command(name: str) -> None:
    answer = run(*name.split(), "--help")
    assert answer.returncode == 0, answer.stderr
    assert f"usage: megatron-dlm {name}" in answer.stdout
    assert "--config" in answer.stdout


def test_overview_of_a_group_of_commands() -> None:
    overview = run("data", "--help")
    assert overview.returncode == 0
    assert "usage: megatron-dlm data COMMAND" in overview.stdout
    shown = {name for name in cli.COMMANDS if f"\n  {name} " in overview.stdout}
    assert shown == {f"data {word}" for word in ("inspect", "count", "verify", "split", "merge")}
    alone = run("data")
    assert (alone.returncode, alone.stdout) == (2, overview.stdout)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["data", "inspct"], "data inspct: error: unknown command; did you mean data inspect? ("),
        (["data", "--input", "x"], "data --input: error: unknown command"),
        (["dta", "inspect"], "dta: error: unknown command"),
        (["data", "count", "--inpt", "x"], "data count: error: unknown flag --inpt; did you mean"),
        (["data", "count"], "data count: error: input is missing"),
    ],
)
def test_misspelt_command_of_two_words(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(words) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"megatron-dlm {message}")
    assert error.count("\n") == 1
    if words[0] == "data" and "unknown command" in error:
        assert "(have: data inspect, data count, data verify, data split, data merge)" in error


def test_configuration_of_a_command_of_two_words(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["data", "merge", "--output_prefix", "a", "--input", "b", "c", "--print_config"]
    assert cli.main(words) == 0
    assert "output_prefix: a\ninput:\n- b\n- c\ncopy: false\n" in capsys.readouterr().out


def test_user_error_is_one_line_on_rank_zero_and_exit_2_everywhere() -> None:
    argv = ("train", "--config", "preset:sdl_1b", "--train.steps", "5000")
    argv += ("--data.train", "{a: 1}", "--parallel.tensor_model_parallel_size", "4")
    first = run(*argv, RANK="0", WORLD_SIZE="2")
    other = run(*argv, RANK="1", WORLD_SIZE="2")
    assert (first.returncode, other.returncode) == (2, 2)
    assert first.stderr.startswith("megatron-dlm train: error: the world size is 2, but tensor 4")
    assert first.stderr.count("\n") == 1
    assert other.stderr == other.stdout == ""


def test_print_config_is_resolved_and_can_be_used_again(tmp_path: Path) -> None:
    answer = run("train", "--config", "preset:tiny", "--model.vocab_size", "99", "--print_config")
    assert answer.returncode == 0, answer.stderr
    path = tmp_path / "config.yaml"
    path.write_text(answer.stdout)
    assert run("train", "--config", str(path), "--print_config").stdout == answer.stdout


def test_training_is_checked_before_torch_is_imported() -> None:
    program = (
        "import sys\n"
        "from megatron_dlm import cli\n"
        "flags = ['--model.vocab_size', '50', '--objective.mask_token_id', '3']\n"
        "config = cli._configure('train', ['--config', 'preset:tiny', *flags,\n"
        "    '--data.train', '{a: 1}', '--train.steps', '100'])\n"
        "assert config.train.steps == 100\n"
        "print(sorted({name.split('.')[0] for name in sys.modules} & {'torch', 'megatron'}))\n"
    )
    command = [sys.executable, "-c", program]
    answer = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert answer.stdout.strip() == "[]", answer.stdout + answer.stderr


def test_defects_keep_their_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def train_like_a_library(config: object) -> None:
        int("not a number")  # ValueError, raised in this module: not the user's

    train_with(monkeypatch, train_like_a_library)
    with pytest.raises(ValueError, match="invalid literal"):
        cli.main(["train"])


def test_missing_file_while_running_is_a_user_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def read_nothing(config: object) -> None:
        (tmp_path / "shard.bin").read_bytes()

    train_with(monkeypatch, read_nothing)
    monkeypatch.setenv("RANK", "1")
    assert cli.main(["train"]) == 2
    message = capsys.readouterr().err
    expected = f"{tmp_path / 'shard.bin'}: No such file or directory"
    assert message == f"megatron-dlm train (rank 1): error: {expected}\n"


def test_a_place_that_cannot_be_written_is_named_as_it_was_given(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    file = tmp_path / "file"
    file.touch()
    train_with(monkeypatch, lambda config: write_whole(file / "law.json", "{}"))
    assert cli.main(["train"]) == 2
    expected = f"megatron-dlm train: error: {file / 'law.json'}: Not a directory\n"
    assert capsys.readouterr().err == expected


def test_interrupted_is_a_line_and_status_130(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    train_with(monkeypatch, lambda config: signal.raise_signal(signal.SIGINT))
    assert cli.main(["train"]) == 130
    assert capsys.readouterr().err == "megatron-dlm train: interrupted\n"


def train_with(monkeypatch: pytest.MonkeyPatch, train: Callable[[object], None]) -> None:
    """Let the command `train` be this function."""
    monkeypatch.setattr(cli, "CHECKS", {})
    monkeypatch.setitem(cli.COMMANDS, "train", (*cli.COMMANDS["train"][:2], "x:y"))
    load = cli._load
    monkeypatch.setattr(cli, "_load", lambda name: train if name == "x:y" else load(name))
