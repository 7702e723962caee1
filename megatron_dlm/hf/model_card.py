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
from megatron_dlm.hf.layouts import Layout
from megatron_dlm.hf.parity import Parity
from megatron_dlm.models.accounting import count_parameters

_WHAT = {
    "autoregressive": "An autoregressive language model: the logits of a slot are those of the "
    "next token.",
    "masked": "A masked-diffusion language model: attention is bidirectional, and the logits of a "
    "slot are those of its own token, hidden behind the mask.",
    "hybrid": "A diffusion language model whose noise is masks and other tokens: attention is "
    "bidirectional, and the logits of a slot are those of its own token, hidden or replaced.",
    "block": "A block-diffusion language model: a block of tokens is denoised at a time, from left "
    "to right; attention sees the own block and those before, and the logits of a slot are those "
    "of its own token, hidden behind the mask.",
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
        _usage(layout, model),
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
        "parameters": f"{checkpoint.manifest['num_parameters']:,}" + _active(model),
        "layers × width": f"{model.num_layers} × {model.hidden_size}",
        "heads": f"{model.num_attention_heads}{groups}, of {model.head_size}",
        "MLP": f"{model.ffn_size}, {model.activation}" + (", biases" if model.mlp_bias else ""),
        "experts": _experts(model),
        "other options": _options(model),
        "vocabulary": f"{model.vocab_size:,}",
        "sequence length": f"{model.seq_length:,}",
        "objective": _objective(objective),
        "step": f"{checkpoint.step:,}",
        "tokens trained on, repeats included": f"{tokens:,}",
        "unique tokens": _count(run.get("unique_tokens")),
        "optimizer": _optimizer(config["optimizer"]),
        "batch": f"{config['train']['global_batch_size']} samples",
        "precision": config["train"]["precision"],
        "seed": str(config["train"]["seed"]),
        "trained with": _software(run),
    }
    lines = [f"| {name} | {value} |" for name, value in rows.items() if value]
    return "\n".join(["## Training", "", "| | |", "|---|---|", *lines])


def _active(model: ModelConfig) -> str:
    if not model.moe.is_moe:
        return ""
    average = ", on average" if model.moe.routing == "expert_choice" else ""
    return f", {count_parameters(model).active:,} of them for one token{average}"


def _experts(model: ModelConfig) -> str:
    moe = model.moe
    if not moe.is_moe:
        return ""
    said = [f"{moe.num_experts} of {model.expert_ffn_size}"]
    if moe.routing == "expert_choice":
        said.append(f"expert choice, {moe.router_topk} per token on average")
    else:
        said.append(f"{moe.router_topk} per token")
    said.append(f"{moe.score_function} gates")
    if moe.shared_expert_ffn_hidden_size:
        gated = "gated " if moe.shared_expert_gate else ""
        said.append(f"a {gated}shared one of {moe.shared_expert_ffn_hidden_size}")
    if moe.num_dense_layers:
        said.append(f"first {moe.num_dense_layers} layers without")
    return ", ".join(said)


def _options(model: ModelConfig) -> str:
    cap = model.attn_logit_softcapping
    said = {
        "QK norm over the full width": model.qk_layernorm_scope == "full",
        f"attention scores capped at {cap}": cap is not None,
        "learned attention sink": model.attention_sink,
        "gains as 1 + weight": model.layernorm_zero_centered_gamma,
        f"residual multiplier {model.residual_multiplier:g}": model.residual_multiplier != 1.0,
        f"output multiplier {model.output_multiplier:g}": model.output_multiplier != 1.0,
    }
    return ", ".join(name for name, is_on in said.items() if is_on)


def _optimizer(settings: Mapping[str, Any]) -> str:
    kind = {"laprop": "LaProp"}.get(settings.get("kind", "adamw"), "AdamW")
    completep = ", CompleteP" if settings.get("parametrization") == "completep" else ""
    return f"{kind}{completep}, lr {settings['lr']}, weight decay {settings['weight_decay']}"


def _objective(objective: ObjectiveConfig) -> str:
    if objective.kind == "autoregressive":
        ratio = objective.input_masking_ratio
        return "autoregressive" + (f", input masking {ratio}" if ratio else "")
    said = [objective.kind, *_details(objective), f"{objective.weighting} weighting"]
    return ", ".join([*said, f"mask id {objective.mask_token_id}"])


def _details(objective: ObjectiveConfig) -> list[str]:
    if objective.kind == "hybrid":
        return [_noise(objective), *_shares(objective)]
    said = [f"{objective.schedule} schedule"]
    if objective.kind == "block":
        said.insert(0, f"blocks of {objective.block_size} tokens")
    if objective.attention_annealing_steps:
        said.append(f"attention from causal over {objective.attention_annealing_steps:,} steps")
    return said


def _noise(objective: ObjectiveConfig) -> str:
    if objective.noise_type == "time":
        return f"noise by GIDD's time form with p_u {objective.uniform_probability:g}"
    if objective.noise_bias is None:
        bias = f"{objective.noise_type} noise"
    else:
        bias = f"noise of bias {objective.noise_bias:g}"
    scale = objective.noise_scale
    return bias if scale == 1.0 else f"{bias} and scale {scale:g}"


def _shares(objective: ObjectiveConfig) -> list[str]:
    shares = {
        "own noise per token": objective.independent_noise_share,
        "clean prompts": objective.prompt_share,
        "infilling": objective.infilling_share,
    }
    said = [f"{name} in {share:.0%} of samples" for name, share in shares.items() if share]
    if objective.empty_token_share:
        said.append(f"up to {objective.empty_token_share:.0%} empty tokens")
    return said


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


def _usage(layout: Layout, model: ModelConfig) -> str:
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
        if model.moe.routing == "expert_choice":
            notes.append(
                "Experts choose among all tokens of a text (expert choice), so a part of it cannot "
                "be computed alone: no keys and values are kept."
            )
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
