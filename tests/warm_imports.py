"""Imported once by the fork server, for all its children."""

from __future__ import annotations

import gc
from importlib import import_module

from megatron_dlm.runtime.device import open_device

open_device("cpu")  # before megatron.core
for name in (
    "megatron_dlm.training.train",
    "megatron_dlm.generation.generate",
    "megatron_dlm.evaluation.evaluate",
    "torch._dynamo",  # the first step of a run
    "numpy.random",
):
    import_module(name)
# What is imported stays: children need not look through it each time they collect.
gc.collect()
gc.freeze()
