#!/usr/bin/env bash
# A long sequence, one fact after another: fine-tuning and trained editors fall apart, neurons for mistakes do not.
#
#   experiments/lifelong_comparison.sh                           # 800 facts of the embedded world
#   FACTS=200 METHODS="ft tpatcher" experiments/lifelong_comparison.sh runs/short
#   experiments/lifelong_comparison.sh runs/mine model=gpt2-xl dataset=counterfact dataset.path=counterfact.json dataset.split=null
#
# Editors that learn are trained first, on the training split; a training that OUT holds already is not repeated. Edited are records of the
# test split after a shuffle, whose subjects no training has met; of its 880, some stay unedited (protocol.holdout). They are four a subject:
# by the end nine in ten of the prompts about other matters of the same subject ask for what is edited, too, in other words. That locality
# cannot stay; dataset.one_a_subject=true edits 220 facts among which there are no such prompts.
# Methods may be run one by one, METHODS=ft and so on, and again for all of them, which only compares what is there.
# Writes OUT/lifelong.{md,csv,png,svg}; a run that was killed goes on where it stopped.
set -euo pipefail

OUT="${1:-runs/lifelong}"
shift $(( $# > 0 ))
FACTS="${FACTS:-800}"
METHODS="${METHODS:-ft ke mend serac tpatcher}"
LEARN="ke mend serac"

for method in $METHODS; do
  if [[ " $LEARN " == *" $method "* ]]; then
    edit-cli train-editor method="$method" dataset=world "$@" run_dir="$OUT/train/$method" > /dev/null
  fi
  edit-cli sequential method="$method" dataset=world dataset.split=test dataset.shuffle_seed=0 protocol.observe.max_new_tokens=8 "$@" \
    limit="$FACTS" protocol.batch_size=1 protocol.sample=200 run_dir="$OUT/$method" > /dev/null
done
runs=()
for method in $METHODS; do runs+=("$OUT/$method"); done
edit-cli compare "${runs[@]}" --out "$OUT/lifelong" \
  --metrics efficacy_accuracy,paraphrase_accuracy,locality_same_relation_accuracy,efficacy_generated_exact,paraphrase_generated_exact,locality_same_relation_generated_unchanged
