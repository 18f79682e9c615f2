#!/usr/bin/env bash
# Who destroys the model, and when: methods that write weights against methods that leave them alone, over 2,000 facts.
#
#   experiments/collapse_comparison.sh                           # 2,000 facts of the embedded world
#   FACTS=200 METHODS="rome grace" experiments/collapse_comparison.sh runs/short
#   METRICS=efficacy_success,paraphrase_success,neighborhood_success,efficacy_generated_contains,perplexity \
#     experiments/collapse_comparison.sh runs/mine model=gpt2-xl dataset=counterfact dataset.path=counterfact.json dataset.split=null
#
# ROME, GRACE, WISE, FT-M and IKE edit one fact a step; MEMIT and AlphaEdit 100. A run that destroys its model is told so at the checkpoint that
# finds it (docs/sequential.md) and goes on. Damage is read off prompts that ask the same of subjects that are never edited: nearly all other facts
# about an edited subject are edited here, too. Writes OUT/collapse.{md,csv,png,svg}; a run that was killed goes on where it stopped.
set -euo pipefail

OUT="${1:-runs/collapse}"
shift $(( $# > 0 ))
FACTS="${FACTS:-2000}"
METHODS="${METHODS:-rome memit alphaedit grace wise ft-m ike}"
MANY="memit alphaedit"
METRICS="${METRICS:-efficacy_accuracy,paraphrase_accuracy,locality_same_relation_accuracy,efficacy_generated_exact,paraphrase_generated_exact,locality_same_relation_generated_unchanged,perplexity}"

checkpoints=""
for number in 10 30 100 200 300 500 700 1000 1500; do
  if (( number < FACTS )); then checkpoints+="$number,"; fi
done

for method in $METHODS; do
  size=1
  if [[ " $MANY " == *" $method "* ]]; then size=100; fi
  own=()
  if [[ "$method" == ike ]]; then own=(dataset@method.store=world method.store.split=train); fi
  edit-cli sequential method="$method" dataset=world dataset.split=all dataset.shuffle_seed=0 "${own[@]}" protocol.observe.max_new_tokens=8 "$@" limit="$FACTS" protocol.batch_size="$size" \
    "protocol.checkpoints=[$checkpoints$FACTS]" protocol.sample=200 protocol.observe.top_tokens=0 \
    run_dir="$OUT/$method" > /dev/null
done
runs=()
for method in $METHODS; do runs+=("$OUT/$method"); done
edit-cli compare "${runs[@]}" --anyway --metrics "$METRICS" --out "$OUT/collapse"
