#!/usr/bin/env bash
# score -> filter -> report on the tiny sample, as the README shows it. Output goes to demo-out/.
set -euo pipefail
cd "$(dirname "$0")/.."
rm -rf demo-out
run() { printf '\n$ %s\n' "$*"; "$@"; }

run trm-audit validate sample_data/tiny/rollouts
run trm-audit score sample_data/tiny/rollouts --model sample_data/tiny/model --trainer-version 200 -o demo-out/scores
run trm-audit filter demo-out/scores --delta-max 0.05 --delta-avg 0.002 -o demo-out/train
run trm-audit report demo-out/scores --delta-max 0.05 --delta-avg 0.002
run trm-audit report demo-out/scores --delta-max 0.05 --delta-avg 0.002 -o demo-out/report.html
