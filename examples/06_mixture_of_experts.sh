#!/usr/bin/env bash
# A masked diffusion model with 8 experts per layer, 4 on each of two ranks: once every token chooses its
# experts, once every expert chooses its tokens. Prints the losses and how busy the experts were.
#
#   make quickstart                            # leaves the text behind, once
#   bash examples/06_mixture_of_experts.sh     # about two minutes on two cores; goes on where it stopped
#
# OUTPUT, STEPS and SEED change what they say.
set -euo pipefail
cd "$(dirname "$0")/.."
OUTPUT=${OUTPUT:-runs/06_mixture_of_experts}
STEPS=${STEPS:-150}
SEED=${SEED:-1234}
PYTHON=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

run() { # name, flags
  echo "== $1"
  "$PYTHON" -m torch.distributed.run --standalone --nproc-per-node 2 -m megatron_dlm train \
    --config examples/06_mixture_of_experts/toy.yaml \
    --train.output_dir "$OUTPUT/$1" \
    --train.steps "$STEPS" \
    --train.seed "$SEED" \
    "${@:2}"
}
run token_choice --model.moe.routing token_choice --model.moe.seq_aux_loss_coeff 0.01
run expert_choice --model.moe.routing expert_choice
"$PYTHON" examples/06_mixture_of_experts/show.py "$OUTPUT"
