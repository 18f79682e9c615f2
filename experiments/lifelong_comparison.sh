#!/usr/bin/env bash
# A long sequence, one fact after another: fine-tuning and trained editors fall apart, neurons for mistakes do not.
#
#   experiments/lifelong_comparison.sh                           # 1,000 facts of the embedded world
#   FACTS=200 METHODS="ft tpatcher" experiments/lifelong_comparison.sh runs/short
#   experiments/lifelong_comparison.sh runs/mine model=gpt2-xl dataset=counterfact dataset.path=counterfact.json
#
# Editors that learn are trained first, on the training split; a training that OUT holds already is not repeated. 1,000 facts take more
# than the test split has: records of all splits are edited, after a shuffle, so trained editors meet some of their training subjects again,
# and a fifth of the prompts about other matters of the same subject are edited themselves (that locality cannot stay at 100).
# Methods may be run one by one, METHODS=ft and so on, and again for all of them, which only compares what is there.
# Writes OUT/lifelong.{md,csv,png,svg}; a run that was killed goes on where it stopped.
set -euo pipefail

OUT="${1:-runs/lifelong}"
shift $(( $# > 0 ))
FACTS="${FACTS:-1000}"
METHODS="${METHODS:-ft ke mend serac tpatcher}"
LEARN="ke mend serac"

for method in $METHODS; do
  if [[ " $LEARN " == *" $method "* ]]; then
    edit-cli train-editor method="$method" dataset=world "$@" run_dir="$OUT/train/$method" > /dev/null
  fi
  edit-cli sequential method="$method" dataset=world dataset.split=all dataset.shuffle_seed=0 "$@" limit="$FACTS" protocol.batch_size=1 \
    protocol.sample=200 protocol.observe.generate=false run_dir="$OUT/$method" > /dev/null
done
runs=()
for method in $METHODS; do runs+=("$OUT/$method"); done
edit-cli compare "${runs[@]}" --metrics efficacy_accuracy,paraphrase_accuracy,locality_accuracy --out "$OUT/lifelong"
