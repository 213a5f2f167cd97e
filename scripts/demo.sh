#!/usr/bin/env bash
# Every experiment at a size that means something on two CPU cores: about 15 minutes, offline, one seed each (make demo).
# Ends in the claims, a line each, and in plots and a page under ROOT (runs/demo). Parts run JOBS (2) at a time, each on one thread; what is
# finished is skipped, what was broken off resumed, a part that fails is named at the end. Ctrl-C lets every part that runs
# save and end, and starts no other. `bash scripts/demo.sh PART` runs one part alone; TEST=1 shortens every part to a smoke
# test, DRY=1 prints the commands.
source "$(dirname "$0")/sweep.bash"
export PYTHON DRY ROOT=${ROOT:-runs/demo} JOBS=${JOBS:-2} OMP_NUM_THREADS=1 TEST=${TEST:-0}
READER=$ROOT/backbone/reader LM=$ROOT/backbone/lm
# part:seconds on one core; those of the second line stand on the backbones of the first
FIRST="lm:220 reader:75 cfhot_leak:60 cfhot_text:220 afrb:140"
SECOND="latentwire_gist:120 latentwire_pooling:60 cognate:130 cognate_recall:130 hst:160 latentwire_width:60 cfhot_adapters:120 hst_checks:140"

once() { # result file, command
  run_one "$1" "$(dirname "$1")" "${@:2}"
}
short() { # the flags of a smoke test where TEST=1
  [[ $TEST == 1 ]] && echo "$*" || true
}
cognate() { # folder, flags: one run at the size of the ablation
  once "$ROOT/$1/reasoning/cognate_results.json" "$PYTHON" train_phase1_cognate.py --model reasoning --resume \
    --checkpoint-dir "$ROOT/$1" --size tiny --d-model 128 --n-heads 4 --tokenizer local --vocab-size 512 --dropout 0 \
    --init-std 0.05 --no-curriculum --epochs 3 --batch-size 32 --grad-accum 1 --max-length 128 --learning-rate 2e-3 \
    --early-stop-patience 0 --device cpu --threads 1 --wandb-mode disabled "${@:2}" $(short --test --synth-rows 40 --epochs 1)
}
latentwire() { # folder, flags: one run on the reader
  once "$ROOT/latentwire/$1/summary.json" "$PYTHON" latentwire_stage1.py --resume auto --save_dir "$ROOT/latentwire/$1" \
    --model_id "$READER" --dataset synthetic --samples 24000 --pca_samples 2000 --epochs 2 --batch_size 48 \
    --eval_samples 512 --adapter_lr 2e-3 --enc_lora_lr 2e-3 --max_new_tokens 4 --quick_eval_every 500 --device cpu \
    --threads 1 "${@:2}" $(short --test --samples 320 --pca_samples 100 --epochs 1 --eval_samples 32)
}
afrb() { # name, flags
  once "$ROOT/afrb/$1/metrics.json" "$PYTHON" afrb_train.py --save "$ROOT/afrb/$1" --resume auto --threads 1 "${@:2}"
}

part() {
  local range="--model tiny --task needle --needle-query --needle-marker range --needle-len 1 --enable-pvm --readout-from pvm
    --disable-attn --ctx-chunks 2 --ctx-chunk-len 16 --bs 16 --ga 1 --lr 3e-3 --steps 6000 --val-every 1000 --log-every 100
    --eval-items 2000 --pvm-beta 0.99 --seed 41 $(short --steps 20 --eval-items 20)"
  local code="--mode pooling --compress_method none --fact_curriculum 2,4 --multi_ratio 2,4 --pool_ratio 4
    --questions_per_context 4 --samples 3000 --epochs 6 --batch_size 12 --eval_samples 128 --eval_every 100 --lambda_kd 0
    --lambda_ae 0 --adapter_lr 1e-3 --enc_lora_lr 1e-3 $(short --samples 96 --epochs 1 --eval_samples 16)"
  case $1 in
    lm) once "$LM/backbone_results.json" "$PYTHON" pretrain_backbone.py --kind lm --output_dir "$LM" --resume auto --threads 1 \
          --max_steps 250 $(short --test --max_steps 20) ;;
    reader) once "$READER/backbone_results.json" "$PYTHON" pretrain_backbone.py --kind reader --output_dir "$READER" \
          --resume auto --threads 1 $(short --test) ;;
    cfhot_leak) SEEDS=0 ROOT=$ROOT/cfhot_leak bash scripts/cfhot_leak.sh ;;
    cfhot_text) once "$ROOT/cfhot_a/causal_s0/phase_a_results.json" "$PYTHON" phase_a_validation.py --resume auto \
          --output_dir "$ROOT/cfhot_a/causal_s0" --data local --tokenizer local --d_model 128 --n_layers 4 --n_heads 4 \
          --d_ff 512 --seq_len 128 --max_steps 300 --grad_accum 1 --lr 1e-3 --warmup_steps 50 --eval_interval 100 \
          --save_interval 100 --log_interval 20 --eval_batches 0 --num_workers 0 --threads 1 $(short --test --max_steps 20) ;;
    cfhot_adapters) SEEDS=0 ROOT=$ROOT/cfhot_b MODEL=$LM bash scripts/cfhot_adapter_seeds.sh --max_steps 60 --samples 1 \
          --threads 1 $(short --test --max_steps 4) ;;
    afrb)
      afrb echo_tied --test --task needle --disable-attn --n-afrb 0 --eval-items 200
      afrb recall --recall-curve
      afrb range_b99_s41 $range
      afrb still_b99_s41 $range --omega 0.01 ;;
    latentwire_width) latentwire stage1/stage1_adapter_only_s0 --mode phase1a --compress_dim 32 --eval_every 1 ;;
    latentwire_pooling) latentwire compression/exp3_pooling_genloss_s0 --pooling_mode generation_loss $code ;;
    latentwire_gist) latentwire compression/exp10_gist_s0 --pooling_mode gist $code ;;
    cognate) cognate cognate_ablation/muon1_grokfast1_memory1_s0 --synth-rows 1000 --datasets synth_add synth_word \
          synth_recall synth_two_step synth_recall3 synth_copy ;;
    cognate_recall) cognate cognate_recall/recall_s0 --synth-rows 6000 --datasets synth_recall ;;
    hst) SEEDS=0 ROOT=$ROOT/hst VARIANTS="plain v3_ultra" STEPS=150 BUDGET=20 bash scripts/hst_variants.sh ;;
    hst_checks) ROOT=$ROOT/hst_checks bash scripts/hst_checks.sh ;;
    *) echo "no such part: $1" >&2; return 2 ;;
  esac
}

