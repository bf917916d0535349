#!/bin/sh
# Plain shell: audits, and keeps the evidence in a folder. Ends with bnaudit's exit code: 1 for a deviation that the
# baseline does not accept, 3 where something crashed or is missing, 4 where a control did not behave.
#     BASELINE=bnaudit-baseline.yaml docs/ci/audit.sh [PATH or option of bnaudit run]...
set -eu
out=${OUT:-bnaudit-report}
mkdir -p "$out"
if [ -n "${BASELINE:-}" ]; then set -- --baseline "$BASELINE" "$@"; fi
exec bnaudit run --json "$out/report.json" --junit "$out/junit.xml" --markdown "$out/summary.md" \
    --html "$out/report.html" "$@"
