#!/usr/bin/env bash
# Everything that only a GPU can show, in one command: tests, speed, a CIFAR-10 training, FID against NFE.
#
#   scripts/benchmark/gpu_check.sh [OUT]          OUT defaults to runs/gpu_check; a second call goes on where the first stopped
#
# Environment, with defaults for one large GPU and about an hour:
#   PARTS="tests speed train plain tables"
#   MINUTES=15        of training, and as many for the plain loop that it is compared with (plain)
#   SAMPLES="10000 50000"   images of the tables
#   METHODS="euler heun"   NFE="5 10 20 50 100"   SCALES="1"   of the tables
#   CONFIG=configs/cifar10_fast.yaml   OVERRIDES="key=value ..."
#   FEATURES="--feature_extractor inception-v3-compat"   where the weights at hand end at layer 768:
#             FEATURES="--feature_extractor inception-v3-compat --feature_weights PATH --feature_layer 768"
#   LAUNCH="python"   BENCHMARK="--steps 20 --rounds 3 --compile"   RACE="--curve 3": further flags of the two benchmarks
# FLOW_DATA names the folder with CIFAR-10. On a CPU, small numbers and a small network try the script itself.
set -euo pipefail
cd "$(dirname "$0")/../.."
OUT=${1:-runs/gpu_check}
PARTS=${PARTS:-tests speed train plain tables}
MINUTES=${MINUTES:-15}
CONFIG=${CONFIG:-configs/cifar10_fast.yaml}
read -ra samples <<<"${SAMPLES:-10000 50000}"
read -ra nfe <<<"${NFE:-5 10 20 50 100}"
read -ra methods <<<"${METHODS:-euler heun}"
read -ra scales <<<"${SCALES:-1}"
read -ra overrides <<<"${OVERRIDES:-}"
read -ra features <<<"${FEATURES:---feature_extractor inception-v3-compat}"
read -ra benchmark <<<"${BENCHMARK:---steps 20 --rounds 3 --compile}"
read -ra race <<<"${RACE:---curve 3}"
read -ra launch <<<"${LAUNCH:-python}"
mkdir -p "$OUT"

tests() {
  python -m pytest -m "slow or not slow" -n 4 tests/scripts/test_gpu.py | tee "$OUT/tests.txt"
}

speed() {
  [ -f "$OUT/benchmark/benchmark.md" ] ||
    python -m scripts.benchmark -c "$CONFIG" --parts train sample --precisions bf16 --against eager "${benchmark[@]}" \
      --out "$OUT/benchmark" "${overrides[@]}"
}

# As many steps as fill the minutes, so that the schedule of the learning rate ends with them
train() {
  python -m scripts.benchmark quality --configs "$CONFIG" --minutes "$MINUTES" --seeds 1 --trial_rounds 1 --methods heun \
    --sampling_steps 18 --n_samples "${samples[0]}" --metrics fid "${race[@]}" "${features[@]}" --out "$OUT/race" "${overrides[@]}"
}

run() {
  echo "$OUT/race/$(basename "$CONFIG" .yaml)/seed_0"
}

plain() {
  [ -f "$OUT/plain.safetensors" ] ||
    python -m scripts.benchmark.baseline -c "$CONFIG" --minutes "$MINUTES" --out "$OUT/plain.safetensors" "${overrides[@]}"
}

tables() {
  for n in "${samples[@]}"; do
    for weights in "$(run)" "$OUT/plain.safetensors"; do
      [ ! -e "$weights" ] ||
        "${launch[@]}" evaluate.py --weights "$weights" --out "$OUT/evaluation_$n" --methods "${methods[@]}" --nfe "${nfe[@]}" \
          --guidance_scale "${scales[@]}" --n_samples "$n" --bspp 500 -mp auto --metrics fid "${features[@]}"
    done
  done
  "${launch[@]}" sample.py --weights "$(run)" --n_samples 100 --save_dir "$OUT/samples" --sampling_method heun \
    --sampling_steps 18 -mp auto
  [ -f "$OUT/half.safetensors" ] || python -m scripts.export --weights "$(run)" --out "$OUT/half.safetensors"
}

for part in $PARTS; do
  echo "== $part"
  "$part"
done
echo "look at $OUT: benchmark/benchmark.md, race/race.md, evaluation_*/results.md, samples/grid.png, half.safetensors"
