#!/usr/bin/env bash
# Who collapses? AlphaEdit, MEMIT and MEMIT that keeps its earlier keys, over a long sequence of edits: one table, one figure.
#
#   experiments/alphaedit_vs_memit.sh                              # 1,100 facts of the embedded world in steps of 20
#   LIMIT=2000 STEP=100 CHECKPOINTS=[500,1000,2000] experiments/alphaedit_vs_memit.sh runs/llama model=llama-3-8b dataset.path=counterfact.json
#   ALPHAEDIT="method.threshold=0.1" experiments/alphaedit_vs_memit.sh runs/tried
#
# MEMIT, KEEPING and ALPHAEDIT hold settings of the three, those for all come after OUT. Writes alphaedit_vs_memit.{md,csv,png,svg} into OUT.
set -euo pipefail

OUT="${1:-runs/alphaedit_vs_memit}"
shift $(( $# > 0 ))
LIMIT="${LIMIT:-1100}"
STEP="${STEP:-20}"
CHECKPOINTS="${CHECKPOINTS:-[100,200,400,600,800,1100]}"

measure() {  # what the line is called, settings
  name="$1"; shift
  edit-cli sequential protocol.observe.max_new_tokens=8 "$@" limit="$LIMIT" protocol.batch_size="$STEP" "protocol.checkpoints=$CHECKPOINTS" protocol.sample=200 tag="$name" \
    run_dir="$OUT/$name" > /dev/null
}
# shellcheck disable=SC2086  # settings are split at spaces
measure memit method=memit ${MEMIT:-} "$@"
# shellcheck disable=SC2086
measure memit-keeps-keys method=memit method.past_keys=write ${KEEPING:-} "$@"
# shellcheck disable=SC2086
measure alphaedit method=alphaedit ${ALPHAEDIT:-} "$@"
edit-cli compare "$OUT"/*/ --by tag --out "$OUT/alphaedit_vs_memit" \
  --metrics efficacy_success,paraphrase_success,neighborhood_success,neighborhood_accuracy,efficacy_generated_exact,paraphrase_generated_exact,neighborhood_generated_unchanged,perplexity
