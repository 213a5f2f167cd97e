#!/usr/bin/env bash
# LatentWire: the document's three annealing variants (linear, weak, warm start from phase 1a), at batch 8 for one epoch
# as its plan assumes: the ramp of 0.4 epochs is then 500 of 1,250 steps. Settings: scripts/latentwire.bash.
source "$(dirname "$0")/latentwire.bash"
root annealing runs # as in the document: runs/phase1_anneal_linear and so on
read -ra base <<<"$(common $(choose "10000 5000 1 8 100" "10000 2000 1 8 512" "200 400 1 8 128"))"
width=$(choose "--compress_dim 1024 --adapter_lr 5e-4" "--compress_dim 16" "--compress_dim 16")
anneal=(--mode phase1b "${base[@]}" $width --anneal_gen_objectives --anneal_epochs 0.4)
seeded "$ROOT/phase1_anneal_linear" "${anneal[@]}" --lambda_kce 0.01 --lambda_kd 0.01
seeded "$ROOT/phase1_anneal_weak" "${anneal[@]}" --lambda_kce 0.001 --lambda_kd 0.001
warm=$ROOT/phase1_warmstart
run "$warm" --mode phase1a "${base[@]}" $width --ckpt_out "$warm/adapter.pt"
seeded "$ROOT/phase1_anneal_warmstart" "${anneal[@]}" --lambda_kce 0.01 --lambda_kd 0.01 --ckpt_in "$warm/adapter.pt"
close anneal
exit $failed
