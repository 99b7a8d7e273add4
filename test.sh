#!/usr/bin/env bash
# ./test.sh: installs what is missing, builds, and runs every test. The last line says how many passed and failed.
#   --quick   leaves out the sanitizer, fuzz and CUDA builds, and the CUDA kernels on the CPU
# Properties (rapidcheck) draw the same cases every time, so that a run tells about the change and not about chance. Other
# cases by hand: RC_PARAMS= build/cpu/kl_tests
set -euo pipefail
cd "$(dirname "$0")"
. tools/setup.sh

quick=0
for argument in "$@"; do
  case $argument in
    --quick) quick=1 ;;
    *) echo "usage: ./test.sh [--quick]" >&2; exit 2 ;;
  esac
done

export RC_PARAMS="seed=1"
passed=0 failed=0
# count NAME COMMAND...: one check that passes if the command succeeds.
check() {
  local name=$1
  shift
  if "$@"; then passed=$((passed + 1)); echo "ok    $name"; else failed=$((failed + 1)); echo "FAIL  $name"; fi
}
# unit NAME PROGRAM [ARGUMENTS]: a GoogleTest program; every test counts. A crash counts as a failure. The tests of a program
# are shared out among processes, for most of them use one processor.
unit() {
  local name=$1 report started=$SECONDS numbers part parts=1 jobs=() good=0 bad=0 skipped=0
  shift
  report=$(mktemp -d)
  case ${!#} in *_tests | --gtest_filter=*) parts=$(($(nproc) < 4 ? $(nproc) : 4)) ;; esac
  for ((part = 0; part < parts; ++part)); do
    GTEST_TOTAL_SHARDS=$parts GTEST_SHARD_INDEX=$part "$@" --gtest_brief=1 --gtest_output=json:"$report/$part.json" \
      >"$report/log$part" 2>&1 &
    jobs+=($!)
  done
  for ((part = 0; part < parts; ++part)); do
    local status=0 good_here=0 bad_here=0 skipped_here=0
    wait "${jobs[part]}" || status=$?
    if numbers=$(python3 tools/count_tests.py "$report/$part.json" 2>/dev/null); then
      read -r good_here bad_here skipped_here <<<"$numbers"
    elif [ $parts = 1 ] || ! grep -q '"tests": 0' "$report/$part.json" 2>/dev/null; then
      bad_here=1  # no report, or no test at all; a part of a short list may be empty
    fi
    [ "$status" = 0 ] || [ "$bad_here" -gt 0 ] || bad_here=1
    [ "$bad_here" = 0 ] || tail -n 60 "$report/log$part" >>"$report/log"
    good=$((good + good_here)) bad=$((bad + bad_here)) skipped=$((skipped + skipped_here))
  done
  [ $((good + bad + skipped)) -gt 0 ] || { bad=1; echo "no test ran" >"$report/log"; }
  passed=$((passed + good)) failed=$((failed + bad))
  echo "$([ "$bad" = 0 ] && echo 'ok   ' || echo FAIL)  $name: $good passed, $bad failed, $skipped skipped, $((SECONDS - started)) s"
  [ "$bad" = 0 ] || cat "$report/log"
  rm -rf "$report"
}

# fuzz NAME RUNS: the corpus and that many mutations of it, always the same ones (about five seconds' worth).
fuzz() {
  local found report started=$SECONDS
  found=$(mktemp -d) report=build/fuzz/$1.log
  if build/fuzz/fuzz_"$1" -seed=1 -runs="$2" -max_len=4096 -timeout=60 -rss_limit_mb=3000 -artifact_prefix=build/fuzz/"$1"- \
      "$found" tests/fuzz/corpus/"$1" >"$report" 2>&1; then
    passed=$((passed + 1)); echo "ok    fuzz $1: $(grep -a DONE "$report" | tr -s ' \t' ' ' | cut -d' ' -f1-6), $((SECONDS - started)) s"
  else
    failed=$((failed + 1)); echo "FAIL  fuzz $1"; tail -n 40 "$report"
  fi
  rm -rf "$found"
}

need_packages $BUILD_PACKAGES $TEST_PACKAGES

say "Structure"
check "include graph: no include runs up a floor" python3 tools/include_graph.py --check
check "include graph: finds what it should" python3 tools/include_graph.py --self-test
if command -v clang-format >/dev/null && clang-format --version | grep -q 'version 14\.'; then
  check "clang-format" bash -c 'git ls-files "*.cc" "*.h" "*.cu" "*.cuh" | xargs clang-format --dry-run --Werror'
fi

say "Release build and tests"
tests="-DKL_TESTS=ON -DKL_TEST_UNITY=${CI:+ON}"  # a folder's as one file in CI, which builds once and from nothing
build cpu kimi-linear kda kda_static kda_prefill_example kl_tests -- $tests ${CI:+-DKL_WERROR=ON}  # errors in CI only: other compilers have other warnings
unit "unit tests" build/cpu/kl_tests
unit "program" python3 tests/program_test.py build/cpu/kimi-linear
unit "libkda" python3 tests/libkda_test.py build/cpu

if [ $quick = 0 ]; then
  say "CUDA kernels on the CPU"
  build cpu cuda_on_cpu_tests
  # All tests for a GPU but those that are too long for this.
  long="KdaBatchInvariantCuda.*:*AHeadOfNans*:DplrHopper.Segments*:SiluMulCuda.*"
  long="$long:LinearAttentionCuda.EveryW*:LinearAttentionCuda.EveryG*:DeltaNetCuda.EveryW*:DeltaNetCuda.EveryG*"
  unit "CUDA kernels on the CPU" build/cpu/cuda_on_cpu_tests --gtest_filter="*Cuda*:*Hopper*-$long"

  # Sanitizer and fuzz builds compile a folder's library as one file, in half the time. That each file includes what it needs
  # is found by the release build.
  one_file="-DCMAKE_UNITY_BUILD=ON -DCMAKE_UNITY_BUILD_BATCH_SIZE=0"

  say "AddressSanitizer and UndefinedBehaviorSanitizer"
  # The code under test is checked, the tests are not.
  build asan kl_tests -- $one_file $tests -DKL_TESTS_FROM="$PWD/build/cpu" -DKL_OBJECTS_FROM="$PWD/build/cpu"
  unit "unit tests under ASan and UBSan" build/asan/kl_tests

  say "ThreadSanitizer"
  build tsan base_tests engine_tests io_tests -- $one_file -DKL_TESTS=ON -DKL_TEST_NAMES="base_test|engine_test|checkpoint_test" \
    -DKL_OBJECTS_FROM="$PWD/build/cpu"
  # Older runtimes do not start where the kernel spreads addresses wider than they know.
  tsan="env"
  build/tsan/base_tests --gtest_list_tests >/dev/null 2>&1 || tsan="setarch $(uname -m) -R"
  unit "thread pool under TSan" $tsan build/tsan/base_tests
  unit "checkpoint under TSan" $tsan build/tsan/io_tests --gtest_filter=Checkpoint.CopiesWhatIsNotAligned
  unit "engine, model and operators under TSan" $tsan build/tsan/engine_tests

  if fuzz_packages && (need_packages $FUZZ_PACKAGES); then
    say "Fuzzing"
    build fuzz fuzzers -- $one_file -DCMAKE_C_COMPILER="$FUZZ_CLANG" -DCMAKE_CXX_COMPILER="clang++-${FUZZ_CLANG#clang-}"
    fuzz safetensors 30000
    fuzz config 20000
    fuzz rank_file 6000
    fuzz chat 5000
    fuzz session 25000
  else
    say "Fuzzing left out: none of $FUZZ_COMPILERS can be installed here together with its runtime"
  fi

  nvcc=$(command -v nvcc || ls /usr/local/cuda/bin/nvcc 2>/dev/null || true)
  if [ -n "$nvcc" ]; then
    say "CUDA build (no GPU needed)"
    # The oldest and the newest of the portable list here; releases are built for all of it.
    check "CUDA kernels compile and link" build cuda ops_kda_tests ops_delta_net_tests ops_dplr_tests \
      ops_linear_attention_tests ops_act_tests ops_norm_tests kda kda_cuda_bench kda_decode_cuda_bench \
      relatives_cuda_bench -- $tests -DKL_CUDA_ARCHS="80;120" -DKL_OBJECTS_FROM="$PWD/build/cpu" \
      -DCMAKE_CUDA_COMPILER="$nvcc"
  else
    say "CUDA build left out: no nvcc here"
  fi
fi

echo
echo "$passed passed, $failed failed"
[ "$failed" = 0 ]
