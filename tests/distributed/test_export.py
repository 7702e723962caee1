"""Exports of real checkpoints, from one rank and from TP2 x PP2, as transformers loads them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rank_pool import RankPool
from saved_model import (
    AUTOREGRESSIVE,
    TP2_PP2,
    masked,
    megatron_logits,
    save_in_ranks,
    some_tokens,
    tiny_model,
)
from tiny_corpus import TinyCorpus

from megatron_dlm.checkpoint.find import find_checkpoint
from megatron_dlm.config.hf_commands import ExportConfig
from megatron_dlm.config.parallel import ParallelConfig
from megatron_dlm.data.tokenization.tokenizer import load_tokenizer
from megatron_dlm.generation.masked_samplers import MaskedDecoding, sample_masked
from megatron_dlm.hf.checkpoint_reader import CheckpointReader
from megatron_dlm.hf.export import export
from megatron_dlm.hf.load import load_model
from megatron_dlm.hf.mapping import FINAL_NORM
from megatron_dlm.hf.parity import compare

AR: dict[str, Any] = {"kind": "autoregressive"}
OURS = "MegatronDLMForCausalLM"
# Values that no default has, of all options that only our own code knows.
OPTIONS: dict[str, Any] = {
    "mlp_bias": True,
    "qk_layernorm_scope": "full",
    "attn_logit_softcapping": 2.0,
    "attention_sink": True,
    "layernorm_zero_centered_gamma": True,
    "residual_multiplier": 0.4,
    "output_multiplier": 0.5,
}
# name -> (changes to the tiny model, objective, architecture written)
CASES: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "tied": ({}, AR, "Qwen3ForCausalLM"),
    "untied": ({"untie_embeddings_and_output_weights": True}, AR, "Qwen3ForCausalLM"),
    "head_dim": ({"kv_channels": 12}, AR, "Qwen3ForCausalLM"),
    "no_query_norm": ({"qk_layernorm": False}, AR, "LlamaForCausalLM"),
    "mlp_bias": ({"qk_layernorm": False, "mlp_bias": True}, AR, "LlamaForCausalLM"),
    "query_bias": (
        {"qk_layernorm": False, "megatron": {"add_qkv_bias": True}},
        AR,
        "Qwen2ForCausalLM",
    ),
    "gelu": ({"activation": "gelu"}, AR, OURS),
    "options": (OPTIONS, AR, OURS),
    "masked": ({}, {}, OURS),
    "masked_untied": (
        {"untie_embeddings_and_output_weights": True, "kv_channels": 6, "num_query_groups": None},
        {},
        OURS,
    ),
    "hybrid": (
        {**OPTIONS, "activation": "squared_relu", "untie_embeddings_and_output_weights": True},
        {"kind": "hybrid", "noise_type": "low_uniform"},
        OURS,
    ),
    "block": ({}, {"kind": "block", "block_size": 5}, OURS),
    "block_options": (OPTIONS, {"kind": "block", "block_size": 4}, OURS),
}


@pytest.mark.parametrize("num_ranks", [1, 4])
@pytest.mark.parametrize("case", CASES)
def test_transformers_computes_what_megatron_computes(
    ranks: RankPool, tmp_path: Path, case: str, num_ranks: int
) -> None:
    from transformers import AutoModelForCausalLM

    changes, learned, architecture = CASES[case]
    model = tiny_model(**changes)
    objective = replace(AUTOREGRESSIVE if learned is AR else masked(model), **learned)
    run, output = tmp_path / "run", tmp_path / "exported"
    layout = TP2_PP2 if num_ranks == 4 else ParallelConfig()
    ranks.run(save_in_ranks, run, model, objective, layout, num_ranks=num_ranks)
    tokens = some_tokens(model)
    (expected,) = ranks.run(megatron_logits, run, tokens, num_ranks=1)
    assert np.abs(expected).max() > 1

    export(ExportConfig(checkpoint=str(run), output_dir=str(output), parity_tolerance=1e-5))
    assert json.loads((output / "parity.json").read_text())["equal"] is True
    assert json.loads((output / "config.json").read_text())["architectures"] == [architecture]
    has_code = architecture == OURS
    assert (output / "modeling_megatron_dlm.py").exists() == has_code
    # Megatron's block models read a corrupted and a clean half.
    options = {"doubled": True} if objective.kind == "block" else {}
    loaded = AutoModelForCausalLM.from_pretrained(output, trust_remote_code=has_code)
    assert type(loaded).__name__ == architecture
    rows = torch.from_numpy(tokens)
    with torch.no_grad():
        theirs = loaded.eval()(rows, **options).logits.numpy()
    np.testing.assert_allclose(theirs, expected, rtol=0, atol=1e-5)
    for source in (run, output):
        ours = load_model(source).model(rows, **options).logits.numpy()
        np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-5)


@pytest.fixture(scope="module")
def text_run(
    ranks: RankPool, tiny_corpus: TinyCorpus, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A masked model over the corpus's tokenizer, in bf16, from TP2 x PP2."""
    run = tmp_path_factory.mktemp("text_run")
    tokenizer = load_tokenizer(tiny_corpus.tokenizer)
    model = tiny_model(vocab_size=tokenizer.vocab_size, seq_length=64)
    ranks.run(
        _save_with_tokenizer,
        run,
        model,
        tokenizer.mask_id,
        str(tiny_corpus.tokenizer),
        num_ranks=4,
    )
    return run


