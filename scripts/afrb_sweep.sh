#!/usr/bin/env bash
# AFRB + PVM: the document's commands, group by group:
#   bash scripts/afrb_sweep.sh [baseline reproduce alpha infonce blocks scale seeds language practice transfer controls | all | positive | lm]
# OUT (./out) is where the runs go; MODEL another model than the document's (backbones/lm, the offline language model, is
# made if it is not there); TEST=1 runs everything at test size on a CPU; DRY=1 prints the commands. The document's ablations keep attention on, where a hit says nothing about the memory: here
# infonce, scale and practice also get --needle-query --disable-attn, and blocks a needle variant, unless VERBATIM=1.
# `positive` is the part of `controls` that needs no base model: one token of a short context, for each of SEEDS.
# `lm` is not part of `all`: bare model, null adapter, AFRB, AFRB + PVM on the language task, attention on and off, for
# each of SEEDS, on MODEL (the offline language model unless given). Two CPU cores: 40 minutes.
# A finished run is skipped, a broken one resumed; a failure is reported at the end. Other flags are not taken.
source "$(dirname "$0")/sweep.bash"
OUT=${OUT:-${ROOT:-./out}} SEEDS=${SEEDS:-"41 42 43"}
ALL="baseline reproduce alpha infonce blocks scale seeds language practice transfer controls"
GROUPS_=${*:-all}
GROUPS_=${GROUPS_/all/$ALL}
HONEST="--needle-query --disable-attn"
[[ ${VERBATIM:-0} == 1 ]] && HONEST=""
SMALL="--test --steps 6 --val-every 6 --ctx-chunk-len 16 --needle-len 4 --seq 64 --bs 2 --ga 1 --eval-items 8"

run() { # name, flags
  local dir="$OUT/$1"
  shift
  local cmd=("$PYTHON" afrb_train.py "$@" --save "$dir")
  if [[ ${MODEL:-} && " $* " != *" --model "* ]]; then cmd+=(--model "$MODEL"); fi
  if [[ " $* " != *" --resume "* ]]; then cmd+=(--resume auto); else cmd+=(--overwrite); fi
  if [[ ${TEST:-0} == 1 ]]; then cmd+=($SMALL --model tiny); fi
  run_one "$dir/metrics.json" "$dir" "${cmd[@]}"
}
DONE='"status": "ok"' # metrics.json of a run that failed says so

NEEDLE="--task needle --ctx-chunks 4 --ctx-chunk-len 128 --needle-len 16 --seq 512 --steps 2000 --bs 1 --ga 4 --lr 1e-4 --disable-attn --seed 41"
MEMORY="--needle-query --omega 6.0 --enable-pvm --pvm-alpha 0.3 --pvm-beta 0.85 --readout-from pvm --infonce-weight 0.3 --kiss-ridge-calib"
RANGE="--model tiny --task needle --needle-query --needle-marker range --needle-len 1 --enable-pvm --readout-from pvm
  --disable-attn --ctx-chunks 2 --ctx-chunk-len 16 --bs 16 --ga 1 --lr 3e-3 --steps 6000 --val-every 1000 --log-every 100 --eval-items 2000"

positive() { # what training, readout and scoring find of a memory that does hold the needle
  for s in $SEEDS; do
    run "range_b99_s$s" $RANGE --pvm-beta 0.99 --seed "$s"
    run "range_b85_s$s" $RANGE --pvm-beta 0.85 --seed "$s"
    run "still_b99_s$s" $RANGE --pvm-beta 0.99 --omega 0.01 --seed "$s"
  done
}

offline_model() {
  if [[ ${TEST:-0} != 1 && ${MODEL:-} == backbones/lm ]]; then backbone lm "$MODEL"; fi
}
offline_model

