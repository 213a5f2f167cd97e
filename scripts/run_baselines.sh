#!/usr/bin/env bash
# LatentWire: text, token budget, PCA, replayed embeddings, snap, segment mean and salience at M prefill positions: the
# document's 32, and others beside it. Settings: scripts/latentwire.bash.
source "$(dirname "$0")/latentwire.bash"
root baselines
flags=(--mode baselines --model_id "$MODEL_ID" --samples "${EVAL_SAMPLES:-$(choose 10000 512 48)}")
flags+=(--pca_samples "${PCA_SAMPLES:-$(choose 1000 2000 100)}" --baseline all)
flags+=($(choose "--compress_dim 1024" "--dataset synthetic --compress_dim 16 --max_new_tokens 4 --device cpu --threads 1" \
  "--test --compress_dim 16"))
for M in ${BUDGETS:-$(choose "32 64" "10 21 32" "10 21")}; do
  run "$ROOT/m$M" "${flags[@]}" --token_budget "$M"
done
close baselines
exit $failed
