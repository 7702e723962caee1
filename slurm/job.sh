# shellcheck shell=bash
# shellcheck disable=SC2034,SC2153 # knobs of the templates, results for them
# What all templates share: read by them after their knobs, never started by itself.

say() { echo "[job] $(date +%FT%T) $*"; }
refuse() {
  say "error: $*"
  exit 2
}

# What scontrol calls this job: the bare number of an array's last task would mean the whole array.
if [ -n "${SLURM_ARRAY_TASK_ID:-}" ]; then
  this_job=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID
else
  this_job=${SLURM_JOB_ID:?start this script with sbatch}
fi
submission=${SLURM_ARRAY_JOB_ID:-$SLURM_JOB_ID}
restart=${SLURM_RESTART_COUNT:-0}

# Since Slurm 22.05 srun no longer takes this over from sbatch.
export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1}
export OMP_NUM_THREADS=${THREADS_PER_RANK:-1}
export PYTHONUNBUFFERED=1 PYTHONFAULTHANDLER=1

# Sets srun_flags and enter: `srun "${srun_flags[@]}" "${enter[@]}" COMMAND` runs in the container,
# if there is one.
open_environment() {
  # shellcheck disable=SC1090 # a file of the site
  if [ -n "$SITE_SETUP" ]; then source "$SITE_SETUP" || refuse "SITE_SETUP $SITE_SETUP failed"; fi
  local mounts
  # The folders that a run reads and writes keep their names inside.
  mounts=$PWD:$PWD,$CODE:$CODE${RUN_DIR:+,$RUN_DIR:$RUN_DIR}${CONTAINER_MOUNTS:+,$CONTAINER_MOUNTS}
  srun_flags=() enter=()
  case $CONTAINER in
    none)
      # shellcheck disable=SC1091 # a file of the user
      if [ -n "$VENV" ]; then
        source "$VENV/bin/activate" || refuse "VENV $VENV has no bin/activate"
      fi
      ;;
    pyxis)
      srun_flags=(--container-image="$IMAGE" --container-mounts="$mounts"
        --container-workdir="$PWD" --no-container-mount-home)
      ;;
    apptainer) enter=(apptainer exec --nv --bind "$mounts" --pwd "$PWD" "$IMAGE") ;;
    *) refuse "CONTAINER is $CONTAINER; it must be none, pyxis or apptainer" ;;
  esac
  if [ "$CONTAINER" != none ] && [ -z "$IMAGE" ]; then
    refuse "CONTAINER is $CONTAINER but IMAGE is empty"
  fi
}

# Run one of our modules as a single task, in the environment of the job. --overlap: the step that
# follows does not wait until Slurm has cleaned up behind this one.
run_alone() {
  srun --overlap --nodes=1 --ntasks=1 --ntasks-per-node=1 "${srun_flags[@]}" "${enter[@]}" \
    "$PYTHON" "$CODE/slurm/start.py" "$@" </dev/null
}

# Run a step; a request to stop reaches its tasks while it runs. Sets status and asked_to_stop.
# USR1 goes to this shell alone and is passed on; TERM Slurm sends to the tasks by itself.
asked_to_stop='' step_pid=''
on_request() {
  say "received $1 after $SECONDS seconds"
  asked_to_stop=$1
  if [ "$1" = USR1 ] && [ -n "$step_pid" ]; then kill -USR1 "$step_pid" 2>/dev/null; fi
}
listen() { trap 'on_request USR1' USR1 && trap 'on_request TERM' TERM; }
run_step() {
  srun "$@" </dev/null &
  step_pid=$!
  while kill -0 "$step_pid" 2>/dev/null; do wait "$step_pid"; done # a signal interrupts wait
  wait "$step_pid" # the shell has kept the status
  status=$?
  step_pid=''
}

# Put this job back into the queue and end; $1 says why, $2 is the exit status where that is off.
requeue() {
  if [ "$ON_STOP" = exit ]; then
    say "$1; the next job of the chain goes on"
    exit "$2"
  fi
  say "$1; queued again"
  trap '' TERM # which the requeue sends
  if ! scontrol requeue "$this_job"; then
    say "error: this cluster does not requeue; submit again, the run goes on where it is saved"
    exit 1
  fi
  exit 0
}

# After a request to stop, which asked_to_stop names; $1 as $2 of requeue. With TERM Slurm ends the
# job, and where it is to run again (scontrol requeue, preemption) Slurm sees to that, but not at
# the time limit; a cancelled job looks the same until it is gone.
requeue_on_request() {
  local facts
  facts=$(scontrol -o show job "$this_job" 2>/dev/null)
  if [ "$asked_to_stop" = TERM ] && [[ $facts != *Reason=TimeLimit* ]]; then
    say "stopped by TERM; whether the job runs again is left to Slurm"
    exit "$1"
  fi
  requeue "stopped by $asked_to_stop" "$1"
}

# Note a crash in file $1 and queue again, or give up with status $3 at the MAX_CRASHES-th crash
# that brought no progress beyond $2 (a step). $4 says what happened.
after_crash() {
  local file=$1 place=$2 code=$3 what=$4 count
  echo "$place $submission $code $restart $(date +%FT%T) $what" >>"$file"
  say "crash: $what"
  count=$(num_crashes "$file" "$place")
  if ((count >= MAX_CRASHES)); then
    say "giving up: $count crashes without progress (MAX_CRASHES is $MAX_CRASHES); see $file"
    exit "$code"
  fi
  requeue "crash $count of $MAX_CRASHES without progress" "$code"
}

# Crashes at this place: of this job, or of all jobs where they form a chain.
num_crashes() {
  local job=$submission
  if [ ! -e "$1" ]; then echo 0 && return; fi
  if [ "$ON_STOP" = exit ]; then job=''; fi
  awk -v place="$2" -v job="$job" '$1 == place && (job == "" || $2 == job) { n++ }
    END { print n + 0 }' "$1"
}
