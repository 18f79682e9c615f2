#!/usr/bin/env bash
# How many facts at once? Fine-tuning, a lookup cache, ENN, MEND and SERAC with 1, 5, 25, 75 and 250 simultaneous edits: one table, one figure.
# Trained editors are trained once, for the edits that their settings name, and used for all sizes. Every batch is taken back before the next.
#
#   experiments/serac_case_study.sh                                # the embedded world, about a quarter of an hour of one core
#   METHODS="lookup serac" SIZES="1 250" experiments/serac_case_study.sh runs/mine
#   experiments/serac_case_study.sh runs/mine seed=1 cache_dir=elsewhere
#
# What comes after OUT are settings of trainings and runs alike. Writes serac_case_study.{md,csv,png,svg} into OUT.
set -euo pipefail

OUT="${1:-runs/serac_case_study}"
shift $(( $# > 0 ))
METHODS="${METHODS:-ft lookup enn mend serac}"
TRAINED=" enn mend serac "
SIZES="${SIZES:-1 5 25 75 250}"
FACTS="${FACTS:-25}"               # asked about at least, in batches

for method in $METHODS; do
  if [[ $TRAINED == *" $method "* ]]; then
    edit-cli train-editor method="$method" dataset=world run_dir="$OUT/training/$method" "$@" > /dev/null
  fi
  for size in $SIZES; do
    edit-cli evaluate method="$method" dataset=world protocol.batch_size="$size" limit="$(( size > FACTS ? size : FACTS ))" tag="$method" \
      run_dir="$OUT/$method/$size" protocol.observe.sample=false protocol.observe.generate=false "$@" > /dev/null
  done
done
edit-cli compare $(for method in $METHODS; do printf '%s ' "$OUT/$method"/*/; done) --x protocol.batch_size --by tag --out "$OUT/serac_case_study" \
  --metrics es_outer,es_edit,locality_random_drawdown,locality_same_relation_drawdown,locality_same_relation_disagreement
