"""One table of names and rows: Megatron Core's checkpoint on one side, Hugging Face on the other.

Every Hugging Face tensor is a choice of rows of checkpoint tensors, in both directions:
linear_qkv holds per key-value group the rows of its query heads, then its key, then its value;
linear_fc1 holds the gate, then the up projection; the vocabulary is padded at its end. Rotary
halves lie alike on both sides, so heads are not permuted. A checkpoint stacks the layers of a dense
model; of a model with experts it names every layer, and stacks the experts of one.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from megatron_dlm.config.architecture import ModelConfig

EMBEDDING, OUTPUT, FINAL_NORM = "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"
_ATTENTION, _MLP = "self_attention", "mlp"
EXPERT_BIAS = "gate.expert_bias"
"""End of the name of a tensor that is fp32 whatever the others are."""


@dataclass(frozen=True)
class Part:
    """`num_rows` rows of a checkpoint tensor, and the rows of an exported tensor that they are."""

    name: str | None
    """The exported tensor; None for rows that only pad."""
    start: int
    """First row in the exported tensor."""
    num_rows: int


@dataclass(frozen=True)
class CheckpointTensor:
    """A tensor of the checkpoint, or one place of a stacked one: its rows from first to last."""

    key: str
    layer: int | None
    """Place in the stack of layers, or of the experts of one; None where nothing is stacked."""
    num_columns: int | None
    """None for a vector, whose elements count as rows."""
    parts: tuple[Part, ...]

    @property
    def num_rows(self) -> int:
        return sum(part.num_rows for part in self.parts)

    @property
    def shape(self) -> tuple[int, ...]:
        """Without the axis of the stack."""
        return _shape(self.num_rows, self.num_columns)

    @property
    def is_fp32(self) -> bool:
        """Whether it is kept in fp32 whatever the type of the model."""
        return any(part.name is not None and part.name.endswith(EXPERT_BIAS) for part in self.parts)


@dataclass(frozen=True)
class Source:
    """`num_rows` rows of a checkpoint tensor."""

    key: str
    layer: int | None
    start: int
    num_rows: int


@dataclass(frozen=True)
class ExportedTensor:
    """A tensor of the Hugging Face side: rows of checkpoint tensors, one after the other."""

    name: str
    num_columns: int | None
    sources: tuple[Source, ...]

    @property
    def num_rows(self) -> int:
        return sum(source.num_rows for source in self.sources)

    @property
    def shape(self) -> tuple[int, ...]:
        return _shape(self.num_rows, self.num_columns)

    @property
    def is_fp32(self) -> bool:
        """Whether it is kept in fp32 whatever the type of the model."""
        return self.name.endswith(EXPERT_BIAS)


def layer_place(model: ModelConfig, layer: int, name: str) -> tuple[str, int | None]:
    """Key and place in its stack of what Megatron Core calls `name` in a layer."""
    if model.moe.is_moe:
        return f"decoder.layers.{layer}.{name}", None
    return f"decoder.layers.{name}", layer


def checkpoint_tensors(model: ModelConfig) -> list[CheckpointTensor]:
    """Every weight of the model on the checkpoint's side, in the model's order."""
    assert model.vocab_size is not None, "resolve() fills vocab_size"
    vocabulary, width = model.vocab_size, model.hidden_size
    padding = Part(None, 0, model.padded_vocab_size - vocabulary)

    def table(key: str, name: str) -> CheckpointTensor:
        parts = (Part(name, 0, vocabulary), *([padding] if padding.num_rows else []))
        return CheckpointTensor(key, None, width, parts)

    tensors = [table("embedding.word_embeddings.weight", EMBEDDING)]
    for layer in range(model.num_layers):
        tensors += _layer_tensors(model, layer)
    final_norm = (Part(FINAL_NORM, 0, width),)
    tensors.append(CheckpointTensor("decoder.final_layernorm.weight", None, None, final_norm))
    if model.untie_embeddings_and_output_weights:
        tensors.append(table("output_layer.weight", OUTPUT))
    return tensors


def exported_tensors(model: ModelConfig) -> list[ExportedTensor]:
    """Every weight of the model on Hugging Face's side, in the model's order."""
    sources: dict[str, list[tuple[int, Source]]] = {}
    columns: dict[str, int | None] = {}
    for tensor in checkpoint_tensors(model):
        row = 0
        for part in tensor.parts:
            if part.name is not None:
                source = Source(tensor.key, tensor.layer, row, part.num_rows)
                sources.setdefault(part.name, []).append((part.start, source))
                columns[part.name] = tensor.num_columns
            row += part.num_rows
    return [
        ExportedTensor(name, columns[name], tuple(source for _, source in _in_order(found)))
        for name, found in sources.items()
    ]


def has_query_bias(model: ModelConfig) -> bool:
    """Whether query, key and value projections have biases (Qwen2.5)."""
    return bool(model.megatron.get("add_qkv_bias"))


def has_experts(model: ModelConfig, layer: int) -> bool:
    """Whether the MLP of a layer is a set of experts."""
    return layer >= model.num_layers - model.num_moe_layers


def _in_order(found: list[tuple[int, Source]]) -> list[tuple[int, Source]]:
    found = sorted(found, key=lambda item: item[0])
    expected = 0
    for start, source in found:
        assert start == expected, f"rows {expected} to {start} have no source"
        expected += source.num_rows
    return found


def _layer_tensors(model: ModelConfig, layer: int) -> Iterator[CheckpointTensor]:
    width = model.hidden_size

    def whole(key: str, name: str, rows: int, columns: int | None = None) -> CheckpointTensor:
        parts = (Part(f"model.layers.{layer}.{name}", 0, rows),)
        return CheckpointTensor(*layer_place(model, layer, key), columns, parts)

    yield whole(f"{_ATTENTION}.linear_qkv.layer_norm_weight", "input_layernorm.weight", width)
    yield _query_key_value(model, layer, "weight", width)
    if has_query_bias(model):
        yield _query_key_value(model, layer, "bias", None)
    size = model.head_size
    heads_width = model.num_attention_heads * size
    if model.qk_layernorm:
        is_full = model.qk_layernorm_scope == "full"
        sizes = (heads_width, model.query_groups * size) if is_full else (size, size)
        for which, rows in zip(("q", "k"), sizes, strict=True):
            key, name = f"{which}_layernorm.weight", f"self_attn.{which}_norm.weight"
            yield whole(f"{_ATTENTION}.{key}", name, rows)
    if model.attention_sink:
        for which in ("sink_key", "sink_value"):
            key, name = f"{_ATTENTION}.core_attention.{which}", f"self_attn.{which}"
            yield whole(key, name, model.query_groups, size)
    yield whole(f"{_ATTENTION}.linear_proj.weight", "self_attn.o_proj.weight", width, heads_width)
    is_moe = has_experts(model, layer)
    norm = "pre_mlp_layernorm.weight" if is_moe else f"{_MLP}.linear_fc1.layer_norm_weight"
    yield whole(norm, "post_attention_layernorm.weight", width)
    if is_moe:
        yield from _expert_tensors(model, layer)
    else:
        place = layer_place(model, layer, _MLP)
        yield from _mlp_tensors(model, layer, place, "mlp", model.ffn_size)


def _expert_tensors(model: ModelConfig, layer: int) -> Iterator[CheckpointTensor]:
    moe, width, names = model.moe, model.hidden_size, f"model.layers.{layer}.mlp"
    prefix, _ = layer_place(model, layer, _MLP)
    gate = (Part(f"{names}.gate.weight", 0, moe.num_experts),)
    yield CheckpointTensor(f"{prefix}.router.weight", None, width, gate)
    if moe.expert_bias:
        bias = (Part(f"{names}.{EXPERT_BIAS}", 0, moe.num_experts),)
        yield CheckpointTensor(f"{prefix}.router.expert_bias", None, None, bias)
    for expert in range(moe.num_experts):
        place = (f"{prefix}.experts.experts", expert)
        inner = model.expert_ffn_size
        yield from _mlp_tensors(model, layer, place, f"mlp.experts.{expert}", inner)
    if moe.shared_expert_ffn_hidden_size:
        shared, inner = (f"{prefix}.shared_experts", None), moe.shared_expert_ffn_hidden_size
        yield from _mlp_tensors(model, layer, shared, "mlp.shared_expert", inner)
    if moe.shared_expert_gate:
        gate = (Part(f"{names}.shared_expert_gate.weight", 0, 1),)
        yield CheckpointTensor(f"{prefix}.shared_experts.gate_weight", None, width, gate)


def _mlp_tensors(
    model: ModelConfig, layer: int, place: tuple[str, int | None], name: str, inner: int
) -> Iterator[CheckpointTensor]:
    """The two matrices of an MLP or an expert, `inner` wide, at a key and a place in its stack."""
    key, stacked = place
    names, width = f"model.layers.{layer}.{name}", model.hidden_size
    gated = ("gate", "up") if model.activation == "swiglu" else ("up",)
    # kind -> columns of the projections up and down
    columns = {"weight": (width, inner), **({"bias": (None, None)} if model.mlp_bias else {})}
    for kind, (up, down) in columns.items():
        parts = tuple(Part(f"{names}.{which}_proj.{kind}", 0, inner) for which in gated)
        yield CheckpointTensor(f"{key}.linear_fc1.{kind}", stacked, up, parts)
        out = (Part(f"{names}.down_proj.{kind}", 0, width),)
        yield CheckpointTensor(f"{key}.linear_fc2.{kind}", stacked, down, out)


def _query_key_value(
    model: ModelConfig, layer: int, kind: str, columns: int | None
) -> CheckpointTensor:
    size = model.head_size
    query_rows = model.num_attention_heads // model.query_groups * size
    parts = []
    for group in range(model.query_groups):
        for which, rows in (("q", query_rows), ("k", size), ("v", size)):
            name = f"model.layers.{layer}.self_attn.{which}_proj.{kind}"
            parts.append(Part(name, group * rows, rows))
    place = layer_place(model, layer, f"{_ATTENTION}.linear_qkv.{kind}")
    return CheckpointTensor(*place, columns, tuple(parts))


def _shape(rows: int, columns: int | None) -> tuple[int, ...]:
    return (rows,) if columns is None else (rows, columns)
