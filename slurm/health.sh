#!/bin/bash
# Is this node fit to train? srun starts it once per node before the first step.
#   health.sh RUN_DIRECTORY
# Prints one line, "OK node" or "BAD node reasons", and always ends with status 0.
set -u
reasons=()

num_gpus=${SLURM_GPUS_ON_NODE:-0}
if ((num_gpus > 0)) && command -v nvidia-smi >/dev/null; then
  # One line per GPU: uncorrected memory errors since the last reset; [N/A] where there is no ECC.
  if errors=$(timeout 60 nvidia-smi --format=csv,noheader \
    --query-gpu=ecc.errors.uncorrected.volatile.total 2>&1); then
    found=$(grep -c . <<<"$errors")
    ((found >= num_gpus)) || reasons+=("$found GPUs of $num_gpus answer")
    if grep -qE '^ *[1-9]' <<<"$errors"; then reasons+=("uncorrected ECC errors"); fi
  else
    reasons+=("nvidia-smi fails: ${errors//$'\n'/ }")
  fi
fi

temporary=${TMPDIR:-/tmp}
for place in "$1" "$temporary"; do
  if file=$(mktemp "$place/.health.XXXXXX" 2>/dev/null); then
    rm -f "$file"
  else
    reasons+=("cannot write to $place")
  fi
done
free_mb=$(df --output=avail -B1M "$temporary" | tail -n 1)
((free_mb >= 1024)) || reasons+=("$((free_mb)) MB free in $temporary")

node=${SLURMD_NODENAME:-$(hostname)}
if ((${#reasons[@]})); then
  printf -v all '%s; ' "${reasons[@]}"
  echo "BAD $node ${all%; }"
else
  echo "OK $node"
fi
