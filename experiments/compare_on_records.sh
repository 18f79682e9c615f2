#!/usr/bin/env bash
# MEMIT, EMMET, ROME and FT-L on real records: 100 edits each, on a small model that was trained on the records' true facts.
#
#   experiments/make_fact_model.sh counterfact.json fact-model
#   experiments/compare_on_records.sh fact-model
#   SCALE=paper experiments/compare_on_records.sh gpt2-xl        # a model that knows them by itself, and the published records
#
# SCALE: scale.sh. MODEL is a folder that make_fact_model.sh has made, or the name of a model.
# Writes at_once.{md,csv} and one.{md,csv} into OUT (runs/compare_on_records).
set -euo pipefail
. "$(dirname "$0")/scale.sh"

MODEL="${1:?usage: $0 MODEL [KEY=VALUE…]   (environment: SCALE OUT LIMIT)}"
shift
OUT="${OUT:-runs/compare_on_records}"
scaled LIMIT 2 100 1000
if [[ -d $MODEL ]]; then
  COMMON=(model=tiny-gpt2 model.name=fact-model "model.id=$MODEL" model.records=null dataset.path="$MODEL/records.json" corpus=file corpus.path="$MODEL/corpus.txt")
else
  COMMON=("model=$MODEL")
fi
METRICS=efficacy_success,paraphrase_success,neighborhood_success,efficacy_accuracy,neighborhood_accuracy,efficacy_generated_exact,neighborhood_generated_unchanged

measure() {  # part, facts at once, methods
  part="$1" size="$2"; shift 2
  for method in $METHODS; do
    edit-cli evaluate method="$method" "${COMMON[@]}" limit="$LIMIT" protocol.batch_size="$size" protocol.observe.sample=false "${BRIEF[@]}" "$@" \
      run_dir="$OUT/$part/$method" > /dev/null
  done
  edit-cli compare "$OUT/$part"/*/ --metrics "$METRICS" --published rome-counterfact --out "$OUT/$part"
}
METHODS="memit emmet" measure at_once all "$@"
METHODS="rome ft-l" measure one 1 "$@"
