"""What an exported directory does not say: where it was made, by whom, and with which keys."""

from __future__ import annotations

import json
from pathlib import Path

from huggingface_tokenizer import write_tokenizer
from small_run import write_run

from megatron_dlm.config.hf_commands import ExportConfig
from megatron_dlm.config.moe import MoEConfig
from megatron_dlm.data.tokenization.tokenizer import load_tokenizer
from megatron_dlm.hf.export import export

SECRET = "hf_0123456789abcdef"


def test_no_paths_hosts_or_keys(tmp_path: Path) -> None:
    """None of what a run directory knows of its machine is in a file that travels."""
    tokenizer = write_tokenizer("gpt2", tmp_path / "alice" / "tokenizer")
    private = {"name_or_path": str(tokenizer), "auth_token": SECRET, "token": SECRET}
    private |= {"special_tokens_map_file": "/home/alice/.cache/map.json"}
    (tokenizer / "tokenizer_config.json").write_text(json.dumps(private))
    size = load_tokenizer(tokenizer).vocab_size
    run = write_run(tmp_path / "alice" / "run", vocab_size=size, tokenizer=tokenizer)
    facts = {
        "commit": "abc",
        "packages": {"torch": "9.9"},
        "host": "node17.cluster.local",
        "command": ["megatron-dlm", "--logging.wandb_project", "alice-project", SECRET],
        "environment": {"WANDB_API_KEY": SECRET, "USER": "alice"},
    }
    (run / "run.json").write_text(json.dumps(facts))
    line = {"step": 0, "split": "valid", "nelbo": 3.25, "host": "node17.cluster.local"}
    (run / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    text = tmp_path / "alice" / "text.txt"
    text.write_text("the sea and the sky " * 20)
    output = tmp_path / "out"
    export(ExportConfig(str(run), str(output), parity_text=str(text)))
    card = (output / "README.md").read_text()
    assert "commit abc" in card
    for file in output.iterdir():
        content = file.read_bytes()
        for word in (str(tmp_path), "alice", "node17", "/home/", SECRET, "wandb"):
            assert word.encode() not in content, f"{file.name} holds {word}"


def test_card_counts_total_and_active_parameters(tmp_path: Path) -> None:
    shared = {"shared_expert_ffn_hidden_size": 8, "shared_expert_gate": True}
    moe = MoEConfig(num_experts=4, ffn_hidden_size=20, num_dense_layers=1, **shared)
    run = write_run(tmp_path / "run", moe=moe)
    export(ExportConfig(str(run), str(tmp_path / "out"), parity=False))
    card = (tmp_path / "out" / "README.md").read_text()
    expert, idle = 3 * 20 * 16, 2
    attention = 2 * 16 * 16 + 2 * 16 * 8 + 2 * 4 + 2 * 16
    experts = 4 * 16 + 3 * 8 * 16 + 16 + 4 * expert
    total = 48 * 16 + 16 + 2 * attention + 3 * 24 * 16 + experts
    active = total - idle * expert
    assert f"| parameters | {total:,}, {active:,} of them for one token |" in card
    said = "4 of 20, 2 per token, softmax gates, a gated shared one of 8, first 1 layers without"
    assert f"| experts | {said} |" in card
    assert "expert choice" not in card
    chosen = MoEConfig(num_experts=4, routing="expert_choice")
    export(
        ExportConfig(
            str(write_run(tmp_path / "second", moe=chosen)), str(tmp_path / "b"), parity=False
        )
    )
    card = (tmp_path / "b" / "README.md").read_text()
    assert "of them for one token, on average |" in card
    assert "| experts | 4 of 24, expert choice, 2 per token on average, softmax gates |" in card
    assert "no keys and values are kept" in card
