#!/usr/bin/env bash
# How many facts at once? Fine-tuning, a lookup cache, ENN, MEND and SERAC with 1, 5, 25, 75 and 250 simultaneous edits: one table, one figure.
# ENN and MEND are trained for each number, as in the paper, with about 2,500 and 500 facts; mend-one and enn-one are trained for
# one fact and used for all. SERAC is trained once. Every batch is taken back before the next.
#
#   experiments/serac_case_study.sh                                # the embedded world, about half an hour of one core
#   METHODS="lookup serac" SIZES="1 250" experiments/serac_case_study.sh runs/mine
#   experiments/serac_case_study.sh runs/mine seed=1 cache_dir=elsewhere
#   SCALE=paper experiments/serac_case_study.sh runs/t5            # zsRE on T5 large
#
# SCALE: scale.sh. What comes after OUT are settings of trainings and runs alike. Writes serac_case_study.{md,csv,png,svg} into OUT.
set -euo pipefail
. "$(dirname "$0")/scale.sh"

OUT="${1:-runs/serac_case_study}"
shift $(( $# > 0 ))
scaled SETUP "dataset=world" "dataset=world" "model=t5-large-ssm-nq dataset=zsre_qa"
scaled METHODS "lookup mend" "ft lookup enn mend serac" "lookup enn mend serac"   # and mend-one, enn-one
scaled SIZES "1 2" "1 5 25 75 250" "1 5 25 75"
scaled FACTS 2 25 100               # asked about at least, in batches

for_as_many() {  # METHOD SIZE: settings of a training for that many facts; of one they are those of conf/tuned
  case "$SCALE-$1-$2" in
    paper-mend-* | paper-enn-*) echo "method.edits=$2"; return ;;
  esac
  case "$1-$2" in
    *-one-*|serac-*|ft-*|lookup-*|*-1) ;;
    mend-*)
      local together=$(( $2 < 16 ? 16 / $2 : 1 ))  # independent edits a step
      local steps=$(( 2500 / (together * $2) ))
      echo "method.edits=$2" "method.training.edits=$together" "method.training.steps=$steps" "method.training.validate_every=$((steps / 2))" \
        "method.training.validation_edits=$(( 200 / $2 > 1 ? 200 / $2 : 1 ))" "method.step_size=$(( $2 < 25 ? 10 : 5 ))e-4" ;;
    enn-*)
      local together=$(( $2 < 8 ? 8 / $2 : 1 ))
      local steps=$(( 500 / (together * $2) > 6 ? 500 / (together * $2) : 6 ))
      echo "method.edits=$2" "method.training.edits=$together" "method.training.steps=$steps" "method.training.validate_every=$((steps / 2))" \
        "method.training.validation_edits=$(( 100 / $2 > 1 ? 100 / $2 : 1 ))" "method.step_size=$(( $2 < 75 ? 80 : 40 ))e-3" ;;
  esac
}

for name in $METHODS; do
  method="${name%-one}"
  for size in $SIZES; do
    many="$(for_as_many "$name" "$size")"
    read -r -a own <<< "method=$method $SETUP $many"
    if learns "$method"; then   # once where all sizes have the same settings: a finished training is not repeated
      own+=("${TRAINING[@]}")
      edit-cli train-editor "${own[@]}" run_dir="$OUT/training/$name${many:+-$size}" "$@" > /dev/null
    fi
    edit-cli evaluate "${own[@]}" "${BRIEF[@]}" protocol.batch_size="$size" limit="$(( size > FACTS ? size : FACTS ))" \
      tag="$name" run_dir="$OUT/$name/$size" protocol.observe.sample=false protocol.observe.max_new_tokens=8 "$@" > /dev/null
  done
done
edit-cli compare $(for name in $METHODS; do printf '%s ' "$OUT/$name"/*/; done) --x protocol.batch_size --by tag --out "$OUT/serac_case_study" \
  --metrics es_outer,es_edit,paraphrase_generated_exact,efficacy_generated_exact,locality_generated_unchanged,locality_random_drawdown,locality_same_relation_drawdown,locality_same_relation_disagreement
