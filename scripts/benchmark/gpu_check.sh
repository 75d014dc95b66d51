#!/usr/bin/env bash
# Everything that only a GPU can show, in one command: tests, speed, a CIFAR-10 training, FID against NFE.
#
#   scripts/benchmark/gpu_check.sh [OUT]          OUT defaults to runs/gpu_check; a second call goes on where the first stopped
#
# Environment, with defaults for one large GPU and about an hour:
#   MINUTES=25        of training, and as many for the plain loop that it is compared with
#   SAMPLES="10000 50000"   images of the two tables
#   NFE="5 10 20 50 100"    Euler steps of the table
#   CONFIG=configs/cifar10_fast.yaml   OVERRIDES="key=value ..."
#   FEATURES="--feature_extractor inception-v3-compat"   where the weights at hand end at layer 768:
#             FEATURES="--feature_weights PATH --feature_layer 768"
#   LAUNCH="python"   BENCHMARK="--steps 20 --rounds 3 --compile"
# FLOW_DATA names the folder with CIFAR-10. On a CPU, small numbers and a small network try the script itself.
set -euo pipefail
cd "$(dirname "$0")/../.."
OUT=${1:-runs/gpu_check}
MINUTES=${MINUTES:-25}
SAMPLES=${SAMPLES:-10000 50000}
NFE=${NFE:-5 10 20 50 100}
CONFIG=${CONFIG:-configs/cifar10_fast.yaml}
FEATURES=${FEATURES:---feature_extractor inception-v3-compat}
LAUNCH=${LAUNCH:-python}
BENCHMARK=${BENCHMARK:---steps 20 --rounds 3 --compile}
read -ra overrides <<<"${OVERRIDES:-}"
read -ra features <<<"$FEATURES"
read -ra benchmark <<<"$BENCHMARK"
read -ra launch <<<"$LAUNCH"
read -ra nfe <<<"$NFE"
mkdir -p "$OUT"

echo "== tests that need a GPU"
python -m pytest -m "slow or not slow" -n 0 tests/scripts/test_gpu.py | tee "$OUT/tests.txt"

echo "== speed against the plain loop"
python -m scripts.benchmark -c "$CONFIG" --parts train sample --precisions bf16 --against eager "${benchmark[@]}" \
  --out "$OUT/benchmark" "${overrides[@]}"

echo "== $MINUTES minutes of training"
if [ ! -d "$OUT/run/snapshots" ]; then
  resume=()
  [ -d "$OUT/run" ] && resume=(-r latest)
  # SIGTERM asks a run to write a checkpoint and leave with 143
  timeout --signal TERM "${MINUTES}m" "${launch[@]}" train.py -c "$CONFIG" -e "$OUT/run" "${resume[@]}" "${overrides[@]}" ||
    [ $? -eq 124 ]
fi

echo "== $MINUTES minutes of the plain loop"
[ -f "$OUT/plain.safetensors" ] ||
  python -m scripts.benchmark.baseline -c "$CONFIG" --minutes "$MINUTES" --out "$OUT/plain.safetensors" "${overrides[@]}"

echo "== tables"
for n in $SAMPLES; do
  for weights in "$OUT/run" "$OUT/plain.safetensors"; do
    "${launch[@]}" evaluate.py --weights "$weights" --out "$OUT/evaluation_$n" --methods euler heun --nfe "${nfe[@]}" \
      --n_samples "$n" --bspp 500 -mp bf16 --metrics fid "${features[@]}"
  done
done
"${launch[@]}" sample.py --weights "$OUT/run" --n_samples 100 --save_dir "$OUT/samples" --sampling_method heun \
  --sampling_steps 18 -mp bf16

echo "== the weights, in half precision"
[ -f "$OUT/half.safetensors" ] || python -m scripts.export --weights "$OUT/run" --out "$OUT/half.safetensors"
echo "look at $OUT: benchmark/benchmark.md, evaluation_*/results.md, samples/grid.png, half.safetensors"
