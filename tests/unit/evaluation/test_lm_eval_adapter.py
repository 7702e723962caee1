"""The parts of the lm-eval adapter that need no run of lm-eval."""

from __future__ import annotations

import importlib.metadata
import math
import re
from pathlib import Path

import pytest

pytest.importorskip("lm_eval", reason="lm-eval is the extra [eval]")

from megatron_dlm.evaluation.likelihood import Request
from megatron_dlm.evaluation.lm_eval_adapter import MegatronDLM, cut_at_stop, windows
from megatron_dlm.evaluation.tasks import delta_nll, open_tasks

SETUP = Path(__file__).parents[3] / "setup.py"


def test_lm_eval_finds_it_by_the_entry_point_of_setup_py() -> None:
    from lm_eval.api.registry import get_model, model_registry

    text = SETUP.read_text()
    (target,) = re.findall(r'"lm_eval.models": \["megatron_dlm = ([\w.:]+)"\]', text)
    point = importlib.metadata.EntryPoint("megatron_dlm", target, "lm_eval.models")
    # What releases after 0.4.13 do with every entry point of the group.
    model_registry.register("megatron_dlm of a test", target=point)
    assert get_model("megatron_dlm of a test") is MegatronDLM


def test_own_tasks_are_found_without_reading_all_of_lm_evals(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("task: mine\ndataset_path: json\n")
    folder = [str(tmp_path)]
    assert open_tasks(["mine"], folder).all_tasks == ["mine"]
    assert {"mine", "arc_easy"} <= {*open_tasks(["mine", "arc_easy"], folder).all_tasks}
    with pytest.raises(ValueError, match="lm-eval knows no task no_such_task; `lm_eval ls tasks`"):
        open_tasks(["mine", "no_such_task"], folder)


def test_windows_score_every_token_of_the_answer_once() -> None:
    text = tuple(range(100, 120))
    assert windows(Request((1,), text[:5]), 6) == [Request((1,), text[:5])]
    assert windows(Request((1, 2, 3, 4), (7, 8)), 4) == [Request((3, 4), (7, 8))]
    assert windows(Request((1,), ()), 6) == []
    for start in ((), (1,), (1, 2, 3)):
        for limit in (2, 5, 19, 20, 21, 40):
            pieces = windows(Request(start, text), limit)
            assert sum((piece.answer for piece in pieces), ()) == text
            whole = (*start, *text)
            end = len(start)
            for number, piece in enumerate(pieces):
                assert len(piece.prompt) + len(piece.answer) <= limit
                end += len(piece.answer)
                assert (*piece.prompt, *piece.answer) == whole[
                    end - limit if end > limit else 0 : end
                ]
                assert piece.prompt or (number == 0 and not start)


def test_stop_texts() -> None:
    assert cut_at_stop("a b\nc\n", ["\n", "b"]) == "a "
    assert cut_at_stop("abc", "c") == "ab"
    assert cut_at_stop("abc", None) == cut_at_stop("abc", ["", "x"]) == "abc"


def test_delta_nll_by_hand() -> None:
    def sample(log_probs, target, options):
        return {
            "filtered_resps": [(value, False) for value in log_probs],
            "target": target,
            "arguments": [("question", option) for option in options],
        }

    rows = [
        sample([-2.0, -4.0, -6.0], 0, ["é", "bb", "cc"]),
        sample([-1.0, -3.0], " no", [" yes", " no"]),
    ]
    found = delta_nll(rows)
    assert found is not None
    assert found.nats == pytest.approx((3.0 + -2.0) / 2)
    assert found.standard_error == pytest.approx(2.5)
    assert found.nats_per_byte == pytest.approx(((2 + 3) / 2 - 1 + 1 / 4 - 1) / 2)
    assert found.num_questions == 2
    (one,) = [delta_nll(rows[:1])]
    assert one is not None
    assert math.isnan(one.standard_error)
    assert delta_nll([{"filtered_resps": ["text"], "target": "text", "arguments": []}]) is None
    assert delta_nll([{"filtered_resps": [-3.0], "target": "text", "arguments": []}]) is None
