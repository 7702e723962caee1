"""preprocess_array.sbatch and sweep.sbatch."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import signal
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
from minislurm import MiniSlurm
from stub_run import StubRun, flags

from megatron_dlm.launch.slurm.queue import numbers_of
from megatron_dlm.launch.slurm.template import fill

KNOBS = {"VENV": "", "PYTHON": sys.executable}


def edited(checkout: Path, name: str, options: dict[str, str | None], **knobs: str) -> Path:
    """The template with the lines that a user edits."""
    path = checkout / "slurm" / f"{name}.sbatch"
    small = {"cpus-per-task": "1", "mem-per-cpu": "100"}
    path.write_text(fill(path.read_text(), {**small, **options}, {**KNOBS, **knobs}))
    return path


def ours(checkout: Path, *arguments: str) -> None:
    """Run one of our commands here."""
    start = [sys.executable, str(checkout / "slurm" / "start.py"), "megatron_dlm"]
    subprocess.run([*start, *arguments], check=True, capture_output=True)


@pytest.fixture
def text(own_checkout: Path) -> tuple[Path, list[str]]:
    """Four files of text, and the flags that make shards of them but for the output."""
    library = Path(sysconfig.get_paths()["stdlib"])
    folder = own_checkout / "text"
    folder.mkdir()
    lines = [json.dumps({"text": file.read_text()}) for file in sorted(library.glob("[a-c]*.py"))]
    for number in range(4):
        (folder / f"{number}.jsonl").write_text("\n".join(lines[number::4]) + "\n")
    tokenizer = folder / "tokenizer"
    words = ["--vocab_size=400", "--max_sentences=300", f"--output_dir={tokenizer}"]
    ours(own_checkout, "tokenizer", f"--input={folder}/0.jsonl", *words)
    inputs = json.dumps([str(folder / f"{number}.jsonl") for number in range(4)])
    return folder, [f"--input={inputs}", f"--tokenizer={tokenizer}", "--shard_size_bytes=100000"]


def test_array_of_four_with_a_task_killed(
    on_slurm: MiniSlurm, own_checkout: Path, text: tuple[Path, list[str]]
) -> None:
    folder, given = text
    edited(own_checkout, "preprocess_array", {})
    script = "slurm/preprocess_array.sbatch"
    output = f"--output_prefix={folder}/array"
    array = on_slurm.submit("--array=0-3", script, *given, output, cwd=own_checkout)
    # Task 2 is killed in the middle, with shards behind and before it.
    on_slurm.wait_until(lambda: list(folder.glob("array_*.bin")), "the first shard")
    on_slurm.wait_until(lambda: kill_preprocess_of(array, 2), "task 2")
    ends = [on_slurm.wait(f"{array}_{task}") for task in range(4)]
    log = (own_checkout / f"preprocess-{array}_2.out").read_text()
    assert [end["JobState"] for end in ends] == ["COMPLETED"] * 4, log
    assert [end["Restarts"] for end in ends] == ["0", "0", "1", "0"]
    assert "crash: preprocess ended with status 137" in log
    assert "crash 1 of 3 without progress; queued again" in log

    ours(own_checkout, "data", "merge", f"--output_prefix={folder}/array")
    ours(own_checkout, "preprocess", *given, f"--output_prefix={folder}/whole")
    for suffix in ("bin", "idx"):
        shards = {path.name[6:]: path.read_bytes() for path in folder.glob(f"array_*.{suffix}")}
        assert len(shards) > 4
        whole = {path.name[6:]: path.read_bytes() for path in folder.glob(f"whole_*.{suffix}")}
        assert shards == whole


def kill_preprocess_of(array: int, task: int) -> bool:
    """kill -9 of the command of one task of the array, once it runs."""
    wanted = {f"SLURM_ARRAY_JOB_ID={array}", f"SLURM_ARRAY_TASK_ID={task}", "SLURM_PROCID=0"}
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            environment = set((folder / "environ").read_text().split("\0"))
            command = (folder / "cmdline").read_text().split("\0")
            if wanted <= environment and command[1].endswith("start.py"):
                os.kill(int(folder.name), signal.SIGKILL)
                return True
    return False


def test_preprocess_with_a_mistake_is_not_tried_again(
    on_slurm: MiniSlurm, own_checkout: Path
) -> None:
    edited(own_checkout, "preprocess_array", {})
    given = ["--input=nowhere.jsonl", "--output_prefix=x", "--tokenizer=nowhere"]
    script = "slurm/preprocess_array.sbatch"
    array = on_slurm.submit("--array=0-1", script, *given, cwd=own_checkout)
    facts = on_slurm.wait(f"{array}_1")
    assert (facts["ExitCode"], facts["Restarts"]) == ("2:0", "0")
    log = (own_checkout / f"preprocess-{array}_1.out").read_text()
    assert "megatron-dlm preprocess: error: " in log


def test_sweep_trains_the_run_of_each_line(
    on_slurm: MiniSlurm, own_checkout: Path, tmp_path: Path
) -> None:
    (own_checkout / "base.yaml").write_text("objective: {mask_token_id: 255}\n")
    given = flags(tmp_path, train__output_dir=None)
    given = [word for word in given if word.startswith(("--model", "--data", "--train"))]
    words = shlex.join(given)
    (own_checkout / "list.txt").write_text(
        "# two runs\n"
        f"slow --config base.yaml {words} --optimizer.lr 1e-4\n\n"
        f"fast --config base.yaml {words} --optimizer.lr 3e-4  # three 'times'\n"
    )
    knobs = {"LIST": "list.txt", "SWEEP_DIR": "sweep", "MINIMUM_FREE_GB": "1"}
    edited(own_checkout, "sweep", {"gpus-per-node": None}, **knobs)
    array = on_slurm.submit("--array=0-2", "slurm/sweep.sbatch", cwd=own_checkout)
    ends = [on_slurm.wait(f"{array}_{task}") for task in range(3)]
    logs = [(own_checkout / f"sweep-{array}_{task}.out").read_text() for task in range(3)]
    assert [end["ExitCode"] for end in ends] == ["0:0", "0:0", "2:0"], logs
    assert "error: list.txt has no run number 2 (counted from 0)" in logs[2]
    for task, (name, rate) in enumerate([("slow", "lr: 0.0001"), ("fast", "lr: 0.0003")]):
        run = StubRun(own_checkout / "sweep" / name, own_checkout, on_slurm)
        assert run.steps() == list(range(1, 21))
        assert rate in (run.directory / "config.yaml").read_text()
        assert numbers_of(run.directory) == [f"{array}_{task}"], "to cancel one spares the other"


def test_the_list_of_a_study_trains_in_waves(
    on_slurm: MiniSlurm,
    own_checkout: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What `study plan` prints is what sbatch is told; quotes in the list are undone."""
    given = flags(tmp_path, train__output_dir=None)
    words = dict(pair.removeprefix("--").split("=", 1) for pair in given)
    shared = {key: word for key, word in words.items() if key[:5] in ("model", "data.", "objec")}
    study = {
        "name": "waves",
        "base": "base.yaml",
        "set": {**shared, "train.steps": 20, "data.train": {"shards of/it's": 1.0}},
        "axes": {
            "stage": {
                "second": {
                    "schedule.kind": "wsd",
                    "train.start_from": "{runs}/first/checkpoints/iter_0000010",
                },
                "first": {},
            }
        },
    }
    (own_checkout / "base.yaml").write_text("train: {device: cpu}\n")
    (own_checkout / "study.yaml").write_text(json.dumps(study))
    edited(own_checkout, "sweep", {"gpus-per-node": None}, MINIMUM_FREE_GB="1")
    monkeypatch.chdir(own_checkout)
    plan = ["study", "plan", "--study", "study.yaml", "--output_dir", "out"]
    start = [sys.executable, str(own_checkout / "slurm" / "start.py"), "megatron_dlm"]
    told = subprocess.run([*start, *plan], check=True, capture_output=True, text=True).stdout
    arrays: list[int] = []
    for line in told.splitlines():
        if " sbatch " in line:
            line = line.partition("#")[0].replace(":JOB", f":{arrays[-1]}" if arrays else "")
            before, after = line.split(" sbatch ")
            variables = dict(word.split("=", 1) for word in shlex.split(before))
            given = ["sbatch", "--parsable", *shlex.split(after)]
            answer = on_slurm.run(*given, check=True, cwd=own_checkout, **variables)
            arrays.append(int(answer.stdout))
    ends = [on_slurm.wait(f"{arrays[task]}_{task}") for task in range(2)]
    logs = [(own_checkout / f"sweep-{arrays[task]}_{task}.out").read_text() for task in range(2)]
    assert [end["ExitCode"] for end in ends] == ["0:0", "0:0"], logs
    assert ends[1]["StartTime"] >= ends[0]["EndTime"]
    config = (own_checkout / "out/runs/second/config.yaml").read_text()
    assert "start_from: out/runs/first/checkpoints/iter_0000010" in config
    assert "shards of/it's: 1.0" in config


@pytest.mark.parametrize(
    ("name", "given", "status", "said"),
    [
        ("convert", ["--checkpoint=a", "--output_dir=b", "--print_config"], "0:0", "checkpoint: a"),
        ("convert", ["--checkpint=a"], "2:0", "unknown flag --checkpint; did you mean"),
        ("evaluate", ["--model=a", "--data=b", "--print_config"], "0:0", "model: a"),
        ("evaluate", ["--model=a"], "2:0", "error: nothing to evaluate"),
    ],
)
def test_status_and_message_of_single_jobs_arrive(
    name: str,
    given: list[str],
    status: str,
    said: str,
    *,
    on_slurm: MiniSlurm,
    own_checkout: Path,
) -> None:
    edited(own_checkout, name, {"mem": "100", "mem-per-cpu": None, "gpus-per-node": None})
    job = on_slurm.submit(f"slurm/{name}.sbatch", *given, cwd=own_checkout)
    assert on_slurm.wait(job)["ExitCode"] == status
    assert said in (own_checkout / f"{name}-{job}.out").read_text()
