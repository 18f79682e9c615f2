#!/usr/bin/env bash
# EMMET against MEMIT by batch size, written to one layer and to several: one table, one figure.
# Every batch is taken back before the next; sizes below FACTS edit FACTS facts in batches of that size, larger ones a single batch.
#
#   experiments/emmet_vs_memit.sh                                  # the embedded world, a quarter of an hour on two cores
#   experiments/emmet_vs_memit.sh runs/mine model=hf model.id=fact-model dataset.path=fact-model/records.json corpus=file corpus.path=fact-model/corpus.txt
#   LAMBDA=20000 SIZES="1 10 100" LAYERS="[17] [13,14,15,16,17]" experiments/emmet_vs_memit.sh runs/xl model=gpt2-xl dataset.path=counterfact.json
#
# With λ = covariance_weight · epsilon the two solve the same system (docs/methods/emmet.md), so MEMIT runs with a λ that protects
# (LAMBDA) and EMMET near its equality (EPSILON, C unscaled). Writes emmet_vs_memit.{md,csv,png,svg} into OUT.
set -euo pipefail

OUT="${1:-runs/emmet_vs_memit}"
shift $(( $# > 0 ))
SIZES="${SIZES:-1 4 16 64 256 1100}"
LAYERS="${LAYERS:-[3] [0,1,2,3]}"
FACTS="${FACTS:-64}"
LAMBDA="${LAMBDA:-200}"
EPSILON="${EPSILON:-0.1}"

measure() {  # what the line is called, layers, settings
  name="$1-${2//[^0-9]/}"; layers="$2"; shift 2
  for size in $SIZES; do
    edit-cli evaluate protocol.observe.max_new_tokens=8 "$@" "method.layers=$layers" tag="$name" protocol.batch_size="$size" limit="$(( size > FACTS ? size : FACTS ))" \
      run_dir="$OUT/$name/$size" protocol.observe.sample=false > /dev/null
  done
}
for layers in $LAYERS; do
  measure memit "$layers" method=memit method.covariance_weight="$LAMBDA" "$@"
  measure emmet "$layers" method=emmet method.covariance_weight=1 method.epsilon="$EPSILON" "$@"
done
edit-cli compare "$OUT"/*/*/ --x protocol.batch_size --by tag --out "$OUT/emmet_vs_memit" \
  --metrics efficacy_success,paraphrase_success,neighborhood_success,efficacy_accuracy,neighborhood_accuracy,efficacy_generated_exact,paraphrase_generated_exact,neighborhood_generated_unchanged
