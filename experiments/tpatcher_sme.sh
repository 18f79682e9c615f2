#!/usr/bin/env bash
# T-Patcher's table (Huang et al., 2023): only mistakes are edited, one after another, over folds; SR, GR, ER, TrainR and TestR of each method.
#
#   experiments/tpatcher_sme.sh                                # claims on the embedded BERT, questions on the embedded BART
#   SCALE=paper experiments/tpatcher_sme.sh runs/bart          # zsRE on BART base, 20 folds
#   SCALE=paper SETUP="model=bert-base-uncased dataset=fever" experiments/tpatcher_sme.sh runs/bert model.id=CLASSIFIER_OF_CLAIMS
#   DEPTH=6 SETUP="model=hf model.id=FOLDER dataset=fever dataset.path=fever.jsonl protocol.answers=right" experiments/tpatcher_sme.sh runs/own
#
# SETUP holds model and data, with commas between several; train_base.sh makes models that err. DEPTH: blocks of a model that is not ours. TUNED and
# PATCHED: further settings of fine-tuning and of T-Patcher. Editors that learn are trained first. docs/sequential.md tells what the rates are.
# SCALE: scale.sh. Writes MODEL.{md,csv} into OUT.
set -euo pipefail
. "$(dirname "$0")/scale.sh"

OUT="${1:-runs/tpatcher_sme}"
shift $(( $# > 0 ))
EMBEDDED="model=tiny-bert dataset=world_claims,model=tiny-bart dataset=world_qa"
ROWS="ft-last ft-all ke mend serac lookup retrain tpatcher"
scaled SETUP "model=tiny-bert dataset=world_claims" "$EMBEDDED" "model=bart-base dataset=zsre_qa"
scaled LIMIT 6 90 5317
scaled METHODS "ft-all tpatcher" "$ROWS" "ft-last ft-all ke mend tpatcher"
FOLDS="protocol.folds=2 protocol.train=4 protocol.test=4"
scaled ASKED "$FOLDS" "protocol.folds=3 protocol.train=150 protocol.test=150" \
  "dataset.split=validation protocol.answers=right protocol.folds=20 protocol.train=10000 protocol.test=10000"
scaled DEPTH "" "" ""
scaled TUNED "" "" ""
scaled PATCHED method.memory_size=100 "" ""

layers() {  # MODEL last|all: blocks of all its stacks
  local depth="$DEPTH"
  case "$1" in
    tiny-bert | tiny-t5) depth=6 ;;
    tiny-bart) depth=5 ;;
    bert-base-uncased | bart-base) depth=12 ;;
  esac
  [[ -n $depth ]] || { echo "DEPTH: say how many blocks $1 has" >&2; exit 2; }
  if [[ $2 == last ]]; then echo "[$(( depth - 1 ))]"; else echo "[$(seq -s , 0 $(( depth - 1 )))]"; fi
}

FAILED=0
run() {  # a method that a model has no settings for is told, and those after it go on
  edit-cli "$@" > /dev/null || { echo "failed: edit-cli $*" >&2; FAILED=1; return 1; }
}

IFS=, read -r -a setups <<< "$SETUP"
for setup in "${setups[@]}"; do
  model="${setup#*model=}" model="${model%% *}"
  for row in $METHODS; do
    case "$row" in
      ft-last | ft-all)
        chosen="$(layers "$model" "${row#ft-}")" || exit 2
        settings="method=ft method.part=block method.layers=$chosen $TUNED" ;;
      tpatcher) settings="method=tpatcher $PATCHED" ;;
      ke | mend | serac | lookup | retrain) settings="method=$row" ;;
      *) echo "$row: choose some of $ROWS" >&2; exit 2 ;;
    esac
    read -r -a own <<< "$setup $settings"
    if learns "$row"; then
      own+=("${TRAINING[@]}")
      run train-editor "${own[@]}" "$@" run_dir="$OUT/$model/training/$row" || continue
    fi
    read -r -a asked <<< "$ASKED"
    run sequential protocol=sme "${own[@]}" limit="$LIMIT" "${asked[@]}" "${BRIEF[@]}" "$@" tag="$row" run_dir="$OUT/$model/runs/$row" || true
  done
  ended=()
  for summary in "$OUT/$model"/runs/*/summary.json; do ended+=("${summary%/summary.json}"); done
  edit-cli compare "${ended[@]}" --by tag --metrics sme_sr,sme_gr,sme_er,sme_train_r,sme_test_r --published tpatcher-sme --out "$OUT/$model"
done
exit "$FAILED"
