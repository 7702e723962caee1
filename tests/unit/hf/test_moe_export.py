"""Models with experts out, equal to Megatron's, and back in; stock Qwen3-MoE both ways."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from small_run import write_run
from stock_models import VOCABULARY, logits_of, write_stock

from megatron_dlm.checkpoint.find import find_checkpoint, model_of
from megatron_dlm.config.architecture import ModelConfig
from megatron_dlm.config.hf_commands import ExportConfig, ImportConfig
from megatron_dlm.config.moe import MoEConfig
from megatron_dlm.config.objective import ObjectiveConfig
from megatron_dlm.hf.checkpoint_reader import CheckpointReader
from megatron_dlm.hf.configuration import SpecialIds, read_config, write_config
from megatron_dlm.hf.export import export
from megatron_dlm.hf.importing import import_model
from megatron_dlm.hf.layouts import choose_layout
from megatron_dlm.hf.load import load_model
from megatron_dlm.hf.mapping import checkpoint_tensors
from megatron_dlm.hf.safetensors_reader import SafetensorsDirectory

AR, MASKED, HYBRID, BLOCK = "autoregressive", "masked", "hybrid", "block"
SIGMOID: dict[str, Any] = {"score_function": "sigmoid", "expert_bias": True}
SHARED: dict[str, Any] = {"shared_expert_ffn_hidden_size": 12, "shared_expert_gate": True}
CHOICE: dict[str, Any] = {"routing": "expert_choice"}
OPTIONS: dict[str, Any] = {
    "activation": "squared_relu",
    "qk_layernorm_scope": "full",
    "attn_logit_softcapping": 2.0,
    "attention_sink": True,
    "layernorm_zero_centered_gamma": True,
    "residual_multiplier": 0.7,
    "output_multiplier": 0.5,
}


def experts(**changes: Any) -> MoEConfig:
    return MoEConfig(**{"num_experts": 4, "ffn_hidden_size": 20, **changes})


# name -> (kind, experts, model section, architecture)
OURS, STOCK = "MegatronDLMForCausalLM", "Qwen3MoeForCausalLM"
CASES: dict[str, tuple[str, MoEConfig, dict[str, Any], str]] = {
    "stock": (AR, experts(), {}, STOCK),
    "stock_dense_first": (AR, experts(num_dense_layers=1, pre_softmax=True), {}, STOCK),
    "one_width": (AR, experts(ffn_hidden_size=None, aux_loss_coeff=0.01), {}, STOCK),
    "no_query_norm": (AR, experts(), {"qk_layernorm": False}, OURS),
    "sigmoid": (AR, experts(**SIGMOID), {}, OURS),
    "shared": (MASKED, experts(**SHARED, num_dense_layers=1), {}, OURS),
    "block": (BLOCK, experts(router_topk=3), {}, OURS),
    "options": (HYBRID, experts(**SIGMOID, router_topk=1), OPTIONS, OURS),
    "choice": (MASKED, experts(**CHOICE), {}, OURS),
    "choice_scaled": (
        HYBRID,
        experts(**CHOICE, **SHARED, count_scales=[0.0, 1.0, 0.8, 0.6, 0.5], num_dense_layers=1),
        {},
        OURS,
    ),
    "choice_sigmoid": (MASKED, experts(**CHOICE, score_function="sigmoid"), OPTIONS, OURS),
    "choice_pre_softmax": (MASKED, experts(**CHOICE, pre_softmax=True), {}, OURS),
}


def write_case(directory: Path, case: str, **changes: Any) -> Path:
    kind, moe, options, _ = CASES[case]
    return write_run(directory, kind=kind, moe=moe, **{**options, **changes})


@pytest.mark.parametrize("case", CASES)
def test_out_and_in(case: str, tmp_path: Path) -> None:
    run, output, back = (tmp_path / name for name in ("run", "out", "back"))
    write_case(run, case)
    export(ExportConfig(str(run), str(output), parity_tolerance=1e-5))
    parity = json.loads((output / "parity.json").read_text())
    assert parity["equal"] is True
    assert parity["largest_logit"] > 0.5
    assert CASES[case][3] in parity["compared"]
    assert json.loads((output / "config.json").read_text())["architectures"] == [CASES[case][3]]
    options: dict[str, Any] = {"tokenizer": "none", "make_vocab_size_divisible_by": 16}
    import_model(ImportConfig(str(output), str(back), **options))
    (model, objective), (first, learned) = (model_of(find_checkpoint(path)) for path in (back, run))
    assert objective.kind == learned.kind
    # How the experts were kept busy is no part of a model.
    assert model == replace(first, moe=replace(first.moe, aux_loss_coeff=0.0))
    readers = [CheckpointReader(find_checkpoint(path).path) for path in (run, back)]
    for tensor in checkpoint_tensors(model):
        count = model.vocab_size if tensor.key.startswith("embedding") else tensor.num_rows
        rows = [reader.rows(tensor.key, tensor.layer, 0, count) for reader in readers]
        assert torch.equal(*rows), tensor.key
    settings = yaml.safe_load((back / "imported.yaml").read_text())["model"]
    assert "aux_loss_coeff" not in settings["moe"]  # a run may say it before or behind this file
    again = {**settings, "moe": MoEConfig(**settings["moe"])}
    assert ModelConfig(**again) == model


@pytest.mark.parametrize("case", ["stock", "stock_dense_first"])
def test_stock_classes_compute_the_same(case: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    output = tmp_path / "out"
    export(ExportConfig(str(write_case(tmp_path / "run", case)), str(output), parity=False))
    assert not list(output.glob("*.py"))
    theirs = AutoModelForCausalLM.from_pretrained(output)
    assert type(theirs).__name__ == STOCK
    tokens = torch.arange(36).view(2, 18)
    ours = load_model(output).model(tokens).logits
    torch.testing.assert_close(logits_of(theirs.eval(), tokens), ours, rtol=0, atol=1e-5)
    own = tmp_path / "own"
    export(ExportConfig(str(tmp_path / "run"), str(own), layout="megatron_dlm", parity=False))
    torch.testing.assert_close(load_model(own).model(tokens).logits, ours, rtol=0, atol=0)


class TestStockModels:
    """Directories that transformers itself saved."""

    @pytest.mark.parametrize(
        "changes",
        [
            {"norm_topk_prob": True},
            {"norm_topk_prob": False, "mlp_only_layers": [0]},
            {"norm_topk_prob": True, "moe_intermediate_size": 36, "tie_word_embeddings": True},
        ],
    )
    def test_come_in(self, tmp_path: Path, changes: dict[str, Any]) -> None:
        theirs = write_stock("qwen3_moe", tmp_path / "stock", **changes)
        tokens = torch.arange(40).view(2, 20)
        expected = logits_of(theirs, tokens)
        options: dict[str, Any] = {"tokenizer": "none"}
        import_model(ImportConfig(str(tmp_path / "stock"), str(tmp_path / "run"), **options))
        for path in (tmp_path / "stock", tmp_path / "run"):
            ours = load_model(path).model(tokens).logits
            torch.testing.assert_close(ours, expected, rtol=0, atol=1e-5)

    def test_become_masked_models(self, tmp_path: Path) -> None:
        write_stock("qwen3_moe", tmp_path / "stock", norm_topk_prob=True)
        options: dict[str, Any] = {"tokenizer": "none", "objective": "masked", "mask_token_id": 44}
        import_model(ImportConfig(str(tmp_path / "stock"), str(tmp_path / "run"), **options))
        model, objective = model_of(find_checkpoint(tmp_path / "run"))
        assert (objective.kind, objective.mask_token_id) == ("masked", 44)
        assert model.moe == MoEConfig(num_experts=4, ffn_hidden_size=20)
        loaded = load_model(tmp_path / "run").model
        assert (loaded.config.num_experts, loaded.config.attn_mask_type) == (4, "bidirectional")
        export(ExportConfig(str(tmp_path / "run"), str(tmp_path / "out"), parity_tolerance=1e-5))

    def test_expert_choice_becomes_no_block_model(self, tmp_path: Path) -> None:
        write_case(tmp_path / "run", "choice")
        export(ExportConfig(str(tmp_path / "run"), str(tmp_path / "out"), parity=False))
        options: dict[str, Any] = {"tokenizer": "none", "objective": "block"}
        with pytest.raises(ValueError, match=r"expert_choice cannot train objective.kind block"):
            import_model(ImportConfig(str(tmp_path / "out"), str(tmp_path / "back"), **options))
        assert not (tmp_path / "back").exists()

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"decoder_sparse_step": 2}, "config.json: decoder_sparse_step is 2; every layer"),
            ({"mlp_only_layers": [1]}, r"config.json: mlp_only_layers is \[1\]; ours are the"),
            ({"mlp_only_layers": [0, 1]}, "model.moe.num_dense_layers 2 leaves none"),
            ({"num_experts_per_tok": None}, "config.json: num_experts_per_tok is None; it must"),
            ({"num_experts_per_tok": 9}, "config.json: model.moe.router_topk is 9; it must be"),
            ({"moe_intermediate_size": "20"}, "config.json: moe_intermediate_size is '20'; it"),
        ],
    )
    def test_that_do_not_fit(self, tmp_path: Path, changes: dict[str, Any], message: str) -> None:
        write_stock("qwen3_moe", tmp_path / "stock")
        file = tmp_path / "stock" / "config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
        with pytest.raises(ValueError, match=message):
            import_model(ImportConfig(str(tmp_path / "stock"), str(tmp_path / "run")))


class TestLayout:
    """Stock code exactly where it fits, refusals by name."""

    @pytest.mark.parametrize(
        ("changes", "kind", "layout"),
        [
            ({}, AR, "qwen3_moe"),
            ({"pre_softmax": True, "num_dense_layers": 2, "router_topk": 1}, AR, "qwen3_moe"),
            # So many fit that nothing is dropped.
            ({"capacity_factor": 2.0}, AR, "qwen3_moe"),
            ({"score_function": "sigmoid"}, AR, "megatron_dlm"),
            (SIGMOID, AR, "megatron_dlm"),
            (SHARED, AR, "megatron_dlm"),
            ({}, MASKED, "megatron_dlm"),
            (CHOICE, MASKED, "megatron_dlm"),
        ],
    )
    def test_is_chosen(self, changes: Any, kind: Any, layout: str) -> None:
        model = ModelConfig(vocab_size=9, moe=experts(**changes))
        assert choose_layout(model, ObjectiveConfig(kind=kind), "auto") == layout

    @pytest.mark.parametrize(
        ("changes", "kind", "wanted", "message"),
        [
            ({"capacity_factor": 1.9}, AR, "auto", "model.moe.capacity_factor is 1.9: which tok"),
            (
                {**CHOICE, "choice_scope": "micro_batch"},
                MASKED,
                "auto",
                "model.moe.choice_scope is micro_batch: what a token passes depends on",
            ),
            ({}, MASKED, "megadlms", "cannot express model.moe.num_experts 4"),
        ],
    )
    def test_refusals(self, changes: Any, kind: Any, wanted: str, message: str) -> None:
        model = ModelConfig(vocab_size=9, moe=experts(**changes))
        with pytest.raises(ValueError, match=message):
            choose_layout(model, ObjectiveConfig(kind=kind), wanted)

    def test_options_of_megatron_core(self) -> None:
        objective = ObjectiveConfig(kind=AR)
        for name, value in {
            "moe_router_topk_scaling_factor": 2.5,
            "moe_router_num_groups": 2,
        }.items():
            model = ModelConfig(vocab_size=9, moe=experts(), megatron={name: value})
            with pytest.raises(ValueError, match=f"model.megatron.{name} is {value}"):
                choose_layout(model, objective, "auto")
        harmless = {"moe_permute_fusion": True, "moe_shared_expert_overlap": True}
        model = ModelConfig(vocab_size=9, moe=experts(), megatron=harmless)
        assert choose_layout(model, objective, "auto") == "qwen3_moe"

    @pytest.mark.parametrize("case", CASES)
    def test_settings_survive(self, case: str) -> None:
        kind, moe, options, _ = CASES[case]
        moe = replace(moe, aux_loss_coeff=0.0)
        model = ModelConfig(vocab_size=9, ffn_hidden_size=24, moe=moe, **options)
        objective: Any = ObjectiveConfig(kind=kind)
        layout = choose_layout(model, objective, "auto")
        written = write_config(model, objective, layout, ids=SpecialIds(), dtype="float32")
        read = read_config(json.loads(json.dumps(written)), Path("config.json"))
        assert read.model.moe == moe
        assert read.layout == layout

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            (
                {"moe_routing": "random"},
                "moe_routing is 'random'; it must be one of token_choice, ",
            ),
            ({"moe_score_function": None}, "moe_score_function is None; it must be one of softmax"),
            ({"moe_pre_softmax": "no"}, "moe_pre_softmax is 'no'; it must be of type bool"),
            ({"num_dense_layers": 1.5}, "num_dense_layers is 1.5; it must be of type int"),
            ({"moe_count_scales": ["a"]}, r"moe_count_scales is \['a'\]; it must be a list of"),
            ({"moe_count_scales": [1.0]}, "model.moe.count_scales has 1 numbers; give num_experts"),
            ({"num_experts": -3}, "model.moe.num_experts is -3; it must be 0"),
        ],
    )
    def test_nonsense_is_refused(self, changes: dict[str, Any], message: str) -> None:
        model = ModelConfig(vocab_size=9, moe=experts(**CHOICE))
        objective = ObjectiveConfig(kind="masked")
        written = write_config(model, objective, "megatron_dlm", ids=SpecialIds(), dtype="float32")
        with pytest.raises(ValueError, match=f"config.json: {message}"):
            read_config({**written, **changes}, Path("config.json"))


def test_the_expert_bias_stays_fp32(tmp_path: Path) -> None:
    """It moves by steps that bf16 would round away; so does what it chooses."""
    from transformers import AutoModelForCausalLM

    run, output, back = (tmp_path / name for name in ("run", "out", "back"))
    write_case(run, "sigmoid")
    export(ExportConfig(str(run), str(output), dtype="bf16", parity_tolerance=1e-5))
    name = "model.layers.1.mlp.gate.expert_bias"
    weights = SafetensorsDirectory(output)
    assert weights.dtype(name) == torch.float32
    assert weights.dtype("model.layers.1.mlp.gate.weight") == torch.bfloat16
    original = CheckpointReader(find_checkpoint(run).path).rows(
        "decoder.layers.1.mlp.router.expert_bias", None, 0, 4
    )
    assert torch.equal(weights.rows(name), original)
    assert not torch.equal(original.bfloat16().float(), original)
    theirs = AutoModelForCausalLM.from_pretrained(
        output, trust_remote_code=True, dtype=torch.bfloat16
    )
    ours = [load_model(output).model, load_model(run, dtype="bf16").model]
    for model in (theirs, *ours):
        state = model.state_dict()
        assert torch.equal(state[name], original)
        assert (
            state[
                "lm_head.weight"
                if "lm_head.weight" in state
                else name.replace("expert_bias", "weight")
            ].dtype
            == torch.bfloat16
        )
    import_model(ImportConfig(str(output), str(back), tokenizer="none"))
    again = CheckpointReader(find_checkpoint(back).path)
    key = "decoder.layers.1.mlp.router.expert_bias"
    assert torch.equal(again.rows(key, None, 0, 4), original)
    assert again.stored("decoder.layers.1.mlp.router.weight").dtype == torch.bfloat16


PROGRAM = """
import sys, torch
from transformers import AutoModelForCausalLM
for path in sys.argv[1:]:
    model = AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True).eval()
    prompts = torch.arange(14).view(2, 7)
    valid = torch.ones_like(prompts)
    valid[1, :2] = 0
    tokens = model.generate(prompts, valid, max_new_tokens=6, seed=3)
    with torch.no_grad():
        logits = model(prompts, attention_mask=valid).logits
    torch.save((tokens, logits), path + "/sampled.pt")
