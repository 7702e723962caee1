"""Which kernels a machine is asked for, and what is refused where it lacks them."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from megatron.core.fp8_utils import is_first_last_bf16_layer
from megatron.core.transformer.enums import AttnBackend
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_dlm.config.architecture import ModelConfig
from megatron_dlm.config.fp8 import Fp8Config
from megatron_dlm.config.moe import MoEConfig
from megatron_dlm.config.parallel import ParallelConfig
from megatron_dlm.models.engine_options import engine_options, transformer_implementation
from megatron_dlm.models.fp8 import fp8_options
from megatron_dlm.models.transformer_config import transformer_config
from megatron_dlm.runtime.capabilities import Capabilities
from megatron_dlm.runtime.device import Device

ENGINE = {"cudnn": "9.19.0", "transformer_engine": "2.11.0"}
MACHINES = {
    "H100": Capabilities((9, 0), (13, 0), **ENGINE),
    "H100, CUDA 12.6": Capabilities((9, 0), (12, 6), **ENGINE),
    "A100": Capabilities((8, 0), (13, 0), **ENGINE),
    "L40S": Capabilities((8, 9), (13, 0), **ENGINE),
    "B200": Capabilities((10, 0), (13, 0), **ENGINE),
    "RTX PRO 6000": Capabilities((12, 0), (13, 0), **ENGINE),
    "H100 without Transformer Engine": Capabilities((9, 0), (13, 0), "9.19.0"),
}
# Recipes that Transformer Engine 2.11 accepts on each.
RECIPES = {
    "H100": {"tensorwise", "delayed", "blockwise"},
    "H100, CUDA 12.6": {"tensorwise", "delayed"},
    "A100": set(),
    "L40S": {"tensorwise", "delayed"},
    "B200": {"tensorwise", "delayed", "blockwise", "mxfp8"},
    "RTX PRO 6000": {"tensorwise", "delayed", "blockwise"},
    "H100 without Transformer Engine": set(),
}
CPU = Device(torch.device("cpu"), "cpu", None)


def gpu(machine: str = "H100", **changes: Any) -> Device:
    capabilities = dataclasses.replace(MACHINES[machine], **changes)
    return Device(torch.device("cuda", 0), machine, 989e12, capabilities)


@pytest.fixture(autouse=True)
def no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    """Building a model sets them for the process."""
    for name in ("NVTE_FLASH_ATTN", "NVTE_FUSED_ATTN", "NVTE_UNFUSED_ATTN"):
        monkeypatch.delenv(name, raising=False)


def options(device: Device, parallel: dict[str, Any] | None = None, **model: Any) -> dict[str, Any]:
    config = ModelConfig(**model)
    return engine_options(config, ParallelConfig(**(parallel or {})), device, precision="bf16")


def test_a_gpu_gets_the_engine() -> None:
    assert transformer_implementation(ModelConfig(), gpu()) == "transformer_engine"
    found = options(gpu())
    assert found["attention_backend"] is AttnBackend.auto
    assert found["apply_rope_fusion"] is found["bias_activation_fusion"] is True
    assert found["cpu_offloading"] is found["gradient_accumulation_fusion"] is False
    assert options(gpu(), activation="squared_relu")["bias_activation_fusion"] is False


def test_the_cpu_gets_none_of_it() -> None:
    assert transformer_implementation(ModelConfig(), CPU) == "local"
    assert not any(value for value in options(CPU).values() if isinstance(value, bool))


def test_options_reach_megatron() -> None:
    found = options(gpu(), {"activation_offload_layers": 3, "gradient_accumulation_fusion": True})
    assert found["cpu_offloading"] is True
    assert found["cpu_offloading_num_layers"] == 3
    assert found["gradient_accumulation_fusion"] is True
    overlapped = {
        "tensor_model_parallel_size": 2,
        "sequence_parallel": True,
        "tp_comm_overlap": True,
    }
    assert options(gpu(), overlapped)["tp_comm_overlap"] is True
    for name in ("fused", "unfused", "local"):
        assert options(gpu(), attention_backend=name)["attention_backend"] is AttnBackend[name]


@pytest.mark.parametrize(
    "device", [CPU, gpu("H100 without Transformer Engine")], ids=["CPU", "GPU"]
)
@pytest.mark.parametrize(
    ("name", "parallel", "model"),
    [
        ("model.attention_backend fused", {}, {"attention_backend": "fused"}),
        ("parallel.activation_offload_layers 2", {"activation_offload_layers": 2}, {}),
        (
            "parallel.tp_comm_overlap",
            {"tensor_model_parallel_size": 2, "sequence_parallel": True, "tp_comm_overlap": True},
            {},
        ),
        (
            "model.recompute_modules layernorm, moe_act",
            {},
            {
                "recompute_granularity": "selective",
                "recompute_modules": ["mlp", "layernorm", "moe_act"],
                "moe": MoEConfig(num_experts=4),
            },
        ),
    ],
)
def test_what_only_the_engine_has(
    device: Device, name: str, parallel: dict[str, Any], model: dict[str, Any]
) -> None:
    with pytest.raises(ValueError, match="needs the layers of") as caught:
        options(device, parallel, **model)
    assert str(caught.value) == (
        f"{name} needs the layers of Transformer Engine; model.transformer_impl is auto and this "
        f"machine has {device.capabilities.describe()}"
    )


def test_gradient_accumulation_fusion_without_the_engine() -> None:
    """On the CPU it is PyTorch's; on a GPU it takes the engine's product or Apex's."""
    asked = {"gradient_accumulation_fusion": True}
    assert options(CPU, asked)["gradient_accumulation_fusion"] is True
    bare = "H100 without Transformer Engine"
    assert options(gpu(bare, has_weight_gradient_kernel=True), asked)
    with pytest.raises(ValueError, match=r"^parallel\.gradient_accumulation_fusion needs the lay"):
        options(gpu(bare), asked)


