#!/usr/bin/env bash
# Do the author's mechanisms help? A comparison that can count: bytes, eight layers or more, equal parameters (850,000) and tokens,
# a rate for each arm, three seeds, mechanisms off one at a time. All arms must end below `floors.trigram`: raise STEPS until
# they do (the table at the end shows both).
# Core-minutes, from CPU seconds of an update (three of each, on a busy machine: an upper bound): plain 0.90, v3 1.10, v4 0.85,
# v4.1 0.89, v5 and v7.1.2 1.35, v6 0.26, controls 0.87 to 0.92; so 1500 updates are 22 (plain), 34 (v5), 6 (v6) core-minutes.
# As it stands: plain, v5 and v5's control, grid then seeds (15 runs, 6.5 core-hours): whether the author's lattice, exits and
# fields help beyond what the auxiliary losses do. ARMS=all PHASES="grid seeds recall off seconds" is everything, 60 core-hours.
# Phases, in the order of what they decide, with the runs and hours of all arms:
#   grid     seed 0, every arm at each of RATES (26 runs, 9 h). An arm's rate is the one with the least tail.lm_loss in the
#            table: of training rows that no update had seen, not of the validation rows that are reported. It goes into BEST.
#   seeds    seeds 0 to 2 of every arm at its rate (39 runs, 14 h)
#   recall   scripts/hst_recall.py: facts at controlled distances, on the spine and off it (3 x 39 runs, not timed)
#   off      the mechanism that sets a variant apart, left out, at the variant's rate: seeds 0 to 2 (48 runs, 17 h)
#   seconds  every arm ends by CPU time (BUDGET, 600 s), the plain one at three sizes (45 runs, 8 h)
# Every variant's control is itself without its mechanisms but with its horizon heads (NAME_control): a plain transformer
# with the same auxiliary losses.
# A finished run is skipped, a broken one resumed; a failure is reported at the end. DRY=1 prints the commands, TEST=1 makes every
# run a smoke test. Flags given here go to every run.
source "$(dirname "$0")/sweep.bash"
BEST=${BEST:-""} # "plain=1e-3 v5=3e-3": to be written here once the grid is there, before the other phases; else 3e-3
ROOT=${ROOT:-runs/hst_evidence} PHASES=${PHASES:-"grid seeds"} RATES=${RATES:-"1e-3 3e-3"}
STEPS=${STEPS:-1500} BUDGET=${BUDGET:-600} RECALL_STEPS=${RECALL_STEPS:-1000}
SIZE="--data local --tokenizer byte --d_model 64 --n_heads 4 --max_seq_len 256 --chunk_size 32 --window 64 --page_size 32
  --match_params 850000 --batch_size 8 --grad_accum 1 --warmup 100 --log_every 100 --eval_every 250 --eval_rows 128
  --save_every 500 --keep 1 --threads 1"
RECALL="--d_model 64 --n_heads 4 --max_seq_len 256 --chunk_size 32 --window 64 --page_size 32 --match_params 850000
  --batch_size 16 --grad_accum 1 --warmup 100 --log_every 100 --eval_rows 256 --threads 1 --lr 1e-3"
if [[ ${TEST:-0} == 1 ]]; then
  SIZE="--test --match_params 500000 --self_check false --eval_rows 4 --log_every 1" STEPS=2 BUDGET=0.2
  RECALL="--test --match_params 500000 --eval_rows 4 --max_steps 2" RECALL_STEPS=2
fi

ARMS=${ARMS:-"plain v5 v5_control"}
if [[ $ARMS == all ]]; then
  ARMS="plain v3_ultra v3_ultra_control v4_unified v4_1_hyperlattice v4_1_hyperlattice_control v5 v5_control v6
    v7_1_2_agile v8_2_crystalline v8_2_crystalline_control chaoslogic"
