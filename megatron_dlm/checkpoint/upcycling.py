"""`megatron-dlm checkpoint upcycle`: a dense checkpoint becomes the start of a run with experts.

Works on tensors by name, one at a time: no ranks, no model, bounded memory. Experts lie in groups
that hold the slices of one copy of the dense MLP each. The experts of a group have the same router
weights, so a token that chooses one of them chooses all, with equal gates, and gets the whole MLP
(as in "Upcycling Large Language Models into Mixture of Experts", arXiv 2410.07524).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
import yaml
from rich.progress import Progress
from torch import Tensor

from megatron_dlm.checkpoint.find import find_checkpoint, model_of
from megatron_dlm.checkpoint.new_run import implied_settings, refuse_used_directory
from megatron_dlm.checkpoint.retention import Checkpoint
from megatron_dlm.checkpoint.tensor_reader import TensorReader
from megatron_dlm.checkpoint.writer import write_checkpoint
from megatron_dlm.config.architecture import ModelConfig, weight_settings
from megatron_dlm.config.moe import MoEConfig
from megatron_dlm.config.schema import RunConfig
from megatron_dlm.config.upcycle_command import UpcycleConfig
from megatron_dlm.config.validate_moe import check_moe
from megatron_dlm.models.accounting import count_parameters
from megatron_dlm.models.parametrization import initial_values

SETTINGS_FILE = "upcycled.yaml"
_STACK, _MLP = "decoder.layers.", "mlp."


@dataclass(frozen=True)
class UpcycledTensor:
    """A tensor of the new checkpoint, or one expert's part of a stacked one."""

    key: str
    layer: int | None
    """Number of the expert; None where nothing is stacked. Layers have names of their own."""
    shape: tuple[int, ...]
    dtype: torch.dtype
    make: Callable[[], Tensor]


@dataclass(frozen=True)
class _Subject:
    """What is upcycled, and into what."""

    reader: TensorReader
    model: ModelConfig
    """With experts."""
    seed: int
    router_init_std: float

    @property
    def num_slices(self) -> int:
        return self.model.ffn_size // self.model.expert_ffn_size


def upcycle(config: UpcycleConfig) -> None:
    """Write the run directory; prints what to type next.

    Raises ValueError for a checkpoint that is not dense, for sizes that do not divide, for a
    routing that the parent's objective forbids, and where the new model would not compute what its
    parent does (a warning with allow_inexact).
    """
    checkpoint = find_checkpoint(Path(config.checkpoint), config.step)
    dense, objective = model_of(checkpoint)
    model = _with_experts(dense, config.model.moe, checkpoint)
    check_moe(RunConfig(model=model, objective=objective), world_size=1)
    reasons = differences(model)
    if reasons and not config.allow_inexact:
        raise ValueError(
            f"the upcycled model would not compute what {checkpoint.path} does: "
            f"{'; '.join(reasons)}; change that, or start near it with allow_inexact true"
        )
    output = Path(config.output_dir)
    refuse_used_directory(output, SETTINGS_FILE)
    for reason in reasons:
        print(f"warning: the upcycled model starts near its parent only: {reason}")
    std = config.router_init_std or model.init_method_std
    subject = _Subject(TensorReader(checkpoint.path), model, config.seed, std)
    output.mkdir(parents=True, exist_ok=True)
    tokenizer = checkpoint.manifest["config"]["data"]["tokenizer"]
    settings = implied_settings(model, objective, tokenizer, output)
    (output / SETTINGS_FILE).write_text(yaml.safe_dump(settings, sort_keys=False))
    path = _write(subject, checkpoint, output, is_exact=not reasons)
    count = count_parameters(model)
    print(f"upcycled {checkpoint.path}: {path}")
    print(f"parameters: {count.total:,}, active per token: {count.active:,}")
    print(f"train it: megatron-dlm train --config {output / SETTINGS_FILE} --config YOURS.yaml")


