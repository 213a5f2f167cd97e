#!/usr/bin/env bash
# LatentWire: the document's compression strategies, and lm_segment beside them, each against the training-free rows at
# equal prefill positions. Document: a GPU and Llama 3.1 8B. On two CPU cores:
#   bash compression_suite.sh --test                smoke size, 6 minutes at most
#   OFFLINE=1 SEEDS="0 1 2" bash compression_suite.sh      the recorded evidence
# scripts/latentwire.bash lists the settings. RUN_EXP2=1 adds the document's skipped run; LEGACY=1 the published faults.
source "$(dirname "$0")/scripts/latentwire.bash"
root compression_suite
read -ra base <<<"$(common $(choose "10000 5000 1 8 200" "24000 2000 3 48 512" "1600 400 1 16 128"))"
width=$(choose "--compress_dim 1024 --adapter_lr 5e-4" "--compress_method none" "--compress_method none")
quarter=$(choose "--sequence_pooling_target 75" "--pool_ratio 5" "--pool_ratio 5")
legacy_M=10  # offline slots of the published twins, which take no ratio: a quarter of a prompt of 42 tokens
half=$(choose "--sequence_pooling_target 150" "--pool_ratio 2" "--pool_ratio 2")

pooled() { # name, pooling mode, flags
  seeded "$ROOT/$1" --mode pooling --pooling_mode "$2" "${base[@]}" $width "${@:3}"
  if [[ $LEGACY == 1 && $2 != lm_segment ]]; then
    seeded "$ROOT/$1_legacy" --mode pooling --pooling_mode "$2" "${base[@]}" $width \
      $(choose "${*:3}" "--sequence_pooling_target $legacy_M" "--sequence_pooling_target $legacy_M") --legacy
  fi
}

seeded "$ROOT/exp1_baseline" --mode phase1a "${base[@]}" $(choose "--compress_dim 1024 --adapter_lr 5e-4" \
  "--compress_dim 32" "--compress_dim 32")
[[ ${RUN_EXP2:-0} == 1 ]] && pooled exp2_pooling mean_target $quarter
pooled exp3_pooling_genloss generation_loss $quarter
legacy_M=21 pooled exp4_pooling_2x generation_loss $half
pooled exp5_hierarchical hierarchical $quarter
pooled exp6_convolutional convolutional
pooled exp7_hybrid hybrid_expand $quarter
pooled exp8_lm_segment lm_segment $quarter
pooled exp8_lm_segment_kept lm_segment $quarter --question_scope kept
pooled exp9_segment_only lm_segment $quarter --seg_encoder none
close compression
exit $failed
