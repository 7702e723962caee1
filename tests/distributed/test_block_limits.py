"""Block diffusion of one block per sample is masked diffusion, through the whole real model."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from rank_pool import RankPool
from tiny_run import assemble, layout, model_config, run_layout

from megatron_dlm.config.objective import ObjectiveConfig

MODEL = model_config()
WHOLE = layout("micro 8", 1, micro=8)  # other layouts: test_invariance.py


def first_step(ranks: RankPool, objective: ObjectiveConfig) -> dict[str, Any]:
    (result,) = ranks.run(run_layout, WHOLE, objective, MODEL, 1, num_ranks=1)
    return result


@pytest.mark.parametrize("weighting", ["elbo", "count"])
def test_one_block_per_sample_is_masked_diffusion(ranks: RankPool, weighting: Any) -> None:
    """Same noise, same losses, same gradients, although the model reads twice the slots."""
    masked = first_step(ranks, ObjectiveConfig(weighting=weighting))
    config = ObjectiveConfig(kind="block", block_size=MODEL.seq_length, weighting=weighting)
    block = first_step(ranks, config)
    for name in ("loss", "nelbo", "masked_share", "masked_nll"):
        assert block["first"][name] == pytest.approx(masked["first"][name], rel=2e-6)
    expected, found = assemble([masked], "gradients"), assemble([block], "gradients")
    assert expected.keys() == found.keys()
    for name, gradient in expected.items():
        scale = np.abs(gradient).max()
        np.testing.assert_allclose(found[name], gradient, rtol=0, atol=2e-5 * scale)


def test_smaller_blocks_see_less_of_the_text(ranks: RankPool) -> None:
    """With the same rates, blocks that do not see the masks of others have other losses."""
    losses = []
    for size in (16, 4, 1):
        config = ObjectiveConfig(kind="block", block_size=size, weighting="count")
        losses.append(first_step(ranks, config)["first"]["nelbo"])
    assert len({round(loss, 4) for loss in losses}) == 3