assert not any(name.partition(".")[0] == "megatron_dlm" for name in sys.modules)
"""


def test_a_fresh_process_loads_and_samples(tmp_path: Path) -> None:
    outputs = [tmp_path / case for case in ("sigmoid", "choice_scaled", "block")]
    for output in outputs:
        run = write_case(tmp_path / f"{output.name}_run", output.name)
        export(ExportConfig(str(run), str(output), parity=False))
    environment = {"HF_MODULES_CACHE": str(tmp_path / "modules"), "PATH": os.environ["PATH"]}
    command = [sys.executable, "-c", PROGRAM, *map(str, outputs)]
    answer = subprocess.run(
        command, capture_output=True, text=True, cwd=tmp_path, env=environment, check=False
    )
    assert answer.returncode == 0, answer.stderr
    prompts, valid = torch.arange(14).view(2, 7), torch.ones(2, 7, dtype=torch.bool)
    valid[1, :2] = False
    for output in outputs:
        tokens, logits = torch.load(output / "sampled.pt")
        ours = load_model(output).model
        torch.testing.assert_close(
            ours(prompts, attention_mask=valid).logits, logits, rtol=0, atol=1e-5
        )
        assert tokens.shape == (2, 13)


def test_a_spoiled_expert_is_seen(tmp_path: Path) -> None:
    """One expert of the last layer, exchanged with another: parity is over all of them."""
    from safetensors.torch import load_file, save_file

    from megatron_dlm.hf.parity import compare

    run, output = write_case(tmp_path / "run", "choice"), tmp_path / "out"
    export(ExportConfig(str(run), str(output), parity=False))
    weights = load_file(output / "model.safetensors")
    first, second = (f"model.layers.1.mlp.experts.{n}.up_proj.weight" for n in (0, 3))
    weights[first], weights[second] = weights[second], weights[first]
    save_file(weights, output / "model.safetensors", metadata={"format": "pt"})
    checkpoint = find_checkpoint(run)
    model, objective = model_of(checkpoint)
    tokens = torch.arange(36).view(2, 18)
    parity = compare(
        output, CheckpointReader(checkpoint.path), model, objective,
        tokens=tokens, text="made up", tolerance=1e-4,
    )  # fmt: skip
    assert not parity.is_equal
    assert VOCABULARY > 36
