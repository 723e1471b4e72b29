#!/usr/bin/env bash
# Our CUDA kernels under compute-sanitizer, on a small selection of the gpu tests: every kernel, with
# ragged, empty and invalid sequences. Minutes on one GPU; fails on an error of a tool or test.
#   tests/sanitize.sh [memcheck|racecheck ...]      (both if none is named)
set -euo pipefail
cd "$(dirname "$0")"

python=${PYTHON:-python}
PATH=$PATH:${CUDA_HOME:-/usr/local/cuda}/bin
command -v compute-sanitizer >/dev/null ||
  { echo "compute-sanitizer is not in PATH or in CUDA_HOME/bin: it comes with the CUDA toolkit"; exit 1; }
# Without a GPU every test would be skipped, and all would seem well.
"$python" -c 'import sys, torch, moba_ext.ops as ops
sys.exit(ops.cuda_status() or (None if torch.cuda.is_available() else "no GPU is visible"))'

# Every tensor its own allocation: else a neighbour in torch's pool hides an access out of bounds.
export PYTORCH_NO_CUDA_MEMORY_CACHING=1
export OMP_NUM_THREADS=2  # for each of the processes below

# Tests by name, of all files below; the -k expression of pytest.
tests() {
  case $1 in
    memcheck)
      echo "many_sequences or many_blocks or invalid_offsets or neighbouring_sequence" \
        "or short_block or strided_and_misaligned or chunked_queries or own_blocks" \
        "or test_rows or test_keys or in_place or no_blocks" \
        "or other_numbers_of_queries or no_queries or layouts" ;;
    racecheck)
      echo "many_tiles or many_blocks or own_blocks or short_block or test_rows or in_place" \
        "or chunked_queries or neighbouring_sequence_is or no_queries_no_keys" ;;
    *) echo "unknown tool $1, must be memcheck or racecheck" >&2; exit 1 ;;
  esac
}

logs=$(mktemp -d)
trap 'rm -rf "$logs"' EXIT
(($#)) || set -- memcheck racecheck
for tool; do
  selected=$(tests "$tool")
  options=(--tool "$tool" --error-exitcode 1 --report-api-errors no)
  # Shared memory races of other libraries are not ours to report, and slow to look for.
  [[ $tool != racecheck ]] || options+=(--kernel-name kns=moba)
  echo "== $tool"
  # Side by side: the tools are slow on the host.
  pids=()
  run() {  # stage, expression
    compute-sanitizer "${options[@]}" "$python" -m pytest -q -x -p no:cacheprovider -m gpu \
      -k "$2" "test_$1_cuda.py" >"$logs/$1.${#pids[@]}" 2>&1 &
    pids+=($!)
  }
  for stage in block_mean gate_topk route gather merge; do run "$stage" "$selected"; done
  if [[ $tool == memcheck ]]; then  # all of it; racecheck has seen its kernels
    run flash "($selected) and invalid_offsets"
    run flash "($selected) and not invalid_offsets"
  fi
  failed=0
  for pid in "${pids[@]}"; do wait "$pid" || failed=1; done
  tail -n +1 "$logs"/*
  rm "$logs"/*
  ((!failed)) || exit 1
done
