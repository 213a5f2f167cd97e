#!/usr/bin/env bash
# LatentWire: phase 1a, pooling towards the mean embedding, and the same with LoRA, which that loss gives no gradient.
# Settings and --test, OFFLINE=1, DRY=1: scripts/latentwire.bash.
source "$(dirname "$0")/latentwire.bash"
root sequence_suite runs # as in the document: runs/exp1_baseline and so on
read -ra base <<<"$(common $(choose "10000 5000 1 8 200" "24000 2000 1 48 512" "1600 400 1 16 128"))"
width=$(choose "--compress_dim 1024 --adapter_lr 5e-4" "--compress_dim 32" "--compress_dim 32")
length=$(choose "--sequence_pooling_target 75" "--pool_ratio 4" "--pool_ratio 4")
pool=(--mode pooling --pooling_mode mean_target "${base[@]}" $width $length)
lora="--use_lora --lora_r 8 --lora_alpha 16 --lora_layers 4"
seeded "$ROOT/exp1_baseline" --mode phase1a "${base[@]}" $width
seeded "$ROOT/exp2_pooling" "${pool[@]}"
seeded "$ROOT/exp3_pooling_lora" "${pool[@]}" $lora
[[ $LEGACY == 1 ]] && seeded "$ROOT/exp2_pooling_legacy" --mode pooling --pooling_mode mean_target "${base[@]}" $width \
  $(choose "$length" "--sequence_pooling_target 10" "--sequence_pooling_target 10") --legacy
close sequence
exit $failed
