#!/usr/bin/env bash
# What the published code itself gives, each figure beside its reconstruction's: one core, 5 minutes.
# Each original is fetched from GitHub at the commit named below into ROOT/src, which is never part of the project.
# Without network: ORIGINALS=DIR, with a checkout each in DIR/HolonomyTransformer, DIR/HST and so on.
# An original that is missing or does not run here is told in its result and stops nothing.
# DRY=1 prints what would run, TEST=1 shortens it.
ORIGINALS=${ORIGINALS:+$(realpath -m "$ORIGINALS")} # as the caller sees it: what follows changes the directory
source "$(dirname "$0")/sweep.bash"
ROOT=${ROOT:-runs/originals} SHORT="" fetched=0
SOURCE=${ORIGINALS:-$ROOT/src}
if [[ ${TEST:-0} == 1 ]]; then SHORT="--test"; fi

NAMES="HolonomyTransformer HST attention-free-phase-blocks the-agent-maker LatentWire"
declare -A REPOSITORY=(
  [HolonomyTransformer]=Loganwins/HolonomyTransformer
  [HST]=ilicilicc/HST
  [attention-free-phase-blocks]=Freeky7819/attention-free-phase-blocks
  [the-agent-maker]=DNYoussef/the-agent-maker
  [LatentWire]=SujeethJinesh/LatentWire
)
declare -A COMMIT=(
  [HolonomyTransformer]=6d44c27cdd58d5498d3053f8f2aa7b16a352979d
  [HST]=a7eb039dbec9b4d4462b38e22829e48b18cc1cf0
  [attention-free-phase-blocks]=893071d943019aa524b403ca2e4da2e555f4062f
  [the-agent-maker]=d183dcd512a28994b5607d758e2d138fe3363655
  [LatentWire]=8074df0cfaab0293cb0db331690dc5c1535fac31
)

fetch() { # name: one commit without its history, and of that the Python files alone
  local dir=$SOURCE/$1
  export GIT_TERMINAL_PROMPT=0
  if [[ $(git -C "$dir" rev-parse -q --verify HEAD 2>&1) == "${COMMIT[$1]}" ]]; then return; fi
  rm -rf "$dir"
  git init -q "$dir" && git -C "$dir" remote add origin "https://github.com/${REPOSITORY[$1]}" &&
    git -C "$dir" fetch -q --depth 1 --filter=blob:none origin "${COMMIT[$1]}" &&
    git -C "$dir" sparse-checkout set --no-cone '*.py' && git -C "$dir" checkout -q --detach FETCH_HEAD
}

if [[ -z $ORIGINALS && $DRY != 1 ]]; then
  mkdir -p "$SOURCE"
  for name in $NAMES; do
    if fetch "$name" >>"$SOURCE/fetch.txt" 2>&1; then fetched=1; else rm -rf "${SOURCE:?}/$name"; fi
  done
  if [[ $fetched == 0 ]]; then
    echo "originals.sh: GitHub cannot be reached ($SOURCE/fetch.txt): name a folder of checkouts, ORIGINALS=DIR" >&2
    exit 2
  fi
fi
for name in $NAMES; do
  result=$ROOT/$name/originals_results.json
  if [[ $DRY != 1 ]] && grep -qs '"ran": false' "$result"; then rm "$result"; fi # its checkout may be there now
  run_one "$result" "$ROOT/$name" \
    "$PYTHON" scripts/originals.py "$name" --output_dir "$ROOT/$name" --source "$SOURCE/$name" \
    --commit "${COMMIT[$name]}" $SHORT
done
if [[ $DRY != 1 ]]; then "$PYTHON" claims.py table "$ROOT" ran || failed=1; fi
exit $failed
