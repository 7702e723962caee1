"""Rules that span sections. Each failure is one line: the keys, their values, the remedy."""

from __future__ import annotations

from megatron_dlm.config.checks import require
from megatron_dlm.config.derive import num_micro_batches, resolve, total_steps, world_size_of
from megatron_dlm.config.objective import AttentionPattern
from megatron_dlm.config.optimizer import check_completep
from megatron_dlm.config.schema import RunConfig
from megatron_dlm.config.tokenizer_metadata import read_tokenizer_metadata
from megatron_dlm.config.validate_context import check_context
from megatron_dlm.config.validate_kernels import check_kernels
from megatron_dlm.config.validate_moe import check_moe


def prepare(config: RunConfig) -> RunConfig:
    """The resolved and checked configuration of a training run in this process's environment."""
    config = resolve(config)
    check(config, world_size_of())
    return config


def check(config: RunConfig, world_size: int) -> None:
    """Refuse what cannot train: a resolved configuration on `world_size` ranks."""
    check_layout(config, world_size)
    check_kernels(config)
    check_tokens(config)
    _check_attention(config)
    check_completep(config.optimizer, config.model)
    _check_length(config)
    require(
        bool(config.data.train),
        "data.train is empty; give {prefix: weight}, a dataset made by `megatron-dlm preprocess`",
    )
    require(
        config.data.packing == "concat" or config.model.seq_length > 1,
        f"data.packing {config.data.packing} cuts long documents into pieces that share a token; "
        f"model.seq_length {config.model.seq_length} leaves no room, use 2 or more",
    )


def check_layout(config: RunConfig, world_size: int) -> None:
    """Refuse shapes that the parallel layout cannot split evenly."""
    micro_batches = num_micro_batches(config, world_size)
    model, parallel = config.model, config.parallel
    tensor_size = parallel.tensor_model_parallel_size
    split_over_tensor_ranks = {
        "model.num_attention_heads": model.num_attention_heads,
        "model.num_query_groups": model.query_groups,
        "model.ffn_hidden_size": model.ffn_size,
    }
    if parallel.sequence_parallel:
        split_over_tensor_ranks["model.seq_length"] = model.seq_length
        if config.objective.variable_length_probability > 0:
            multiple = config.objective.variable_length_multiple
            split_over_tensor_ranks["objective.variable_length_multiple"] = multiple
    for name, value in split_over_tensor_ranks.items():
        require(
            value % tensor_size == 0,
            f"{name} {value} is not a multiple of "
            f"parallel.tensor_model_parallel_size {tensor_size}",
        )
    require(
        model.padded_vocab_size % tensor_size == 0,
        f"the padded vocabulary of {model.padded_vocab_size} rows is not a multiple of "
        f"parallel.tensor_model_parallel_size {tensor_size}; make "
        f"model.make_vocab_size_divisible_by {model.make_vocab_size_divisible_by} a multiple of it",
    )
    check_context(config)
    _check_pipeline(config, micro_batches)
    check_moe(config, world_size)
    _check_implementation(config)


def _check_pipeline(config: RunConfig, micro_batches: int) -> None:
    parallel = config.parallel
    stages = parallel.pipeline_model_parallel_size
    chunks = parallel.virtual_pipeline_model_parallel_size or 1
    layers = config.model.num_layers
    require(
        layers % (stages * chunks) == 0,
        f"model.num_layers {layers} is not a multiple of parallel.pipeline_model_parallel_size "
        f"{stages} * parallel.virtual_pipeline_model_parallel_size {chunks}",
    )
    require(
        chunks == 1 or micro_batches % stages == 0,
        f"a step has {micro_batches} micro-batches per rank; the interleaved pipeline needs a "
        f"multiple of parallel.pipeline_model_parallel_size {stages}: raise "
        "train.global_batch_size or drop parallel.virtual_pipeline_model_parallel_size",
    )


def _check_implementation(config: RunConfig) -> None:
    require(
        config.train.device != "cpu" or config.model.transformer_impl != "transformer_engine",
        "model.transformer_impl transformer_engine needs a GPU, but train.device is cpu; use auto",
    )


