#!/usr/bin/env bash
# EasyEdit's method table (Yao et al., 2023): methods of all families on the same facts, one at a time.
#
#   experiments/survey_methods.sh                            # the embedded world, GPT-2
#   SCALE=paper experiments/survey_methods.sh runs/gpt-j     # GPT-J: zsRE (an alternative answer is written), and CounterFact
#   METHODS="ike memit" DATA=world experiments/survey_methods.sh runs/mine seed=1
#
# SCALE: scale.sh. DATA holds data sets. Editors that learn are trained first, on the training split. Writes DATA.{md,csv} into OUT.
set -euo pipefail
. "$(dirname "$0")/scale.sh"

OUT="${1:-runs/survey_methods}"
shift $(( $# > 0 ))
scaled MODEL_NAME tiny-gpt2 tiny-gpt2 gpt-j-6b
scaled DATA world "world counterfact" "zsre_alt counterfact"
scaled LIMIT 2 100 1037
scaled METHODS "ft-l lookup ike mend rome" "ft-l lookup serac ike ke mend rome memit" "ft-l serac ike ke mend rome memit"
RIGHT=efficacy_token_accuracy,paraphrase_token_accuracy,efficacy_generated_exact,paraphrase_generated_exact

for data in $DATA; do
  for method in $METHODS; do
    own=(method="$method" model="$MODEL_NAME")
    if learns "$method"; then   # where CounterFact is edited, as in the survey, by what was trained on questions
      own+=("${TRAINING[@]}")
      scaled LEARNED world world zsre_qa
      edit-cli train-editor "${own[@]}" dataset="$LEARNED" "$@" run_dir="$OUT/training/$method" > /dev/null
    fi
    edit-cli evaluate "${own[@]}" dataset="$data" limit="$LIMIT" protocol.batch_size=1 protocol.observe.sample=false "${BRIEF[@]}" "$@" \
      tag="$method" run_dir="$OUT/$data/$method" > /dev/null
  done
  case "$data" in   # what must stay
    *counterfact) kept=neighborhood_accuracy,neighborhood_generated_unchanged ;;
    *) kept=locality_unchanged,locality_generated_unchanged ;;
  esac
  edit-cli compare "$OUT/$data"/*/ --by tag --metrics "$RIGHT,$kept" --published survey-zsre,survey-counterfact,knowedit-zsre --out "$OUT/$data"
done
