#!/usr/bin/env bash
# AFRB + PVM: the document's commands, group by group:
#   bash scripts/afrb_sweep.sh [baseline reproduce alpha infonce blocks scale seeds language practice transfer controls | all]
#   bash scripts/afrb_sweep.sh [capacity published cancel rivals rotation updates positive lm]
# OUT (./out) is where the runs go; MODEL another model than the document's (backbones/lm, the offline language model, is
# made if it is not there); SEEDS (41 42 43); TEST=1 runs everything at test size on a CPU; DRY=1 prints the commands. The
# document's ablations keep attention on, where a hit says nothing about the memory: here infonce, scale and practice also
# get --needle-query --disable-attn, and blocks a needle variant, unless VERBATIM=1.
# Not part of `all`, in the order of what each decides; core-minutes of one idle CPU core, all seeds:
#   capacity   what the state of the untrained memory holds, by three decoders, widths 256 to 2048    70
#   published  the documented run, with the published loss, without memory, without calibration, and  150
#              nothing, on a stand-in made for needles, with tied and with untied tables
#   cancel     the documented task read by cancellation, untrained, retentions 0.5 to 0.98, and by mlp  60
#   rivals     recurrences of equal state on one marked token of 32 and of 128                        100
#   rotation   no rotation, a constant one, a learned one, the documented one; with memory and without  25
#   updates    the documented rotation after 500 to 6,000 updates, weaker rotations after 2,000        12
#   positive   one token of a short context, the documented omega and hardly any rotation              10
#   lm         bare model, null adapter, AFRB, AFRB + PVM on text, attention on and off, on MODEL       80
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
  if [[ ${TEST:-0} == 1 && " $* " == *" --steps 0 "* ]]; then cmd+=(--steps 0); fi # what is not trained stays so
  run_one "$dir/metrics.json" "$dir" "${cmd[@]}"
}
DONE='"status": "ok"' # metrics.json of a run that failed says so

NEEDLE="--task needle --ctx-chunks 4 --ctx-chunk-len 128 --needle-len 16 --seq 512 --steps 2000 --bs 1 --ga 4 --lr 1e-4 --disable-attn --seed 41"
MEMORY="--needle-query --omega 6.0 --enable-pvm --pvm-alpha 0.3 --pvm-beta 0.85 --readout-from pvm --infonce-weight 0.3 --kiss-ridge-calib"
UNTRAINED="--needle-query --omega 6.0 --enable-pvm --readout-from pvm --steps 0"
RANGE="--model tiny --task needle --needle-query --needle-marker range --needle-len 1 --enable-pvm --readout-from pvm
  --disable-attn --ctx-chunks 2 --ctx-chunk-len 16 --bs 16 --ga 1 --lr 3e-3 --steps 6000 --val-every 1000 --log-every 100 --eval-items 2000"

positive() { # what training, readout and scoring find of a memory that does hold the needle
  for s in $SEEDS; do
    run "range_b99_s$s" $RANGE --pvm-beta 0.99 --seed "$s"
    run "range_b85_s$s" $RANGE --pvm-beta 0.85 --seed "$s"
    run "still_b99_s$s" $RANGE --pvm-beta 0.99 --omega 0.01 --seed "$s"
  done
}

