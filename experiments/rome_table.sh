#!/usr/bin/env bash
# ROME's table (Meng et al., 2022): editors of all families on CounterFact, one fact at a time, and at paper scale on zsRE.
#
#   experiments/rome_table.sh                                # the embedded world, GPT-2
#   SCALE=paper experiments/rome_table.sh runs/xl            # GPT-2 XL: 7,500 records of CounterFact, 10,000 of zsRE
#   METHODS="none rome" LIMIT=500 SCALE=paper experiments/rome_table.sh runs/j model=gpt-j-6b
#
# SCALE: scale.sh. KE and MEND learn from what LEARNED names first, as theirs did from other data than is edited (CounterFact: KE-CF, MEND-CF).
# Writes DATA.{md,csv} into OUT for each data set of DATA.
set -euo pipefail
. "$(dirname "$0")/scale.sh"

OUT="${1:-runs/rome_table}"
shift $(( $# > 0 ))
scaled SETUP "model=tiny-gpt2" "model=tiny-gpt2" "model=gpt2-xl"
scaled LEARNED "dataset=world" "dataset=world" "dataset=zsre_qa method.draw.stays=answer"
scaled DATA counterfact counterfact "counterfact zsre_true"
scaled LIMIT 2 100 7500
scaled METHODS "none ft-l mend rome" "none ft ft-l kn ke mend rome" "none ft ft-l kn ke mend rome"
scaled ASKED "" "" "dataset.snippets=published"
scaled FLUENCY "" ",generation_entropy,reference_score" ",generation_entropy,reference_score"   # of texts of 100 tokens, which tiny runs leave out
COUNTERFACT=score,efficacy_success,efficacy_magnitude,paraphrase_success,paraphrase_magnitude,neighborhood_success,neighborhood_magnitude
WRITTEN=efficacy_generated_exact,paraphrase_generated_exact,neighborhood_generated_unchanged
ZSRE=efficacy_token_accuracy,paraphrase_token_accuracy,locality_token_accuracy,efficacy_generated_exact,paraphrase_generated_exact,locality_generated_unchanged

for method in $METHODS; do
  read -r -a own <<< "method=$method $SETUP"
  if learns "$method"; then
    read -r -a learned <<< "$LEARNED"
    own+=("${TRAINING[@]}")
    edit-cli train-editor "${own[@]}" "${learned[@]}" "$@" run_dir="$OUT/training/$method" > /dev/null
    own+=("${learned[@]:1}")   # settings of the training, but for its data
  fi
  for data in $DATA; do
    asked=()
    if [[ $data == counterfact ]]; then read -r -a asked <<< "$ASKED"; fi
    edit-cli evaluate "${own[@]}" dataset="$data" "${asked[@]}" limit="$LIMIT" protocol.batch_size=1 "${BRIEF[@]}" "$@" tag="$method" \
      run_dir="$OUT/$data/$method" > /dev/null
  done
done
for data in $DATA; do
  case "$data" in
    counterfact) metrics="$COUNTERFACT$FLUENCY,$WRITTEN" table=rome-counterfact ;;
    *) metrics="$ZSRE" table=rome-zsre ;;
  esac
  edit-cli compare "$OUT/$data"/*/ --by tag --metrics "$metrics" --published "$table" --out "$OUT/$data"
done
