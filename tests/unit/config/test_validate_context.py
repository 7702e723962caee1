"""Rules of context parallelism: one configuration that passes, one change that does not."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from megatron_dlm.config.architecture import ModelConfig
from megatron_dlm.config.objective import ObjectiveConfig
from megatron_dlm.config.parallel import ParallelConfig
from megatron_dlm.config.schema import DataConfig, RunConfig, TrainConfig
from megatron_dlm.config.validate import check

GOOD = RunConfig(
    model=ModelConfig(
        vocab_size=1000, num_layers=8, num_attention_heads=8, num_query_groups=4, seq_length=96
    ),
    objective=ObjectiveConfig(mask_token_id=3),
    data=DataConfig(train={"shard": 1.0}),
    train=TrainConfig(steps=10, global_batch_size=16),
    parallel=ParallelConfig(context_parallel_size=4),
)
TRADE = {"context_parallel_comm": "a2a"}
RING = {"context_parallel_comm": "p2p"}


def changed(**sections: dict[str, Any]) -> RunConfig:
    return replace(
        GOOD, **{name: replace(getattr(GOOD, name), **values) for name, values in sections.items()}
    )


DOCUMENTS = {"reset_attention_mask": True}
GOODS = {
    "as it is": GOOD,
    "by heads": changed(parallel=TRADE),
    "ring": changed(parallel=RING),
    "blocks": changed(objective={"kind": "block"}),
    "documents on the CPU": changed(data=DOCUMENTS, train={"device": "cpu"}),
    "documents on local layers": changed(data=DOCUMENTS, model={"transformer_impl": "local"}),
    "documents in our attention": changed(data=DOCUMENTS, model={"attention_backend": "local"}),
    "split norms": changed(parallel={"tensor_model_parallel_size": 2, "sequence_parallel": True}),
    "lengths": changed(
        objective={"variable_length_probability": 0.5, "variable_length_multiple": 24}
    ),
    "one rank": changed(
        parallel={"context_parallel_size": 1, **RING}, model={"attention_sink": True}
    ),
}


@pytest.mark.parametrize("name", GOODS)
def test_good_configurations_pass(name: str) -> None:
    check(GOODS[name], 8)


BAD = {
    "length": (changed(model={"seq_length": 100}), r"model\.seq_length 100 .* 2 \* .*size 4"),
    "length, split norms": (
        changed(
            model={"seq_length": 88, "num_query_groups": 8},
            parallel={"tensor_model_parallel_size": 4, "sequence_parallel": True},
        ),
        r"model\.seq_length 88 is not a multiple of 16, .*sequence_parallel over 4 ranks",
    ),
    "cropped lengths": (
        changed(objective={"variable_length_probability": 0.5, "variable_length_multiple": 12}),
        r"objective\.variable_length_multiple 12 is not a multiple of 2 \*",
    ),
    "heads": (
        changed(parallel={"tensor_model_parallel_size": 4, **TRADE}),
        r"a2a .* model\.num_attention_heads 8 .*parallel_size 4 \* .*size 4; use all_gather",
    ),
    "groups": (
        changed(parallel=TRADE, model={"num_query_groups": 2}),
        r"a2a .* model\.num_query_groups 2 .* use all_gather",
    ),
    "ring of blocks": (
        changed(parallel=RING, objective={"kind": "block"}),
        r"p2p .* objective\.kind block .* use auto",
    ),
    "ring of prompts": (
        changed(parallel=RING, objective={"kind": "hybrid", "prompt_share": 0.5}),
        r"p2p .* objective\.kind hybrid",
    ),
    "ring with a cap": (
        changed(parallel=RING, model={"attn_logit_softcapping": 50.0}),
        r"p2p .* model\.attn_logit_softcapping",
    ),
    "ring with a sink": (
        changed(parallel=RING, model={"attention_sink": True}),
        r"p2p .* model\.attention_sink",
    ),
    "ring of local layers": (
        changed(parallel=RING, model={"transformer_impl": "local"}),
        r"p2p .* model\.transformer_impl local",
    ),
    "ring in our attention": (
        changed(parallel=RING, model={"attention_backend": "local"}),
        r"p2p .* model\.attention_backend local",
    ),
    "ring on the CPU": (
        changed(parallel=RING, train={"device": "cpu"}),
        r"p2p .* train\.device cpu",
    ),
    "documents": (changed(data=DOCUMENTS), r"reset_attention_mask.* set model\.attention_backend"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_configurations_are_refused(name: str) -> None:
    config, message = BAD[name]
    with pytest.raises(ValueError, match=message) as error:
        check(config, 32)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("asked", "with_engine", "without"),
    [("auto", "p2p", "all_gather"), ("a2a", "a2a", "a2a"), ("all_gather", *2 * ["all_gather"])],
)
def test_communication(asked: str, with_engine: str, without: str) -> None:
    config = replace(GOOD.parallel, context_parallel_comm=asked)
    assert config.attention_communication(has_engine=True) == with_engine
    assert config.attention_communication(has_engine=False) == without
    alone = replace(config, context_parallel_size=1)
    assert alone.attention_communication(has_engine=True) is None


def test_a_ring_needs_transformer_engine() -> None:
    config = replace(GOOD.parallel, **RING)
    assert config.attention_communication(has_engine=True) == "p2p"
    with pytest.raises(ValueError, match="does not build the layers here; use all_gather or a2a"):
        config.attention_communication(has_engine=False)
