"""The export command beside the numbers: files, layouts, tokenizers, refusals, tools."""

from __future__ import annotations

import json
import runpy
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_tokenizer import KINDS, write_tokenizer
from small_run import write_run
from tiny_corpus import TinyCorpus

from megatron_dlm import cli
from megatron_dlm.config.architecture import ModelConfig
from megatron_dlm.config.hf_commands import ExportConfig
from megatron_dlm.config.objective import ObjectiveConfig
from megatron_dlm.data.tokenization.tokenizer import load_tokenizer
from megatron_dlm.hf.checkpoint_reader import CheckpointReader
from megatron_dlm.hf.configuration import SpecialIds, read_config, write_config
from megatron_dlm.hf.export import export
from megatron_dlm.hf.layouts import check_expressible, choose_layout
from megatron_dlm.hf.load import load_model
from megatron_dlm.hf.safetensors_reader import SafetensorsDirectory
from megatron_dlm.hf.safetensors_writer import Entry, write_sharded

ROOT = Path(__file__).parents[3]
AR: Any = "autoregressive"
# Options of the model section that only our own code knows.
OPTIONS: dict[str, Any] = {
    "qk_layernorm_scope": "full",
    "attn_logit_softcapping": 30.0,
    "attention_sink": True,
    "layernorm_zero_centered_gamma": True,
    "residual_multiplier": 0.5,
    "output_multiplier": 2.0,
}


def export_here(run: Path, output: Path, **options: Any) -> Path:
    export(ExportConfig(str(run), str(output), **{"parity": False, **options}))
    return output