def check_tokens(config: RunConfig) -> None:
    """Refuse a mask id or vocabulary that clashes with the tokenizer or the objective."""
    objective, vocab_size = config.objective, config.model.vocab_size
    assert vocab_size is not None, "resolve() fills vocab_size"
    mask_id = objective.mask_token_id
    require(
        mask_id is not None or not objective.needs_mask,
        f"objective.kind {objective.kind} needs a mask token; {_mask_remedy(config)}",
    )
    require(
        mask_id is None or 0 <= mask_id < vocab_size,
        f"objective.mask_token_id {mask_id} is outside the vocabulary of {vocab_size} tokens",
    )
    pad_id = objective.pad_token_id
    require(
        pad_id is not None or objective.empty_token_share == 0,
        "objective.empty_token_share needs a pad token; give objective.pad_token_id or a "
        "data.tokenizer that has one",
    )
    require(
        pad_id is None or 0 <= pad_id < vocab_size,
        f"objective.pad_token_id {pad_id} is outside the vocabulary of {vocab_size} tokens",
    )
    if config.data.tokenizer is not None:
        _check_against_tokenizer(config.data.tokenizer, vocab_size, mask_id)


def _check_attention(config: RunConfig) -> None:
    objective, data = config.objective, config.data
    is_special = objective.attention in (AttentionPattern.ARBITRARY, AttentionPattern.BLOCK)
    require(
        not (is_special and data.resets_attention),
        f"attention inside documents (data.packing {data.packing}, data.reset_attention_mask) "
        f"cannot be joined with the attention of this objective (kind {objective.kind}: blocks, "
        "prompts, infilling or annealing); use data.packing concat without it",
    )
    require(
        objective.kind != "block" or objective.block_size <= config.model.seq_length,
        f"objective.block_size {objective.block_size} is larger than model.seq_length "
        f"{config.model.seq_length}",
    )


def _mask_remedy(config: RunConfig) -> str:
    tokenizer = config.data.tokenizer
    if tokenizer is None:
        return "give data.tokenizer or objective.mask_token_id"
    return (
        f"data.tokenizer {tokenizer} has none: give objective.mask_token_id, or add one with "
        f"`megatron-dlm tokenizer --existing {tokenizer} --add_mask_token true --output_dir DIR`"
    )


def _check_against_tokenizer(directory: str, vocab_size: int, mask_id: int | None) -> None:
    metadata = read_tokenizer_metadata(directory)
    require(
        vocab_size >= metadata.vocab_size,
        f"model.vocab_size {vocab_size} is below the {metadata.vocab_size} tokens of "
        f"data.tokenizer {directory}; remove it to take the tokenizer's",
    )
    if mask_id is None:
        return
    theirs = "it has none" if metadata.mask_id is None else f"its mask token is {metadata.mask_id}"
    require(
        mask_id >= metadata.vocab_size or mask_id in metadata.special_ids,
        f"objective.mask_token_id {mask_id} is a text token of data.tokenizer {directory}; "
        + theirs,
    )
    require(
        mask_id not in (metadata.eod_id, metadata.bos_id, metadata.pad_id),
        f"objective.mask_token_id {mask_id} is the end-of-document, begin or pad token of "
        f"data.tokenizer {directory}; {theirs}",
    )


def _check_length(config: RunConfig) -> None:
    train, schedule = config.train, config.schedule
    require(
        any(value is not None for value in (train.steps, train.tokens, train.epochs)),
        "the length of the run is unknown; give one of train.steps, train.tokens, train.epochs",
    )
    if train.epochs is None:
        check_schedule(config, total_steps(config, num_windows=0))
    require(
        schedule.kind != "wsd" or schedule.decay_fraction > 0,
        "schedule.kind wsd with schedule.decay_fraction 0 never decays; use schedule.kind constant",
    )


def check_schedule(config: RunConfig, steps: int) -> None:
    """Refuse a warmup (and wsd decay) that does not fit into `steps`."""
    schedule = config.schedule
    require(
        schedule.warmup_steps < steps,
        f"schedule.warmup_steps {schedule.warmup_steps} must be below the {steps} steps of the run",
    )
    decay = schedule.decay_fraction * steps if schedule.kind == "wsd" else 0
    require(
        schedule.warmup_steps + decay <= steps,
        f"schedule.warmup_steps {schedule.warmup_steps} and schedule.decay_fraction "
        f"{schedule.decay_fraction} of {steps} steps overlap; make one of them smaller",
    )
