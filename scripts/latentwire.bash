# Sourced by compression_suite.sh and the other LatentWire sweeps: settings and one run with skip, resume and failure.
# Environment: MODEL_ID SAMPLES PCA_SAMPLES EPOCHS BATCH_SIZE EVAL_SAMPLES OUTPUT_DIR (or ROOT) EXTRA_ARGS SEEDS PYTHON.
#   --test or TEST=1   the same grid at smoke size on the reader (made first if it is not there)
#   OFFLINE=1          the reader at sizes that let it learn: the recorded evidence
#   LEGACY=1           beside each documented failure its twin with the published faults (default with OFFLINE)
#   READER, READER_FLAGS   the offline model's directory, and what pretrain_backbone.py makes it with
#   DRY=1              print the commands; FORCE=1: run again what is done
source "$(dirname "${BASH_SOURCE[0]}")/sweep.bash"
if [[ ${1:-} == --test ]]; then TEST=1; shift; fi
TEST=${TEST:-0} OFFLINE=${OFFLINE:-0} FORCE=${FORCE:-0}
LEGACY=${LEGACY:-$OFFLINE} READER=${READER:-backbones/reader} EXTRA_ARGS="${EXTRA_ARGS:-} $*"
MODEL_ID=${MODEL_ID:-$([[ $TEST$OFFLINE == 00 ]] && echo meta-llama/Meta-Llama-3.1-8B-Instruct || echo "$READER")}

choose() { # document, offline, test: the setting for this kind of run
  if [[ $TEST == 1 ]]; then echo "$3"; elif [[ $OFFLINE == 1 ]]; then echo "$2"; else echo "$1"; fi
}
root() { # default folder, and the document's own where that is another: OUTPUT_DIR or ROOT wins
  ROOT=${OUTPUT_DIR:-${ROOT:-$(choose "${2:-runs/$1}" "runs/$1" "runs/test_$1")}} TABLE=runs/$1
  if [[ $ROOT != runs ]]; then TABLE=$ROOT; fi
}
common() { # flags of every run: samples, pca samples, epochs, batch, eval samples in the document
  local small="--dataset synthetic --adapter_lr 2e-3 --enc_lora_lr 2e-3 --max_new_tokens 4 --device cpu --threads 1"
  echo "--model_id $MODEL_ID --samples ${SAMPLES:-$1} --pca_samples ${PCA_SAMPLES:-$2} --epochs ${EPOCHS:-$3}" \
    "--batch_size ${BATCH_SIZE:-$4} --eval_samples ${EVAL_SAMPLES:-$5}" \
    "$(choose "" "$small --quick_eval_every 500" "--test $small --quick_eval_every 50")"
}
SCRIPT=latentwire_stage1.py RESULT=summary.json LOG=training.log DIAGNOSTICS="" SHOWN="^(Best F1|Text prompt|Status|latentwire)" DIVERGES="*_legacy*"
run() { # folder, flags
  local resume="--resume auto"
  if [[ $FORCE == 1 ]]; then resume=--overwrite; fi
  run_one "$1/$RESULT" "$1" "$PYTHON" "$SCRIPT" $resume --save_dir "$1" \
    ${DIAGNOSTICS:+--diagnostic_log "$1/$DIAGNOSTICS"} "${@:2}" $EXTRA_ARGS
  local link=$TABLE/${1##*/}
  if [[ $DRY != 1 && $TABLE != "$ROOT" && ! -d $link ]]; then # runs/ may hold other runs: the table is of these alone
    mkdir -p "$TABLE"
    ln -sfn "../${1##*/}" "$link"
  fi
}
seeded() { # folder, flags: once, or once for each of SEEDS
  local seed
  if [[ -z ${SEEDS:-} ]]; then run "$@"; return; fi
  for seed in $SEEDS; do run "$1_s$seed" "${@:2}" --seed "$seed"; done
}
close() { # kind of report, folder: that of this sweep
  local cmd=("$PYTHON" claims.py status "$1" "${2:-$TABLE}")
  if [[ $DRY == 1 ]]; then echo "${cmd[*]}"; else "${cmd[@]}" || failed=1; fi
}
if [[ $MODEL_ID == "$READER" ]]; then backbone reader "$READER" ${READER_FLAGS:-}; fi
