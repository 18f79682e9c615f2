#!/usr/bin/env bash
# The locate-then-edit family and its options in one table: one fact at a time, 50 at once, and a sequence of which nothing is taken back.
#
#   experiments/family_table.sh                                    # the embedded world, about a quarter of an hour on two cores
#   experiments/family_table.sh runs/mine seed=1
#   SCALE=paper experiments/family_table.sh runs/gpt-j             # AlphaEdit's protocol: 2,000 facts in steps of 100, GPT-J
#
# SCALE: scale.sh. Writes one.{md,csv}, fifty.{md,csv} and sequence.{md,csv,png,svg} into OUT.
set -euo pipefail
. "$(dirname "$0")/scale.sh"

OUT="${1:-runs/family_table}"
shift $(( $# > 0 ))
scaled SETUP "" "" "model=gpt-j-6b dataset=multi_counterfact"
scaled LIMIT 2 50 50
scaled FACTS 4 200 2000
scaled STEP 2 20 100
scaled CHECKPOINTS "[4]" "[20,100,200]" "[100,1000,2000]"
ROWS="rome r-rome memit emmet pmet alphaedit blue memit-merge"
OPTIONS="ultraedit memit-keeps-keys encore memit-rect memit-prune emmet-exact alphaedit-forgets"
scaled METHODS "rome memit-rect" "$ROWS $OPTIONS" "$ROWS $OPTIONS"
METRICS=efficacy_success,paraphrase_success,neighborhood_accuracy,efficacy_generated_exact,paraphrase_generated_exact,neighborhood_generated_unchanged

settings_of() {  # a row's settings: those of the method of its name, or an option of one
  case "$1" in
    ultraedit) echo method=ultraedit method.begin_with=0 ;;   # as published, with nothing to begin with
    memit-keeps-keys) echo method=memit method.past_keys=write ;;
    encore) echo method=memit method.past_keys=write method.norm_weight=0.1 method.value.mpes=4 "$ENCORE" ;;
    memit-rect) echo method=memit method.rect=0.4 ;;
    memit-prune) echo method=memit method.prune=1.2 ;;
    emmet-exact) echo method=emmet method.epsilon=0 ;;
    alphaedit-forgets) echo method=alphaedit method.past_keys=none ;;
    *) echo method="$1" ;;
  esac
}
scaled ENCORE method.covariance_weight=50 method.covariance_weight=50 ""   # its λ here; published ones are in conf/tuned

for name in $METHODS; do
  read -r -a own <<< "$SETUP $(settings_of "$name") protocol.observe.sample=false protocol.observe.max_new_tokens=8"
  own+=("${BRIEF[@]}" "$@" tag="$name")
  edit-cli evaluate "${own[@]}" limit="$LIMIT" protocol.batch_size=1 run_dir="$OUT/one/$name" > /dev/null
  edit-cli evaluate "${own[@]}" limit="$LIMIT" protocol.batch_size=50 run_dir="$OUT/fifty/$name" > /dev/null
  edit-cli sequential "${own[@]}" limit="$FACTS" protocol.batch_size="$STEP" protocol.checkpoints="$CHECKPOINTS" run_dir="$OUT/sequence/$name" > /dev/null
done
edit-cli compare "$OUT"/one/*/ --by tag --metrics "$METRICS" --published rome-counterfact --out "$OUT/one"
edit-cli compare "$OUT"/fifty/*/ --by tag --metrics "$METRICS" --out "$OUT/fifty"
edit-cli compare "$OUT"/sequence/*/ --by tag --metrics "$METRICS" --published alphaedit-counterfact --out "$OUT/sequence"
