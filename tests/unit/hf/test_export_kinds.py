"""Every kind of model, with every option: out, equal to Megatron's, and back in."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from small_run import write_run

from megatron_dlm.checkpoint.find import find_checkpoint, model_of
from megatron_dlm.config.hf_commands import ExportConfig, ImportConfig
from megatron_dlm.config.objective import ObjectiveConfig
from megatron_dlm.hf.checkpoint_reader import CheckpointReader
from megatron_dlm.hf.export import export
from megatron_dlm.hf.importing import import_model
from megatron_dlm.hf.load import load_model
from megatron_dlm.hf.mapping import checkpoint_tensors
from megatron_dlm.hf.objective_settings import read_objective, write_objective

HYBRID: Any = "hybrid"
SECOND_PAPER: dict[str, Any] = {
    "activation": "squared_relu",
    "mlp_bias": True,
    "qk_layernorm_scope": "full",
    "attn_logit_softcapping": 2.0,
    "attention_sink": True,
    "layernorm_zero_centered_gamma": True,
    "residual_multiplier": 0.7,
    "output_multiplier": 0.5,
    "untie_embeddings_and_output_weights": True,
}
# name -> (kind, objective section, model section)
CASES: dict[str, tuple[Any, dict[str, Any], dict[str, Any]]] = {
    "autoregressive": ("autoregressive", {}, SECOND_PAPER),
    "masked": ("masked", {}, SECOND_PAPER),
    "annealed": ("masked", {"attention_annealing_steps": 7}, {}),
    "hybrid": ("hybrid", {"noise_type": "low_uniform"}, SECOND_PAPER),
    "prompts": ("hybrid", {"prompt_share": 0.2, "noise_bias": 0.5, "noise_scale": 0.5}, {}),
    "time": ("hybrid", {"noise_type": "time", "uniform_probability": 0.2}, {}),
    "block": ("block", {"block_size": 5}, SECOND_PAPER),
    "gated_biases": ("block", {}, {"mlp_bias": True, "megatron": {"add_qkv_bias": True}}),
}


@pytest.mark.parametrize("case", CASES)
def test_out_and_in(case: str, tmp_path: Path) -> None:
    kind, learned, changes = CASES[case]
    run, output, back = (tmp_path / name for name in ("run", "out", "back"))
    write_run(run, kind=kind, learned=learned, **changes)
    export(ExportConfig(str(run), str(output), parity_tolerance=1e-5))
    parity = json.loads((output / "parity.json").read_text())
    assert parity["equal"] is True
    assert parity["largest_logit"] > 0.5
    original, exported = load_model(run), load_model(output)
    assert exported.objective_kind == kind
    for name in ("noise_type", "noise_bias", "noise_scale", "uniform_probability", "block_size"):
        assert getattr(exported.objective, name) == getattr(original.objective, name)
    assert exported.objective.mask_token_id == original.objective.mask_token_id
    options = {"tokenizer": "none", "make_vocab_size_divisible_by": 16}
    import_model(ImportConfig(str(output), str(back), **options))
    model, objective = model_of(find_checkpoint(back))
    assert objective == exported.objective
    assert model == model_of(find_checkpoint(run))[0]
    readers = [CheckpointReader(find_checkpoint(path).path) for path in (run, back)]
    for tensor in checkpoint_tensors(model):
        count = tensor.num_rows
        if tensor.key.startswith(("embedding", "output_layer")):
            count = model.vocab_size
        first, second = (reader.rows(tensor.key, tensor.layer, 0, count) for reader in readers)
        assert torch.equal(first, second), tensor.key
    settings = yaml.safe_load((back / "imported.yaml").read_text())["objective"]
    assert ObjectiveConfig(**settings) == objective


def test_sight_of_the_exported_model(tmp_path: Path) -> None:
    """What the configuration says is what the model does."""
    expected = {
        "autoregressive": ("causal", False),
        "masked": ("bidirectional", False),
        "annealed": ("bidirectional", False),
        "hybrid": ("bidirectional", False),
        "prompts": ("bidirectional", True),
        "block": ("block", False),
    }
    for case, (pattern, has_prompts) in expected.items():
        kind, learned, _ = CASES[case]
        config = load_model(write_run(tmp_path / case, kind=kind, learned=learned)).model.config
        assert (config.attn_mask_type, config.prompt_attention) == (pattern, has_prompts)


def test_cards_name_what_was_learned(tmp_path: Path) -> None:
    options = ", ".join(
        [
            "QK norm over the full width",
            "attention scores capped at 2.0",
            "learned attention sink",
            "gains as 1 + weight",
            "residual multiplier 0.7",
            "output multiplier 0.5",
        ]
    )
    expected = {
        "hybrid": ["hybrid, low_uniform noise, elbo weighting, mask id 39", options],
        "prompts": ["hybrid, noise of bias 0.5 and scale 0.5, clean prompts in 20% of samples"],
        "time": ["noise by GIDD's time form with p_u 0.2"],
        "block": ["block, blocks of 5 tokens, linear schedule", "24, squared_relu, biases"],
        "annealed": ["attention from causal over 7 steps"],
    }
    for case, parts in expected.items():
        kind, learned, changes = CASES[case]
        run = write_run(tmp_path / f"{case}_run", kind=kind, learned=learned, **changes)
        export(ExportConfig(str(run), str(tmp_path / case), parity=False))
        card = (tmp_path / case / "README.md").read_text()
        for part in parts:
            assert part in card


class TestSettings:
    """What config.json says of the objective."""

    @pytest.mark.parametrize(
        ("learned", "law"),
        [
            ({"noise_type": "masked"}, (-1000.0, 1.0)),
            ({"noise_type": "high_uniform", "noise_scale": 0.5}, (2.0, 0.5)),
            ({"noise_bias": -3.5}, (-3.5, 1.0)),
            ({"noise_type": "time", "uniform_probability": 0.1}, (None, 1.0)),
        ],
    )
    def test_noise_is_said_in_numbers(self, learned: Any, law: Any) -> None:
        objective = ObjectiveConfig(kind=HYBRID, mask_token_id=9, infilling_share=0.1, **learned)
        written = json.loads(json.dumps(write_objective(objective)))
        assert (written["noise_bias"], written["noise_scale"]) == law
        assert read_objective(written, Path("c"), mask_token_id=9) == objective

    def test_training_alone_is_not_said(self) -> None:
        objective = ObjectiveConfig(kind="block", block_size=8, schedule="cosine", time_floor=0.01)
        read = read_objective(write_objective(objective), Path("c"), mask_token_id=None)
        assert asdict(read) == asdict(ObjectiveConfig(kind="block", block_size=8))

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"objective_kind": "odd"}, "c: objective_kind is odd; use one of autoregressive, m"),
            ({"noise_type": "loud"}, "c: noise_type is loud, not one of ours"),
            ({"noise_bias": 1.0}, "c: noise_bias 1.0 is not that of noise_type balanced"),
            ({"noise_scale": -1.0}, "c: objective.noise_scale is -1.0"),
            ({"noise_type": "time", "noise_scale": 0.5}, "c: objective.noise_type time mixes by"),
            ({"attn_mask_type": "block"}, "c: attn_mask_type is block; bidirectional is that of"),
            ({"objective_kind": "block", "block_size": 0}, "c: objective.block_size is 0"),
        ],
    )
    def test_nonsense_is_refused(self, changes: dict[str, Any], message: str) -> None:
        written = {**write_objective(ObjectiveConfig(kind=HYBRID)), **changes}
        with pytest.raises(ValueError, match=message):
            read_objective(written, Path("c"), mask_token_id=None)


PROGRAM = """
import sys, torch
from transformers import AutoModelForCausalLM
for path in sys.argv[1:]:
    model = AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True).eval()
    prompts = torch.arange(14).view(2, 7)
    valid = torch.ones_like(prompts)
    valid[1, :2] = 0
    options = {
        "masked": {"num_steps": 4, "order": "ancestral"}, "hybrid": {"num_steps": 4}
    }.get(model.config.objective_kind, {})
    tokens = model.generate(prompts, valid, max_new_tokens=8, seed=3, **options)
    with torch.no_grad():
        logits = model(prompts, attention_mask=valid).logits
    torch.save((tokens, logits), path + "/sampled.pt")
