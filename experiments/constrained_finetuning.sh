#!/usr/bin/env bash
# Constrained fine-tuning (Zhu et al., 2020): accuracy on modified and on unmodified facts by δ, by blocks and by norm, against its two baselines
# (fine-tuning on the modified facts alone, and on modified and unmodified ones together).
#
#   experiments/constrained_finetuning.sh                                     # T-REx's embedded twin, some ten minutes of one core
#   experiments/constrained_finetuning.sh runs/claims model=tiny-bert dataset=world_claims
#   BLOCKS="first=[0] middle=[15] last=[29]" LINF="1e-4 3e-4 1e-3" L2="0.1 0.3 1" \
#     experiments/constrained_finetuning.sh runs/real model=hf model.id=SmolLM2-135M dataset=trex dataset.path=LAMA/TREx
#   SCALE=paper experiments/constrained_finetuning.sh runs/medium dataset.path=LAMA/TREx
#
# SCALE: scale.sh. The paper's model fills in masks, which nothing here does: GPT-2 medium, of the size of its larger one, stands for it.
# FACTS facts are modified at once. Whole blocks are tuned; BLOCKS names them as NAME=LAYERS. Writes linf.{md,csv,png,svg}, l2.{…} (by δ, a line a
# choice of blocks) and baselines.{md,csv} into OUT; a run that was killed goes on where it stopped.
set -euo pipefail
. "$(dirname "$0")/scale.sh"

OUT="${1:-runs/constrained_finetuning}"
shift $(( $# > 0 ))
scaled SETUP "dataset=trex" "dataset=trex" "model=gpt2-medium dataset=trex"
scaled FACTS 2 32 32
scaled BLOCKS "last=[5]" "first=[0] middle=[2] last=[5] all=[0,1,2,3,4,5]" "first=[0] middle=[11] last=[23]"
scaled LINF 1e-2 "1e-3 3e-3 1e-2 3e-2" "1e-4 3e-4 1e-3 3e-3"
scaled L2 3 "0.3 1 3 10" "0.1 0.3 1 3"
METRICS=modified_accuracy,unmodified_accuracy,modified_written,unmodified_written

tune() {  # run directory, settings; those given to the script come last
  place="$1"; shift
  # shellcheck disable=SC2086  # settings are split at spaces
  edit-cli evaluate $SETUP "${BRIEF[@]}" "$@" method.part=block limit="$FACTS" protocol.batch_size=all protocol.observe.sample=false protocol.observe.max_new_tokens=8 \
    run_dir="$OUT/$place" > /dev/null
}
for block in $BLOCKS; do
  name="${block%%=*}"
  for delta in $LINF; do
    tune "linf/$name-$delta" method=ft-l "method.layers=${block#*=}" method.norm_constraint="$delta" tag="$name" "$@"
  done
  for delta in $L2; do
    tune "l2/$name-$delta" method=ft-l "method.layers=${block#*=}" method.norm=l2 method.norm_constraint="$delta" tag="$name" "$@"
  done
  for baseline in ft ft-mixed; do
    tune "baselines/$baseline-$name" method="$baseline" "method.layers=${block#*=}" tag="$baseline-$name" "$@"
  done
done
for norm in linf l2; do
  edit-cli compare "$OUT/$norm"/*/ --x method.norm_constraint --by tag --metrics "$METRICS" --out "$OUT/$norm"
done
edit-cli compare "$OUT"/baselines/*/ --by tag --metrics "$METRICS" --out "$OUT/baselines"
