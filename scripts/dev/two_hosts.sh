#!/usr/bin/env bash
# Two hosts on one machine: two network namespaces with a cable between them, one process in each, started as on two machines.
#   scripts/dev/two_hosts.sh [FOLDER]     needs root and iproute2; leaves with 77 where they are not there
# Trains, samples and evaluates on the digits and compares with one host of two processes; then cuts the cable during a
# training: both hosts end within the timeout, each with a message, and the run goes on from its checkpoint. FOLDER (default: a
# temporary one) keeps runs and logs. PYTHON names the interpreter.
set -euo pipefail
cd "$(dirname "$0")/../.."
PYTHON=${PYTHON:-python}
FOLDER=${1:-$(mktemp -d)}
A=flow$$a B=flow$$b
LAUNCH=("$PYTHON" -m accelerate.commands.launch --config_file configs/accelerate/two_machines.yaml --num_processes 2)
TRAIN=(train.py -c configs/digits.yaml train.steps=60 train.checkpoint_every_steps=20 train.log_every_steps=10
  train.sample_every_steps=0 train.batch_size=64 train.log_with=[] preview.n_samples=4 preview.sampling_steps=1)
TIMEOUT_SECONDS=15
export FLOW_NUM_THREADS=1

ip netns add "$A" 2>/dev/null || { echo "two_hosts: needs root and iproute2 for network namespaces"; exit 77; }
finish() {
  for namespace in "$A" "$B"; do
    ip netns pids "$namespace" 2>/dev/null | xargs -r kill -9 2>/dev/null || true
    ip netns del "$namespace" 2>/dev/null || true
  done
}
trap finish EXIT
ip netns add "$B"
ip link add "$A" type veth peer name "$B"
for host in "$A:10.77.0.1" "$B:10.77.0.2"; do
  name=${host%:*}
  ip link set "$name" netns "$name"
  ip -n "$name" addr add "${host#*:}/24" dev "$name"
  ip -n "$name" link set lo up
  ip -n "$name" link set "$name" up
done

# both RANK0_LOG RANK1_LOG SCRIPT ARGUMENTS...: the same command on both hosts, as configs/accelerate/two_machines.yaml says
both() {
  local logs=("$1" "$2") ranks=(0 1) hosts=("$A" "$B") pids=()
  shift 2
  for rank in 0 1; do
    ip netns exec "${hosts[rank]}" env GLOO_SOCKET_IFNAME="${hosts[rank]}" "${LAUNCH[@]}" --machine_rank "${ranks[rank]}" \
      --main_process_ip 10.77.0.1 "$@" >"${logs[rank]}" 2>&1 &
    pids+=($!)
  done
  STATUS=0
  for pid in "${pids[@]}"; do wait "$pid" || STATUS=$?; done
}

alone() { "$PYTHON" -m torch.distributed.run --nproc_per_node 2 --rdzv_backend c10d --rdzv_endpoint localhost:0 "$@"; }

expect() { # WHAT COMMAND...: say whether it holds, and end where it does not
  local what=$1
  shift
  "$@" || { echo "two_hosts: FAILED: $what (see $FOLDER)"; exit 1; }
  echo "two_hosts: $what"
}

SAMPLE=(sample.py --n_samples 24 --sampling_steps 4 --bspp 4)
EVALUATE=(evaluate.py --n_samples 200 --sampling_steps 4 --bspp 50 --feature_extractor digits --metrics fid accuracy)
for where in hosts one; do
  run=$FOLDER/$where
  for job in train sample evaluate; do
    case $job in
      train) command=("${TRAIN[@]}" -e "$run/run") ;;
      sample) command=("${SAMPLE[@]}" --weights "$run/run" --save_dir "$run/samples") ;;
      evaluate) command=("${EVALUATE[@]}" --weights "$run/run" --out "$run/table") ;;
    esac
    mkdir -p "$run"
    if [ $where = hosts ]; then
      both "$run/$job-a.txt" "$run/$job-b.txt" "${command[@]}"
      expect "$job on two hosts ends well" test "$STATUS" = 0
    else
      alone "${command[@]}" >"$run/$job.txt" 2>&1
    fi
  done
done
expect "the weights are those of one host, to the bit" \
  cmp "$FOLDER"/{hosts,one}/run/checkpoints/step_00000060/model.safetensors
expect "the images are those of one host, to the bit" diff -r "$FOLDER"/{hosts,one}/samples/images
same_row() {
  "$PYTHON" - "$FOLDER"/{hosts,one}/table/results.jsonl <<'PYTHON'
import json, sys
a, b = (json.loads(open(path).readline())["metrics"] for path in sys.argv[1:])
sys.exit(a.keys() != b.keys() or any(abs(a[k] - b[k]) > 1e-6 * abs(b[k]) for k in a))
PYTHON
}
expect "the distance and the accuracy are those of one host" same_row

# The cable is cut in the middle of a training.
minutes=$(awk "BEGIN { print $TIMEOUT_SECONDS / 60 }")
long=("${TRAIN[@]}" train.steps=1_000_000 "train.timeout_minutes=$minutes" -e "$FOLDER/cut")
both "$FOLDER/cut-a.txt" "$FOLDER/cut-b.txt" "${long[@]}" &
hosts=$!
for _ in $(seq 600); do
  compgen -G "$FOLDER/cut/checkpoints/step_*" >/dev/null && break
  sleep 0.1
done
ip -n "$A" link set "$A" down
began=$(date +%s)
wait "$hosts" || true
seconds=$(($(date +%s) - began))
lost="another process has ended, hangs or cannot be reached"
expect "cut off, host a ended with a message" grep -q "$lost" "$FOLDER/cut-a.txt"
expect "cut off, host b ended with a message" grep -q "$lost" "$FOLDER/cut-b.txt"
expect "both had ended $seconds s after the cut (timeout $TIMEOUT_SECONDS s)" test "$seconds" -le $((TIMEOUT_SECONDS + 45))
ip -n "$A" link set "$A" up
newest=$(ls -d "$FOLDER"/cut/checkpoints/step_* | tail -1)
step=$((10#${newest##*step_}))
both "$FOLDER/on-a.txt" "$FOLDER/on-b.txt" train.py -e "$FOLDER/cut" -r latest "train.steps=$((step + 20))"
expect "the cable mended, the run went on from step $step" test "$STATUS" = 0