def test_flash_attention_needs_its_package() -> None:
    with pytest.raises(ValueError, match=r"flash needs the package flash-attn; .*: use fused$"):
        options(gpu(), attention_backend="flash")
    found = options(gpu(flash_attention="2.8.0"), attention_backend="flash")
    assert found["attention_backend"] is AttnBackend.flash


def test_fast_attention_has_no_fp32() -> None:
    model = ModelConfig(attention_backend="fused")
    with pytest.raises(ValueError, match=r"fused has no kernels for train\.precision fp32"):
        engine_options(model, ParallelConfig(), gpu(), precision="fp32")


def test_the_environment_does_not_choose_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NVTE_FUSED_ATTN", "0")
    with pytest.raises(ValueError, match="the environment sets NVTE_FUSED_ATTN to 0, against"):
        options(gpu())
    assert options(gpu(flash_attention="2.8.0"), attention_backend="flash")
    assert options(CPU)


def test_the_optimizer_leaves_a_gpu_only() -> None:
    asked = {"optimizer_cpu_offload_fraction": 0.5}
    assert options(gpu(), asked)
    with pytest.raises(
        ValueError, match=r"fraction 0\.5 needs a GPU and .*; this machine has no GPU$"
    ):
        options(CPU, asked)


@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize("recipe", ["tensorwise", "delayed", "blockwise", "mxfp8"])
def test_recipes_of_machines(recipe: Any, machine: str) -> None:
    fp8 = Fp8Config(recipe=recipe, format="e4m3")
    capabilities = MACHINES[machine]
    if recipe in RECIPES[machine]:
        assert fp8_options(fp8, capabilities, num_layers=4)["fp8_recipe"] == recipe
        return
    with pytest.raises(ValueError, match="this machine has") as caught:
        fp8_options(fp8, capabilities, num_layers=4)
    message = str(caught.value)
    assert f"this machine has {capabilities.describe()}: use " in message
    if capabilities.transformer_engine is not None:
        assert message.startswith(f"fp8.recipe {recipe} needs compute capability")
        if not RECIPES[machine]:
            assert message.endswith("use train.precision bf16")
        for other in RECIPES[machine]:
            assert other in message.rpartition(": use ")[2]