left() { # the status line: parts done, minutes left at the pace of those done
  local done=0 expected=0 taken=0 total=0 all=0 file
  for item in $FIRST $SECOND; do
    all=$((all + 1)) total=$((total + ${item#*:})) file="$ROOT/log/${item%:*}.seconds"
    if [[ -f $file ]]; then
      done=$((done + 1)) expected=$((expected + ${item#*:})) taken=$((taken + $(<"$file")))
    fi
  done
  ((taken >= 60 && taken >= expected / 20)) || taken=$expected  # nothing measured yet: the expectation itself
  ((expected)) || taken=1 expected=1
  local rest=$(((total - (expected > 1 ? expected : 0)) * taken / expected / JOBS))
  printf '[%2d/%d parts, %d min so far, about %d min left]' "$done" "$all" $((SECONDS / 60)) $(((rest + 59) / 60))
}

say() { # a line of its own, over the status line on a terminal
  if [[ -t 1 ]]; then printf '\r\033[K'; fi
  echo "$*"
}

one() { # run a part with its output in a file, say how it ended
  local name=$1 begin=$SECONDS log="$ROOT/log/$1.txt" ended=0
  if [[ -f $ROOT/log/$name.seconds ]]; then say "done already: $name"; return; fi
  say "started: $name"
  part "$name" >>"$log" 2>&1 || ended=$?
  if [[ $ended == 130 || $ended == 143 ]]; then exit $ended; fi # a sweep of its own was interrupted
  if [[ $ended$failed != 00 ]]; then
    say "FAILED: $name (see $log)"
    return 1
  fi
  echo $((SECONDS - begin)) >"$ROOT/log/$name.seconds"
  say "done: $name ($((SECONDS - begin)) s)"
}

settle_ended() { # look at the parts that have ended; one that was interrupted ends the demo
  local child
  for child in $children; do
    if kill -0 "$child" 2>/dev/null; then continue; fi
    settle "$child"
    if [[ $code != 0 ]]; then failed=1; fi
    if [[ $stopped == 0 && ($code == 130 || $code == 143) ]]; then
      stopped=$code
      forward TERM
    fi
  done
}

wait_below() { # number: until fewer parts run than that; after a signal until none runs, and that is the end
  local limit=$1
  while true; do
    settle_ended
    if [[ $stopped != 0 ]]; then limit=1; fi
    set -- $children
    if (($# < limit)); then break; fi
    if [[ -t 1 ]]; then printf '\r%s ' "$(left)"; elif ((SECONDS - shown >= 60)); then echo "$(left)"; shown=$SECONDS; fi
    sleep 0.5 || true # a signal ends it
  done
  if [[ $stopped != 0 ]]; then
    say "interrupted: what ran has been saved, the same command goes on from there"
    exit "$stopped"
  fi
}

if [[ $DRY == 1 ]]; then for item in $FIRST $SECOND; do part "${item%:*}"; done; exit; fi
mkdir -p "$ROOT/log"
if [[ -n ${1:-} ]]; then one "$1"; exit; fi
((JOBS >= 1)) || JOBS=1
shown=-60
for stage in "$FIRST" "$SECOND"; do
  for item in $stage; do
    wait_below "$JOBS"
    begin bash scripts/demo.sh "${item%:*}"
  done
  wait_below 1
done
echo
"$PYTHON" claims.py report --results "$ROOT" --out "$ROOT" || failed=1
cat <<TEXT
These runs are shortened forms of the recorded ones: one seed each, fewer updates, smaller sweeps. So most verdicts above are
undecided, which is what one seed is worth. What the full runs gave, with controls and commands: RESULTS.md and docs/index.html;
the same pages of these runs: $ROOT/RESULTS.md and $ROOT/index.html.
TEXT
exit $failed
