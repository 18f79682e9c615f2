#!/usr/bin/env bash
# Who collapses? AlphaEdit, MEMIT and MEMIT that keeps its earlier keys, over a long sequence of edits: one table, one figure.
#
#   experiments/alphaedit_vs_memit.sh                              # 1,100 facts of the embedded world in steps of 20
#   SCALE=paper experiments/alphaedit_vs_memit.sh runs/llama       # 2,000 in steps of 100, Llama 3 8B Instruct; SETUP chooses another model or data
#   ALPHAEDIT="method.threshold=0.1" experiments/alphaedit_vs_memit.sh runs/tried
#
# SCALE: scale.sh. MEMIT, KEEPING and ALPHAEDIT hold settings of the three, those for all come after OUT.
# Writes alphaedit_vs_memit.{md,csv,png,svg} into OUT.
set -euo pipefail
. "$(dirname "$0")/scale.sh"

OUT="${1:-runs/alphaedit_vs_memit}"
shift $(( $# > 0 ))
scaled SETUP "" "" "model=llama-3-8b-instruct dataset=multi_counterfact"
scaled LIMIT 8 1100 2000
scaled STEP 4 20 100
scaled CHECKPOINTS "[4,8]" "[100,200,400,600,800,1100]" "[100,500,1000,1500,2000]"
scaled ASKED "protocol.holdout=4" "protocol.observe.max_new_tokens=8 protocol.sample=200" "protocol.sample=null"

measure() {  # what the line is called, settings
  name="$1"; shift
  # shellcheck disable=SC2086  # settings are split at spaces
  edit-cli sequential $SETUP limit="$LIMIT" protocol.batch_size="$STEP" "protocol.checkpoints=$CHECKPOINTS" $ASKED "${BRIEF[@]}" "$@" \
    tag="$name" run_dir="$OUT/$name" > /dev/null
}
# shellcheck disable=SC2086
measure memit method=memit ${MEMIT:-} "$@"
# shellcheck disable=SC2086
measure memit-keeps-keys method=memit method.past_keys=write ${KEEPING:-} "$@"
# shellcheck disable=SC2086
measure alphaedit method=alphaedit ${ALPHAEDIT:-} "$@"
edit-cli compare "$OUT"/*/ --by tag --published alphaedit-counterfact --out "$OUT/alphaedit_vs_memit" \
  --metrics efficacy_success,paraphrase_success,neighborhood_success,neighborhood_accuracy,efficacy_generated_exact,paraphrase_generated_exact,neighborhood_generated_unchanged,perplexity
