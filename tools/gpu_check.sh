#!/usr/bin/env bash
# Runs on a GPU machine what was built elsewhere: every CUDA test, the checks of the prefill, the benchmarks. Needs a
# driver, and for --peers Python with torch and Triton. Prints the benchmarks' figures, then one table; every
# program's whole output stays in the log folder.
#
#   tools/gpu_check.sh [--build DIR] [--logs DIR] [--tests | --bench] [--sanitize | --racecheck] [--peers [SECONDS]]
#
#   --tests      tests, checks and the relatives' times only          --bench    benchmarks only
#   --sanitize   compute-sanitizer's memcheck on a reduced set of tests, instead of everything else
#   --racecheck  its racecheck on the pipelines, instead of everything else. DIR is a build with -DKL_RACECHECK=ON
#                For both $SANITIZER is a compute-sanitizer other than the one in PATH; racecheck needs 2026.4 or later
#                (docs/2026-11-25-gpu-proofs.md says why).
#   --peers      also tools/bench_peers.py --quick, within SECONDS (95)
#
# To build:  cmake --preset cuda -DKL_TESTS=ON && cmake --build build/cuda --target ops_kda_tests ops_delta_net_tests \
#   ops_dplr_tests ops_linear_attention_tests ops_act_tests ops_norm_tests kda kda_cuda_bench kda_decode_cuda_bench \
#   relatives_cuda_bench
# A program that is not there is left out, and the table says so.
set -uo pipefail
cd "$(dirname "$0")/.."

build=build/cuda logs=build/gpu_check tests=1 bench=1 sanitize=0 racecheck=0 peers=0
while [ $# -gt 0 ]; do
  case $1 in
    --build) build=$2; shift ;;
    --logs) logs=$2; shift ;;
    --tests) bench=0 ;;
    --bench) tests=0 ;;
    --sanitize) sanitize=1 ;;
    --racecheck) racecheck=1 ;;
    --peers) peers=95; [[ ${2:-} =~ ^[0-9]+$ ]] && { peers=$2; shift; } ;;
    *) echo "usage: tools/gpu_check.sh [--build DIR] [--logs DIR] [--tests | --bench] [--sanitize | --racecheck]" \
            "[--peers [SECONDS]]" >&2
       exit 2 ;;
  esac
  shift
done
mkdir -p "$logs"

table=() failed=0
# row NAME STATUS WORDS SECONDS
row() {
  table+=("$(printf '%-34s %-7s %5s s  %s' "$1" "$2" "$4" "$3")")
  [ "$2" != FAILED ] || failed=$((failed + 1))
}
# run NAME SUMMARY COMMAND...: SUMMARY is a pattern of the lines that the table shows, the last one of them.
run() {
  local name=$1 pattern=$2 log status=0 words started=$SECONDS
  shift 2
  if ! [ -e "$1" ] && ! command -v "$1" >/dev/null; then row "$name" absent "$1 is not there" 0; return; fi
  log=$logs/$(tr -c 'a-z0-9\n' _ <<<"${name,,}").log
  "$@" >"$log" 2>&1 || status=$?
  words=$(grep -E "$pattern" "$log" | tail -n 1 | cut -c 1-60)
  # Tests are skipped where there is no GPU, and this script is for where there is one.
  if [ $status = 0 ] && [[ $words == *SKIPPED* ]]; then status=skipped; fi
  if [ $status = 0 ]; then row "$name" ok "$words" $((SECONDS - started)); return; fi
  row "$name" FAILED "exit $status ${words}" $((SECONDS - started))
  grep -E 'FAILED|Failure|actual|error|Error|ERROR' "$log" | head -n 12
}
# figures NAME: what a benchmark printed.
figures() {
  local log=$logs/$(tr -c 'a-z0-9\n' _ <<<"${1,,}").log
  [ -e "$log" ] && { echo "-- $1"; cat "$log"; }
}
# shards PROGRAM FILTER: its tests in four processes, because the references on the CPU take most of the time.
shards() {
  local i status=0 pids=()
  for i in 0 1 2 3; do
    GTEST_TOTAL_SHARDS=4 GTEST_SHARD_INDEX=$i "$1" --gtest_filter="$2" --gtest_brief=1 >"$logs/shard$i" 2>&1 &
    pids+=($!)
  done
  for i in 0 1 2 3; do wait "${pids[i]}" || status=$?; done
  cat "$logs"/shard[0-3]
  awk '/^\[  PASSED  \]/ { passed += $4 } /^\[  FAILED  \] [0-9]+ test/ { failed += $4 }
       /^\[  SKIPPED \]/ { skipped += $4 }
       END { print (failed ? "[  FAILED  ] " : skipped ? "[  SKIPPED ] " : "[  PASSED  ] ") passed + 0 " passed, " \
                   failed + 0 " failed, " skipped + 0 " skipped" }' "$logs"/shard[0-3]
  return $status
}
unit() {  # unit PROGRAM FILTER, the program of the build folder
  if ! [ -e "$build/$1" ]; then row "$1" absent "$build/$1 is not there" 0; return; fi
  run "$1" '^\[  (PASSED|FAILED|SKIPPED)' shards "$build/$1" "$2"
}

cuda_tests=(ops_delta_net_tests ops_dplr_tests ops_linear_attention_tests ops_act_tests ops_norm_tests)
nvidia-smi --query-gpu=name,driver_version --format=csv,noheader 2>/dev/null

