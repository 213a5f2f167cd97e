# Sourced by latentwire_wire.sh and latentwire_smoke.sh: the two offline readers, one run, the table at the end. What
# TEST=1 (or --test), OFFLINE, DRY, FORCE, EXTRA_ARGS and PYTHON do, and `choose`, stand in latentwire.bash.
# Environment beside those: ROOT SEEDS; READER and SECOND (directories of the two readers, made if they are not there).
READER=${READER:-backbones/reader32} SECOND=${SECOND:-backbones/pieces16} MODEL_ID=none # not stage 1's reader
source "$(dirname "${BASH_SOURCE[0]}")/latentwire.bash"
SCRIPT=latentwire_train.py RESULT=wire_results.json LOG=stdout.txt SHOWN="^(Text|[0-9.]+ slots|    swapped|latentwire)" DIVERGES=""

readers() { # words of width 64 and 3 layers; word pieces of width 96 and 4 layers
  backbone reader "$READER" --facts 32 --questions 4 --max_steps 4000
  backbone reader "$SECOND" --facts 16 --questions 4 --max_steps 4000 --reader_tokenizer pieces --width 96 --layers 4 --lr 1e-3
}
close() { # metrics: mean and sd over seeds; a share is that of the text's F1 which a reader keeps at a ratio
  if [[ $DRY != 1 ]]; then "$PYTHON" claims.py table "$ROOT" "$@" || failed=1; fi
}