class TestLayout:
    """Which layout is written, and what it cannot say."""

    @pytest.mark.parametrize(
        ("changes", "kind", "layout"),
        [
            ({}, AR, "qwen3"),
            ({"qk_layernorm": False}, AR, "llama"),
            ({"qk_layernorm": False, "megatron": {"add_qkv_bias": True}}, AR, "qwen2"),
            ({"megatron": {"add_qkv_bias": True}}, AR, "megatron_dlm"),
            ({"activation": "squared_relu"}, AR, "megatron_dlm"),
            # transformers 5 refuses such a Llama.
            (
                {"qk_layernorm": False, "hidden_size": 18, "kv_channels": 8},
                AR,
                "megatron_dlm",
            ),
            # Llama has biases in its MLP, Qwen3 has none.
            ({"qk_layernorm": False, "mlp_bias": True}, AR, "llama"),
            ({"mlp_bias": True}, AR, "megatron_dlm"),
            (
                {"qk_layernorm": False, "mlp_bias": True, "megatron": {"add_qkv_bias": True}},
                AR,
                "megatron_dlm",
            ),
            ({}, "masked", "megatron_dlm"),
            ({}, "hybrid", "megatron_dlm"),
            ({}, "block", "megatron_dlm"),
            *(({name: value}, AR, "megatron_dlm") for name, value in OPTIONS.items()),
        ],
    )
    def test_stock_code_where_it_fits(self, changes: Any, kind: Any, layout: str) -> None:
        model = ModelConfig(vocab_size=9, **changes)
        objective = ObjectiveConfig(kind=kind)
        assert choose_layout(model, objective, "auto") == layout
        assert choose_layout(model, objective, "megatron_dlm") == "megatron_dlm"

    @pytest.mark.parametrize(
        ("changes", "kind", "obstacle"),
        [
            ({}, AR, "objective.kind autoregressive"),
            ({"activation": "gelu"}, "masked", "model.activation gelu"),
            ({"qk_layernorm": False}, "masked", "model.qk_layernorm false"),
            ({"megatron": {"add_qkv_bias": True}}, "masked", "model.megatron.add_qkv_bias"),
            ({"rope_scaling_factor": 8.0}, "masked", "model.rope_scaling_factor"),
            ({}, "hybrid", "objective.kind hybrid"),
            ({}, "block", "objective.kind block"),
            ({"mlp_bias": True}, "masked", "model.mlp_bias True"),
            *(
                ({name: value}, "masked", f"model.{name} {value}")
                for name, value in OPTIONS.items()
            ),
        ],
    )
    def test_megadlms_refuses_by_name(self, changes: Any, kind: Any, obstacle: str) -> None:
        model = ModelConfig(vocab_size=9, **changes)
        with pytest.raises(ValueError, match=f"layout megadlms cannot express {obstacle}"):
            choose_layout(model, ObjectiveConfig(kind=kind), "megadlms")

    @pytest.mark.parametrize(
        "option",
        [{"rotary_interleaved": True}, {"softmax_scale": 0.5}, {"window_size": "[8, 0]"}],
    )
    def test_options_that_change_the_function(self, option: dict[str, Any]) -> None:
        model = ModelConfig(vocab_size=9, megatron=option)
        with pytest.raises(ValueError, match=f"model.megatron.{next(iter(option))} is"):
            choose_layout(model, ObjectiveConfig(kind=AR), "auto")

    def test_options_that_do_not(self) -> None:
        harmless = {"attention_softmax_in_fp32": True, "tp_comm_overlap": True, "fp8": "hybrid"}
        check_expressible(ModelConfig(vocab_size=9, megatron=harmless))

    @pytest.mark.parametrize("layout", ["qwen3", "megatron_dlm", "megadlms"])
    def test_settings_survive_the_way_out_and_in(self, layout: Any) -> None:
        model = ModelConfig(
            num_layers=3, hidden_size=24, num_attention_heads=4, num_query_groups=2, kv_channels=8,
            ffn_hidden_size=40, normalization_epsilon=1e-5, rotary_base=77_000, seq_length=99,
            vocab_size=50, untie_embeddings_and_output_weights=True, init_method_std=0.01,
        )  # fmt: skip
        kind: Any = AR if layout == "qwen3" else "masked"
        ids = SpecialIds(mask=49 if kind == "masked" else None, pad=0, bos=1, eos=2)
        objective = ObjectiveConfig(kind=kind, mask_token_id=ids.mask)
        written = write_config(model, objective, layout, ids=ids, dtype="float32")
        described = read_config(json.loads(json.dumps(written)), Path("config.json"))
        assert (described.model, described.objective, described.ids) == (model, objective, ids)
        assert described.layout == layout

    def test_files_of_the_megadlms_layout(self, tmp_path: Path) -> None:
        run = write_run(tmp_path / "run")
        output = export_here(
            run, tmp_path / "out", layout="megadlms", eager_attention=True, parity=True
        )
        config = json.loads((output / "config.json").read_text())
        assert config["architectures"] == ["DiffLM"]
        assert config["auto_map"]["AutoModelForCausalLM"] == "modeling_dlm.DiffLM"
        assert config["attn_mask_type"] == "bidirectional"
        assert config["mask_token_id"] == 39
        assert config["vocab_size"] == 40
        assert config["_attn_implementation"] == "eager"
        assert not list(output.glob("*.py"))
        assert load_model(output).objective_kind == "masked"


