#!/usr/bin/env bash
# Who destroys the model, and when: methods that write weights against methods that leave them alone, over a long sequence of facts.
#
#   experiments/collapse_comparison.sh                           # 2,000 facts of the embedded world
#   FACTS=200 METHODS="rome grace" experiments/collapse_comparison.sh runs/short
#   SCALE=paper experiments/collapse_comparison.sh runs/llama    # WISE's table: 1,000 of zsRE on Llama 2 7B
#   SETUP="model=gpt2-xl dataset=counterfact" METRICS=efficacy_success,paraphrase_success,neighborhood_success,efficacy_generated_contains,perplexity \
#     experiments/collapse_comparison.sh runs/mine
#
# SCALE: scale.sh. ROME, GRACE, WISE, FT-M and IKE edit one fact a step; MEMIT and AlphaEdit 100. A run that destroys its model is told so at the
# checkpoint that finds it (docs/sequential.md) and goes on. Damage is read off prompts that ask the same of subjects that are never edited: nearly all
# other facts about an edited subject are edited here, too. Writes OUT/collapse.{md,csv,png,svg}; a run that was killed goes on where it stopped.
set -euo pipefail
. "$(dirname "$0")/scale.sh"

OUT="${1:-runs/collapse}"
shift $(( $# > 0 ))
WORLD="dataset=world dataset.split=all dataset.shuffle_seed=0"
scaled SETUP "$WORLD" "$WORLD" "model=llama-2-7b dataset=zsre_alt"
scaled FACTS 4 2000 1000
scaled METHODS "rome memit grace" "rome memit alphaedit grace wise ft-m ike" "ft rome memit defer grace wise"
scaled STEP 2 100 100
scaled ASKED "protocol.holdout=4" "protocol.observe.max_new_tokens=8 protocol.sample=200" "protocol.sample=200"
KEPT=locality_same_relation_accuracy,efficacy_generated_exact,paraphrase_generated_exact,locality_same_relation_generated_unchanged,perplexity
scaled METRICS "efficacy_accuracy,paraphrase_accuracy,$KEPT" "efficacy_accuracy,paraphrase_accuracy,$KEPT" \
  efficacy_accuracy,paraphrase_accuracy,locality_unchanged,efficacy_generated_exact,paraphrase_generated_exact,locality_generated_unchanged,perplexity
MANY="memit alphaedit"

checkpoints=""
for number in 10 30 100 200 300 500 700 1000 1500; do
  if (( number < FACTS )); then checkpoints+="$number,"; fi
done

for method in $METHODS; do
  size=1
  if [[ " $MANY " == *" $method "* ]]; then size="$STEP"; fi
  own=()
  if [[ "$method" == ike ]]; then own=(dataset@method.store=world method.store.split=train); fi
  # shellcheck disable=SC2086  # settings are split at spaces
  edit-cli sequential method="$method" $SETUP "${own[@]}" $ASKED "${BRIEF[@]}" "$@" limit="$FACTS" protocol.batch_size="$size" \
    "protocol.checkpoints=[$checkpoints$FACTS]" protocol.observe.top_tokens=0 run_dir="$OUT/$method" > /dev/null
done
runs=()
for method in $METHODS; do runs+=("$OUT/$method"); done
edit-cli compare "${runs[@]}" --anyway --metrics "$METRICS" --published wise-zsre --out "$OUT/collapse"