def _save_with_tokenizer(run: Path, model: Any, mask_id: int, tokenizer: str) -> None:
    objective = type(AUTOREGRESSIVE)(kind="masked", mask_token_id=mask_id)
    save_in_ranks(run, model, objective, TP2_PP2, "bf16", tokenizer=tokenizer)


def test_text_in_and_out_with_transformers(
    text_run: Path, tiny_corpus: TinyCorpus, tmp_path: Path
) -> None:
    from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

    output = tmp_path / "exported"
    export(ExportConfig(str(text_run), str(output), dtype="fp32", max_shard_bytes=20_000))
    assert len(list(output.glob("model-*.safetensors"))) > 2
    ours = load_tokenizer(tiny_corpus.tokenizer)
    theirs = AutoTokenizer.from_pretrained(output)
    text = Path(__file__).read_text()
    assert theirs(text, add_special_tokens=False)["input_ids"] == ours.encode(text)
    assert theirs.decode(ours.encode(text)) == text
    assert (theirs.mask_token_id, theirs.eos_token_id) == (ours.mask_id, ours.eod_id)

    model = AutoModelForCausalLM.from_pretrained(output, trust_remote_code=True).eval()
    # The second prompt is padded on its left.
    prompts = theirs(["def running_mean(values", "x = 1"], return_tensors="pt", padding=True)
    tokens = model.generate(**prompts, max_new_tokens=8, num_steps=4, order="low_confidence")
    loaded = load_model(output)
    assert loaded.tokenizer is not None
    expected = sample_masked(
        loaded.model.denoiser(),
        torch.tensor([ours.encode("x = 1")]),
        mask_id=ours.mask_id,
        num_tokens=8,
        decoding=MaskedDecoding(order="low_confidence", num_steps=4),
        choice=_choice(ours),
        eos_id=ours.eod_id,
        row_ids=torch.tensor([1]),
    )
    new = tokens[:, prompts["input_ids"].shape[1] :]
    assert new[1].tolist() == expected.tokens[0, -8:].tolist()
    assert not set(new.flatten().tolist()) & (set(ours.special_ids) - {ours.eod_id})
    hidden = AutoModel.from_pretrained(output, trust_remote_code=True)(prompts["input_ids"])
    assert hidden.last_hidden_state.shape[2] == model.config.hidden_size


def _choice(tokenizer: Any) -> Any:
    from megatron_dlm.generation.samplers import TokenChoice

    silent = [token for token in tokenizer.special_ids if token != tokenizer.eod_id]
    return TokenChoice(forbidden_ids=tuple(silent))


def test_bf16_is_kept_and_compared_as_written(text_run: Path, tmp_path: Path) -> None:
    output = tmp_path / "exported"
    export(ExportConfig(str(text_run), str(output), parity_tolerance=1e-5))
    assert load_model(output).model.dtype == torch.bfloat16
    assert json.loads((output / "config.json").read_text())["torch_dtype"] == "bfloat16"
    # The same weights in fp32 are other numbers only in their type.
    whole = tmp_path / "whole"
    export(ExportConfig(str(text_run), str(whole), dtype="fp32"))
    for name, weight in load_model(whole).model.state_dict().items():
        assert torch.equal(weight, load_model(output, dtype="fp32").model.state_dict()[name])


@pytest.mark.parametrize("trap", ["rms_norm_eps", "rope_theta", "final norm", "head"])
def test_parity_sees_what_others_export_wrong(ranks: RankPool, tmp_path: Path, trap: str) -> None:
    model = tiny_model(untie_embeddings_and_output_weights=True)
    run, output = tmp_path / "run", tmp_path / "exported"
    ranks.run(save_in_ranks, run, model, AUTOREGRESSIVE, ParallelConfig(), num_ranks=1)
    export(ExportConfig(str(run), str(output)))
    config = json.loads((output / "config.json").read_text())
    defaults = {"rms_norm_eps": 1e-6, "rope_theta": 10_000.0, "tie_word_embeddings": False}
    config |= {trap: defaults[trap]} if trap in defaults else {}
    (output / "config.json").write_text(json.dumps(config))
    if trap not in defaults:
        _spoil(output / "model.safetensors", trap)
    checkpoint = find_checkpoint(run)
    parity = compare(
        output,
        CheckpointReader(checkpoint.path),
        model,
        AUTOREGRESSIVE,
        tokens=torch.from_numpy(some_tokens(model)),
        text="made up",
        tolerance=1e-4,
    )
    assert not parity.is_equal
    assert parity.maximum_difference > 1e-2


def _spoil(path: Path, trap: str) -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file(path)
    if trap == "final norm":
        weights[FINAL_NORM] = torch.ones_like(weights[FINAL_NORM])
    else:
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    save_file(weights, path, metadata={"format": "pt"})


def test_an_export_that_differs_is_not_published(
    ranks: RankPool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from megatron_dlm.hf import export as module

    def wrong(*arguments: Any, **options: Any) -> dict[str, Any]:
        return {**real(*arguments, **options), "rope_theta": 10_000.0}

    real = module.write_config
    monkeypatch.setattr(module, "write_config", wrong)
    run, output = tmp_path / "run", tmp_path / "exported"
    model = tiny_model()
    ranks.run(save_in_ranks, run, model, masked(model), ParallelConfig(), num_ranks=1)
    with pytest.raises(ValueError, match=r"largest difference of a logit is .* not published"):
        export(ExportConfig(str(run), str(output)))
    assert not output.exists()
    assert json.loads((tmp_path / "exported.unfinished" / "parity.json").read_text())["equal"] is (
        False
    )
