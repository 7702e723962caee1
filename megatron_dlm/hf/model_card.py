"""README.md of an exported model: what it is, how it was trained, how to use it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_dlm import __version__
from megatron_dlm.checkpoint.retention import Checkpoint
from megatron_dlm.config.architecture import ModelConfig
from megatron_dlm.config.objective import ObjectiveConfig
from megatron_dlm.hf.configuration import Layout
from megatron_dlm.hf.parity import Parity

_WHAT = {
    "autoregressive": "An autoregressive language model: the logits of a slot are those of the "
    "next token.",
    "masked": "A masked-diffusion language model: attention is bidirectional, and the logits of a "
    "slot are those of its own token, hidden behind the mask.",
}


def model_card(
    *,
    name: str,
    license: str | None,
    checkpoint: Checkpoint,
    model: ModelConfig,
    objective: ObjectiveConfig,
    layout: Layout,
    parity: Parity | None,
) -> str:
    """The card, in Markdown with the metadata that the Hub reads."""
    run = checkpoint.path.parent.parent
    sections = [
        _front_matter(license),
        f"# {name}\n\n{_WHAT[objective.kind]}",
        _facts(checkpoint, model, objective, _read_json(run / "run.json")),
        _losses(run / "metrics.jsonl", checkpoint.step),
        _usage(layout, objective),
        _proof(parity),
        f"Written by megatron_dlm {__version__}.",
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def _front_matter(license: str | None) -> str:
    lines = ["library_name: transformers", "pipeline_tag: text-generation"]
    if license is not None:
        lines.append(f"license: {license}")
    return "\n".join(["---", *lines, "tags:", "- megatron-dlm", "---"])


def _facts(
    checkpoint: Checkpoint, model: ModelConfig, objective: ObjectiveConfig, run: Mapping[str, Any]
) -> str:
    config = checkpoint.manifest["config"]
    tokens = checkpoint.step * config["train"]["global_batch_size"] * model.seq_length
    groups = f", {model.query_groups} key-value" if model.num_query_groups else ""
    rows = {
        "parameters": f"{checkpoint.manifest['num_parameters']:,}",
        "layers × width": f"{model.num_layers} × {model.hidden_size}",
        "heads": f"{model.num_attention_heads}{groups}, of {model.head_size}",
        "MLP": f"{model.ffn_size}, {model.activation}",
        "vocabulary": f"{model.vocab_size:,}",
        "sequence length": f"{model.seq_length:,}",
        "objective": _objective(objective),
        "step": f"{checkpoint.step:,}",
        "tokens trained on, repeats included": f"{tokens:,}",
        "unique tokens": _count(run.get("unique_tokens")),
        "optimizer": f"AdamW, lr {config['optimizer']['lr']}, "
        f"weight decay {config['optimizer']['weight_decay']}",
        "batch": f"{config['train']['global_batch_size']} samples",
        "precision": config["train"]["precision"],
        "seed": str(config["train"]["seed"]),
        "trained with": _software(run),
    }
    lines = [f"| {name} | {value} |" for name, value in rows.items() if value]
    return "\n".join(["## Training", "", "| | |", "|---|---|", *lines])


def _objective(objective: ObjectiveConfig) -> str:
    if objective.kind == "autoregressive":
        ratio = objective.input_masking_ratio
        return "autoregressive" + (f", input masking {ratio}" if ratio else "")
    return (
        f"masked, {objective.schedule} schedule, {objective.weighting} weighting, "
        f"mask id {objective.mask_token_id}"
    )


def _count(value: Any) -> str:
    return "" if value is None else f"{value:,}"


def _software(run: Mapping[str, Any]) -> str:
    packages = run.get("packages") or {}
    known = {"megatron_dlm": run.get("megatron_dlm"), **packages, "commit": run.get("commit")}
    return ", ".join(f"{name} {version}" for name, version in known.items() if version)


def _losses(metrics: Path, step: int) -> str:
    """The last losses logged up to the exported step, in nats per token."""
    try:
        lines = metrics.read_text(encoding="utf-8").splitlines()
    except OSError:
        return ""
    last: dict[str, dict[str, Any]] = {}
    for line in lines:
        try:
            entry = json.loads(line)
        except ValueError:  # the line that an interrupted run left half-written
            continue
        if entry["step"] <= step:
            last[entry["split"]] = entry
    if not last:
        return ""
    rows = [
        f"| {split} | {entry['step']:,} | {entry['nelbo']:.4f} |" for split, entry in last.items()
    ]
    unit = "In nats per token: the bound for diffusion, exact for autoregression."
    return "\n".join(["## Loss", "", unit, "", "| split | step | NELBO |", "|---|---|---|", *rows])


def _usage(layout: Layout, objective: ObjectiveConfig) -> str:
    remote = layout in ("megatron_dlm", "megadlms")
    option = ", trust_remote_code=True" if remote else ""
    code = [
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        f'tokenizer = AutoTokenizer.from_pretrained("PATH"{option})',
        f'model = AutoModelForCausalLM.from_pretrained("PATH"{option})',
    ]
    notes = ["Documents were trained on as their tokens and an end, without a begin token."]
    if layout == "megadlms":
        notes.append(
            "This directory holds weights and settings for MegaDLMs' `configuration_dlm.py` and "
            "`modeling_dlm.py`, which are not included: copy them beside the weights. Ask for "
            '`attn_implementation="eager"` on transformers 4.48 to 4.52, where it is causal '
            "otherwise."
        )
    if layout == "megatron_dlm":
        code += [
            'prompts = ["Once upon a time"]',
            'inputs = tokenizer(prompts, return_tensors="pt", padding=True, '
            "add_special_tokens=False)",
            "tokens = model.generate(**inputs, max_new_tokens=64)",
            "print(tokenizer.batch_decode(tokens, skip_special_tokens=True))",
        ]
        notes.append(
            "Padding, on either side, changes nothing as long as `attention_mask` names it. The "
            "code beside the weights needs PyTorch 2.5 and transformers 4.51 or newer."
        )
    return "\n\n".join(["## Use", "\n".join(["```python", *code, "```"]), *notes])


def _proof(parity: Parity | None) -> str:
    if parity is None:
        return "Not compared with the checkpoint it was written from."
    return (
        "## Equality\n\n"
        f"Logits on {parity.num_tokens} tokens ({parity.text}) differ from the checkpoint's by at "
        f"most {parity.maximum_difference:.1e} (mean {parity.mean_difference:.1e}, largest logit "
        f"{parity.largest_logit:.1f}): {parity.compared}; see `parity.json`."
    )


def _read_json(path: Path) -> Mapping[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return values if isinstance(values, dict) else {}
