"""`megatron-dlm slurm submit`: one command from a configuration to a queued run."""

from __future__ import annotations

from pathlib import Path

from megatron_dlm.config.slurm_commands import ChainConfig, SlurmSubmitConfig
from megatron_dlm.launch.slurm.queue import add_number, queue_of, slurm
from megatron_dlm.launch.slurm.render import CHECKOUT, write_submission


def submit(config: SlurmSubmitConfig) -> None:
    """Write the submission, submit it and show the job numbers."""
    numbers = submit_jobs(config)
    run = config.train.output_dir
    print(f"submitted {' '.join(map(str, numbers))}; watch: megatron-dlm slurm follow --run {run}")


def submit_jobs(config: SlurmSubmitConfig, *, checkout: Path = CHECKOUT) -> list[int]:
    """Numbers of the submitted jobs, in the order in which they will run.

    Raises ValueError when the run cannot start so, has jobs that are not waited for, or Slurm
    refuses it.
    """
    chain = config.chain
    run_directory = Path(config.train.output_dir).absolute()
    if chain.after is None:
        _refuse_second(run_directory)
    on_stop = "requeue" if chain.jobs == 1 else "exit"
    submission = write_submission(config, checkout=checkout, on_stop=on_stop)
    crashes = run_directory / "slurm" / "crashes.txt"
    if crashes.exists():  # whoever submits again has mended what crashed: the count begins anew
        crashes.rename(submission.folder / "crashes_before.txt")
    numbers: list[int] = []
    for options in _options(chain):
        dependency = _dependency(numbers[-1] if numbers else chain.after)
        # The job notes its number itself when it starts; until then only we know it.
        answer = slurm("sbatch", "--parsable", dependency, *options, str(submission.script))
        numbers.append(int(answer.split(";")[0]))
        add_number(run_directory, numbers[-1])
    return numbers


def _options(chain: ChainConfig) -> list[list[str]]:
    """Options of every call of sbatch."""
    if chain.kind == "array" and chain.jobs > 1:
        return [[f"--array=1-{chain.jobs}%1"]]
    return [[] for _ in range(chain.jobs)]


def _dependency(after: int | None) -> str:
    return "--dependency=" + (f"afterany:{after}," if after is not None else "") + "singleton"


def _refuse_second(run_directory: Path) -> None:
    if not (run_directory / "slurm" / "jobs.txt").exists():
        return
    queued = queue_of(run_directory)
    if queued:
        raise ValueError(
            f"{run_directory} already has {queued[0]}; end it first with `megatron-dlm slurm "
            f"cancel --run {run_directory}`"
        )
