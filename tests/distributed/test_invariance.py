"""Promise 1: the same numbers on any layout, for every objective."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pytest
from rank_pool import RankPool

from megatron_dlm.config.architecture import ObjectiveConfig
from tests.distributed.tiny_run import LAYOUTS, Layout, assemble, layout, model_config, run_layout

OBJECTIVES = {
    "autoregressive": ObjectiveConfig(kind="autoregressive"),
    "input masking": ObjectiveConfig(kind="autoregressive", input_masking_ratio=0.3),
    "masked elbo": ObjectiveConfig(kind="masked"),
    "masked count": ObjectiveConfig(kind="masked", weighting="count"),
    "masked maskgit": ObjectiveConfig(kind="masked", weighting="maskgit", schedule="cosine"),
}
NUM_STEPS = 3