standin() { # kind (tied, untied): the model for needles, in BASE
  BASE=${STANDIN:-backbones/needles}_$1
  if [[ ${TEST:-0} == 1 || $DRY == 1 || -f $BASE/backbone_results.json ]]; then return; fi
  local flag=""; [[ $1 == untied ]] && flag=--untied
  DONE="" run_one "$BASE/backbone_results.json" "$BASE" "$PYTHON" scripts/afrb_standin.py $flag --output_dir "$BASE" --overwrite
  if [[ $failed != 0 ]]; then exit 1; fi
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
      run no_kiss_ridge $NEEDLE ${MEMORY/ --kiss-ridge-calib/}
      run legacy_echo $NEEDLE $MEMORY --legacy-echo
      run legacy_echo_no_memory $NEEDLE --needle-query --legacy-echo
      positive
      run recall --recall-curve ;;
    positive) positive ;;
    capacity)
      run recall --recall-curve
      run recall_cancel --recall-curve --readout cancel
      for width in 256 512 1024; do
        run "recall_d$width" --recall-curve --recall-width "$width"
        run "recall_cancel_d$width" --recall-curve --recall-width "$width" --readout cancel
      done
      run recall_mlp_d256 --recall-curve --recall-width 256 --readout mlp --steps 600 ;;
    published)
      for kind in tied untied; do
        standin $kind
        run "${kind}_bare" $NEEDLE --needle-query --n-afrb 0 --model "$BASE"
        for s in $SEEDS; do
          run "${kind}_documented_s$s" $NEEDLE $MEMORY --model "$BASE" --seed "$s"
          run "${kind}_echo_s$s" $NEEDLE $MEMORY --legacy-echo --model "$BASE" --seed "$s"
          run "${kind}_echo_no_memory_s$s" $NEEDLE --needle-query --legacy-echo --model "$BASE" --seed "$s"
          run "${kind}_no_kiss_ridge_s$s" $NEEDLE ${MEMORY/ --kiss-ridge-calib/} --model "$BASE" --seed "$s"
        done
      done ;;
    cancel)
      standin tied
      for s in $SEEDS; do
        for beta in 0.5 0.6 0.85 0.9 0.95 0.98; do
          run "cancel_b${beta#0.}_s$s" $NEEDLE $UNTRAINED --pvm-beta "$beta" --readout cancel --model "$BASE" --seed "$s"
          run "linear_b${beta#0.}_s$s" $NEEDLE $UNTRAINED --pvm-beta "$beta" --kiss-ridge-calib --model "$BASE" --seed "$s"
        done
        run "mlp_b85_s$s" $NEEDLE $MEMORY --readout mlp --model "$BASE" --seed "$s"
        run "mlp_b98_s$s" $NEEDLE ${MEMORY/0.85/0.98} --readout mlp --model "$BASE" --seed "$s"
      done ;;
    rivals)
      for s in $SEEDS; do
        for length in 32 128; do
          LONG="$RANGE --ctx-chunk-len $((length / 2)) --seed $s"
          run "rival_${length}_pvm_s$s" $LONG --pvm-beta 0.99
          run "rival_${length}_still_s$s" $LONG --pvm-beta 0.99 --omega 0
          run "rival_${length}_spread_s$s" $LONG --pvm-beta 0.85 --pvm-beta-max 0.999 --omega 0
          run "rival_${length}_diagonal_s$s" $LONG --memory diagonal
          run "rival_${length}_delta_s$s" $LONG --memory delta
        done
      done ;;
    rotation)
      for s in $SEEDS; do
        for memory in "" --enable-pvm; do
          name=$([[ $memory ]] && echo memory || echo none)
          TURN="${RANGE/ --enable-pvm --readout-from pvm/} --steps 3000 $memory --pvm-beta 0.99 --seed $s"
          run "turn_${name}_still_s$s" $TURN --omega 0
          run "turn_${name}_constant_s$s" $TURN --omega 0.1 --phase linear
          run "turn_${name}_learned_s$s" $TURN --adaptive-omega --omega-min 0 --omega-max 10
          run "turn_${name}_log_s$s" $TURN
        done
      done ;;
    updates)
      for s in $SEEDS; do
        for steps in 500 1000 2000 4000 6000; do run "updates_${steps}_s$s" $RANGE --pvm-beta 0.99 --steps $steps --seed "$s"; done
        for omega in 0 1 3; do run "updates_2000_w${omega}_s$s" $RANGE --pvm-beta 0.99 --steps 2000 --omega $omega --seed "$s"; done
      done ;;
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
    *) echo "unknown group: $group (use: $ALL, all, capacity, published, cancel, rivals, rotation, updates, positive, lm)" >&2; exit 2 ;;
  esac
done
if [[ $DRY != 1 ]]; then
  "$PYTHON" claims.py lanes "$OUT" || failed=1
fi
exit $failed
