"""The peer of gpu_step.py: the transformer of plain.py under torch.compile and autocast.

Import only after `open_device`: it has to adapt Megatron Core first.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from plain import PlainTransformer
from synthetic_run import SyntheticRun
from torch import Tensor
from torch.nn import functional

from megatron_dlm.config.schema import RunConfig
from megatron_dlm.runtime.device import Device
from megatron_dlm.runtime.parallel import ParallelContext

# Transformer Engine keeps the norms with the matrices behind them.
_RENAMED = {
    "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
    "mlp.linear_fc1.layer_norm_weight": "pre_mlp_layernorm.weight",
}


def peer_step(
    config: RunConfig, device: Device, parallel: ParallelContext, *, compiles: bool
) -> Callable[[], float]:
    """One update of the peer, from our initial weights on our first batch."""
    ours = SyntheticRun(config, device, parallel)
    [batch] = ours.batches()
    inputs = ours.objective.prepare(
        batch.to(device.torch_device), config.train.seed, ours.pass_setup.stream
    )
    model = PlainTransformer(config.model, is_causal=False)
    model.load_megatron(_weights(ours))
    del ours
    model.to(device.torch_device)
    model.cos, model.sin = model.cos.to(device.torch_device), model.sin.to(device.torch_device)
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=config.optimizer.lr,
        betas=(config.optimizer.adam_beta1, config.optimizer.adam_beta2),
        weight_decay=config.optimizer.weight_decay,
        fused=True,
    )
    weights = inputs.weights.flatten() / inputs.counted.sum()
    is_mixed = config.train.precision != "fp32"

    def loss_of(tokens: Tensor, targets: Tensor) -> Tensor:
        with torch.autocast(device.torch_device.type, torch.bfloat16, enabled=is_mixed):
            logits = model(tokens).flatten(0, 1)
        losses = functional.cross_entropy(logits.float(), targets.flatten(), reduction="none")
        return (losses * weights).sum()

    compiled = torch.compile(loss_of) if compiles else loss_of

    def step() -> float:
        optimizer.zero_grad()
        loss: Tensor = compiled(inputs.tokens, inputs.targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.optimizer.clip_grad)
        optimizer.step()
        return loss.item()

    return step


def _weights(run: SyntheticRun) -> dict[str, Tensor]:
    """fp32, on the host, under the names of the local spec."""
    weights = {}
    for name, value in run.chunks[0].module.state_dict().items():
        if isinstance(value, Tensor) and not name.endswith("_extra_state"):
            for old, new in _RENAMED.items():
                name = name.replace(old, new)
            weights[name] = value.float().cpu()
    return weights
