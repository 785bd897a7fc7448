#!/usr/bin/env bash
# Builds, tests and measures on a GPU machine, stage by stage; called by `make gpu`.
#
#   OUT       folder of logs and results (build/gpu)
#   STAGES    some of: build tests ops end_to_end large graphs sanitizer report (all)
#   PYTHON    with torch, pytest and the build tools; nothing is downloaded (python3)
#   DEVICE    cuda, or cpu: a rehearsal on a machine without a GPU (cuda)
#   QUICK     1: small problems, a few seconds for an op (empty)
#   LIMIT     seconds for a stage (570)
#
# A rented machine gives one command 600 seconds, little more than a stage may take: call it with a stage or two there,
#   make gpu STAGES="build tests"    make gpu STAGES=ops    make gpu STAGES=end_to_end    ...
# A stage that fails does not stop those after it. The exit status is 1 if any of them failed.
# shellcheck disable=SC2329 # stages are called by their names
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1

ALL="build tests ops end_to_end large graphs sanitizer report"
OUT=${OUT:-build/gpu}
STAGES=${STAGES:-$ALL}
PYTHON=${PYTHON:-python3}
DEVICE=${DEVICE:-cuda}
QUICK=${QUICK:-}
export OUT STAGES PYTHON DEVICE QUICK
NOT_THERE=69 # exit status of a stage that has nothing to run here

# A stage's command, whose output goes to its log. The last line that says so is what the table shows beside it.

stage_build() {
  local cuda=AUTO
  if [ "$DEVICE" = cuda ]; then cuda=ON; fi
  # Native code is asked for: a missing header or compiler is an error, and never a silent pure-Python package.
  "$PYTHON" -m pip install --no-build-isolation --no-deps --no-index -e . \
    -Ccmake.define.TORCH_INFLUENCE_NATIVE=ON -Ccmake.define.TORCH_INFLUENCE_CUDA="$cuda" || return 1
  "$PYTHON" -m torch_influence info | tee "$OUT/info.txt" || return 1
  if [ "$DEVICE" = cuda ] && grep -q '^cuda: reference' "$OUT/info.txt"; then
    echo "note: CUDA tensors would go to the references"
    return 1
  fi
}

stage_tests() {
  "$PYTHON" -m pytest -m cuda tests -q -rs --junitxml "$OUT/tests.xml" || return 1
  # Skipped tests are no failure for pytest; on a GPU they are none that has passed, either.
  "$PYTHON" - "$OUT/tests.xml" "$DEVICE" <<'PY'
import sys
import xml.etree.ElementTree as ET

suite = ET.parse(sys.argv[1]).getroot().find("testsuite")
count, skipped = int(suite.get("tests")), int(suite.get("skipped"))
print(f"note: {count - skipped} passed, {skipped} skipped")
sys.exit(sys.argv[2] == "cuda" and count == skipped)
PY
}

stage_ops() {
  local bench name status=0 done=0
  for bench in benchmarks/ops/bench_*.py; do
    name=$(basename "$bench" .py)
    echo "== $name"
    timeout 110 "$PYTHON" "$bench" --device "$DEVICE" ${QUICK:+--seconds 0.2} --json "$OUT/$name.json"
    case $? in
      0) done=$((done + 1)) ;;
      124) echo "$name: timed out" && status=1 ;;
      *) echo "$name: failed" && status=1 ;;
    esac
  done
  echo "note: $done ops measured"
  return "$status"
}

# Lines of the table that a limit leaves no time for are named in its results.
end_to_end() {
  local problems=$1 name=$2
  "$PYTHON" benchmarks/end_to_end.py --device "$DEVICE" --problems "$problems" ${QUICK:+--quick} --limit 420 \
    --json "$OUT/$name.json" --markdown "$OUT/$name.md" || return 1
  echo "note: $(grep -c '^Not run' "$OUT/$name.md") lines or problems not run for lack of time"
}

stage_end_to_end() { end_to_end A,B,C,D end_to_end; }

stage_large() {
  if [ "$DEVICE" = cpu ] && [ -z "$QUICK" ]; then
    echo "note: too large for a CPU, except with QUICK=1"
    return "$NOT_THERE"
  fi
  end_to_end R,T,H end_to_end_large
}

stage_graphs() {
  "$PYTHON" benchmarks/cuda_graphs.py --json "$OUT/cuda_graphs.json" --markdown "$OUT/cuda_graphs.md" || return 1
  if [ "$DEVICE" = cpu ]; then echo "note: needs a GPU, nothing measured"; fi
}

stage_sanitizer() {
  if ! command -v compute-sanitizer >/dev/null; then
    echo "note: no compute-sanitizer on the PATH"
    return "$NOT_THERE"
  fi
  if [ "$DEVICE" = cpu ]; then
    echo "note: needs a GPU"
    return "$NOT_THERE"
  fi
  # Without torch's pool, or what lies beyond a tensor belongs to the pool and is no error.
  PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck --error-exitcode 1 \
    "$PYTHON" -m torch_influence selftest
}

stage_report() { "$PYTHON" benchmarks/report.py "$OUT"; }

if [ "${1:-}" = --stage ]; then # in a process of its own, so that a timeout ends all of it
  "stage_$2"
  exit
fi

for stage in $STAGES; do
  case " $ALL " in
    *" $stage "*) ;;
    *)
      echo "STAGES: expected some of $ALL, got $stage" >&2
      exit 2
      ;;
  esac
done
mkdir -p "$OUT" || exit 1
OUT=$(cd "$OUT" && pwd)

status=0
table=""
for stage in $STAGES; do
  log="$OUT/$stage.log"
  begin=$SECONDS
  timeout --kill-after=10 "${LIMIT:-570}" bash benchmarks/gpu.sh --stage "$stage" >"$log" 2>&1
  case $? in
    0) outcome=ok ;;
    "$NOT_THERE") outcome="not there" ;;
    124 | 137) outcome="timed out" status=1 ;;
    *) outcome=failed status=1 ;;
  esac
  note=$(sed -n 's/^note: //p' "$log" | tail -n 1)
  if [ "$outcome" = failed ] || [ "$outcome" = "timed out" ]; then
    echo "== $stage $outcome; the end of $log:"
    tail -n 40 "$log"
  fi
  table+=$(printf '%-12s%-12s%5d s  %s' "$stage" "$outcome" $((SECONDS - begin)) "$note")$'\n'
  echo "$stage: $outcome" >&2
done
{
  echo "$(date -u +%Y-%m-%dT%H:%M:%SZ) on $DEVICE${QUICK:+, quick}"
  printf '%s' "$table"
} | tee -a "$OUT/stages.txt"
exit "$status"
