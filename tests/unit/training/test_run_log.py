"""What a run writes: metrics.jsonl and its repair on resume, train.log, console, TensorBoard."""

from __future__ import annotations

import io
import json
import sys

import pytest
from rich.console import Console

from megatron_dlm.config.schema import LoggingConfig
from megatron_dlm.training.console import ConsoleLog
from megatron_dlm.training.log_entry import LogEntry, clock
from megatron_dlm.training.log_sinks import MetricsFile
from megatron_dlm.training.run_log import open_run_log

VALUES = {"loss": 2.5, "nelbo": 2.25, "lr": 1e-3, "tokens": 4096, "tokens_per_second": 12345.6}
PLAIN = LoggingConfig(tensorboard=False)


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_every_entry_is_on_disk_at_once(tmp_path, capsys):
    log = open_run_log(tmp_path, PLAIN, is_main=True, total_steps=10)
    log.log(1, "train", VALUES)
    log.log(1, "valid", {"nelbo": 3.0})
    log.note("hello [bold]")
    # Not closed: what a killed run leaves.
    assert read(tmp_path / "metrics.jsonl") == [
        {"step": 1, "split": "train", **VALUES},
        {"step": 1, "split": "valid", "nelbo": 3.0},
    ]
    text = (tmp_path / "train.log").read_text().splitlines()
    assert len(text) == 3
    assert text[0].endswith(
        "train step 1/10  loss 2.5000  nelbo 2.2500  lr 1.00e-03  tokens/s 12,346"
    )
    assert text[2].endswith("hello [bold]")
    console = capsys.readouterr().out
    assert "train step 1/10  loss 2.5000" in console
    assert "hello [bold]" in console
    log.close()


def test_other_ranks_write_nothing(tmp_path, capsys):
    with open_run_log(tmp_path, LoggingConfig(), is_main=False, total_steps=10) as log:
        log.log(1, "train", VALUES)
        log.note("hello")
    assert list(tmp_path.iterdir()) == []
    assert capsys.readouterr().out == ""


def test_not_a_number_stays_readable(tmp_path):
    with open_run_log(tmp_path, PLAIN, is_main=True, total_steps=10) as log:
        log.log(1, "train", {"loss": float("nan")})
    assert read(tmp_path / "metrics.jsonl")[0]["loss"] is None


def write_steps(path, steps):
    path.write_text("".join(f'{{"step":{step},"split":"train"}}\n' for step in steps))


def test_resume_cuts_what_will_be_repeated(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write_steps(path, [1, 2, 3, 4])
    sink = MetricsFile(path, resume_step=2)
    sink.write(LogEntry(3, "train", {"loss": 1.0}))
    sink.close()
    assert [entry["step"] for entry in read(path)] == [1, 2, 3]
    assert read(path)[-1]["loss"] == 1.0
    assert [file.name for file in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_resume_at_the_end_leaves_the_file_untouched(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write_steps(path, [1, 2])
    before = path.stat().st_ino
    MetricsFile(path, resume_step=2).close()
    assert path.stat().st_ino == before


@pytest.mark.parametrize("torn", ['{"step":3,"spl', "\0\0\0", '{"step":2,"split":"valid"}'])
def test_a_half_written_last_line_is_dropped(tmp_path, torn):
    path = tmp_path / "metrics.jsonl"
    write_steps(path, [1, 2])
    with path.open("a") as file:
        file.write(torn)
    MetricsFile(path, resume_step=5).close()
    assert [entry["step"] for entry in read(path)] == [1, 2]


@pytest.mark.parametrize("bad", ["what is this", "[1]", '{"split":"train"}'])
def test_a_foreign_line_is_refused_and_kept(tmp_path, bad):
    path = tmp_path / "metrics.jsonl"
    text = f'{{"step":1}}\n{bad}\n{{"step":2}}\n'
    path.write_text(text)
    with pytest.raises(ValueError, match=r"metrics\.jsonl line 2"):
        MetricsFile(path, resume_step=0)
    assert path.read_text() == text


def test_train_log_grows_over_sessions(tmp_path):
    for session in range(2):
        with open_run_log(tmp_path, PLAIN, is_main=True, total_steps=10) as log:
            log.note(f"session {session}")
    assert len((tmp_path / "train.log").read_text().splitlines()) == 2


def test_tensorboard_holds_the_scalars(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with open_run_log(tmp_path, LoggingConfig(), is_main=True, total_steps=10) as log:
        log.log(3, "train", {"loss": 1.5})
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    (event,) = events.Scalars("train/loss")
    assert (event.step, event.value) == (3, 1.5)


def test_missing_wandb_is_named_with_its_remedy(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    logging = LoggingConfig(tensorboard=False, wandb_project="my-project")
    with pytest.raises(ValueError, match=r"wandb_project is my-project.*pip install wandb"):
        open_run_log(tmp_path, logging, is_main=True, total_steps=10)


class FakeWandb:
    """Records what WandbLog asks of wandb."""

    def __init__(self):
        self.inits, self.logged = [], []

    def init(self, **arguments):
        self.inits.append(arguments)
        return self

    def define_metric(self, name, step_metric):
        assert (name, step_metric) == ("*", "step")

    def log(self, values):
        self.logged.append(values)

    def finish(self):
        pass


def test_wandb_continues_the_same_run(tmp_path, monkeypatch):
    wandb = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    logging = LoggingConfig(tensorboard=False, wandb_project="p")
    for step in (1, 2):
        with open_run_log(
            tmp_path, logging, is_main=True, total_steps=2, resume_step=step - 1, config={"a": 1}
        ) as log:
            log.log(step, "train", {"loss": 1.0})
    assert wandb.inits[0]["id"] == wandb.inits[1]["id"]
    assert wandb.inits[0]["config"] == {"a": 1}
    assert wandb.logged == [{"step": 1, "train/loss": 1.0}, {"step": 2, "train/loss": 1.0}]


def test_a_terminal_gets_a_live_bar():
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=160)
    log = ConsoleLog("tiny", total_steps=100, resume_step=40, console=console)
    log.write(LogEntry(50, "train", VALUES))
    log.write(LogEntry(50, "valid", {"nelbo": 3.125}))
    log.write(LogEntry(60, "train", VALUES))
    log.note("saved [x]")
    log.close()
    shown = screen.getvalue()
    for part in ("tiny", "60/100", "nelbo 2.250", "valid 3.125", "12,346 tok/s", "left 0:"):
        assert part in shown
    assert "saved [x]" in shown


def test_clock():
    assert [clock(0.4), clock(61), clock(3600 * 30 + 59.6)] == ["0:00:00", "0:01:01", "30:01:00"]
