#!/usr/bin/env bash
# One code for two frozen readers that share neither tokenizer, width nor depth: docs/latentwire_wire.md.
#   bash scripts/latentwire_wire.sh --test              smoke size on two tiny random readers, 3 minutes
#   bash scripts/latentwire_wire.sh                     on one core: 2 hours a seed, 100 minutes more for the last four
# In the order of what they decide, with core-minutes at 0.4 s an update for the first reader and 0.4 more for the second,
# less while contexts are short (ONLY='both|llama' makes these alone; SEEDS="0 1 2"; the readers before them: 40):
#   both         55  the lm sender for both readers: F1 against ratio 2, 4, 8, 16, bits, more facts, unseen pairs
#   llama qwen   48  one code for one reader alone, at the same slots: the price of a common language
#   transfer      8  the code of `llama`, frozen: an adapter for the second reader alone
#   byte          6  the document's encoder in the same training (longer if it gets past two facts)
#   bits8 narrow 90  trained with 8 bits on the wire; 32 values a slot as well (one seed)
#   interlingua encoded  10  the document's last proposal; its own form, question in the code (one seed)
source "$(dirname "$0")/wire.bash"
ROOT=${ROOT:-runs/latentwire_wire} SEEDS=${SEEDS:-0 1 2}
TABLE=$ROOT
if [[ $TEST == 1 ]]; then
  common="--test" course="--fact_curriculum 2,3 --facts 3 --multi_ratio 2,4" more="--eval_facts 4" first="--epochs 2" counted=""
else
  readers
  common="--llama_id $READER --qwen_id $SECOND --dataset synthetic --facts 16 --questions_per_context 8 --samples 3000 --batch_size 12"
  common+=" --d_z 64 --lr 1e-3 --eval_samples 64 --eval_batch_size 12 --max_new_tokens 6 --device cpu --threads 1"
  course="--fact_curriculum 2,4,8,16 --multi_ratio 1,2,4,8,16 --ratio 4 --epochs 16" more="--eval_facts 24,32 --eval_bits 16,8,6,4 --unseen_pairs"
  first="--epochs 3" counted="--count_tokens_of $READER"
fi
wire() { # name, seed, flags
  if [[ ! $1 =~ ^(${ONLY:-.*})$ ]]; then return; fi
  run "$ROOT/$1_s$2" $common "${@:3}" --seed "$2"
}
for seed in $SEEDS; do
  wire both "$seed" --encoder_type lm $course $more
  wire llama "$seed" --encoder_type lm --models llama $course
  wire qwen "$seed" --encoder_type lm --models qwen $counted $course
  wire transfer "$seed" --encoder_type lm --multi_ratio "2,4" $first --ckpt_in "$ROOT/llama_s$seed/wire.pt" \
    --freeze_encoder --freeze_llama_adapter "$ROOT/llama_s$seed/wire.pt"
  wire byte "$seed" --encoder_type byte $course
done
one=${SEEDS%% *}
wire bits8 "$one" --encoder_type lm --bits 8 $course
wire narrow "$one" --encoder_type lm --bits 8 --d_z 32 $course
wire interlingua "$one" --encoder_type interlingua $course
wire encoded "$one" --encoder_type lm --question_scope encoded --questions_per_context 1 $course
close shares.llama_2 shares.qwen_2 shares.llama_4 shares.qwen_4 shares.llama_8 shares.qwen_8 shares.llama_16 shares.qwen_16
exit $failed
