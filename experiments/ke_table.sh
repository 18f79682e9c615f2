#!/usr/bin/env bash
# KnowledgeEditor's table (De Cao et al., 2021): success, retained, equivalence and deterioration of KE, of its loop and its wordings, and of fine-tuning.
#
#   experiments/ke_table.sh                                  # claims on the embedded BERT, questions on the embedded T5
#   SCALE=paper experiments/ke_table.sh runs/bart            # zsRE on BART base
#   SCALE=paper SETUP="model=bert-base-uncased dataset=fever" experiments/ke_table.sh runs/bert model.id=CLASSIFIER_OF_CLAIMS
#
# SCALE: scale.sh. SETUP holds model and data, with commas between several; ALL names all layers, NORM is δ of constrained fine-tuning. One fact
# at a time. Beside them stands what MEND's authors measured of KE and fine-tuning. Writes MODEL.{md,csv} into OUT.
set -euo pipefail
. "$(dirname "$0")/scale.sh"

OUT="${1:-runs/ke_table}"
shift $(( $# > 0 ))
EMBEDDED="model=tiny-bert dataset=world_claims,model=tiny-t5 dataset=world_qa"
scaled SETUP "model=tiny-bert dataset=world_claims" "$EMBEDDED" "model=bart-base dataset=zsre_qa"
scaled ALL "[0,1,2,3,4,5]" "[0,1,2,3,4,5]" "[0,1,2,3,4,5,6,7,8,9,10,11]"
scaled NORM 5.0e-4 5.0e-4 1.0e-3
scaled LIMIT 2 100 1000
ROWS="ft-first ft-all ft-constrained ke ke-loop ke-wordings ke-wordings-loop"
scaled NAMES "ft-first ke-loop" "$ROWS" "$ROWS"

IFS=, read -r -a setups <<< "$SETUP"
for setup in "${setups[@]}"; do
  model="${setup#*model=}" model="${model%% *}"
  for name in $NAMES; do
    case "$name" in
      ft-first) settings="method=ft method.part=block method.layers=[0]" ;;
      ft-all) settings="method=ft method.part=block method.layers=$ALL" ;;
      ft-constrained) settings="method=ft-l method.part=block method.layers=$ALL method.norm_constraint=$NORM" ;;
      ke) settings="method=ke method.rounds=1 method.wordings=false" ;;
      ke-loop) settings="method=ke method.rounds=5 method.wordings=false" ;;
      ke-wordings) settings="method=ke method.rounds=1 method.wordings=true" ;;
      ke-wordings-loop) settings="method=ke method.rounds=5 method.wordings=true" ;;
      *) echo "$name: choose some of $ROWS" >&2; exit 2 ;;
    esac
    read -r -a own <<< "$setup $settings"
    if [[ $name == ke* ]]; then   # the loop has nothing to learn: it takes the training of the row without it
      own+=("${TRAINING[@]}")
      edit-cli train-editor "${own[@]/rounds=5/rounds=1}" "$@" run_dir="$OUT/$model/training/${name%-loop}" > /dev/null
    fi
    edit-cli evaluate "${own[@]}" limit="$LIMIT" protocol.batch_size=1 protocol.observe.sample=false protocol.observe.max_new_tokens=12 "${BRIEF[@]}" "$@" \
      tag="$name" run_dir="$OUT/$model/evaluate/$name" > /dev/null
  done
  edit-cli compare "$OUT/$model"/evaluate/*/ --by tag --published mend-fever,mend-zsre --out "$OUT/$model" \
    --metrics ke_success,ke_retain,ke_equivalence,ke_deterioration,efficacy_accuracy,paraphrase_accuracy,es_outer,locality_drawdown
done