class TestWeights:
    """Files that the safetensors library reads."""

    def test_written_blocks_are_read_back(self, tmp_path: Path) -> None:
        tensors = {
            "b": torch.randn(5).to(torch.bfloat16),  # an odd number, in front of wider ones
            "a": torch.randn(7, 3),
            "c": torch.randn(4, 4).to(torch.float16),
        }
        entries = [Entry(name, tuple(value.shape), value.dtype) for name, value in tensors.items()]
        blocks = {name: value.split(2) for name, value in tensors.items()}
        for limit, num_files in ((10**9, 1), (100, 2), (1, 3)):
            directory = tmp_path / str(limit)
            directory.mkdir()
            write_sharded(
                directory, entries, lambda entry: blocks[entry.name], max_shard_bytes=limit
            )
            assert len(list(directory.glob("*.safetensors"))) == num_files
            read = SafetensorsDirectory(directory)
            assert read.names == set(tensors)
            for name, value in tensors.items():
                assert torch.equal(read.rows(name), value)
                assert torch.equal(read.rows(name, 1, 2), value[1:3])

    def test_vocabulary_padding_is_trimmed(self, tmp_path: Path) -> None:
        run = write_run(tmp_path / "run", untie_embeddings_and_output_weights=True)
        read = SafetensorsDirectory(export_here(run, tmp_path / "out"))
        for name in ("model.embed_tokens.weight", "lm_head.weight"):
            assert read.shape(name) == (40, 16)

    def test_header_is_aligned(self, tmp_path: Path) -> None:
        run = write_run(tmp_path / "run")
        content = (export_here(run, tmp_path / "out") / "model.safetensors").read_bytes()
        (length,) = struct.unpack("<Q", content[:8])
        assert length % 8 == 0
        assert json.loads(content[8 : 8 + length])["__metadata__"] == {"format": "pt"}

    def test_one_tensor_is_in_memory_at_a_time(self, tmp_path: Path) -> None:
        reader = CheckpointReader(write_run(tmp_path / "run") / "checkpoints" / "iter_0000000")
        fc1, fc2 = (f"decoder.layers.mlp.linear_fc{number}.weight" for number in (1, 2))
        for key, layer in ((fc1, 0), (fc1, 1), (fc2, 0)):
            reader.rows(key, layer, 0, 8)
            held = sum(chunk.nbytes for chunk in reader._chunks.values())
            assert held == torch.Size(reader.tensors[key].shape[1:]).numel() * 4

    @pytest.mark.slow
    def test_memory_on_a_gigabyte(self) -> None:
        """The benchmark ends with an error when the promise is broken."""
        for flags in ([], ["--parity"]):
            command = [sys.executable, str(ROOT / "tools" / "benchmarks" / "export.py"), *flags]
            answer = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
            assert answer.returncode == 0, answer.stdout + answer.stderr


class TestTokenizer:
    """What transformers reads gives the ids that the model was trained on."""

    @pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "bert"])
    def test_hugging_face_kinds_travel_unchanged(self, kind: str, tmp_path: Path) -> None:
        from transformers import AutoTokenizer

        source = write_tokenizer(kind, tmp_path / "tokenizer")
        ours = load_tokenizer(source)
        run = write_run(tmp_path / "run", kind=AR, vocab_size=ours.vocab_size, tokenizer=source)
        output = export_here(run, tmp_path / "out")
        written = (output / "tokenizer.json").read_bytes()
        assert written == (source / "tokenizer.json").read_bytes()
        theirs = AutoTokenizer.from_pretrained(output)
        text = Path(__file__).read_text()
        assert theirs(text, add_special_tokens=False)["input_ids"] == ours.encode(text)
        assert set(theirs("x")) == {"input_ids", "attention_mask"}
        assert load_model(output).tokenizer is not None
        config = json.loads((output / "config.json").read_text())
        assert config.get("eos_token_id") == ours.eod_id
        suppressed = json.loads((output / "generation_config.json").read_text())["suppress_tokens"]
        assert set(suppressed) == set(ours.special_ids) - {ours.eod_id}

    def test_our_own_kind(self, tiny_corpus: TinyCorpus, tmp_path: Path) -> None:
        ours = load_tokenizer(tiny_corpus.tokenizer)
        options = {"vocab_size": ours.vocab_size, "tokenizer": tiny_corpus.tokenizer}
        output = export_here(write_run(tmp_path / "run", **options), tmp_path / "out")
        parity = json.loads((output / "parity.json").read_text())["tokenizer"]
        assert parity["num_texts"] > 500
        assert parity["num_different"] < 10
        again = load_tokenizer(output)
        assert again.metadata == ours.metadata

    def test_a_tokenizer_that_is_too_large(self, tiny_corpus: TinyCorpus, tmp_path: Path) -> None:
        run = write_run(tmp_path / "run", tokenizer=tiny_corpus.tokenizer)
        with pytest.raises(ValueError, match=r"has 400 tokens, the model 40; name the one it was"):
            export_here(run, tmp_path / "out")
        assert not (
            export_here(run, tmp_path / "out", tokenizer="none") / "tokenizer.json"
        ).exists()


