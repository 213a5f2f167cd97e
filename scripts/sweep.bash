# Sourced by every sweep and by the demo: one run with skip, resume and failure, and an orderly end.
# A run that is finished is skipped and one that was broken off goes on. An ordinary failure is reported, the sweep goes
# on and exits with 1 at its end. A run that was interrupted (exit code 130 or 143), or a signal to the sweep itself, ends
# the sweep with that code: the run saves first, and no further one is started.
# Environment: PYTHON; DRY=1 prints the commands. A sweep may set LOG (name of the file that keeps a run's output),
# SHOWN (what of that output is printed after the run), DONE (what a result file of a finished run must say) and DIVERGES
# (directories of runs that are meant to diverge).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
PYTHON=${PYTHON:-python} DRY=${DRY:-0} LOG=stdout.txt SHOWN="" DONE="" DIVERGES="" failed=0
stopped=0 starting="" children=" " code=0

forward() { # signal: to everything that runs now
  local child
  for child in $children; do kill -s "$1" -- "-$child" 2>/dev/null || true; done
}
stop() { # signal, exit code: what runs now saves and ends, and nothing more is started
  stopped=$2
  forward "$1"
  if [[ -z $starting && $children == " " ]]; then exit "$stopped"; fi
}
trap 'stop INT 130' INT
trap 'stop TERM 143' TERM
trap 'stop TERM 129' HUP

# A command gets a process group of its own, so that a signal reaches it once, through `forward`, wherever it was sent:
# Ctrl-C and `kill` of the sweep alone then do the same, and the shell is free to wait until the run has saved.
begin() { # command
  starting=1
  set -m
  "$@" </dev/null &
  set +m
  children="$children$! "
  starting=""
  if [[ $stopped != 0 ]]; then forward TERM; fi
}

settle() { # process id: wait for its end, its exit code is then in `code`
  code=0
  wait "$1" || code=$?
  while kill -0 "$1" 2>/dev/null; do # a signal ends the waiting, not the run
    code=0
    wait "$1" || code=$?
  done
  children=${children/ $1 / }
}

finished() { # result file
  [[ -f $1 ]] && { [[ -z $DONE ]] || grep -qs "$DONE" "$1"; }
}

run_one() { # result file, directory, command
  local result=$1 dir=$2 size=0
  local log=$dir/$LOG
  shift 2
  if [[ $stopped != 0 ]]; then exit "$stopped"; fi
  if [[ $DRY == 1 ]]; then echo "$*"; return; fi
  if [[ ${FORCE:-0} != 1 ]] && finished "$result"; then echo "done already: $dir"; return; fi
  mkdir -p "${log%/*}"
  echo "running: $dir"
  if [[ -f $log ]]; then size=$(wc -c <"$log"); fi
  begin "$@" >>"$log" 2>&1
  settle "$!"
  if [[ -n $SHOWN ]]; then tail -c +$((size + 1)) "$log" | grep -E "$SHOWN" || true; fi
  if [[ $code == 130 || $code == 143 ]]; then stopped=$code; fi
  if [[ $stopped != 0 ]]; then
    echo "interrupted: $dir (call the sweep again to go on)"
    exit "$stopped"
  fi
  if [[ $code == 3 && -n $DIVERGES && $dir == $DIVERGES ]]; then echo "diverged, as published: $dir"; return; fi
  if [[ $code != 0 || ! -f $result ]]; then
    echo "FAILED: $dir (see $log)"
    failed=1
  fi
}

backbone() { # kind, directory, flags: make the offline model unless it is finished; nothing works without it
  if [[ $DRY == 1 || -f $2/backbone_results.json ]]; then return; fi
  LOG=stdout.txt SHOWN="" run_one "$2/backbone_results.json" "$2" \
    "$PYTHON" pretrain_backbone.py --kind "$1" --output_dir "$2" --resume auto "${@:3}"
  if [[ $failed != 0 ]]; then exit 1; fi
}