def differences(model: ModelConfig) -> list[str]:
    """Why the upcycled model cannot compute what its dense parent does; empty where it does.

    It does where the gates of the chosen experts add up to 1 and every token gets all slices.
    """
    moe, num_slices = model.moe, model.ffn_size // model.expert_ffn_size
    is_choice = moe.routing == "expert_choice"
    takes_all = moe.router_topk == moe.num_experts
    reasons = []
    if moe.pre_softmax and not takes_all:
        reasons.append(
            "with model.moe.pre_softmax true the gates of the chosen experts add up to less than 1"
        )
    if moe.score_function == "sigmoid" and moe.router_topk == 1 and not is_choice:
        reasons.append("the sigmoid gate of model.moe.router_topk 1 is not 1")
    if is_choice and not takes_all:
        reasons.append(
            "with model.moe.routing expert_choice some tokens are chosen by no expert and get "
            "nothing"
        )
    if any(scale != 1 for scale in moe.count_scales):
        reasons.append("model.moe.count_scales changes the output of the experts")
    room = moe.num_experts / moe.router_topk
    if moe.capacity_factor is not None and moe.capacity_factor < room:
        reasons.append("model.moe.capacity_factor lets experts drop tokens")
    if not is_choice and moe.router_topk % num_slices:
        reasons.append(
            f"model.moe.router_topk {moe.router_topk} is not a multiple of the {num_slices} slices "
            "of the dense MLP, so a token misses some"
        )
    return reasons


def upcycled_tensors(subject: _Subject) -> Iterator[UpcycledTensor]:
    """Every tensor of the new checkpoint."""
    reader, model = subject.reader, subject.model
    first_moe = model.num_layers - model.num_moe_layers
    for key, stored in reader.tensors.items():
        if key.startswith("optimizer."):
            continue
        if not key.startswith(_STACK):
            yield _copy(subject, key, key, None)
            continue
        name = key.removeprefix(_STACK)
        for layer in range(stored.shape[0]):
            place = f"{_STACK}{layer}."
            if layer < first_moe or not name.startswith(_MLP):
                yield _copy(subject, key, place + name, layer)
            elif name == "mlp.linear_fc1.layer_norm_weight":
                yield _copy(subject, key, f"{place}pre_mlp_layernorm.weight", layer)
            else:
                yield from _experts(subject, key, layer)
    for layer in range(first_moe, model.num_layers):
        yield from _new_tensors(subject, f"{_STACK}{layer}.mlp.")


def output_scale(model: ModelConfig) -> float:
    """Factor of the experts' last matrix.

    Of n slices every one comes with 1/n of the gate; the gates themselves add up to 1, or with a
    router that favours nobody to what pre_softmax and top-1 sigmoid make of it.
    """
    moe = model.moe
    gates = 1.0
    if moe.pre_softmax:
        gates = moe.router_topk / moe.num_experts
    elif (moe.score_function, moe.router_topk, moe.routing) == ("sigmoid", 1, "token_choice"):
        gates = 0.5
    return model.ffn_size // model.expert_ffn_size / gates


def _with_experts(dense: ModelConfig, moe: MoEConfig, checkpoint: Checkpoint) -> ModelConfig:
    if dense.moe.is_moe:
        raise ValueError(
            f"{checkpoint.path} has {dense.moe.num_experts} experts already; upcycle a dense one"
        )
    model = replace(dense, moe=moe)
    if dense.ffn_size % model.expert_ffn_size:
        raise ValueError(
            f"model.moe.ffn_hidden_size is {model.expert_ffn_size}; it must divide the width of "
            f"the dense MLP, {dense.ffn_size}: experts are slices of it"
        )
    num_slices = dense.ffn_size // model.expert_ffn_size
    if moe.num_experts % num_slices:
        raise ValueError(
            f"model.moe.num_experts is {moe.num_experts}; it must be a multiple of {num_slices}, "
            "the experts that one copy of the dense MLP makes"
        )
    return model


def _copy(subject: _Subject, key: str, target: str, layer: int | None) -> UpcycledTensor:
    stored = subject.reader.stored(key)
    shape = stored.shape if layer is None else stored.shape[1:]
    return UpcycledTensor(
        target, None, shape, stored.dtype, lambda: _whole(subject.reader, key, layer)
    )


def _whole(reader: TensorReader, key: str, layer: int | None) -> Tensor:
    shape = reader.stored(key).shape
    return reader.rows(key, layer, 0, shape[0] if layer is None else shape[1])


