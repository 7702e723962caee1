"""One table of names and rows: Megatron Core's checkpoint on one side, Hugging Face on the other.

Every Hugging Face tensor is a choice of rows of checkpoint tensors, in both directions:
linear_qkv holds per key-value group the rows of its query heads, then its key, then its value;
linear_fc1 holds the gate, then the up projection; the vocabulary is padded at its end. Rotary
halves lie alike on both sides, so heads are not permuted. Layers are stacked in the checkpoint.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from megatron_dlm.config.architecture import ModelConfig

EMBEDDING, OUTPUT, FINAL_NORM = "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"
_ATTENTION, _MLP = "decoder.layers.self_attention", "decoder.layers.mlp"


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
    """A tensor of the checkpoint, or one layer of a stacked one: its rows from first to last."""

    key: str
    layer: int | None
    """Place in the stack; None where nothing is stacked."""
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


def _in_order(found: list[tuple[int, Source]]) -> list[tuple[int, Source]]:
    found = sorted(found, key=lambda item: item[0])
    expected = 0
    for start, source in found:
        assert start == expected, f"rows {expected} to {start} have no source"
        expected += source.num_rows
    return found


def _layer_tensors(model: ModelConfig, layer: int) -> Iterator[CheckpointTensor]:
    width, inner = model.hidden_size, model.ffn_size
    names = f"model.layers.{layer}"

    def whole(key: str, name: str, rows: int, columns: int | None = None) -> CheckpointTensor:
        return CheckpointTensor(key, layer, columns, (Part(f"{names}.{name}", 0, rows),))

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
    yield whole(f"{_MLP}.linear_fc1.layer_norm_weight", "post_attention_layernorm.weight", width)
    gated = ("gate", "up") if model.activation == "swiglu" else ("up",)
    # kind -> columns of the projections up and down
    columns = {"weight": (width, inner), **({"bias": (None, None)} if model.mlp_bias else {})}
    for kind, (up, down) in columns.items():
        parts = tuple(Part(f"{names}.mlp.{which}_proj.{kind}", 0, inner) for which in gated)
        yield CheckpointTensor(f"{_MLP}.linear_fc1.{kind}", layer, up, parts)
        yield whole(f"{_MLP}.linear_fc2.{kind}", f"mlp.down_proj.{kind}", width, down)


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
    return CheckpointTensor(f"{_ATTENTION}.linear_qkv.{kind}", layer, columns, tuple(parts))


def _shape(rows: int, columns: int | None) -> tuple[int, ...]:
    return (rows,) if columns is None else (rows, columns)
