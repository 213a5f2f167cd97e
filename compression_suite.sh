#!/usr/bin/env bash
# LatentWire: can fewer positions carry a prompt? The document's strategies and our own senders, each beside text of equal
# positions. The code is made from the context alone, before the question, and each code is asked several questions.
# Document: a GPU and Llama 3.1 8B. On two CPU cores:
#   bash compression_suite.sh --test                       smoke size, under 4 minutes
#   OFFLINE=1 SEEDS="0 1 2" bash compression_suite.sh      the recorded evidence, about 150 core-minutes: one seed of a
#       sender of ours takes 11, of a documented pooler 4, of one that sees no answers 2, of the document's form 2
# scripts/latentwire.bash lists the settings. RUN_EXP2=1 adds the document's skipped run; LEGACY=1 the published faults.
READER=${READER:-backbones/reader32} READER_FLAGS=${READER_FLAGS:---facts 32 --questions 3} # reads twice what is trained on
if [[ ${1:-} == --test || ${TEST:-0} == 1 ]]; then READER=backbones/reader READER_FLAGS=""; fi
source "$(dirname "$0")/scripts/latentwire.bash"
root compression_suite
read -ra base <<<"$(common $(choose "10000 5000 1 8 200" "8000 2000 12 32 256" "320 100 1 16 32"))"
width=$(choose "--compress_dim 1024 --adapter_lr 5e-4" "--compress_method none" "--compress_method none")
few="--facts 16 --fact_curriculum 2,4,8,16 --multi_ratio 2,4,8,16 --pool_ratio 4 --lambda_kd 0 --lambda_ae 0"
few+=" --eval_facts 24,32 --eval_every 100"
quarter=$(choose "--sequence_pooling_target 75" "$few" "--multi_ratio 2,4 --pool_ratio 4")

pooled() { # name, pooling mode, flags
  seeded "$ROOT/$1" --mode pooling --pooling_mode "$2" "${base[@]}" $width "${@:3}"
}
published() { # name, pooling mode, slots offline: the document's own form, where the question is in the code
  if [[ $LEGACY != 1 ]]; then return; fi
  seeded "$ROOT/$1_legacy" --mode pooling --pooling_mode "$2" "${base[@]}" $width --sequence_pooling_target \
    $(choose "$4" "$3" 10) $(choose "" "--facts 4 --samples 16000 --epochs 3" "") --legacy
}

seeded "$ROOT/exp1_baseline" --mode phase1a "${base[@]}" $(choose "--compress_dim 1024 --adapter_lr 5e-4" \
  "--compress_dim 32 --facts 16 --epochs 2" "--compress_dim 32")
[[ ${RUN_EXP2:-$OFFLINE} == 1 ]] && pooled exp2_pooling mean_target $quarter
pooled exp3_pooling_genloss generation_loss $quarter
published exp3_pooling_genloss generation_loss 10 75
if [[ $OFFLINE != 1 ]]; then # offline the curve of exp3 has half of the positions too
  pooled exp4_pooling_2x generation_loss $(choose "--sequence_pooling_target 150" "" "--pool_ratio 2")
fi
published exp4_pooling_2x generation_loss 21 150
pooled exp5_hierarchical hierarchical $quarter
published exp5_hierarchical hierarchical 10 75
pooled exp6_convolutional convolutional $quarter
published exp6_convolutional convolutional 10 75
pooled exp7_hybrid hybrid_expand $quarter
published exp7_hybrid hybrid_expand 10 75
pooled exp8_lm_segment lm_segment $quarter
pooled exp9_segment_only lm_segment $quarter --seg_encoder none
pooled exp10_gist gist $quarter
pooled exp11_select select $quarter
# the document's form, question coded too: a code that may hold the answer, down to one slot
pooled exp12_document_form lm_segment --question_scope compressed \
  $(choose "--sequence_pooling_target 75" "--pool_ratio 5 --samples 16000 --epochs 3" "--pool_ratio 5")
pooled exp13_one_slot lm_segment --question_scope compressed --sequence_pooling_target 1 \
  $(choose "" "--samples 16000 --epochs 3" "")
close compression
exit $failed