def test_megatron_takes_the_options() -> None:
    """Its own checks pass, and the layers it keeps in bf16 are those we asked for."""
    fp8 = Fp8Config(num_layers_at_start_in_bf16=0, num_layers_at_end_in_bf16=2)
    found = fp8_options(fp8, MACHINES["H100"], num_layers=8)
    config = TransformerConfig(num_layers=8, hidden_size=64, num_attention_heads=4, **found)
    kept = [number for number in range(8) if is_first_last_bf16_layer(config, number)]
    assert kept == [6, 7]
    delayed = fp8_options(Fp8Config(recipe="delayed"), MACHINES["H100"], num_layers=8)
    config = TransformerConfig(num_layers=8, hidden_size=64, num_attention_heads=4, **delayed)
    assert (config.fp8_amax_history_len, config.fp8_amax_compute_algo) == (1024, "max")


def test_some_layer_is_left_for_fp8() -> None:
    fp8 = Fp8Config(num_layers_at_start_in_bf16=2, num_layers_at_end_in_bf16=2)
    with pytest.raises(ValueError, match="leave none of the 4 layers in FP8"):
        fp8_options(fp8, MACHINES["H100"], num_layers=4)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"recipe": "blockwise"}, r"fp8\.format is hybrid, use e4m3$"),
        ({"recipe": "delayed", "num_layers_at_end_in_bf16": 1}, r"it cannot keep 0 first and 1 la"),
        ({"num_layers_at_start_in_bf16": -1}, r"at_start_in_bf16 is -1; it must be at least 0"),
        ({"amax_history_len": 0}, r"amax_history_len is 0; it must be greater than 0"),
    ],
)
def test_impossible_recipes(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Fp8Config(**settings)


def test_fp8_on_the_cpu_is_one_line() -> None:
    with pytest.raises(ValueError, match="needs Transformer Engine") as caught:
        transformer_config(ModelConfig(), ParallelConfig(), precision="fp8", device=CPU)
    assert str(caught.value) == (
        "train.precision fp8 needs Transformer Engine on a GPU; this machine has no GPU: use "
        "train.precision bf16, or install the extra [te]"
    )
    local = ModelConfig(transformer_impl="local")
    with pytest.raises(ValueError, match=r"but model\.transformer_impl is local; use auto$"):
        transformer_config(local, ParallelConfig(), precision="fp8", device=CPU)


def test_recompute_reaches_megatron() -> None:
    model = ModelConfig(recompute_granularity="selective", recompute_modules=["mlp", "core_attn"])
    found = transformer_config(model, ParallelConfig(), precision="fp32", device=CPU)
    assert found.recompute_granularity == "selective"
    assert found.recompute_modules == ["mlp", "core_attn"]
    whole = ModelConfig(recompute_granularity="full", recompute_num_layers=2)
    found = transformer_config(whole, ParallelConfig(), precision="fp32", device=CPU)
    assert (found.recompute_method, found.recompute_num_layers) == ("uniform", 2)


def test_recompute_of_what_is_not_there() -> None:
    with pytest.raises(ValueError, match=r"recompute_modules names moe, but the model has no exp"):
        ModelConfig(recompute_granularity="selective", recompute_modules=["moe"])
    with pytest.raises(ValueError, match=r"recompute_modules is empty; name a module"):
        ModelConfig(recompute_granularity="selective", recompute_modules=[])


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("fp8", "hybrid"),
        ("cuda_graph_impl", "local"),
        ("cross_entropy_loss_fusion", True),
        ("deterministic_mode", True),
    ],
)
def test_what_is_not_offered_is_not_offered_by_the_back_door(name: str, value: Any) -> None:
    model = ModelConfig(megatron={name: value})
    with pytest.raises(ValueError, match=rf"^model\.megatron\.{name} is set by this program"):
        transformer_config(model, ParallelConfig(), precision="bf16", device=CPU)
