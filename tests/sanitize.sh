#!/usr/bin/env bash
# Our CUDA kernels under compute-sanitizer, on a small selection of the gpu tests: every kernel, with
# ragged, empty and invalid sequences. Minutes on one GPU; fails on an error of a tool or test.
#   tests/sanitize.sh [memcheck|racecheck|synccheck ...]      (all if none is named)
# racecheck of sm90's kernels wants another build:
#   CUDAFLAGS=-DMOBA_CHECKED pip install --no-build-isolation -e . && MOBA_CHECKED=1 tests/sanitize.sh racecheck
# In that build warps are also delayed at random: all gpu tests must pass with it.
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
      echo "many_sequences or many_lists or many_blocks or invalid_offsets" \
        "or neighbouring_sequence or short_block or strided_and_misaligned or chunked_queries or own_blocks" \
        "or test_rows or test_keys or in_place or no_blocks" \
        "or other_numbers_of_queries or no_queries or layouts or short_segments or whole_calls" ;;
    racecheck | synccheck)
      echo "many_tiles or many_lists or many_blocks or own_blocks or short_block or test_rows" \
        "or in_place or chunked_queries or neighbouring_sequence_is or no_queries_no_keys or short_segments" ;;
    *) echo "unknown tool $1, must be memcheck, racecheck or synccheck" >&2; exit 1 ;;
  esac
}

logs=$(mktemp -d)
trap 'rm -rf "$logs"' EXIT
(($#)) || set -- memcheck racecheck synccheck

# Of our kernels alone: those of other libraries are not ours to report, and slow to look at.
sanitize() {  # tool, arguments of python
  local tool=$1
  shift
  compute-sanitizer --tool "$tool" --kernel-name kns=moba --error-exitcode 1 --report-api-errors no \
    "$python" "$@"
}

# Would it see an error? A row far beyond the tensor, in device memory, where no op checks it.
sanitize memcheck -c 'import torch, moba_ext
x = torch.zeros(4, 1, 64, dtype=torch.bfloat16, device="cuda")
entries, total = (torch.tensor(i, dtype=torch.int32, device="cuda") for i in ([1 << 24] * 4, [0, 4]))
torch.ops.moba.flash_gather([x], None, entries, total, 1, 0, 1, 0, 4)
torch.cuda.synchronize()' >"$logs/planted" 2>&1 &&
  { echo "memcheck did not see the planted error"; exit 1; }
grep -q "Invalid __global__ read" "$logs/planted" || { cat "$logs/planted"; exit 1; }

for tool; do
  selected=$(tests "$tool")
  echo "== $tool"
  stages=(block_mean gate_topk route gather merge)
  # racecheck takes a warp whose first lane arrives at an mbarrier for all of them for a race.
  [[ $tool == racecheck && -z ${MOBA_CHECKED:-} ]] || stages+=(sm90_stages sm90)
  [[ $tool != memcheck ]] || stages+=(flash)  # its kernels are those of the others
  pids=()
  for stage in "${stages[@]}"; do  # side by side: the tools are slow on the host
    {
      [[ $stage != sm90 || $tool == memcheck ]] || selected=whole_calls
      sanitize "$tool" -m pytest -q -x -p no:cacheprovider -m gpu -k "$selected" \
        "test_${stage}_cuda.py" >"$logs/$tool.$stage" 2>&1 && code=0 || code=$?
      cat "$logs/$tool.$stage"
      exit "$code"
    } &
    pids+=($!)
  done
  failed=0
  for pid in "${pids[@]}"; do wait "$pid" || failed=1; done
  ((!failed)) || exit 1
done
