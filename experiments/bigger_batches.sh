#!/usr/bin/env bash
# Is a bigger batch better? The same facts with MEMIT and EMMET in steps of different sizes, none taken back, all asked about at the end (Yoon et al., 2024).
#
#   experiments/bigger_batches.sh                              # 512 facts of the embedded world
#   SCALE=paper experiments/bigger_batches.sh runs/llama       # 4,096 of MultiCounterFact, Llama 3 8B, layer 1
#
# SCALE: scale.sh. Writes bigger_batches.{md,csv,png,svg} into OUT.
set -euo pipefail
. "$(dirname "$0")/scale.sh"

OUT="${1:-runs/bigger_batches}"
shift $(( $# > 0 ))
scaled SETUP "" "" "model=llama-3-8b dataset=multi_counterfact method.layers=[1]"
scaled FACTS 4 512 4096
scaled STEPS "2 4" "16 64 256 512" "256 1024 4096"
scaled METHODS "memit emmet" "memit emmet" "memit emmet"
scaled ASKED "protocol.holdout=4" "protocol.observe.max_new_tokens=8 protocol.sample=200" "protocol.sample=1000"

for method in $METHODS; do
  for step in $STEPS; do
    # shellcheck disable=SC2086  # settings are split at spaces
    edit-cli sequential method="$method" $SETUP limit="$FACTS" protocol.batch_size="$step" "protocol.checkpoints=[$FACTS]" $ASKED "${BRIEF[@]}" "$@" \
      run_dir="$OUT/$method-$step" > /dev/null
  done
done
edit-cli compare "$OUT"/*/ --x protocol.batch_size --published emmet-llama3-batch-1024 --out "$OUT/bigger_batches" \
  --metrics efficacy_success,paraphrase_success,neighborhood_success,score,neighborhood_accuracy,efficacy_generated_exact,paraphrase_generated_exact,neighborhood_generated_unchanged,perplexity
