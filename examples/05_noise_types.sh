#!/usr/bin/env bash
# Five noise types of hybrid diffusion, from masks only to uniform tokens only, on the same text with
# the same noise levels: trains all five at toy size and draws their validation bounds.
#
#   make quickstart                      # leaves the text behind, once
#   bash examples/05_noise_types.sh      # about ten minutes on two cores; goes on where it stopped
#
# OUTPUT, STEPS, RANKS and SEED change what they say.
set -euo pipefail
cd "$(dirname "$0")/.."
OUTPUT=${OUTPUT:-runs/05_noise_types}
STEPS=${STEPS:-500}
RANKS=${RANKS:-2}
SEED=${SEED:-1234}
PYTHON=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

for noise in masked low_uniform balanced high_uniform uniform; do
  echo "== $noise"
  "$PYTHON" -m torch.distributed.run --standalone --nproc-per-node "$RANKS" -m megatron_dlm train \
    --config examples/05_noise_types/toy.yaml \
    --objective.noise_type "$noise" \
    --train.output_dir "$OUTPUT/$noise" \
    --train.steps "$STEPS" \
    --train.seed "$SEED"
done
"$PYTHON" examples/05_noise_types/draw.py "$OUTPUT"
