#!/usr/bin/env bash
# Every method on the embedded world: one fact at a time, and a hundred at once. One run each, two tables.
#
#   experiments/compare_methods.sh
#   LIMIT=30 experiments/compare_methods.sh model=gpt2-xl dataset.path=counterfact.json
set -euo pipefail

METHODS="${METHODS:-memit,emmet,rome,ft,ft-l,lookup}"
LIMIT="${LIMIT:-100}"

echo "One fact at a time, taken back before the next"
edit-cli evaluate -m method="$METHODS" limit="$LIMIT" protocol.batch_size=1 tag=one protocol.observe.sample=false "$@"

echo "$LIMIT facts at once"
edit-cli evaluate -m method="$METHODS" limit="$LIMIT" protocol.batch_size=all tag=all "$@"