assert not any(name.partition(".")[0] == "megatron_dlm" for name in sys.modules)
"""


def test_a_fresh_process_loads_and_samples_every_kind(tmp_path: Path) -> None:
    """With the code beside the weights and nothing of ours; texts are those of our own samplers."""
    cases = ["autoregressive", "masked", "prompts", "time", "block"]
    outputs = []
    for case in cases:
        kind, learned, changes = CASES[case]
        write_run(tmp_path / f"{case}_run", kind=kind, learned=learned, **changes)
        outputs.append(tmp_path / case)
        options: dict[str, Any] = {"parity": False, "layout": "megatron_dlm"}
        export(ExportConfig(str(tmp_path / f"{case}_run"), str(outputs[-1]), **options))
    environment = {"HF_MODULES_CACHE": str(tmp_path / "modules"), "PATH": "/usr/bin:/bin"}
    command = [sys.executable, "-c", PROGRAM, *map(str, outputs)]
    answer = subprocess.run(
        command, capture_output=True, text=True, cwd=tmp_path, env=environment, check=False
    )
    assert answer.returncode == 0, answer.stderr
    prompts, valid = torch.arange(14).view(2, 7), torch.ones(2, 7, dtype=torch.bool)
    valid[1, :2] = False
    for output in outputs:
        tokens, logits = torch.load(output / "sampled.pt")
        loaded = load_model(output)
        torch.testing.assert_close(
            loaded.model(prompts, attention_mask=valid).logits, logits, rtol=0, atol=1e-5
        )
        assert tokens.shape == (2, 15)
        assert torch.equal(tokens[:, :7], prompts)
        silent = set(loaded.model.config.silent_token_ids)
        assert not silent & set(tokens[:, 7:].flatten().tolist())


def test_old_transformers_find_every_file(tmp_path: Path) -> None:
    """Up to 4.57 only those files are copied that the modeling file itself names."""
    from transformers.dynamic_module_utils import get_relative_imports

    output = tmp_path / "out"
    export(ExportConfig(str(write_run(tmp_path / "run")), str(output), parity=False))
    code = {path.stem for path in output.glob("*.py")}
    named = set(get_relative_imports(output / "modeling_megatron_dlm.py"))
    assert named == code - {"modeling_megatron_dlm"}
    assert get_relative_imports(output / "configuration_megatron_dlm.py") == []
    for path in output.glob("*.py"):
        assert "from megatron_dlm" not in path.read_text(), path.name
