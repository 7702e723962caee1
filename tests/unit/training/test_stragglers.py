"""Who is slow, given the times; how times come about is tested on real ranks."""

from __future__ import annotations

from megatron_dlm.training.stragglers import Straggler, slow_ranks


def test_of_two_ranks_the_slower_can_be_named() -> None:
    assert slow_ranks([1.0, 2.5], [0, 0], 2.0) == {1: 1.0}
    assert slow_ranks([1.0, 1.9], [0, 0], 2.0) == {}


def test_ranks_of_other_stages_do_other_work() -> None:
    seconds = [1.0, 1.1, 5.0, 5.2, 1.0, 12.0]
    stages = [0, 0, 1, 1, 0, 1]
    assert slow_ranks(seconds, stages, 1.5) == {5: 5.2}


def test_equal_times_and_a_single_rank_name_nobody() -> None:
    assert slow_ranks([0.0, 0.0], [0, 0], 1.5) == {}
    assert slow_ranks([3.0], [0], 1.5) == {}


def test_in_words() -> None:
    text = str(Straggler(rank=3, host="node7", seconds=0.9, median_seconds=0.4))
    expected = "rank 3 on node7 is slow: 0.9 s of its own per step, 2.2 times the median"
    assert text.startswith(expected)
