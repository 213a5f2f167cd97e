#!/usr/bin/env bash
# LatentWire: ten training-free transforms of real embeddings, in half precision as published and with the published
# faults (an fp32 target, exceptions stored as empty answers). Settings: scripts/latentwire.bash.
source "$(dirname "$0")/latentwire.bash"
root embed_sweep_simple
flags=(--mode embed_sweep --model_id "$MODEL_ID" --samples "${SAMPLES:-$(choose 100 512 48)}")
flags+=(--pca_samples "${PCA_SAMPLES:-$(choose 1000 2000 100)}")
flags+=($(choose "" "--dataset synthetic --device cpu --threads 1 --max_new_tokens 4" "--test --max_new_tokens 4"))
run "$ROOT/corrected" "${flags[@]}"
run "$ROOT/bf16" "${flags[@]}" --dtype bf16
run "$ROOT/legacy_bf16" "${flags[@]}" --dtype bf16 --legacy
if [[ $DRY != 1 && ( -L $ROOT/summary.json || ! -e $ROOT/summary.json ) ]]; then # where the document reads it
  ln -sfn corrected/summary.json "$ROOT/summary.json"
fi
for run in corrected bf16 legacy_bf16; do
  close embed_sweep "$ROOT/$run"
done
exit $failed
