#!/usr/bin/env bash
# LatentWire phase 1b at the documented weights of 0.5, and without them; LEGACY=1: with the published losses as well.
# Settings and --test, OFFLINE=1, DRY=1: scripts/latentwire.bash.
source "$(dirname "$0")/latentwire.bash"
root stage1b runs # as in the document: runs/stage1b_phase1b
LOG=logs/training.log DIAGNOSTICS=logs/diagnostics.jsonl
read -ra base <<<"$(common $(choose "10000 5000 5 8 100" "8000 2000 1 8 512" "400 400 1 8 128"))"
width=$(choose "--compress_dim 1024 --adapter_lr 5e-4" "--compress_dim 16" "--compress_dim 16")
flags=(--mode phase1b "${base[@]}" $width --k_tokens 2 --kd_tau 1.0 --eval_every 1)
half=$(choose stage1b_phase1b phase1b_half phase1b_half)
seeded "$ROOT/$half" "${flags[@]}" --lambda_kce 0.5 --lambda_kd 0.5
seeded "$ROOT/phase1b_zero" "${flags[@]}" --lambda_kce 0 --lambda_kd 0
[[ $LEGACY == 1 ]] && seeded "$ROOT/${half}_legacy" "${flags[@]}" --lambda_kce 0.5 --lambda_kd 0.5 --legacy
close weight_sweep
exit $failed
