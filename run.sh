#!/usr/bin/env bash
# ./run.sh ["prompt"]: installs what is missing, builds build/cpu/kimi-linear, and lets the shipped model speak: it answers the
# prompt, or without one goes on with a sentence of prose.
set -euo pipefail
cd "$(dirname "$0")"
. tools/setup.sh

need_packages $BUILD_PACKAGES
[ -x build/cpu/kimi-linear ] || say "Building build/cpu/kimi-linear (a minute or two, once)"
build cpu kimi-linear

if [ $# -gt 0 ]; then
  exec build/cpu/kimi-linear run -m models/demo --temp 0 -n 200 -- "$*"
fi
prompt="It is a truth universally acknowledged, that a single man"
say "kimi-linear run -m models/demo --raw --temp 0 -n 48 \"$prompt\""
printf '%s' "$prompt"
build/cpu/kimi-linear run -m models/demo --raw --temp 0 -n 48 "$prompt"
cat <<'TEXT'

Next: ./run.sh "What does music mean?"                  one question to the shipped model (small: form without wisdom)
      build/cpu/kimi-linear chat -m models/demo         a conversation; -m takes any Kimi Linear checkpoint directory
      build/cpu/kimi-linear inspect -m models/demo      what a checkpoint is and what it costs to hold
TEXT
