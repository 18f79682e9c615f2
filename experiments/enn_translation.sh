#!/usr/bin/env bash
# Editable Neural Networks on translation (Sinitsin et al., 2020): one sentence of the test split gets the translation that is wanted; success rate, drawdown in
# BLEU on other sentences, and gradient steps, of ENN beside its untrained control, plain fine-tuning, KE and MEND. BLEU needs sacrebleu (pip install 'edit-cli[translation]').
#
#   experiments/enn_translation.sh                                       # two invented languages and the embedded translator, some ten minutes of one core
#   SCALE=paper experiments/enn_translation.sh runs/wmt dataset.path=newstest.en dataset.reference_path=newstest.de \
#     'dataset.prefix=translate English to German:'
#
# SCALE: scale.sh; at paper scale sentences of yours on T5 small, of which LAYERS are edited. LIMIT sentences are edited one at a time, each from
# the same weights. Editors that learn are trained first, on the training split; a training that OUT
# holds already is not repeated. Writes translation.{md,csv} into OUT; a run that was killed goes on where it stopped.
set -euo pipefail
. "$(dirname "$0")/scale.sh"

OUT="${1:-runs/enn_translation}"
shift $(( $# > 0 ))
scaled LIMIT 2 50 50
scaled MODEL tiny-translator tiny-translator t5-small
scaled LAYERS "" "" "[10,11]"
scaled SETUP "dataset=pairs" "dataset=pairs" "dataset=pairs method.layers=$LAYERS"
scaled ASKED "" "" "protocol.observe.max_new_tokens=80"
scaled ROWS "ft enn" "ft ke mend enn-untrained enn" "ft ke mend enn-untrained enn"
METRICS=es_edit,gradient_steps,bleu,bleu_drawdown,locality_disagreement,efficacy_generated_exact,locality_generated_unchanged

row() {  # name of the row; settings given to the script
  local name="$1" own
  shift
  read -r -a own <<< "model=$MODEL method=${name%-untrained} $SETUP"
  if [[ $name == *-untrained ]]; then own+=(method.trains=nothing); fi
  if learns "${name%-untrained}"; then own+=("${TRAINING[@]}"); fi
  local settings=("${own[@]}" "$@")
  local asking=(protocol.batch_size=1 protocol.observe.sample=false protocol.observe.top_tokens=0 ${ASKED:+"$ASKED"} "${BRIEF[@]}")
  if learns "${name%-untrained}"; then
    edit-cli train-editor "${settings[@]}" run_dir="$OUT/train/$name" > /dev/null
  fi
  edit-cli evaluate "${settings[@]}" limit="$LIMIT" "${asking[@]}" run_dir="$OUT/evaluate/$name" tag="$name" > /dev/null
}

for name in $ROWS; do row "$name" "$@"; done
edit-cli compare "$OUT"/evaluate/*/ --by tag --metrics "$METRICS" --out "$OUT/translation"
