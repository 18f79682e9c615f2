#!/usr/bin/env bash
# MEMIT's scaling curve (Meng et al., 2023): MEMIT, ROME, MEND and fine-tuning by the number of facts that are edited at once.
#
#   experiments/memit_scaling.sh                              # 1 to 512 facts of the embedded world
#   SCALE=paper experiments/memit_scaling.sh runs/gpt-j       # 1 to 10,000 of MultiCounterFact, GPT-J
#
# SCALE: scale.sh. ROME writes the facts of a batch one after the other; MEND, trained for one fact, sums their gradients, as in the paper.
# experiments/ten_thousand_edits.sh edits real records with MEMIT and EMMET. Writes memit_scaling.{md,csv,png,svg} into OUT.
set -euo pipefail
. "$(dirname "$0")/scale.sh"

OUT="${1:-runs/memit_scaling}"
shift $(( $# > 0 ))
scaled SETUP "model=tiny-gpt2" "model=tiny-gpt2" "model=gpt-j-6b"
scaled LEARNED world world zsre_qa
scaled DATA multi_counterfact multi_counterfact multi_counterfact
scaled SIZES "1 2" "1 4 16 64 128 512" "1 3 10 32 100 316 1000 3162 10000"
scaled METHODS "memit mend" "memit rome mend ft-l" "memit rome mend ft-l"

for method in $METHODS; do
  read -r -a own <<< "method=$method $SETUP"
  if learns "$method"; then
    own+=("${TRAINING[@]}")
    edit-cli train-editor "${own[@]}" dataset="$LEARNED" "$@" run_dir="$OUT/training/$method" > /dev/null
  fi
  for size in $SIZES; do
    edit-cli evaluate "${own[@]}" dataset="$DATA" limit="$size" protocol.batch_size="$size" protocol.observe.sample=false \
      protocol.observe.max_new_tokens=8 "${BRIEF[@]}" "$@" run_dir="$OUT/runs/$method-$size" > /dev/null
  done
done
edit-cli compare "$OUT"/runs/*/ --x protocol.batch_size --published memit-counterfact-10k --out "$OUT/memit_scaling" \
  --metrics score,efficacy_success,paraphrase_success,neighborhood_success,neighborhood_accuracy,efficacy_generated_exact,paraphrase_generated_exact,neighborhood_generated_unchanged
