"""Stands in for Apex's extension fused_weight_gradient_mlp_cuda, which adds weight gradients.

Megatron Core's own linear layers import a module of that name for gradient accumulation fusion;
this file registers itself under it where Apex's is missing. On a GPU the product is Transformer
Engine's matrix product with accumulation (not yet run on a GPU); on CPU it is PyTorch's.
"""

from __future__ import annotations

import importlib.util
import sys

from torch import Tensor

_NAME = "fused_weight_gradient_mlp_cuda"


def stand_in() -> None:
    """Register this module under the extension's name; call before importing megatron.core."""
    if _NAME not in sys.modules and importlib.util.find_spec(_NAME) is None:
        sys.modules[_NAME] = sys.modules[__name__]


def wgrad_gemm_accum_fp32(total_input: Tensor, grad_output: Tensor, main_grad: Tensor) -> None:
    """main_grad [out, in] += grad_output^T [out, t] total_input [t, in]."""
    rows, gradients = total_input.flatten(0, -2), grad_output.flatten(0, -2)
    if main_grad.is_cuda:
        from transformer_engine.pytorch.cpp_extensions import general_gemm

        general_gemm(
            rows,
            gradients,
            out_dtype=main_grad.dtype,
            layout="NT",
            out=main_grad,
            accumulate=True,
            grad=True,
        )
    elif rows.dtype == main_grad.dtype:
        main_grad.addmm_(gradients.t(), rows)
    else:
        main_grad += gradients.t() @ rows


wgrad_gemm_accum_fp16 = wgrad_gemm_accum_fp32
