#!/usr/bin/env bash
# The locate-then-edit family and its options in one table: one fact at a time, 50 at once, and 10 steps of 20 without taking anything back.
#
#   experiments/family_table.sh                                    # the embedded world, about a quarter of an hour on two cores
#   experiments/family_table.sh runs/mine seed=1
#
# Writes one.{md,csv}, fifty.{md,csv} and sequence.{md,csv,png,svg} into OUT.
set -euo pipefail

OUT="${1:-runs/family_table}"
shift $(( $# > 0 ))
COMMON=(protocol.observe.sample=false protocol.observe.max_new_tokens=8 "$@")
METRICS=efficacy_success,paraphrase_success,neighborhood_accuracy,efficacy_generated_exact,paraphrase_generated_exact,neighborhood_generated_unchanged

row() {  # what the line is called, settings
  name="$1"; shift
  set -- "$@" tag="$name" "${COMMON[@]}"
  edit-cli evaluate "$@" limit=50 protocol.batch_size=1 run_dir="$OUT/one/$name" > /dev/null
  edit-cli evaluate "$@" limit=50 protocol.batch_size=50 run_dir="$OUT/fifty/$name" > /dev/null
  edit-cli sequential "$@" limit=200 protocol.batch_size=20 'protocol.checkpoints=[20,100,200]' run_dir="$OUT/sequence/$name" > /dev/null
}
for method in ${METHODS:-rome r-rome memit emmet pmet alphaedit blue memit-merge}; do
  row "$method" method="$method"
done
if [[ -z "${METHODS:-}" ]]; then
  row ultraedit method=ultraedit method.begin_with=0   # as published, with nothing to begin with
  row memit-keeps-keys method=memit method.past_keys=write
  row encore method=memit method.past_keys=write method.covariance_weight=50 method.norm_weight=0.1 method.value.mpes=4
  row memit-rect method=memit method.rect=0.4
  row memit-prune method=memit method.prune=1.2
  row emmet-exact method=emmet method.epsilon=0
  row alphaedit-forgets method=alphaedit method.past_keys=none
fi
for part in one fifty sequence; do
  edit-cli compare "$OUT/$part"/*/ --by tag --metrics "$METRICS" --out "$OUT/$part"
done