def _experts(subject: _Subject, key: str, layer: int) -> Iterator[UpcycledTensor]:
    """A matrix of the dense MLP as those of all experts."""
    name = key.removeprefix(f"{_STACK}{_MLP}")
    target = f"{_STACK}{layer}.mlp.experts.experts.{name}"
    stored, model = subject.reader.stored(key), subject.model
    shape = list(stored.shape[1:])
    shape[1 if name == "linear_fc2.weight" else 0] //= subject.num_slices
    for expert in range(model.moe.num_experts):

        def make(number: int = expert % subject.num_slices) -> Tensor:
            values = _whole(subject.reader, key, layer)
            inner = model.expert_ffn_size
            columns = slice(number * inner, (number + 1) * inner)
            if name == "linear_fc2.weight":
                return (values[:, columns] * output_scale(model)).contiguous()
            return _inner_rows(values, model)[:, columns].flatten(0, 1)  # linear_fc1

        yield UpcycledTensor(target, expert, tuple(shape), stored.dtype, make)


def _inner_rows(values: Tensor, model: ModelConfig) -> Tensor:
    """Rows of linear_fc1 as [gate and up, or up alone; inner width; …]."""
    return values.unflatten(0, (-1, model.ffn_size))


def _new_tensors(subject: _Subject, place: str) -> Iterator[UpcycledTensor]:
    """What the dense layer lacks: the router, and a shared expert that begins with output 0."""
    model, moe = subject.model, subject.model.moe
    layer = int(place.split(".")[2])
    source = f"{_STACK}{_MLP}linear_fc1.weight"
    dtype = subject.reader.stored(source).dtype
    width = model.hidden_size

    def new(name: str, shape: tuple[int, ...], make: Callable[[], Tensor]) -> UpcycledTensor:
        return UpcycledTensor(place + name, None, shape, dtype, make)

    def zeros(name: str, *shape: int) -> UpcycledTensor:
        return new(name, shape, lambda: torch.zeros(shape, dtype=dtype))

    key = f"{place}router.weight"
    yield new("router.weight", (moe.num_experts, width), lambda: _router(subject, key).to(dtype))
    if moe.expert_bias:
        bias = zeros("router.expert_bias", moe.num_experts)
        yield replace(bias, dtype=torch.float32, make=lambda: torch.zeros(moe.num_experts))
    shared = moe.shared_expert_ffn_hidden_size
    if shared == 0:
        return
    num_parts = 2 if model.activation == "swiglu" else 1
    columns = torch.arange(shared) % model.ffn_size

    def inner() -> Tensor:
        rows = _inner_rows(_whole(subject.reader, source, layer), model)
        return rows[:, columns].flatten(0, 1)

    yield new("shared_experts.linear_fc1.weight", (num_parts * shared, width), inner)
    yield zeros("shared_experts.linear_fc2.weight", width, shared)
    if moe.shared_expert_gate:
        yield zeros("shared_experts.gate_weight", 1, width)


def _router(subject: _Subject, key: str) -> Tensor:
    """fp32 [experts, h]: one row for each group where tokens take whole groups, else one each."""
    moe, num_slices = subject.model.moe, subject.num_slices
    takes_groups = moe.routing == "expert_choice" or moe.router_topk % num_slices == 0
    size = num_slices if takes_groups else 1
    shape = (moe.num_experts // size, subject.model.hidden_size)
    rows = initial_values(key, shape, std=subject.router_init_std, seed=subject.seed)
    return rows.repeat_interleave(size, dim=0)


def _write(subject: _Subject, checkpoint: Checkpoint, output: Path, *, is_exact: bool) -> Path:
    config = {**checkpoint.manifest["config"], "model": asdict(subject.model)}
    config["train"] = {**config["train"], "output_dir": str(output)}
    description = {
        "model": weight_settings(subject.model),
        "data": {"digest": None},
        "config": config,
        "num_parameters": count_parameters(subject.model).total,
        "upcycled_from": {
            "path": str(checkpoint.path),
            "seed": subject.seed,
            "exact": is_exact,
        },
    }
    tensors = list(upcycled_tensors(subject))
    with Progress() as progress:
        bar = progress.add_task("writing the checkpoint", total=len(tensors))

        def read(tensor: UpcycledTensor) -> Tensor:
            progress.advance(bar)
            return tensor.make()

        return write_checkpoint(
            output / "checkpoints",
            tensors,
            read,
            dtype={tensor.key: tensor.dtype for tensor in tensors},
            description=description,
        )
