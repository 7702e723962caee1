"""examples/configs/moe: every combination is a run that could start, of the size it names."""

from __future__ import annotations

from pathlib import Path

import pytest
from sources import ROOT

from megatron_dlm.checkpoint.upcycling import differences
from megatron_dlm.config.derive import resolve, total_steps
from megatron_dlm.config.parse import parse
from megatron_dlm.config.schema import RunConfig
from megatron_dlm.config.validate import check
from megatron_dlm.models.accounting import (
    count_parameters,
    expert_parameters,
    training_flops_per_token,
)

MOE = ROOT / "examples" / "configs" / "moe"
# experts of OpenMoE 2 -> billions of all and of active parameters
EXPERTS = {
    "experts_16": (8.08, 1.60),
    "experts_64": (8.08, 1.60),
    "experts_256": (8.09, 1.62),
    "experts_64_shared": (7.90, 1.74),
    "experts_56_upcycled": (8.08, 1.74),
}
ROUTINGS = {
    "routing_token_choice": [[], ["gate_sigmoid"], ["dense_first"]],
    "routing_expert_choice": [
        [],
        ["gate_sigmoid"],
        ["dense_first"],
        ["scope_micro_batch"],
        ["token_balance"],
    ],
}


def read(*files: Path, changes: tuple[str, ...] = ()) -> RunConfig:
    """The resolved configuration of a run from these files on 8 ranks."""
    flags = ["--config", "preset:sdl_1b"]
    flags += [part for file in files for part in ("--config", str(file))]
    config = resolve(parse(RunConfig, [*flags, *changes], prog="x"))
    check(config, 8)
    return config


def openmoe2(*parts: str) -> RunConfig:
    return read(*(MOE / "openmoe2" / f"{part}.yaml" for part in ("base", *parts)))


def test_every_file_is_known() -> None:
    names = {path.stem for path in (MOE / "openmoe2").glob("*.yaml")}
    questions = {name for sets in ROUTINGS.values() for names in sets for name in names}
    assert names == {"base", *EXPERTS, *ROUTINGS, *questions}
    assert {path.stem for path in MOE.glob("*.yaml")} == {
        "8b1a_1b_96e_ar",
        "8b1a_1b_96e_masked",
    }


@pytest.mark.parametrize("kind", ["ar", "masked"])
def test_8b_of_which_1b_are_active_is_matched_to_the_dense_1b(kind: str) -> None:
    config = read(MOE / f"8b1a_1b_96e_{kind}.yaml")
    dense = parse(RunConfig, ["--config", "preset:sdl_1b"], prog="x").model
    count, parent = count_parameters(config.model), count_parameters(dense)
    assert count.total == pytest.approx(7.7e9, rel=0.01)
    # What a token meets: the dense model, and 88 rows of a router in every layer.
    assert count.active == parent.total + 26 * 88 * 1792
    assert 8 * expert_parameters(config.model) == 3 * 1792 * dense.ffn_size
    ours = training_flops_per_token(config.model, config.objective).total
    theirs = training_flops_per_token(dense, config.objective).total
    assert ours == pytest.approx(theirs, rel=0.01)
    assert total_steps(config, -(-1_000_000_000 // 2048)) == 183_106
    assert differences(config.model) == []  # it can be made of the dense one


def test_the_two_halves_differ_in_the_objective_only() -> None:
    same = ("--objective.kind", "masked", "--train.output_dir", "x")
    same += ("--objective.weighting", "count", "--objective.time_sampling", "iid")
    same += ("--objective.variable_length_probability", "0.01")
    left, right = (
        read(MOE / f"8b1a_1b_96e_{kind}.yaml", changes=same) for kind in ("ar", "masked")
    )
    assert left == right


@pytest.mark.parametrize("experts", EXPERTS)
@pytest.mark.parametrize(
    ("routing", "question"),
    [(routing, question) for routing, sets in ROUTINGS.items() for question in sets],
    ids=lambda value: "+".join(value) if isinstance(value, list) else str(value),
)
def test_every_ablation_can_start(experts: str, routing: str, question: list[str]) -> None:
    config = openmoe2(experts, routing, *question)
    count = count_parameters(config.model)
    assert routing.endswith(config.model.moe.routing)
    if "dense_first" in question:
        assert config.model.num_moe_layers == 26
        assert 7.4e9 < count.total < 7.65e9
        return
    total, active = EXPERTS[experts]
    assert count.total / 1e9 == pytest.approx(total, abs=0.005)
    assert count.active / 1e9 == pytest.approx(active, abs=0.005)


def test_the_dense_baseline_has_what_a_token_meets_of_the_upcycled_model() -> None:
    dense = count_parameters(openmoe2().model)
    assert dense.total == dense.active == pytest.approx(1.733e9, rel=1e-3)
    model = openmoe2("experts_56_upcycled", "routing_token_choice").model
    assert count_parameters(model).active == dense.total + 28 * 56 * 2048
    assert differences(model) == []
    assert total_steps(openmoe2(), 0) == -(-100 * 10**9 // (256 * 2048))
