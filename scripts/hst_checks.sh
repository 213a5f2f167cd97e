#!/usr/bin/env bash
# All eight HST variants, in every mode they have, as smoke tests on a source of known entropy, with the checks of their
# invariants (5 minutes).
# A finished run is skipped, a broken one resumed; a failure is reported at the end. DRY=1 prints the commands.
# TEST=1 shortens each to ten updates. Flags given here go to every run.
source "$(dirname "$0")/sweep.bash"
ROOT=${ROOT:-runs/hst_checks} SHORT=""
if [[ ${TEST:-0} == 1 ]]; then SHORT="--max_steps 10"; fi

run() { # directory, flags
  run_one "$1/hst_results.json" "$1" \
    "$PYTHON" hst_train.py --middle spine --old_start --test --resume auto --save_dir "$1" $SHORT "${@:2}"
}

for variant in v3_ultra v4_unified v4_1_hyperlattice v5 v6 v7_1_2_agile v8_2_crystalline chaoslogic; do
  run "$ROOT/${variant}_s0" --variant "$variant" "$@"
done
for variant in v4_unified v5 v7_1_2_agile; do run "$ROOT/${variant}_chunk_s0" --variant "$variant" --mode chunk "$@"; done
run "$ROOT/v6_token_s0" --variant v6 --mode token "$@"
if [[ $DRY != 1 ]]; then
  "$PYTHON" claims.py table "$ROOT" tail.lm_loss self_check.leak self_check.cache_mismatch self_check.rows || failed=1
fi
exit $failed
