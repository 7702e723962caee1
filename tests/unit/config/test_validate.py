"""Every rule that spans sections: one configuration that passes, one change that does not."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_dlm.config.architecture import ModelConfig
from megatron_dlm.config.objective import ObjectiveConfig
from megatron_dlm.config.parallel import ParallelConfig
from megatron_dlm.config.schema import DataConfig, RunConfig, ScheduleConfig, TrainConfig
from megatron_dlm.config.tokenizer_metadata import read_tokenizer_metadata
from megatron_dlm.config.validate import check, prepare

GOOD = RunConfig(
    model=ModelConfig(vocab_size=1000, num_layers=8, num_query_groups=2),
    objective=ObjectiveConfig(mask_token_id=3),
    data=DataConfig(train={"shard": 1.0}),
    train=TrainConfig(steps=10, global_batch_size=16),
)


def changed(**sections: dict[str, Any]) -> RunConfig:
    return replace(
        GOOD, **{name: replace(getattr(GOOD, name), **values) for name, values in sections.items()}
    )


@pytest.mark.parametrize(
    ("config", "world_size"),
    [
        (GOOD, 1),
        (GOOD, 8),
        (changed(parallel={"tensor_model_parallel_size": 2, "sequence_parallel": True}), 4),
        (
            changed(
                parallel={
                    "pipeline_model_parallel_size": 2,
                    "virtual_pipeline_model_parallel_size": 4,
                }
            ),
            4,
        ),
        (changed(train={"steps": None, "epochs": 2.5}), 1),
        (changed(objective={"kind": "autoregressive", "mask_token_id": None}), 1),
    ],
)
def test_good_configurations_pass(config: RunConfig, world_size: int) -> None:
    check(config, world_size)


PIPELINE = {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2}
BAD: dict[str, tuple[RunConfig, int, str]] = {
    "world_size": (
        changed(parallel={"tensor_model_parallel_size": 2}),
        3,
        r"world size is 3, but tensor 2 \* pipeline 1 \* context 1 .*--nproc-per-node 2",
    ),
    "heads": (
        changed(
            model={"hidden_size": 192, "num_attention_heads": 6, "num_query_groups": 6},
            parallel={"tensor_model_parallel_size": 4},
        ),
        4,
        r"model\.num_attention_heads 6 is not a multiple of .*tensor_model_parallel_size 4",
    ),
    "query_groups": (
        changed(parallel={"tensor_model_parallel_size": 4}),
        4,
        r"model\.num_query_groups 2 is not a multiple",
    ),
    "ffn": (
        changed(model={"ffn_hidden_size": 333}, parallel={"tensor_model_parallel_size": 2}),
        2,
        r"model\.ffn_hidden_size 333 is not a multiple",
    ),
    "sequence": (
        changed(
            model={"seq_length": 127},
            parallel={"tensor_model_parallel_size": 2, "sequence_parallel": True},
        ),
        2,
        r"model\.seq_length 127 is not a multiple",
    ),
    "vocabulary": (
        changed(
            model={"vocab_size": 999, "make_vocab_size_divisible_by": 1},
            parallel={"tensor_model_parallel_size": 2},
        ),
        2,
        r"padded vocabulary of 999 rows .*make_vocab_size_divisible_by 1 a multiple",
    ),
    "layers": (
        changed(parallel={"pipeline_model_parallel_size": 3}),
        3,
        r"model\.num_layers 8 is not a multiple of parallel\.pipeline_model_parallel_size 3",
    ),
    "layers_of_chunks": (
        changed(parallel={**PIPELINE, "virtual_pipeline_model_parallel_size": 3}),
        2,
        r"num_layers 8 .*size 2 \* parallel\.virtual_pipeline_model_parallel_size 3",
    ),
    "interleaved_micro_batches": (
        changed(parallel=PIPELINE, train={"global_batch_size": 3}),
        2,
        r"a step has 3 micro-batches per rank; .*multiple of .*pipeline_model_parallel_size 2",
    ),
    "batch": (changed(train={"micro_batch_size": 3}), 1, r"global_batch_size 16 is not a multiple"),
    "engine_on_cpu": (
        changed(model={"transformer_impl": "transformer_engine"}, train={"device": "cpu"}),
        1,
        r"transformer_engine needs a GPU, but train\.device is cpu",
    ),
    "no_mask": (
        changed(objective={"mask_token_id": None}),
        1,
        r"objective\.kind masked needs a mask token; give data\.tokenizer",
    ),
    "no_mask_for_input_masking": (
        changed(
            objective={
                "kind": "autoregressive",
                "input_masking_ratio": 0.1,
                "mask_token_id": None,
            }
        ),
        1,
        r"objective\.kind autoregressive needs a mask token",
    ),
    "mask_outside": (
        changed(objective={"mask_token_id": 1000}),
        1,
        r"mask_token_id 1000 is outside the vocabulary of 1000 tokens",
    ),
    "mask_negative": (changed(objective={"mask_token_id": -1}), 1, r"mask_token_id -1 is outside"),
    "no_length": (changed(train={"steps": None}), 1, r"give one of train\.steps"),
    "no_data": (changed(data={"train": {}}), 1, r"data\.train is empty; give \{prefix: weight\}"),
    "warmup": (
        changed(schedule={"warmup_steps": 10}),
        1,
        r"schedule\.warmup_steps 10 must be below the 10 steps",
    ),
    "warmup_by_tokens": (
        changed(schedule={"warmup_steps": 2}, train={"steps": None, "tokens": 16 * 128 + 1}),
        1,
        r"schedule\.warmup_steps 2 must be below the 2 steps",
    ),
    "warmup_into_decay": (
        replace(GOOD, schedule=ScheduleConfig(kind="wsd", warmup_steps=6, decay_fraction=0.5)),
        1,
        r"warmup_steps 6 and schedule\.decay_fraction 0\.5 of 10 steps overlap",
    ),
    "wsd_without_decay": (
        changed(schedule={"kind": "wsd", "decay_fraction": 0.0}),
        1,
        r"never decays; use schedule\.kind constant",
    ),
    "blocks_inside_documents": (
        changed(objective={"kind": "block"}, data={"packing": "pack"}),
        1,
        r"data\.packing pack.*kind block: blocks.*use data\.packing concat",
    ),
    "prompts_inside_documents": (
        changed(
            objective={"kind": "hybrid", "prompt_share": 0.2},
            data={"reset_attention_mask": True},
        ),
        1,
        r"reset_attention_mask.*kind hybrid: .*prompts",
    ),
    "block_beyond_the_sample": (
        changed(objective={"kind": "block", "block_size": 1000}),
        1,
        r"objective\.block_size 1000 is larger than model\.seq_length",
    ),
    "empty_tokens_without_pad": (
        changed(objective={"kind": "hybrid", "empty_token_share": 0.2}),
        1,
        r"empty_token_share needs a pad token; give objective\.pad_token_id",
    ),
    "pad_outside_the_vocabulary": (
        changed(objective={"kind": "hybrid", "empty_token_share": 0.2, "pad_token_id": 10**6}),
        1,
        r"objective\.pad_token_id 1000000 is outside the vocabulary",
    ),
    "packing_without_room": (
        changed(data={"packing": "pack"}, model={"seq_length": 1}),
        1,
        r"data\.packing pack .*model\.seq_length 1 leaves no room",
    ),
}


@pytest.mark.parametrize(("config", "world_size", "message"), BAD.values(), ids=BAD.keys())
def test_impossible_combinations_name_values_and_remedy(
    config: RunConfig, world_size: int, message: str
) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        check(config, world_size)
    assert "\n" not in str(caught.value)


def test_exactly_one_length() -> None:
    with pytest.raises(ValueError, match=r"exactly one of .*; got steps, epochs"):
        TrainConfig(steps=1, epochs=1.0)


@pytest.mark.parametrize("packing", ["pack", "document"])
def test_padded_samples_always_keep_attention_inside_documents(packing: Any) -> None:
    assert DataConfig(packing=packing).resets_attention
    assert DataConfig(packing=packing, reset_attention_mask=True).resets_attention
    message = rf"reset_attention_mask is false, but data\.packing {packing} pads .*use concat"
    with pytest.raises(ValueError, match=message):
        DataConfig(packing=packing, reset_attention_mask=False)


def test_concatenated_samples_let_attention_cross_documents_unless_told() -> None:
    assert not DataConfig().resets_attention
    assert not DataConfig(reset_attention_mask=False).resets_attention
    assert DataConfig(reset_attention_mask=True).resets_attention


def with_tokenizer(directory: Path, **sections: dict[str, Any]) -> RunConfig:
    config = changed(**sections)
    return replace(config, data=replace(config.data, tokenizer=str(directory)))


def test_prepare_takes_the_world_from_the_environment(
    tokenizer_directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = with_tokenizer(
        tokenizer_directory, model={"vocab_size": None}, objective={"mask_token_id": None}
    )
    monkeypatch.delenv("SLURM_NTASKS", raising=False)
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert prepare(config).objective.mask_token_id == 3
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(ValueError, match=r"global_batch_size 16 .* 3 data-parallel ranks"):
        prepare(config)


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"objective": {"mask_token_id": 500}}, r"500 is a text token of .*mask token is 3"),
        ({"objective": {"mask_token_id": 2}}, r"2 is the end-of-document, .*mask token is 3"),
        ({"model": {"vocab_size": 900}}, r"model\.vocab_size 900 is below the 1000 tokens"),
    ],
)
def test_clashes_with_the_tokenizer(
    tokenizer_directory: Path, sections: dict[str, dict[str, Any]], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        check(with_tokenizer(tokenizer_directory, **sections), 1)


def test_a_tokenizer_without_mask_serves_autoregressive_models_only(
    tokenizer_directory: Path,
) -> None:
    path = tokenizer_directory / "metadata.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "mask_id": None}))
    without = {"mask_token_id": None}
    check(with_tokenizer(tokenizer_directory, objective={"kind": "autoregressive", **without}), 1)
    command = rf"tokenizer --existing {tokenizer_directory} --add_mask_token true"
    with pytest.raises(ValueError, match=rf"objective\.kind masked needs a mask .*{command}"):
        check(with_tokenizer(tokenizer_directory, objective=without), 1)
    with pytest.raises(ValueError, match=r"500 is a text token of .*; it has none"):
        check(with_tokenizer(tokenizer_directory, objective={"mask_token_id": 500}), 1)
    sections = {"model": {"vocab_size": 1001}, "objective": {"mask_token_id": 1000}}
    check(with_tokenizer(tokenizer_directory, **sections), 1)


def test_mask_in_rows_beyond_the_tokenizer_is_fine(tokenizer_directory: Path) -> None:
    sections = {"model": {"vocab_size": 1024}, "objective": {"mask_token_id": 1010}}
    check(with_tokenizer(tokenizer_directory, **sections), 1)


def test_missing_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"cannot read .*metadata\.json \(No such file.*make one"):
        read_tokenizer_metadata(str(tmp_path))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("{", r"metadata\.json is not valid JSON"),
        ("[]", r"expected a JSON object"),
        ({"mask_id": None}, r"lacks mask_id"),
        ({"vocab_size": "1000"}, r"must be integers"),
        ({"mask_id": 9}, r"mask_id is 9; it must be one of special_ids \[0, 1, 2, 3\]"),
        ({"vocab_size": 3}, r"mask_id is 3; .* below vocab_size 3"),
    ],
)
def test_corrupt_tokenizer_metadata(
    tokenizer_directory: Path, change: str | dict[str, Any], message: str
) -> None:
    path = tokenizer_directory / "metadata.json"
    if isinstance(change, dict):
        values = {**json.loads(path.read_text()), **change}
        change = json.dumps({name: value for name, value in values.items() if value is not None})
    path.write_text(change)
    with pytest.raises(ValueError, match=message):
        read_tokenizer_metadata(str(tokenizer_directory))


def test_layout_is_checked_with_the_sizes_of_parallel_config() -> None:
    config = replace(GOOD, parallel=ParallelConfig(pipeline_model_parallel_size=4))
    check(config, 16)
    with pytest.raises(ValueError, match=r"multiple of 4"):
        check(config, 10)