if [ $sanitize = 1 ]; then
  memcheck=("${SANITIZER:-compute-sanitizer}" --tool memcheck --error-exitcode 9)
  for program in "${cuda_tests[@]:0:3}"; do
    run "memcheck $program" 'ERROR SUMMARY|PASSED' "${memcheck[@]}" "$build/$program" \
      --gtest_filter='*Cuda.EveryLength:*Cuda.PackedEqualsAlone:*Hopper.PackedEqualsAlone' --gtest_brief=1
  done
  for program in "${cuda_tests[@]:3}"; do
    run "memcheck $program" 'ERROR SUMMARY|PASSED' "${memcheck[@]}" "$build/$program" \
      --gtest_filter='*Cuda*' --gtest_brief=1
  done
  run "memcheck kda" 'ERROR SUMMARY|PASSED' "${memcheck[@]}" "$build/ops_kda_tests" --gtest_brief=1 \
    --gtest_filter='KdaPrefillCuda.SlotsHeadsAndCheckpoints:KdaDecodeCuda.SeveralTokens:KdaStepCuda.*:KdaReplayCuda.*'
  run "memcheck kda_cuda_bench" 'ERROR SUMMARY|checks failed' "${memcheck[@]}" "$build/kda_cuda_bench" check lengths
elif [ $racecheck = 1 ]; then
  racecheck() {  # racecheck KERNEL PROGRAM ARGUMENT...
    local kernel=$1
    shift
    # No --launch-count: with it 2026.4 lists nothing, whatever there is.
    "${SANITIZER:-compute-sanitizer}" --tool racecheck --error-exitcode 9 --num-cuda-barriers 128 \
      --kernel-name "kernel_substring=$kernel" "$build/$@"
  }
  race() {  # race NAME KERNEL PROGRAM ARGUMENT...
    local name=$1
    shift
    if ! [ -e "$build/$2" ]; then row "racecheck $name" absent "$build/$2 is not there" 0; return; fi
    run "racecheck $name" 'RACECHECK SUMMARY' finds_nothing "$@"
  }
  # Into run()'s log. Warnings count, which leave the exit status as it is.
  finds_nothing() { racecheck "$@" && grep -q 'RACECHECK SUMMARY: 0 hazards' "$log"; }
  # racecheck as it is used here sees a race where there is one.
  finds_race() { ! racecheck planted_race kda_cuda_bench race && grep -q 'Race reported' "$log"; }
  run "racecheck a planted race" 'RACECHECK SUMMARY' finds_race
  race decode kda_decode_pipeline ops_kda_tests --gtest_filter=KdaDecodeCuda.PipelineWithManyItemsABlock
  race "fused step" kda_decode_pipeline ops_kda_tests --gtest_filter=KdaStepCuda.BesideTheDefinition
  race replay kda_replay_pipeline ops_kda_tests --gtest_filter='KdaReplayCuda.Many*'
  race "kda prefill, whole sequences" prefill_kernel kda_cuda_bench check lengths
  race "kda prefill, probes" prefill_kernel kda_cuda_bench check "T 1024 H4"
  race "kda prefill, joins" prefill_kernel kda_cuda_bench check "uneven split"
  for kernel in prefill_kernel clear_and_order_kernel; do
    race "kda, ${kernel%_kernel}, ordered" $kernel ops_kda_tests --gtest_filter='KdaPrefillCuda.AHeadOfNans*'
  done
  race "dplr prefill" prefill_kernel ops_dplr_tests --gtest_filter=DplrHopper.EveryLength
  race "dplr prefill, joins" prefill_kernel ops_dplr_tests --gtest_filter=DplrHopper.SegmentsOfLongSequences
else
  if [ $tests = 1 ]; then
    for program in "${cuda_tests[@]}"; do unit "$program" '*Cuda*:*Hopper*'; done
    unit ops_kda_tests '*Cuda*'
    run "kda_cuda_bench check" 'checks failed' "$build/kda_cuda_bench" check
    grep -E 'FAILED' "$logs/kda_cuda_bench_check.log" 2>/dev/null
    grep -E 'T 1048576|alone or in a pack' "$logs/kda_cuda_bench_check.log" 2>/dev/null
  fi
  run "relatives_cuda_bench" ' H' "$build/relatives_cuda_bench"
  figures "relatives_cuda_bench"
  if [ $bench = 1 ]; then
    run "kda_cuda_bench time" 'geomean' "$build/kda_cuda_bench" time
    run "kda_decode_cuda_bench B1 H32" 'tiles|step' "$build/kda_decode_cuda_bench" "B1 H32 D128 T1 "
    run "kda_decode_cuda_bench B256 H32" 'step|replay' "$build/kda_decode_cuda_bench" "B256 H32 D128 T1 [K,V] f32"
    for name in "kda_cuda_bench time" "kda_decode_cuda_bench B1 H32" "kda_decode_cuda_bench B256 H32"; do
      figures "$name"
    done
  fi
  if [ "$peers" != 0 ]; then
    library=$(ls "$build"/libkda.so.?.* "$build"/libkda.so 2>/dev/null | head -n 1)
    run "bench_peers" ' s in all' python3 tools/bench_peers.py --quick --budget "$peers" --lib "${library:-libkda.so}"
    figures "bench_peers"
  fi
fi

echo
printf '%s\n' "${table[@]}"
echo "$failed failed"
[ $failed = 0 ]
