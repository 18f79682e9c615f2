#!/usr/bin/env bash
# Ten thousand edits at once with MEMIT and with EMMET, on a small model that was trained on the true facts of the same records:
# time by phase, memory, metrics.
#
#   LIMIT=10000 EPOCHS=20 experiments/make_fact_model.sh counterfact-edit-10k.json fact-model-10k
#   experiments/ten_thousand_edits.sh fact-model-10k
#   FACTS=1000 experiments/ten_thousand_edits.sh fact-model-10k method.covariance_weight=30
#
# All records are edited, so there is none left to choose settings on that is not measured as well: choose them with FACTS=1000.
set -euo pipefail

MODEL="${1:?usage: $0 MODEL_DIR [KEY=VALUE…]}"
shift
OUT="${OUT:-runs/ten_thousand_edits}"
for method in ${METHODS:-memit emmet}; do
  edit-cli evaluate method="$method" protocol.batch_size=all limit="${FACTS:-10000}" model=tiny-gpt2 model.name=fact-model "model.id=$MODEL" \
    model.records=null dataset.path="$MODEL/records.json" corpus=file corpus.path="$MODEL/corpus.txt" \
    protocol.observe.sample=false protocol.observe.generate=false run_dir="$OUT/$method-${FACTS:-10000}" "$@"
done
