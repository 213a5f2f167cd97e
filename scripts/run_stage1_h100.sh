#!/usr/bin/env bash
# LatentWire phase 1a, reconstruction alone: train, score with every answer extraction, print the result.
# Settings and --test, OFFLINE=1, DRY=1: scripts/latentwire.bash.
source "$(dirname "$0")/latentwire.bash"
root stage1 runs # as in the document: runs/stage1_adapter_only
LOG=logs/training.log DIAGNOSTICS=logs/diagnostics.jsonl
read -ra base <<<"$(common $(choose "10000 5000 3 64 100" "4000 2000 10 64 512" "640 400 2 64 128"))"
width=$(choose "--compress_dim 1024 --compress_method pca --adapter_hidden_mult 4 --adapter_dropout 0.1 --adapter_lr 5e-4" \
  "--compress_dim 32" "--compress_dim 32")
seeded "$ROOT/stage1_adapter_only" --mode phase1a "${base[@]}" $width --eval_every 1
if [[ $OFFLINE == 1 ]]; then  # the document's k = d / 4, with the linear decoder, and without the rescaling
  seeded "$ROOT/quarter_width" --mode phase1a "${base[@]}" --compress_dim 16
  seeded "$ROOT/quarter_linear" --mode phase1a "${base[@]}" --compress_dim 16 --adapter_type linear
  seeded "$ROOT/unmatched" --mode phase1a "${base[@]}" --compress_dim 16 --rms_match none --color_init unit
fi
suffix=$([[ -n ${SEEDS:-} ]] && echo "_s${SEEDS%% *}" || true)
run "$ROOT/path_c" --mode eval --ckpt_in "$ROOT/stage1_adapter_only$suffix/adapter_phase1_best.pt" "${base[@]}"
close sequence
exit $failed