for group in $GROUPS_; do
  case $group in
    baseline) run BASELINE_0PCT $NEEDLE --n-afrb 0 ;;
    reproduce)
      run quick_test --task needle --n-afrb 1 --enable-pvm --pvm-alpha 0.3 --pvm-beta 0.85 --steps 2000
      for name in REPRODUCE_10PCT PAPER_RESULT_1; do
        run $name $NEEDLE $MEMORY --n-afrb 1 --alpha 0.04 --gamma 0.20 --infonce-tau 0.08
      done ;;
    alpha)
      run ALPHAWEAK $NEEDLE $MEMORY --n-afrb 1 --alpha 0.02 --gamma 0.15
      run ALPHASTRONG $NEEDLE $MEMORY --n-afrb 1 --alpha 0.08 --gamma 0.30 ;;
    infonce)
      for pair in 0.0:no_infonce 0.1:mild_infonce 0.3:optimal_infonce 1.0:aggressive_infonce; do
        run "${pair#*:}" --task needle --enable-pvm --kiss-ridge-calib --infonce-weight "${pair%:*}" $HONEST
      done ;;
    blocks)
      run single_block --n-afrb 1 --omega 6.0
      run dual_block --n-afrb 2 --omega 6.0 --omega-delta 1.0
      run triple_block --n-afrb 3 --omega 6.0 --omega-delta 0.5 --cascade-lambda 0.1
      if [[ ${VERBATIM:-0} != 1 ]]; then
        run single_needle $NEEDLE $MEMORY --n-afrb 1
        run dual_needle $NEEDLE $MEMORY --n-afrb 2 --omega-delta 1.0
        run triple_needle $NEEDLE $MEMORY --n-afrb 3 --omega-delta 0.5 --cascade-lambda 0.1
      fi ;;
    scale)
      run micro --task needle --ctx-chunks 4 --ctx-chunk-len 128 --seq 512 --steps 2000 --lr 1e-4 --enable-pvm $HONEST
      run big --task needle --ctx-chunks 16 --ctx-chunk-len 128 --seq 2048 --steps 5000 --lr 5e-5 --bs 1 --ga 8 \
        --enable-pvm --gradient-checkpointing $HONEST ;;
    seeds) for s in 41 42 43; do run "seed_$s" --seed "$s"; done ;;
    language)
      run language_base --task language --n-afrb 0 --seed 41
      run PAPER_RESULT_2_RESONANT --task language --n-afrb 1 --alpha 0.02 --gamma 0.20 --omega 6.0 --steps 2000 \
        --lr 2e-6 --bs 8 --ga 4 --seed 41 ;;
    practice)
      run baseline --task needle --n-afrb 0 $HONEST
      run resonant --task needle --n-afrb 1 --enable-pvm $HONEST
      run debug --task needle --n-afrb 1 --enable-pvm --steps 500 $HONEST ;;
    transfer)
      run base_model --task language --enable-pvm --steps 2000
      run finetuned_model --task needle --resume "$OUT/base_model/checkpoint_final.pt" --steps 1000 --lr 5e-5 ;;
    controls)
      run null_adapter $NEEDLE --needle-query --n-afrb 1 --alpha 0
      run attention_on --task needle --needle-query --n-afrb 0
      run attention_on_unmarked --task needle --needle-query --needle-marker none --n-afrb 0
      run trace $NEEDLE $MEMORY --readout-memory trace
      run no_kiss_ridge $NEEDLE ${MEMORY/ --kiss-ridge-calib/}
      run legacy_echo $NEEDLE $MEMORY --legacy-echo
      run legacy_echo_no_memory $NEEDLE --needle-query --legacy-echo
      positive
      run recall --recall-curve ;;
    positive) positive ;;
    lm)
      [[ ${MODEL:-} ]] || MODEL=backbones/lm
      offline_model
      LM="--task language --data local --seq 512 --steps ${STEPS:-400} --bs 2 --ga 2 --lr 1e-3 --warmup-steps 50 --val-every 200"
      for s in $SEEDS; do
        for attention in on off; do
          off=""; [[ $attention == off ]] && off="--disable-attn"
          run "lm_base_${attention}_s$s" $LM --seed "$s" --n-afrb 0 $off
          run "lm_null_${attention}_s$s" $LM --seed "$s" --alpha 0 $off
          run "lm_afrb_${attention}_s$s" $LM --seed "$s" $off
          run "lm_pvm_${attention}_s$s" $LM --seed "$s" --enable-pvm $off
        done
      done ;;
    *) echo "unknown group: $group (use: $ALL, all, positive, lm)" >&2; exit 2 ;;
  esac
done
if [[ $DRY != 1 ]]; then
  "$PYTHON" claims.py lanes "$OUT" || failed=1
fi
exit $failed
