#!/usr/bin/env bash
# EMMET against MEMIT by batch size, written to one layer and to several: one table, one figure.
# Every batch is taken back before the next; sizes below FACTS edit FACTS facts in batches of that size, larger ones a single batch.
#
#   experiments/emmet_vs_memit.sh                                  # the embedded world, a quarter of an hour on two cores
#   experiments/emmet_vs_memit.sh runs/mine model=hf model.id=fact-model dataset.path=fact-model/records.json corpus=file corpus.path=fact-model/corpus.txt
#   SCALE=paper experiments/emmet_vs_memit.sh runs/llama           # Llama 3 8B, layer 1 and layers 4 to 8, up to 4,096 facts
#   LAMBDA=20000 SIZES="1 10 100" LAYERS="[17] [13,14,15,16,17]" experiments/emmet_vs_memit.sh runs/xl model=gpt2-xl dataset.path=counterfact.json
#
# SCALE: scale.sh. With λ = covariance_weight · epsilon the two solve the same system (docs/methods/emmet.md), so MEMIT runs with a λ that
# protects (LAMBDA) and EMMET near its equality (EPSILON, C unscaled). Writes emmet_vs_memit.{md,csv,png,svg} into OUT.
set -euo pipefail
. "$(dirname "$0")/scale.sh"

OUT="${1:-runs/emmet_vs_memit}"
shift $(( $# > 0 ))
scaled SETUP "" "" "model=llama-3-8b dataset=multi_counterfact"
scaled SIZES "1 2" "1 4 16 64 256 1100" "1 16 64 256 1024 4096"
scaled LAYERS "[3] [2,3]" "[3] [0,1,2,3]" "[1] [4,5,6,7,8]"
scaled FACTS 2 64 256
scaled LAMBDA 200 200 15000
scaled EPSILON 0.1 0.1 0.1

measure() {  # what the line is called, layers, settings
  name="$1-${2//[^0-9]/}"; layers="$2"; shift 2
  for size in $SIZES; do
    # shellcheck disable=SC2086  # settings are split at spaces
    edit-cli evaluate $SETUP protocol.observe.max_new_tokens=8 "${BRIEF[@]}" "$@" "method.layers=$layers" tag="$name" protocol.batch_size="$size" \
      limit="$(( size > FACTS ? size : FACTS ))" run_dir="$OUT/$name/$size" protocol.observe.sample=false > /dev/null
  done
}
for layers in $LAYERS; do
  measure memit "$layers" method=memit method.covariance_weight="$LAMBDA" "$@"
  measure emmet "$layers" method=emmet method.covariance_weight=1 method.epsilon="$EPSILON" "$@"
done
edit-cli compare "$OUT"/*/*/ --x protocol.batch_size --by tag --published emmet-llama3-single,emmet-llama3-batch-1024 --out "$OUT/emmet_vs_memit" \
  --metrics efficacy_success,paraphrase_success,neighborhood_success,score,efficacy_accuracy,neighborhood_accuracy,efficacy_generated_exact,paraphrase_generated_exact,neighborhood_generated_unchanged
