"""What a run writes: metrics.jsonl and its repair on resume, train.log, console, TensorBoard."""

from __future__ import annotations

import io
import json
import sys

import pytest
from rich.console import Console

from megatron_dlm.config.schema import LoggingConfig
from megatron_dlm.training.console import ConsoleLog
from megatron_dlm.training.histogram import EDGES, Histogram
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
    text = text[-3:]  # the first lines say where to look
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


@pytest.mark.parametrize(
    "bad", ["what is this", "[1]", '{"split":"train"}', '{"step":null}', '{"step":"2"}']
)
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
    lines = (tmp_path / "train.log").read_text().splitlines()
    assert [line.split("  ")[1] for line in lines if "session" in line] == [
        "session 0",
        "session 1",
    ]


def test_tensorboard_holds_the_scalars(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with open_run_log(tmp_path, LoggingConfig(), is_main=True, total_steps=10) as log:
        log.log(3, "train", {"loss": 1.5})
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    (event,) = events.Scalars("train/loss")
    assert (event.step, event.value) == (3, 1.5)


def board_of(run):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(run / "tensorboard"), size_guidance={"histograms": 0})
    board.Reload()
    return board


def test_tensorboard_shows_the_configuration(tmp_path):
    config = {"model": {"num_layers": 3}, "train": {"output_dir": "naïve"}}
    open_run_log(tmp_path, LoggingConfig(), is_main=True, total_steps=1, config=config).close()
    (text,) = board_of(tmp_path).Tensors("config/text_summary")
    shown = text.tensor_proto.string_val[0].decode()
    assert shown == "    model:\n      num_layers: 3\n    train:\n      output_dir: naïve"


def test_tensorboard_shows_histograms(tmp_path):
    counts = [0.0] * (len(EDGES) + 1)
    first = EDGES.index(0.1)
    counts[first : first + 3] = [4.0, 0.0, 2.0]
    found = {
        "gradient/w": Histogram(0.75, 0.25, counts),
        "gradient/none": Histogram(0, 0, [0] * 91),
    }
    with open_run_log(tmp_path, LoggingConfig(), is_main=True, total_steps=9) as log:
        log.histograms(7, found)
    board = board_of(tmp_path)
    (event,) = board.Histograms("gradient/w")
    value = event.histogram_value
    assert (event.step, value.num, value.sum, value.sum_squares) == (7, 6.0, 0.75, 0.25)
    assert value.bucket_limit == list(EDGES[first : first + 3])
    assert value.bucket == [4.0, 0.0, 2.0]
    assert (value.min, value.max) == (EDGES[first - 1], EDGES[first + 2])
    assert "gradient/none" not in board.Tags()["histograms"]


def test_values_beyond_all_edges_have_a_place(tmp_path):
    counts = [1.0, *[0.0] * (len(EDGES) - 1), 1.0]
    with open_run_log(tmp_path, LoggingConfig(), is_main=True, total_steps=9) as log:
        log.histograms(1, {"w": Histogram(0.0, 1e9, counts)})
    value = board_of(tmp_path).Histograms("w")[0].histogram_value
    assert (value.min, value.max, value.num) == (EDGES[0], EDGES[-1], 2.0)
    assert len(value.bucket) == len(EDGES) + 1


def test_a_run_that_goes_back_repeats_nothing(tmp_path):
    with open_run_log(tmp_path, LoggingConfig(), is_main=True, total_steps=9) as log:
        for step in (1, 2, 3):
            log.log(step, "train", {"loss": float(step)})
        log.rewind(1)
        log.log(2, "train", {"loss": 20.0})
    assert [(entry["step"], entry["loss"]) for entry in read(tmp_path / "metrics.jsonl")] == [
        (1, 1.0),
        (2, 20.0),
    ]
    events = board_of(tmp_path).Scalars("train/loss")
    assert [(event.step, event.value) for event in events] == [(1, 1.0), (2, 20.0)]


def test_it_says_where_to_look_first_and_last(tmp_path, capsys):
    run = tmp_path / "my run"
    run.mkdir()
    with open_run_log(run, LoggingConfig(), is_main=True, total_steps=9) as log:
        log.note("in between")
    first, second, middle, *last = capsys.readouterr().out.splitlines()
    assert first == f"run directory: '{run}'  curves: tensorboard --logdir '{run}'/tensorboard"
    assert second == f"report of the run: megatron-dlm report '{run}'"
    assert (middle, last) == ("in between", [first, second])
    (tmp_path / "plain").mkdir()
    open_run_log(tmp_path / "plain", PLAIN, is_main=True, total_steps=9).close()
    assert "tensorboard" not in capsys.readouterr().out


def test_starts_are_events(tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "2")
    open_run_log(tmp_path, PLAIN, is_main=True, total_steps=9).close()
    with open_run_log(tmp_path, PLAIN, is_main=True, total_steps=9, resume_step=4) as log:
        log.events.write("save", step=5)
        assert not log.events.has_end
        log.events.write("end", step=5, state="preempted")
        assert log.events.has_end
    start, resume, save, end = read(tmp_path / "events.jsonl")
    assert (start["kind"], start["step"], start["total_steps"]) == ("start", 0, 9)
    assert (resume["kind"], resume["step"]) == ("resume", 4)
    assert (resume["slurm_job_id"], resume["slurm_restart_count"]) == ("77", "2")
    assert (save["kind"], save["step"]) == ("save", 5)
    assert (end["kind"], end["state"]) == ("end", "preempted")


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
    log.rewind(45)
    log.write(LogEntry(46, "train", VALUES))
    log.close()
    shown = screen.getvalue()
    for part in (
        "tiny",
        "60/100",
        "46/100",
        "nelbo 2.250",
        "valid 3.125",
        "12,346 tok/s",
        "left 0:",
    ):
        assert part in shown
    assert "saved [x]" in shown


def test_clock():
    assert [clock(0.4), clock(61), clock(3600 * 30 + 59.6)] == ["0:00:00", "0:01:01", "30:01:00"]
