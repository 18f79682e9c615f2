#!/usr/bin/env bash
# EMMET against MEMIT by batch size, written to one layer and to several: one table, one figure.
# Every batch is taken back before the next; sizes below FACTS edit FACTS facts in batches of that size, larger ones a single batch.
#
#   experiments/emmet_vs_memit.sh                                  # the embedded world, about a quarter of an hour on two cores
#   SIZES="1 10 100" LAYERS="[17] [13,14,15,16,17]" experiments/emmet_vs_memit.sh model=gpt2-xl dataset.path=counterfact.json
set -euo pipefail

SIZES="${SIZES:-1 4 16 64 256 1100}"
LAYERS="${LAYERS:-[3] [0,1,2,3]}"
FACTS="${FACTS:-64}"
OUT="${OUT:-runs/emmet_vs_memit}"

for layers in $LAYERS; do
  for method in memit emmet; do
    for size in $SIZES; do
      edit-cli evaluate method="$method" "method.layers=$layers" protocol.batch_size="$size" limit="$(( size > FACTS ? size : FACTS ))" \
        run_dir="$OUT/$method-${layers//[^0-9]/}-$size" protocol.observe.sample=false protocol.observe.generate=false "$@" > /dev/null
    done
  done
done
edit-cli compare "$OUT"/*/ --x protocol.batch_size --by method.layers --out "$OUT/emmet_vs_memit" \
  --metrics efficacy_success,paraphrase_success,neighborhood_success,neighborhood_accuracy
