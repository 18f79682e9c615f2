#!/usr/bin/env bash
# Up to ten thousand edits at once with MEMIT and with EMMET, and the same facts in steps of a thousand: time, memory, metrics.
#
#   LIMIT=10000 EPOCHS=40 WIDTH=192 ROWS=32 VOCAB=4096 experiments/make_fact_model.sh records.json fact-model
#   experiments/ten_thousand_edits.sh records.json fact-model
#   SIZES=1000 experiments/ten_thousand_edits.sh records.json fact-model runs/tried method.covariance_weight=20
#   SCALE=paper experiments/ten_thousand_edits.sh published gpt-j-6b     # MultiCounterFact, on a model that knows it
#
# SCALE: scale.sh. RECORDS is a file of records, MODEL a small model that was trained on their true facts (or `published`, and the name of a model). All records are edited in the end, so none is left
# to choose settings on: try some with SIZES=1000, and say that they were chosen on facts that are edited. Writes at_once.{md,csv,png,svg} and in_steps.{md,csv,png,svg} into OUT.
set -euo pipefail
. "$(dirname "$0")/scale.sh"

if [[ $# -lt 2 ]]; then
  echo "usage: $0 RECORDS MODEL [OUT [KEY=VALUE…]]   (environment: SCALE SIZES STEP METHODS)" >&2
  exit 2
fi
RECORDS="$1" MODEL="$2" OUT="${3:-runs/ten_thousand_edits}"
shift $(( $# < 3 ? $# : 3 ))
scaled SIZES "1 2" "10 100 1000 10000" "10 100 1000 10000"
scaled STEP 1 1000 1000
if [[ -d $MODEL ]]; then
  COMMON=(model=tiny-gpt2 model.name=fact-model "model.id=$MODEL" model.records=null model.perplexity_text=null "dataset.path=$RECORDS"
          corpus=file "corpus.path=$MODEL/corpus.txt" stats.tokens=400000)
else
  COMMON=("model=$MODEL" dataset=multi_counterfact)
fi
COMMON+=(protocol.observe.sample=false protocol.observe.max_new_tokens=8 "${BRIEF[@]}" "$@")
METRICS=efficacy_success,efficacy_accuracy,paraphrase_success,neighborhood_success,neighborhood_accuracy,efficacy_generated_exact,paraphrase_generated_exact,neighborhood_generated_unchanged

for method in ${METHODS:-memit emmet}; do
  for size in $SIZES; do
    edit-cli evaluate method="$method" protocol.batch_size=all limit="$size" run_dir="$OUT/at_once/$method-$size" "${COMMON[@]}" > /dev/null
  done
done
edit-cli compare "$OUT"/at_once/*/ --x protocol.batch_size --metrics "$METRICS" --published memit-counterfact-10k --out "$OUT/at_once"

if [[ "$STEP" -gt 0 ]]; then
  edit-cli sequential method=memit method.past_keys=write limit="${SIZES##* }" protocol.batch_size="$STEP" run_dir="$OUT/in_steps/memit" \
    protocol.holdout=0 "${COMMON[@]}" > /dev/null
  edit-cli compare "$OUT"/in_steps/*/ --metrics "$METRICS" --out "$OUT/in_steps"
fi
