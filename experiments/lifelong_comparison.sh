#!/usr/bin/env bash
# A long sequence, one fact after another: fine-tuning and trained editors fall apart, neurons for mistakes do not.
#
#   experiments/lifelong_comparison.sh                           # 800 facts of the embedded world
#   FACTS=200 METHODS="ft tpatcher" experiments/lifelong_comparison.sh runs/short
#   SCALE=paper experiments/lifelong_comparison.sh runs/t5       # GRACE's table: 1,000 of zsRE on T5 small
#
# SCALE: scale.sh. Editors that learn are trained first, on the training split; a training that OUT holds already is not repeated. Edited are records of the
# test split after a shuffle, whose subjects no training has met; of its 880, some stay unedited (protocol.holdout). They are four a subject:
# by the end nine in ten of the prompts about other matters of the same subject ask for what is edited, too, in other words. That locality
# cannot stay; dataset.one_a_subject=true edits 220 facts among which there are no such prompts.
# Methods may be run one by one, METHODS=ft and so on, and again for all of them, which only compares what is there.
# Writes OUT/lifelong.{md,csv,png,svg}; a run that was killed goes on where it stopped.
set -euo pipefail
. "$(dirname "$0")/scale.sh"

OUT="${1:-runs/lifelong}"
shift $(( $# > 0 ))
scaled FACTS 3 800 1000
scaled METHODS "ft mend" "ft ke mend serac tpatcher" "ewc replay retrain mend defer grace melo"
scaled SETUP "dataset=world" "dataset=world" "model=t5-small-ssm-nq dataset=zsre_qa"
scaled ASKED "protocol.holdout=4 protocol.sample=4" "protocol.observe.max_new_tokens=8 protocol.sample=200" "protocol.sample=200"

for method in $METHODS; do
  read -r -a own <<< "method=$method $SETUP"
  if learns "$method"; then
    own+=("${TRAINING[@]}")
    edit-cli train-editor "${own[@]}" "$@" run_dir="$OUT/train/$method" > /dev/null
  fi
  # shellcheck disable=SC2086  # settings are split at spaces
  edit-cli sequential "${own[@]}" dataset.split=test dataset.shuffle_seed=0 $ASKED "${BRIEF[@]}" "$@" \
    limit="$FACTS" protocol.batch_size=1 run_dir="$OUT/$method" > /dev/null
done
runs=()
for method in $METHODS; do runs+=("$OUT/$method"); done
edit-cli compare "${runs[@]}" --published grace,wise-zsre --out "$OUT/lifelong" \
  --metrics efficacy_accuracy,paraphrase_accuracy,locality_same_relation_accuracy,efficacy_generated_exact,paraphrase_generated_exact,locality_same_relation_generated_unchanged
