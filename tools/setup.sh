# Sourced by run.sh and test.sh: installs what is missing and builds. Needs Debian 12 or later, or Ubuntu 24.04 or later, and
# root or sudo if packages are missing.

say() { printf '\n== %s\n' "$*"; }
die() { printf 'error: %s\n' "$*" >&2; exit 1; }

BUILD_PACKAGES="g++ cmake ninja-build pkg-config nlohmann-json3-dev libcli11-dev libedit-dev libpcre2-dev"
TEST_PACKAGES="python3 libgtest-dev librapidcheck-dev"
# The first of these compilers that can be had here is for the fuzz targets, with its libFuzzer. Debian 12's own clang (14)
# does not understand <ranges> of libstdc++ 12.
FUZZ_COMPILERS="clang-19 clang-18 clang-20 clang-21"

as_root() {
  if [ "$(id -u)" = 0 ]; then "$@"
  elif command -v sudo >/dev/null; then sudo "$@"
  else die "packages have to be installed ($*): run this as root or install sudo"
  fi
}

# need_packages NAME...: installs those that are not there; quick and silent when all are.
need_packages() {
  local missing=() package
  for package in "$@"; do
    dpkg-query -W -f '${Status}' "$package" 2>/dev/null | grep -q 'ok installed' || missing+=("$package")
  done
  [ ${#missing[@]} = 0 ] && return
  command -v apt-get >/dev/null || die "missing: ${missing[*]}; this script knows Debian and Ubuntu, elsewhere install their equivalents and run cmake --preset cpu"
  say "Installing ${missing[*]}"
  as_root env DEBIAN_FRONTEND=noninteractive apt-get update -qq
  as_root env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${missing[@]}" >/dev/null
}

# fuzz_packages: sets FUZZ_CLANG (clang-19) and FUZZ_PACKAGES (it and its runtime); fails if there is none.
fuzz_packages() {
  local updated
  for updated in no yes; do
    for FUZZ_CLANG in $FUZZ_COMPILERS; do
      FUZZ_PACKAGES="$FUZZ_CLANG libclang-rt-${FUZZ_CLANG#clang-}-dev"
      # Both: an apt that knows only one of them cannot help.
      [ "$(apt-cache policy $FUZZ_PACKAGES 2>/dev/null | grep -c 'Candidate: [^(]')" = 2 ] && return
    done
    [ $updated = yes ] || (as_root apt-get update -qq) >/dev/null 2>&1 || true  # a fresh image has no lists
  done
  return 1
}

# build PRESET TARGET... [-- CMAKE OPTIONS]: configures once, builds what changed.
build() {
  local preset=$1 targets=() started=$SECONDS
  shift
  while [ $# -gt 0 ] && [ "$1" != -- ]; do targets+=("$1"); shift; done
  [ $# -gt 0 ] && shift
  local log
  log=$(mktemp)
  if [ ! -f "build/$preset/build.ninja" ] || [ $# -gt 0 ]; then
    cmake --preset "$preset" "$@" >"$log" 2>&1 || { cat "$log"; rm -f "$log"; die "cmake --preset $preset failed"; }
  fi
  cmake --build "build/$preset" --target "${targets[@]}" >"$log" 2>&1 || { cat "$log"; rm -f "$log"; die "the $preset build failed"; }
  grep -E 'warning:' "$log" || true
  rm -f "$log"
  [ $((SECONDS - started)) -lt 3 ] || echo "built build/$preset in $((SECONDS - started)) s"
}
