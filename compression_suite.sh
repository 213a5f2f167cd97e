#!/usr/bin/env bash
# LatentWire: can fewer positions carry a prompt? The document's strategies and our own senders, each beside text of equal
# positions. The code is made from the context alone, before the question, and each code is asked several questions.
# Document: a GPU and Llama 3.1 8B. On two CPU cores:
#   bash compression_suite.sh --test                       smoke size, under 4 minutes
#   OFFLINE=1 SEEDS="0 1 2" bash compression_suite.sh      the recorded evidence, 50 core-minutes a seed: one of our senders
#       takes 8, a documented pooler 3, one that sees no answers 1, the document's form 2
# scripts/latentwire.bash lists the settings. ONLY='exp10_gist|.*legacy' makes these runs alone; RUN_EXP2=1 adds the document's skipped run; LEGACY=1 the published faults.
READER_FLAGS=${READER_FLAGS:-}
if [[ ${OFFLINE:-0} == 1 && ${TEST:-0} != 1 && ${1:-} != --test ]]; then # reads twice as much as is trained on here
  READER=${READER:-backbones/reader32} READER_FLAGS="--facts 32 --questions 4 --max_steps 4000"
fi
source "$(dirname "$0")/scripts/latentwire.bash"
root compression_suite
read -ra base <<<"$(common $(choose "10000 5000 1 8 200" "3000 2000 12 12 64" "320 100 1 16 32"))"
width=$(choose "--compress_dim 1024 --adapter_lr 5e-4" "--compress_method none" "--compress_method none")
task="--facts 16 --fact_curriculum 2,4,8,16 --questions_per_context 8 --eval_facts 24,32 --lambda_kd 0 --lambda_ae 0"
task+=" --adapter_lr 1e-3 --enc_lora_lr 1e-3 --eval_batch_size 96 --eval_every 100"
quarter=$(choose "--sequence_pooling_target 75" "$task --multi_ratio 2,4,8,16 --pool_ratio 4" "--multi_ratio 2,4 --pool_ratio 4")
form=$(choose "" "--samples 16000 --epochs 3 --batch_size 48 --eval_samples 512" "") # of runs on one question each

pooled() { # name, pooling mode, flags
  if [[ ! $1 =~ ^(${ONLY:-.*})$ ]]; then return; fi
  seeded "$ROOT/$1" --mode pooling --pooling_mode "$2" "${base[@]}" $width "${@:3}"
}
published() { # name, pooling mode, slots offline, slots of the document: its own form, question coded too
  if [[ $LEGACY == 1 ]]; then
    pooled "$1_legacy" "$2" --sequence_pooling_target "$(choose "$4" "$3" "$3")" $form --legacy
  fi
}
sweep() {
  seeded "$ROOT/exp1_baseline" --mode phase1a "${base[@]}" $(choose "--compress_dim 1024 --adapter_lr 5e-4" \
    "--compress_dim 32 --facts 16 --samples 4000 --epochs 4 --batch_size 64 --eval_samples 256" "--compress_dim 32")
  pooled exp10_gist gist $quarter
  pooled exp3_pooling_genloss generation_loss $quarter
  if [[ $OFFLINE != 1 ]]; then # offline the curve of exp3 has half of the positions too
    pooled exp4_pooling_2x generation_loss $(choose "--sequence_pooling_target 150" "" "--pool_ratio 2")
  fi
  pooled exp5_hierarchical hierarchical $quarter
  pooled exp6_convolutional convolutional $quarter
  pooled exp7_hybrid hybrid_expand $quarter
  [[ ${RUN_EXP2:-$OFFLINE} == 1 ]] && pooled exp2_pooling mean_target $quarter
  pooled exp8_lm_segment lm_segment $quarter
  pooled exp12_select select $quarter
  pooled exp9_segment_only lm_segment $quarter --seg_encoder none
  # the document's form, question coded too: a code that may hold the answer, down to one slot
  pooled exp13_document_form lm_segment --question_scope compressed $form \
    $(choose "--sequence_pooling_target 75" "--pool_ratio 5" "--pool_ratio 5")
  pooled exp14_one_slot lm_segment --question_scope compressed --sequence_pooling_target 1 $form
  published exp3_pooling_genloss generation_loss 10 75
  published exp4_pooling_2x generation_loss 21 150
  published exp5_hierarchical hierarchical 10 75
  published exp6_convolutional convolutional 10 75
  published exp7_hybrid hybrid_expand 10 75
}

all=${SEEDS:-}
if [[ -z $all ]]; then sweep; fi
for seed in $all; do SEEDS=$seed sweep; done # every strategy once, then again
close compression
exit $failed
