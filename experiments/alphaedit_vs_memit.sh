#!/usr/bin/env bash
# Who collapses? AlphaEdit, MEMIT and MEMIT that keeps its earlier keys, over a long sequence of edits: one table, one figure.
#
#   experiments/alphaedit_vs_memit.sh                              # 1,100 facts of the embedded world in steps of 20
#   LIMIT=2000 STEP=100 experiments/alphaedit_vs_memit.sh model=llama-3-8b dataset.path=counterfact.json
set -euo pipefail

LIMIT="${LIMIT:-1100}"
STEP="${STEP:-20}"
CHECKPOINTS="${CHECKPOINTS:-[100,200,400,600,800,1100]}"
OUT="${OUT:-runs/alphaedit_vs_memit}"

sequence() {
  name="$1"; shift
  edit-cli sequential "$@" limit="$LIMIT" protocol.batch_size="$STEP" "protocol.checkpoints=$CHECKPOINTS" protocol.sample=200 \
    protocol.observe.generate=false run_dir="$OUT/$name" > /dev/null
}
sequence memit method=memit "$@"
sequence memit-keeps-keys method=memit method.past_keys=write "$@"
sequence alphaedit method=alphaedit "$@"
edit-cli compare "$OUT"/*/ --out "$OUT/alphaedit_vs_memit" \
  --metrics efficacy_success,paraphrase_success,neighborhood_success,neighborhood_accuracy,perplexity
