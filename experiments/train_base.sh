#!/usr/bin/env bash
# Base models that have learned their data and still err, for tpatcher_sme.sh: a classifier of claims, and an encoder-decoder that answers questions.
#
#   experiments/train_base.sh                                                              # both, from random weights, on the embedded world
#   KINDS=claims CLAIMS="FOLDER dataset=fever dataset.path=fever.jsonl" LEARNED=1000 experiments/train_base.sh runs/minilm   # of a pretrained encoder
#   SCALE=paper CLAIMS="bert-base-uncased dataset=fever" QUESTIONS="facebook/bart-base dataset=zsre_qa" experiments/train_base.sh
#
# CLAIMS and QUESTIONS: a model, its data, and further arguments of `python -m tools.train_base`, by transformers' Trainer. LEARNED: records that are
# learned, the first ones; the 200 after them are asked afterwards. SCALE: scale.sh. Writes OUT/claims and OUT/questions.
set -euo pipefail
. "$(dirname "$0")/scale.sh"

OUT="${1:-runs/base}"
shift $(( $# > 0 ))
scaled KINDS "claims questions" "claims questions" "claims questions"
scaled CLAIMS "tiny-bert --scratch --epochs 1 --held_out 4 dataset=world_claims" \
  "tiny-bert --scratch --epochs 40 --lr 1e-3 --batch 32 dataset=world_claims dataset.split=train" \
  "bert-base-uncased --epochs 3 --lr 3e-5 --batch 32 dataset=fever"
scaled QUESTIONS "tiny-bart --scratch --epochs 1 --held_out 4 dataset=world_qa" \
  "tiny-bart --scratch --epochs 40 --lr 1e-3 --batch 32 dataset=world_qa dataset.split=train" \
  "facebook/bart-base --epochs 3 --lr 3e-5 --batch 32 dataset=zsre_qa"
scaled LEARNED 12 "" ""

export PYTHONPATH="$(dirname "$0")/..${PYTHONPATH:+:$PYTHONPATH}"   # where tools/ is
for kind in $KINDS; do
  case "$kind" in
    claims) read -r -a own <<< "$CLAIMS" ;;
    questions) read -r -a own <<< "$QUESTIONS" ;;
    *) echo "$kind: choose claims or questions" >&2; exit 2 ;;
  esac
  "${PYTHON:-python}" -m tools.train_base "${own[@]}" ${LEARNED:+--limit "$LEARNED"} "$@" --out "$OUT/$kind"
done
