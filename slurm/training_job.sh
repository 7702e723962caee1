# shellcheck shell=bash
# One start of a training job, from the snapshot of code and config to the decision whether the job
# is queued again: read by pretrain.sbatch and sweep.sbatch after their knobs.
#
#   RUN_DIR/slurm/logs/JOB_RESTART/NODE_taskN.log   what each rank printed
#   RUN_DIR/slurm/logs/JOB_RESTART/failed_ranks.txt errors of ranks, the first one first
#   RUN_DIR/slurm/logs/JOB_RESTART/{srun,health}.txt what srun and the check of the nodes said
#   RUN_DIR/slurm/crashes.txt                       step, job, status, restart, time, reason
#   RUN_DIR/slurm/JOB/{code,config.yaml}            what a requeued job runs, whatever is edited

# shellcheck source-path=SCRIPTDIR source=job.sh
source "$CODE/slurm/job.sh" || exit 2

run_training_job() { # arguments: more flags of `megatron-dlm train`
  local free_gb
  RUN_DIR=$(realpath -m "$RUN_DIR")
  logs=$RUN_DIR/slurm/logs/${this_job}_$restart
  crashes=$RUN_DIR/slurm/crashes.txt
  mkdir -p "$logs" || refuse "RUN_DIR $RUN_DIR cannot be written"
  listen
  say "job $this_job restart $restart on $SLURM_JOB_NUM_NODES nodes: $SLURM_JOB_NODELIST"
  # What `megatron-dlm slurm` finds the jobs of the run by: an array is one chain, a sweep is not.
  job_of_run=${job_of_run:-$submission}
  if ! grep -qx "$job_of_run" "$RUN_DIR/slurm/jobs.txt" 2>/dev/null; then
    echo "$job_of_run" >>"$RUN_DIR/slurm/jobs.txt"
  fi
  open_environment
  check_nodes # first: on an unfit node nothing else works either
  take_snapshot "$@"
  read_state || exit $?
  say "run $RUN_DIR is $state at step $step${num_steps:+ of $num_steps}; code $CODE; logs $logs"
  if [ "$state" = finished ]; then exit 0; fi
  if [ "$ON_STOP" = exit ] && (($(num_crashes "$crashes" "$step") >= MAX_CRASHES)); then
    say "giving up: the jobs before this one crashed here; see $crashes"
    exit 1
  fi
  free_gb=$(df --output=avail -B1G "$RUN_DIR" | tail -n 1)
  if ((free_gb < MINIMUM_FREE_GB)); then
    refuse "$((free_gb)) GB free in $RUN_DIR, MINIMUM_FREE_GB is $MINIMUM_FREE_GB"
  fi
  local first_step=$step
  if [ -z "$asked_to_stop" ]; then start_ranks; else status=0; fi
  decide "$first_step"
}

