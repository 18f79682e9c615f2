#!/usr/bin/env bash
# Editable Neural Networks on translation (Sinitsin et al., 2020): one sentence of the test split gets the translation that is wanted; success rate, drawdown in
# BLEU on other sentences, and gradient steps, of ENN beside its untrained control, plain fine-tuning, KE and MEND. BLEU needs sacrebleu (pip install 'edit-cli[translation]').
#
#   experiments/enn_translation.sh                                       # two invented languages and the embedded translator, some ten minutes of one core
#   MODEL=t5-small experiments/enn_translation.sh runs/wmt 'method.layers=[10,11]' dataset.path=newstest.en dataset.reference_path=newstest.de \
#     'dataset.prefix=translate English to German:' protocol.observe.max_new_tokens=80
#
# LIMIT sentences are edited one at a time, each from the same weights. Editors that learn are trained first, on the training split; a training that OUT
# holds already is not repeated. Writes translation.{md,csv} into OUT; a run that was killed goes on where it stopped.
set -euo pipefail

OUT="${1:-runs/enn_translation}"
shift $(( $# > 0 ))
LIMIT="${LIMIT:-50}"
MODEL="${MODEL:-tiny-translator}"
METRICS=es_edit,gradient_steps,bleu,bleu_drawdown,locality_disagreement,efficacy_generated_exact,locality_generated_unchanged

row() {  # name of the row, settings of the method
  local name="$1"
  shift
  local settings=(model="$MODEL" dataset=pairs "$@" "${OVERRIDES[@]}")
  local asking=(protocol.batch_size=1 protocol.observe.sample=false protocol.observe.top_tokens=0)
  if [[ "$*" != *method=ft* ]]; then
    edit-cli train-editor "${settings[@]}" run_dir="$OUT/train/$name" > /dev/null
  fi
  edit-cli evaluate "${settings[@]}" limit="$LIMIT" "${asking[@]}" run_dir="$OUT/evaluate/$name" tag="$name" > /dev/null
}

OVERRIDES=("$@")
row ft method=ft
row ke method=ke
row mend method=mend
row enn-untrained method=enn method.trains=nothing
row enn method=enn
edit-cli compare "$OUT"/evaluate/*/ --by tag --metrics "$METRICS" --out "$OUT/translation"
