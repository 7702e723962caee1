"""`python -m megatron_dlm.evaluation.lm_eval_command`: lm-eval's command line with our model.

For lm-eval up to 0.4.13, which does not look for models that other packages install. Takes the same
flags as `lm_eval`.
"""

from __future__ import annotations

from lm_eval.__main__ import cli_evaluate
from lm_eval.api.registry import model_registry

from megatron_dlm.evaluation.lm_eval_adapter import MegatronDLM

if __name__ == "__main__":
    if "megatron_dlm" not in model_registry:
        model_registry.register("megatron_dlm", target=MegatronDLM)
    cli_evaluate()
