"""One size of a network under the two conventions of FLOPs per token, so that laws are not mixed.

six_n: 6 P. six_p_and_attention: 6 P + 12 L d S, the attention over all S keys counted too. P are
parameters without embeddings. Both ask for a shape; it is that of the grid of "Scaling Behavior of
Discrete Diffusion Language Models": P = 12 L d^2, with the width d of the published sizes, between
and beyond them by straight lines in logarithms.
"""

from __future__ import annotations

import numpy as np

_PARAMETERS = (25.2e6, 49.2e6, 85.1e6, 201.6e6, 566.7e6, 2.039e9, 8.666e9)
_WIDTHS = (512, 640, 768, 1024, 1536, 3072, 4608)


def width_of(parameters: float) -> float:
    """Hidden size of a network of so many parameters without embeddings."""
    x, y = np.log(_PARAMETERS), np.log(_WIDTHS)
    at = float(np.log(parameters))
    if at <= x[0] or at >= x[-1]:
        # Beyond the grid width grows as parameters^(1/3): layers and width in proportion.
        end = 0 if at <= x[0] else -1
        return float(np.exp(y[end] + (at - x[end]) / 3))
    return float(np.exp(np.interp(at, x, y)))


def flops_per_token(parameters: float, convention: str, seq_length: int) -> float:
    """Training FLOPs per token of a network of the published shape."""
    flops = 6 * parameters
    if convention == "six_p_and_attention":
        # 12 L d S, with L = P / (12 d^2).
        flops += parameters * seq_length / width_of(parameters)
    else:
        assert convention == "six_n", convention
    return flops


def parameters_of(per_token: float, convention: str, seq_length: int) -> float:
    """The size with so many training FLOPs per token; inverse of `flops_per_token`."""
    low, high = per_token / 6 / (1 + seq_length), per_token / 6
    for _ in range(56):
        middle = float(np.sqrt(low * high))
        if flops_per_token(middle, convention, seq_length) > per_token:
            high = middle
        else:
            low = middle
    return float(np.sqrt(low * high))