class TestOutput:
    """What may be overwritten, and what is written besides."""

    def test_nothing_else_is_overwritten(self, tmp_path: Path) -> None:
        run, output = write_run(tmp_path / "run"), tmp_path / "out"
        output.mkdir()
        (output / "thesis.tex").write_text("x")
        with pytest.raises(ValueError, match="out holds other files; name a new directory"):
            export_here(run, output)
        (output / "thesis.tex").unlink()
        export_here(run, output)
        with pytest.raises(ValueError, match=r"out holds a model; .* --overwrite true"):
            export_here(run, output)
        export_here(run, output, overwrite=True)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "run"]

    def test_card_tells_the_run(self, tmp_path: Path) -> None:
        run = write_run(tmp_path / "run")
        facts = {"unique_tokens": 123_456, "packages": {"torch": "9.9"}, "commit": "abc"}
        (run / "run.json").write_text(json.dumps(facts))
        lines = [{"step": 0, "split": "valid", "nelbo": 3.25}, {"step": 9, "split": "valid"}]
        (run / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)) + '\n{"step": 10, "s')
        output = export_here(run, tmp_path / "out", license="apache-2.0", model_name="Ada")
        card = (output / "README.md").read_text()
        for part in ("# Ada", "license: apache-2.0", "123,456", "torch 9.9", "commit abc"):
            assert part in card
        assert "| valid | 0 | 3.2500 |" in card
        assert "trust_remote_code=True" in card
        stock = export_here(write_run(tmp_path / "ar", kind=AR), tmp_path / "out_ar")
        assert "trust_remote_code" not in (stock / "README.md").read_text()


class TestCommandLine:
    """Through `megatron-dlm` and the converter with Megatron-LM's flags."""

    def test_round_trip(self, tmp_path: Path) -> None:
        run, output, back = write_run(tmp_path / "run"), tmp_path / "out", tmp_path / "back"
        assert cli.main(["export", "--checkpoint", str(run), "--output_dir", str(output)]) == 0
        flags = ["--model", str(output), "--output_dir", str(back), "--tokenizer", "none"]
        assert cli.main(["import", *flags]) == 0
        first, second = load_model(run).model, load_model(back).model
        for name, weight in first.state_dict().items():
            assert torch.equal(weight, second.state_dict()[name])

    def test_errors_are_one_line(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        absent = str(tmp_path / "absent")
        assert cli.main(["export", "--checkpoint", absent, "--output_dir", absent]) == 2
        assert cli.main(["import", "--model", absent, "--output_dir", absent]) == 2
        errors = capsys.readouterr().err.splitlines()
        assert errors[0].startswith(f"megatron-dlm export: error: {absent} is no directory")
        assert errors[1].startswith(f"megatron-dlm import: error: {absent} is no run")
        assert len(errors) == 2

    def test_flags_of_megatron(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        main = runpy.run_path(str(ROOT / "tools" / "convert_checkpoint.py"))["main"]
        run, output = write_run(tmp_path / "run", kind=AR), tmp_path / "out"
        flags = ["--model-type", "GPT", "--load-dir", str(run), "--save-dir", str(output)]
        sizes = ["--target-tensor-parallel-size", "4"]
        assert main([*flags, "--loader", "core", "--saver", "hf", *sizes]) == 0
        assert (output / "parity.json").exists()
        back = ["--model-type", "GPT", "--load-dir", str(output), "--save-dir", str(tmp_path / "b")]
        assert main([*back, "--loader", "llama_mistral", "--saver", "core"]) == 2
        assert "holds no tokenizer" in capsys.readouterr().err
        assert main([*flags, "--loader", "core", "--saver", "core"]) == 2
        assert "a checkpoint of one layout loads on any other" in capsys.readouterr().err
        assert main([*flags, "--loader", "core", "--saver", "hf", "--fp16"]) == 2
        assert capsys.readouterr().err == (
            "convert_checkpoint.py: error: --fp16 cannot be honoured: weights are fp32 or bf16; "
            "leave the flag away\n"
        )
