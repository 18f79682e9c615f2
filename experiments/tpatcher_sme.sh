#!/usr/bin/env bash
# T-Patcher's table (Huang et al., 2023): only mistakes are edited, one after another, over folds; SR, GR, ER, TrainR and TestR of each method.
#
#   experiments/tpatcher_sme.sh                                # claims on the embedded BERT, questions on the embedded BART
#   SCALE=paper experiments/tpatcher_sme.sh runs/bart          # zsRE on BART base, 20 folds
#   SCALE=paper SETUP="model=bert-base-uncased dataset=fever" experiments/tpatcher_sme.sh runs/bert model.id=CLASSIFIER_OF_CLAIMS
#
# SCALE: scale.sh. SETUP holds model and data, with commas between several. Editors that learn are trained first. docs/sequential.md tells what the
# rates are. Writes MODEL.{md,csv} into OUT.
set -euo pipefail
. "$(dirname "$0")/scale.sh"

OUT="${1:-runs/tpatcher_sme}"
shift $(( $# > 0 ))
EMBEDDED="model=tiny-bert dataset=world_claims,model=tiny-bart dataset=world_qa"
scaled SETUP "model=tiny-bert dataset=world_claims" "$EMBEDDED" "model=bart-base dataset=zsre_qa"
scaled LIMIT 6 90 5317
scaled METHODS "ft-l tpatcher" "ft mend lookup tpatcher" "ke mend tpatcher"
FOLDS="protocol.folds=2 protocol.train=4 protocol.test=4"
scaled ASKED "$FOLDS" "protocol.folds=3 protocol.train=150 protocol.test=150" \
  "dataset.split=validation protocol.answers=right protocol.folds=20 protocol.train=10000 protocol.test=10000"
scaled REMEMBERED method.memory_size=100 "" ""

IFS=, read -r -a setups <<< "$SETUP"
for setup in "${setups[@]}"; do
  model="${setup#*model=}" model="${model%% *}"
  for method in $METHODS; do
    read -r -a own <<< "$setup method=$method"
    if learns "$method"; then
      own+=("${TRAINING[@]}")
      edit-cli train-editor "${own[@]}" "$@" run_dir="$OUT/$model/training/$method" > /dev/null
    fi
    if [[ $method == tpatcher ]]; then own+=(${REMEMBERED:+"$REMEMBERED"}); fi
    read -r -a asked <<< "$ASKED"
    edit-cli sequential protocol=sme "${own[@]}" limit="$LIMIT" "${asked[@]}" "${BRIEF[@]}" "$@" run_dir="$OUT/$model/runs/$method" > /dev/null
  done
  edit-cli compare "$OUT/$model"/runs/*/ --metrics sme_sr,sme_gr,sme_er,sme_train_r,sme_test_r --published tpatcher-sme --out "$OUT/$model"
done
