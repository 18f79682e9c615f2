#!/usr/bin/env bash
# Who destroys the model, and when: methods that write weights against methods that leave them alone, over 2,000 facts.
#
#   experiments/collapse_comparison.sh                           # 2,000 facts of the embedded world
#   FACTS=200 METHODS="rome grace" experiments/collapse_comparison.sh runs/short
#   experiments/collapse_comparison.sh runs/mine model=gpt2-xl dataset=counterfact dataset.path=counterfact.json
#
# ROME, GRACE, WISE, FT-M and IKE edit one fact a step; MEMIT and AlphaEdit 100. A run that destroys its model is told so at the checkpoint that
# finds it (docs/sequential.md) and goes on. Writes OUT/collapse.{md,csv,png,svg}; a run that was killed goes on where it stopped.
set -euo pipefail

OUT="${1:-runs/collapse}"
shift $(( $# > 0 ))
FACTS="${FACTS:-2000}"
METHODS="${METHODS:-rome memit alphaedit grace wise ft-m ike}"
MANY="memit alphaedit"

for method in $METHODS; do
  size=1
  if [[ " $MANY " == *" $method "* ]]; then size=100; fi
  edit-cli sequential method="$method" dataset=world dataset.split=all dataset.shuffle_seed=0 "$@" limit="$FACTS" protocol.batch_size="$size" \
    protocol.sample=200 protocol.observe.generate=false run_dir="$OUT/$method" > /dev/null
done
runs=()
for method in $METHODS; do runs+=("$OUT/$method"); done
edit-cli compare "${runs[@]}" --metrics efficacy_success,paraphrase_success,locality_token_accuracy,perplexity --out "$OUT/collapse"
