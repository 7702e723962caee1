"""Tensors of the Hugging Face side out of a checkpoint of any layout."""

from __future__ import annotations

from collections import Counter

import torch
from torch import Tensor

from megatron_dlm.checkpoint.tensor_reader import TensorReader
from megatron_dlm.config.architecture import ModelConfig
from megatron_dlm.hf.mapping import ExportedTensor, checkpoint_tensors


class CheckpointReader(TensorReader):
    """Reads single tensors; `tensors` says what there is (optimizer state included)."""

    def read(self, tensor: ExportedTensor) -> Tensor:
        """A tensor of Hugging Face's side, whole."""
        return torch.cat(
            [
                self.rows(source.key, source.layer, source.start, source.num_rows)
                for source in tensor.sources
            ]
        )

    def check(self, model: ModelConfig) -> None:
        """Refuse a checkpoint that lacks a weight of the model or has it in another shape."""
        tensors = checkpoint_tensors(model)
        stacked = Counter(tensor.key for tensor in tensors if tensor.layer is not None)
        for tensor in tensors:
            stack = () if tensor.layer is None else (stacked[tensor.key],)
            stored = self.stored(tensor.key)
            if stored.shape != (*stack, *tensor.shape):
                raise ValueError(
                    f"{self.path}: {tensor.key} has shape {list(stored.shape)}, its configuration "
                    f"implies {[*stack, *tensor.shape]}"
                )
