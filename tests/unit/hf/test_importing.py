"""Hugging Face directories as checkpoints: numbers against transformers, masks, refusals."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from huggingface_tokenizer import write_tokenizer
from stock_models import FAMILIES, VOCABULARY, logits_of, write_stock

from megatron_dlm.checkpoint.find import find_checkpoint, model_of
from megatron_dlm.config.hf_commands import ExportConfig, ImportConfig
from megatron_dlm.config.objective import ObjectiveConfig
from megatron_dlm.data.tokenization.tokenizer import load_tokenizer
from megatron_dlm.hf.checkpoint_reader import CheckpointReader
from megatron_dlm.hf.export import export
from megatron_dlm.hf.importing import import_model
from megatron_dlm.hf.load import load_model
from megatron_dlm.hf.mapping import EMBEDDING, OUTPUT, checkpoint_tensors
from megatron_dlm.hf.safetensors_reader import SafetensorsDirectory


def import_here(source: Path, output: Path, **options: Any) -> Path:
    options = {"tokenizer": "none", "make_vocab_size_divisible_by": 32, **options}
    import_model(ImportConfig(str(source), str(output), **options))
    return output


def some_tokens() -> torch.Tensor:
    return torch.randint(0, VOCABULARY, (2, 20), generator=torch.Generator().manual_seed(4))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_round_trip_of_every_family(family: str, tied: bool, tmp_path: Path) -> None:
    stock = write_stock(family, tmp_path / "stock", tie_word_embeddings=tied)
    assert len(list((tmp_path / "stock").glob("*.safetensors"))) > 1
    run = import_here(tmp_path / "stock", tmp_path / "run")
    expected = logits_of(stock, some_tokens())
    for source in (run, tmp_path / "stock"):
        ours = load_model(source)
        assert ours.objective_kind == "autoregressive"
        assert ours.max_length == 64
        logits = ours.model(some_tokens()).logits
        torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5)
    export(ExportConfig(str(run), str(tmp_path / "again"), parity_tolerance=1e-5))
    before = SafetensorsDirectory(tmp_path / "stock")
    after = SafetensorsDirectory(tmp_path / "again")
    assert after.names == before.names
    for name in before.names:
        assert torch.equal(after.rows(name), before.rows(name)), name
    configs = [
        json.loads((tmp_path / name / "config.json").read_text()) for name in ("stock", "again")
    ]
    same = ("architectures", "model_type", "vocab_size", "num_key_value_heads", "rms_norm_eps")
    assert [configs[0][name] for name in same] == [configs[1][name] for name in same]


def test_llama_3_1_with_its_long_rotary_embedding(tmp_path: Path) -> None:
    scaling = {
        "rope_type": "llama3",
        "rope_theta": 500_000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    changes = {"rope_parameters": scaling, "head_dim": 32, "max_position_embeddings": 20_000}
    stock = write_stock("llama", tmp_path / "stock", **changes)
    run = import_here(tmp_path / "stock", tmp_path / "run")
    tokens, positions = some_tokens(), torch.arange(20) * 900 + torch.tensor([[0], [7]])
    with torch.no_grad():
        expected = stock(tokens, position_ids=positions).logits
        unscaled = load_model(run).model
        unscaled.config.rope_scaling_factor = None
        assert (unscaled(tokens, position_ids=positions).logits - expected).abs().max() > 1e-2
    ours = load_model(run).model(tokens, position_ids=positions).logits
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-4)
    export(ExportConfig(str(run), str(tmp_path / "again"), parity_tolerance=1e-5))
    again = json.loads((tmp_path / "again" / "config.json").read_text())
    assert again["architectures"] == ["LlamaForCausalLM"]
    assert again["rope_scaling"]["factor"] == 8.0


def test_llama_with_biases_in_its_mlp(tmp_path: Path) -> None:
    stock = write_stock("llama", tmp_path / "stock", mlp_bias=True)
    run = import_here(tmp_path / "stock", tmp_path / "run")
    ours = load_model(run).model(some_tokens()).logits
    torch.testing.assert_close(ours, logits_of(stock, some_tokens()), rtol=0, atol=1e-5)
    export(ExportConfig(str(run), str(tmp_path / "again"), parity_tolerance=1e-5))
    config = json.loads((tmp_path / "again" / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    before, after = (SafetensorsDirectory(tmp_path / name) for name in ("stock", "again"))
    assert after.names == before.names
    for name in before.names:
        assert torch.equal(after.rows(name), before.rows(name)), name


def test_settings_that_the_weights_imply(tmp_path: Path) -> None:
    write_stock("qwen3", tmp_path / "stock")
    run = import_here(tmp_path / "stock", tmp_path / "run", seq_length=16)
    settings = yaml.safe_load((run / "imported.yaml").read_text())
    model, _ = model_of(find_checkpoint(run))
    assert settings["model"]["rotary_base"] == model.rotary_base == 500
    assert settings["model"]["normalization_epsilon"] == 1e-3
    assert settings["model"]["kv_channels"] == 10
    assert settings["model"]["seq_length"] == 16
    assert settings["model"]["vocab_size"] == VOCABULARY
    assert settings["train"]["output_dir"] == str(run)


def test_padding_rows_are_zero_and_the_rest_is_there(tmp_path: Path) -> None:
    write_stock("llama", tmp_path / "stock")
    run = import_here(tmp_path / "stock", tmp_path / "run")
    checkpoint = find_checkpoint(run)
    model, _ = model_of(checkpoint)
    reader = CheckpointReader(checkpoint.path)
    reader.check(model)
    assert set(reader.tensors) == {tensor.key for tensor in checkpoint_tensors(model)}
    rows = reader.rows("output_layer.weight", None, VOCABULARY, 64 - VOCABULARY)
    assert not rows.any()


class TestMask:
    """An autoregressive model gets a mask."""

    def test_a_row_is_added_with_the_mean(self, tmp_path: Path) -> None:
        write_stock("qwen3", tmp_path / "stock")
        run = import_here(tmp_path / "stock", tmp_path / "run", objective="masked")
        loaded = load_model(run)
        assert (loaded.objective_kind, loaded.mask_token_id) == ("masked", VOCABULARY)
        assert loaded.model.config.vocab_size == VOCABULARY + 1
        assert not loaded.model.config.is_causal
        before = SafetensorsDirectory(tmp_path / "stock")
        state = loaded.model.state_dict()
        for name in (EMBEDDING, OUTPUT):
            assert torch.equal(state[name][:VOCABULARY], before.rows(name))
            mean = before.rows(name).double().mean(0)
            torch.testing.assert_close(state[name][VOCABULARY].double(), mean, rtol=0, atol=1e-7)
        manifest = loaded.facts["manifest"]
        expected = f"a row was added, initialised to the mean of {VOCABULARY} rows"
        assert manifest["imported_from"]["mask"]["origin"] == expected

    @pytest.mark.parametrize("objective", ["hybrid", "block"])
    def test_every_kind_of_diffusion_gets_one(self, objective: str, tmp_path: Path) -> None:
        write_stock("qwen3", tmp_path / "stock")
        run = import_here(tmp_path / "stock", tmp_path / "run", objective=objective)
        loaded = load_model(run)
        expected: Any = {"kind": objective, "mask_token_id": VOCABULARY}
        assert loaded.objective == ObjectiveConfig(**expected)
        settings = yaml.safe_load((run / "imported.yaml").read_text())
        assert settings["objective"] == expected
        # Its own mask is kept on the way to another kind.
        export(ExportConfig(str(run), str(tmp_path / "out"), parity=False))
        again = import_here(tmp_path / "out", tmp_path / "masked", objective="masked")
        origin = load_model(again).facts["manifest"]["imported_from"]["mask"]["origin"]
        assert origin == "the model's own"
        table = loaded.model.state_dict()[EMBEDDING]
        assert torch.equal(load_model(again).model.state_dict()[EMBEDDING], table)

    def test_a_row_behind_the_tokenizer_is_used(self, tmp_path: Path) -> None:
        tokenizer = load_tokenizer(write_tokenizer("gpt2", tmp_path / "tokenizer"))
        size = tokenizer.vocab_size
        stock = write_stock("qwen3", tmp_path / "stock", vocab_size=size + 10)
        shutil.copytree(tmp_path / "tokenizer", tmp_path / "stock", dirs_exist_ok=True)
        options = {"tokenizer": None, "objective": "masked"}
        run = import_here(tmp_path / "stock", tmp_path / "run", **options)
        loaded = load_model(run)
        assert loaded.tokenizer is not None
        assert loaded.mask_token_id == loaded.tokenizer.mask_id == size
        assert loaded.model.config.vocab_size == size + 10
        table = stock.model.embed_tokens.weight
        row = loaded.model.state_dict()[EMBEDDING][size]
        torch.testing.assert_close(row, table[:size].mean(0), rtol=0, atol=1e-6)
        text = "def f(x):\n    return x\n"
        assert loaded.tokenizer.encode(text) == tokenizer.encode(text)
        kept = import_here(tmp_path / "stock", tmp_path / "kept", **options, mask_row="keep")
        assert torch.equal(load_model(kept).model.state_dict()[EMBEDDING], table)
        assert loaded.model.config.silent_token_ids[-10:] == list(range(size, size + 10))

    def test_a_special_token_becomes_the_mask(self, tmp_path: Path) -> None:
        tokenizer = load_tokenizer(write_tokenizer("gpt2", tmp_path / "tokenizer"))
        write_stock("qwen3", tmp_path / "stock", vocab_size=tokenizer.vocab_size)
        (token,) = set(tokenizer.special_ids) - {tokenizer.eod_id}
        options = {"tokenizer": str(tmp_path / "tokenizer"), "objective": "masked"}
        run = import_here(tmp_path / "stock", tmp_path / "run", **options, mask_token_id=token)
        loaded = load_model(run)
        assert loaded.tokenizer is not None
        assert loaded.mask_token_id == loaded.tokenizer.mask_id == token
        assert loaded.model.config.vocab_size == tokenizer.vocab_size

    @pytest.mark.parametrize(
        ("token", "message"),
        [
            (lambda t: t.encode("x")[0], "is a text token of the tokenizer"),
            (lambda t: t.eod_id, "is the end, begin or pad token of the tokenizer"),
            (lambda t: t.vocab_size + 2, r"leaves a gap behind the \d+ tokens"),
            (lambda t: t.vocab_size + 9, r"is beyond the \d+ rows"),
        ],
    )
    def test_other_rows_are_refused(
        self, token: Callable[[Any], int], message: str, tmp_path: Path
    ) -> None:
        tokenizer = load_tokenizer(write_tokenizer("gpt2", tmp_path / "tokenizer"))
        write_stock("qwen3", tmp_path / "stock", vocab_size=tokenizer.vocab_size + 5)
        options = {"tokenizer": str(tmp_path / "tokenizer"), "objective": "masked"}
        with pytest.raises(ValueError, match=message):
            import_here(
                tmp_path / "stock", tmp_path / "run", **options, mask_token_id=token(tokenizer)
            )
        assert not (tmp_path / "run").exists()


class TestRefusals:
    """One line that names the file and what is wrong."""

    @pytest.fixture
    def stock(self, tmp_path: Path) -> Path:
        write_stock("llama", tmp_path / "stock")
        return tmp_path / "stock"

    def refuse(self, stock: Path, message: str, **options: Any) -> None:
        with pytest.raises(ValueError, match=message):
            import_here(stock, stock.parent / "run", **options)
        assert not (stock.parent / "run").exists()

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"architectures": ["GPT2LMHeadModel"]}, "the architecture GPT2LMHeadModel is not"),
            ({"architectures": None}, "the architecture llama is not known"),
            (
                {"rope_parameters": {"rope_type": "llama3", "factor": 8.0}},
                "config.json: low_freq_factor of rope_type llama3 is None, not 1.0",
            ),
            ({"rope_scaling": {"type": "yarn"}, "rope_parameters": None}, "rope_type yarn"),
            (
                {"mlp_bias": True},
                r"lacks the tensor model.layers.0.mlp.gate_proj.bias that its conf",
            ),
            ({"attention_bias": True}, "config.json: attention_bias is True"),
            ({"hidden_act": "gelu_new"}, "hidden_act gelu_new"),
            ({"num_key_value_heads": None}, "config.json: num_key_value_heads is missing"),
            ({"intermediate_size": 40}, r"gate_proj.weight has shape \[36, 24\], config.json"),
            ({"num_hidden_layers": 3}, r"lacks the tensor model.layers.2"),
            ({"num_hidden_layers": 1}, r"holds tensors that our model does not have: model.lay"),
            ({"tie_word_embeddings": True}, "says tie_word_embeddings, but lm_head.weight diff"),
            ({"quantization_config": {"bits": 4}}, "quantization_config is"),
            ({"hidden_size": "big"}, "config.json: hidden_size is 'big'"),
        ],
    )
    def test_configuration(self, stock: Path, changes: dict[str, Any], message: str) -> None:
        path = stock / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
        self.refuse(stock, message)

    def test_missing_shard(self, stock: Path) -> None:
        shard = sorted(stock.glob("model-*.safetensors"))[1]
        shard.unlink()
        self.refuse(stock, f"{shard.name} is missing, but model.safetensors.index.json names it")

    def test_truncated_shard(self, stock: Path) -> None:
        shard = sorted(stock.glob("model-*.safetensors"))[1]
        shard.write_bytes(shard.read_bytes()[:-100])
        self.refuse(stock, f"{shard.name}: .* cannot be read")

    def test_pickled_weights(self, stock: Path) -> None:
        for file in stock.glob("model*"):
            file.unlink()
        (stock / "pytorch_model.bin").write_bytes(b"x")
        self.refuse(stock, "pytorch_model.bin is a pickle, which can run code")

    def test_wrong_directory(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match=r"is no run, no checkpoint and no Hugging Face"):
            import_here(tmp_path, tmp_path / "run")

    def test_broken_json(self, stock: Path) -> None:
        (stock / "config.json").write_text("{")
        self.refuse(stock, "config.json is not valid JSON")

    def test_no_tokenizer(self, stock: Path) -> None:
        self.refuse(stock, "holds no tokenizer", tokenizer=None)

    def test_output_that_holds_something(self, stock: Path, tmp_path: Path) -> None:
        run = import_here(stock, tmp_path / "imported")
        with pytest.raises(ValueError, match="holds a run"):
            import_here(stock, run)
        (tmp_path / "other").mkdir()
        (tmp_path / "other" / "notes.txt").write_text("x")
        with pytest.raises(ValueError, match="holds other files"):
            import_here(stock, tmp_path / "other")