fi
OFF=${OFF:-"v3_ultra:middle v4_unified:middle v4_unified:control v4_1_hyperlattice:middle v5:middle v5:control v5:fields
  v6:middle v7_1_2_agile:control v8_2_crystalline:hebbian v8_2_crystalline:diamond v8_2_crystalline:hyperbolic
  v8_2_crystalline:feedback v8_2_crystalline:middle chaoslogic:compressed chaoslogic:control"}

flags_of() { # arm: the variant, and as many layers as leave the FFN about four times as wide as the model
  local off=""
  case $1 in
    plain) echo --variant plain --n_layers 16; return ;;
    v3_ultra_control) off=middle,control ;;
    v4_1_hyperlattice_control) off=middle,paged ;;
    v5_control) off=middle,control,fields ;;
    v8_2_crystalline_control) off=middle,hebbian,feedback,hyperbolic,diamond ;;
  esac
  if [[ -n $off ]]; then echo --variant "${1%_control}" --n_layers 16 --off "$off"; return; fi
  case $1 in
    v3_ultra) echo --variant "$1" --n_layers 20 ;;
    v4_unified) echo --variant "$1" --n_layers 14 ;;
    v4_1_hyperlattice) echo --variant "$1" --n_layers 16 ;;
    v8_2_crystalline) echo --variant "$1" --n_layers 10 ;;
    *) echo --variant "$1" --n_layers 8 ;;
  esac
}

run() { # directory, flags
  run_one "$1/hst_results.json" "$1" "$PYTHON" hst_train.py --resume auto --save_dir "$1" $SIZE "${@:2}"
}

rate_of() { # arm: what BEST says
  local pair
  for pair in $BEST; do
    if [[ ${pair%=*} == "$1" ]]; then echo "${pair#*=}"; return; fi
  done
  echo 3e-3
}

for phase in $PHASES; do
  case $phase in
    grid)
      for arm in $ARMS; do
        for lr in $RATES; do
          run "$ROOT/grid/${arm}_lr$lr" $(flags_of "$arm") --lr "$lr" --seed 0 --max_steps "$STEPS" "$@"
        done
      done ;;
    seeds)
      for arm in $ARMS; do
        lr=$(rate_of "$arm")
        for seed in 0 1 2; do
          run "$ROOT/seeds/${arm}_s$seed" $(flags_of "$arm") --lr "$lr" --seed "$seed" --max_steps "$STEPS" "$@"
        done
      done ;;
    off)
      for pair in $OFF; do
        if [[ " "$(echo $ARMS)" " != *" ${pair%:*} "* ]]; then continue; fi
        arm=${pair%:*} lr=$(rate_of "${pair%:*}")
        for seed in 0 1 2; do
          run "$ROOT/off/${arm}_without_${pair#*:}_s$seed" $(flags_of "$arm") --off "${pair#*:}" --lr "$lr" --seed "$seed" \
            --max_steps "$STEPS" "$@"
        done
      done ;;
    seconds)
      for arm in $ARMS; do
        lr=$(rate_of "$arm")
        for seed in 0 1 2; do
          run "$ROOT/seconds/${arm}_s$seed" $(flags_of "$arm") --lr "$lr" --seed "$seed" --max_steps 100000 \
            --max_seconds "$BUDGET" "$@"
          if [[ $arm != plain ]]; then continue; fi
          for size in 250000 2500000; do
            run "$ROOT/seconds/plain${size}_s$seed" $(flags_of plain) --lr "$lr" --seed "$seed" --max_steps 100000 \
              --max_seconds "$BUDGET" --match_params "$size" "$@"
          done
        done
      done ;;
    recall)
      for task in any spine off; do
        for arm in $ARMS; do
          for seed in 0 1 2; do
            dir=$ROOT/recall/${arm}_${task}_s$seed
            run_one "$dir/hst_recall_results.json" "$dir" "$PYTHON" scripts/hst_recall.py --overwrite --save_dir "$dir" $RECALL \
              $(flags_of "$arm") --task "$task" --seed "$seed" --max_steps "$RECALL_STEPS" "$@"
          done
        done
      done ;;
    *) echo "no such phase: $phase" >&2; exit 2 ;;
  esac
  if [[ $DRY != 1 && $phase != recall ]]; then
    "$PYTHON" claims.py table "$ROOT/$phase" tail.lm_loss final.loss floors.trigram floors.bigram train_cpu_seconds || failed=1
  elif [[ $DRY != 1 ]]; then
    "$PYTHON" claims.py table "$ROOT/recall" accuracy.all.mean absent.all.mean train_seconds || failed=1
  fi
done
exit $failed
