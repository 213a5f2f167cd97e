#!/usr/bin/env bash
# LatentWire: eight weights of the generation losses and the control without them; LEGACY=1: each with the published
# losses as well. SAMPLES=10000 is the document's slow sweep. Settings: scripts/latentwire.bash.
source "$(dirname "$0")/latentwire.bash"
root phase1b_sweep
read -ra base <<<"$(common $(choose "1000 5000 1 8 100" "8000 2000 1 8 512" "200 400 1 8 128"))"
width=$(choose "--compress_dim 1024 --adapter_lr 5e-4" "--compress_dim 16" "--compress_dim 16")
for lambda in ${LAMBDAS:-0 0.001 0.005 0.01 0.02 0.05 0.1 0.2 0.5}; do
  flags=(--mode phase1b "${base[@]}" $width --k_tokens 2 --kd_tau 1.0 --lambda_kce $lambda --lambda_kd $lambda)
  seeded "$ROOT/lambda_$lambda" "${flags[@]}"
  [[ $LEGACY == 1 && $lambda != 0 ]] && seeded "$ROOT/lambda_${lambda}_legacy" "${flags[@]}" --legacy
done
close weight_sweep
exit $failed