# From here on CODE and config_file are copies that nobody edits.
take_snapshot() {
  local folder=$RUN_DIR/slurm/$submission flags=() name
  if [[ $CODE == "$RUN_DIR"/slurm/submission_*/code ]]; then # made by `megatron-dlm slurm render`
    config_file=${CONFIG[0]}
    (($# == 0)) || refuse "flags ($*) after a rendered script; give them to megatron-dlm slurm"
    return
  fi
  if [ ! -d "$folder/code" ]; then
    rm -rf "$folder/code.tmp"
    mkdir -p "$folder/code.tmp"
    cp -r "$CODE/megatron_dlm" "$CODE/slurm" "$folder/code.tmp/" ||
      refuse "CODE $CODE is no checkout of this project, or cannot be copied"
    mv "$folder/code.tmp" "$folder/code"
  fi
  CODE=$folder/code
  open_environment
  config_file=$folder/config.yaml
  if [ ! -s "$config_file" ]; then
    for name in "${CONFIG[@]}"; do flags+=(--config "$name"); done
    run_alone megatron_dlm train "${flags[@]}" "$@" --train.output_dir "$RUN_DIR" \
      --train.resume auto --print_config >"$config_file.tmp" || exit 2
    mv "$config_file.tmp" "$config_file"
  fi
}

# Sets state (new, unfinished, finished), step (newest checkpoint) and num_steps (if known), and from
# status.json, if this start wrote it, ended (running, finished, preempted, failed) and reason.
read_state() {
  local answer
  answer=$(run_alone megatron_dlm.launch.slurm.run_state "$RUN_DIR" "$config_file") || return
  { read -r state step num_steps && read -r ended reason; } <<<"$answer"
}

# Every node must be fit; the job goes back into the queue without those that are not.
check_nodes() {
  local log=$logs/health.txt nodes bad excluded place
  srun --overlap --ntasks="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 --cpus-per-task=1 \
    bash "$CODE/slurm/health.sh" "$RUN_DIR" </dev/null >"$log" 2>&1
  nodes=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
  # A node that printed neither line did not answer at all.
  bad=$(for node in $nodes; do grep -q "^OK $node\$" "$log" || echo "$node"; done | paste -sd, -)
  if [ -z "$bad" ] || [ -n "$asked_to_stop" ]; then return; fi
  say "unfit nodes: $bad"
  cat "$log"
  place=unfit_at_$(cat "$RUN_DIR/checkpoints/latest_checkpointed_iteration.txt" 2>/dev/null || echo 0)
  echo "$place $submission 1 $restart $(date +%FT%T) $bad" >>"$crashes"
  if [ "$ON_STOP" = exit ]; then exit 1; fi
  if (($(num_crashes "$crashes" "$place") >= MAX_CRASHES)); then
    say "giving up: unfit nodes in $MAX_CRASHES starts; see $crashes"
    exit 1
  fi
  excluded=$(scontrol -o show job "$this_job" | sed -n 's/.* ExcNodeList=\([^ (]*\).*/\1/p')
  trap '' TERM # the requeue sends it; nodes can be excluded only once the job is pending again
  scontrol requeuehold "$this_job" || exit 1
  for _ in $(seq 100); do
    scontrol update JobId="$this_job" ExcNodeList="${excluded:+$excluded,}$bad" 2>/dev/null && break
    sleep 0.2
  done
  scontrol release "$this_job"
  exit 0
}

start_ranks() {
  local node command
  node=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
  # NodeAddr and not the name: names of nodes are not resolved everywhere.
  MASTER_ADDR=$(scontrol -o show node "$node" | sed -n 's/.* NodeAddr=\([^ ]*\).*/\1/p')
  # A port of its own for each job and start, so that two jobs on one node do not meet.
  MASTER_PORT=$((15000 + (SLURM_JOB_ID * 7 + restart) % 15000))
  export MASTER_ADDR=${MASTER_ADDR:-$node} MASTER_PORT MEGATRON_DLM_FAILURES=$logs/failed_ranks.txt
  command=("$CODE/slurm/start.py" megatron_dlm train --config "$config_file"
    --train.output_dir "$RUN_DIR" --train.resume auto)
  case $LAUNCHER in
    srun) command=("$PYTHON" "${command[@]}") ;;
    torchrun)
      # Static rendezvous keeps Slurm's order of the nodes; c10d would sort them by name. The
      # number of the node is known on the node only.
      # shellcheck disable=SC2016
      command=(bash -c 'exec "$0" -m torch.distributed.run --node-rank="$SLURM_NODEID" "$@"'
        "$PYTHON" --nnodes="$SLURM_JOB_NUM_NODES" --nproc-per-node="$RANKS_PER_NODE"
        --master-addr="$MASTER_ADDR" --master-port="$MASTER_PORT" --max-restarts=0
        "${TORCHRUN_FLAGS[@]}" "${command[@]}")
      ;;
    *) refuse "LAUNCHER is $LAUNCHER; it must be srun or torchrun" ;;
  esac
  # A rank that ends with an error ends the others; ranks that are through wait for the rest.
  run_step --kill-on-bad-exit=1 --wait=300 --output="$logs/%N_task%t.log" "${srun_flags[@]}" \
    "${enter[@]}" "${command[@]}" 2>"$logs/srun.txt"
  cat "$logs/srun.txt"
}

# The status of the task that srun speaks of in line $1: its own is the highest one, which may be that
# of a task that was ended because of this one.
status_in() {
  case $1 in
    *'exit code '*) echo "${1##*exit code }" ;;
    *Killed*) echo 137 ;;
    *Aborted*) echo 134 ;;
    *'Segmentation fault'*) echo 139 ;;
    *) echo $((status ? status : 1)) ;;
  esac
}

# The job ends, or goes back into the queue: finished, stopped and saved, or crashed.
decide() {
  local first_step=$1 failures=$logs/failed_ranks.txt code task node message
  if [ -e "$RUN_DIR/slurm/stop_$job_of_run" ]; then
    say "stopped on request; submit again to go on"
    exit 0
  fi
  # A job that Slurm is ending can start no further step, not even to look how far the run is.
  if [ "$asked_to_stop" = TERM ]; then requeue_on_request 0; fi
  read_state || after_crash "$crashes" "$step" 1 "the state of $RUN_DIR cannot be read"
  say "srun ended with status $status; run $state at step $step${num_steps:+ of $num_steps}"
  if [ "$state" = finished ]; then exit 0; fi
  # torchrun ends with 1 when it is signalled, and a rank that is still starting dies of the signal.
  if [ ! -s "$failures" ] && [ -n "$asked_to_stop" ]; then requeue_on_request 0; fi
  # The trainer was asked to stop past this script, as by a preemption with grace.
  if [ ! -s "$failures" ] && [ "$ended" = preempted ]; then requeue "stopped and saved" 0; fi
  if [ -s "$failures" ]; then
    read -r code task node message <"$failures"
    message="task $task on $node ended with status $code: $message"
    say "the last lines of task $task:"
    tail -n 20 "$logs/"*"_task$task.log"
  else
    # A killed rank cannot speak; srun names it before it ends the others, and they say who it was.
    message=$(grep -m 1 'error: .*task' "$logs/srun.txt")
    code=$(status_in "$message")
    if [ "$ended" = failed ]; then message="$reason${message:+ ($message)}"; fi
    message="srun ended with status $status: ${message:-no rank said why}"
  fi
  if ((code == 2 && step == first_step)); then
    say "$message; status 2 wants a person, so the job is not queued again"
    exit 2
  fi
  after_crash "$crashes" "$step" "$code" "$message"
}
