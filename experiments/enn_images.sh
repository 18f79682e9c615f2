#!/usr/bin/env bash
# Editable Neural Networks on images (Sinitsin et al., 2020): one image of the test split gets another label; success rate, drawdown in accuracy on
# other images, and gradient steps, of ENN beside its untrained control, plain fine-tuning, KE and MEND.
#
#   experiments/enn_images.sh                                            # the embedded ResNet and digits, some ten minutes of one core
#   MODELS="tiny-resnet tiny-vit" experiments/enn_images.sh runs/both
#   MODELS=hf experiments/enn_images.sh runs/cifar model.id=FOLDER model.perplexity_text=null 'method.layers=[4,5]' dataset=cifar10 dataset.path=cifar-10-batches-bin dataset.others=0
#
# LIMIT images are edited one at a time, each from the same weights. Editors that learn are trained first, on the training split; a training that OUT
# holds already is not repeated. Writes MODEL.{md,csv} into OUT; a run that was killed goes on where it stopped.
set -euo pipefail

OUT="${1:-runs/enn_images}"
shift $(( $# > 0 ))
LIMIT="${LIMIT:-50}"
MODELS="${MODELS:-tiny-resnet}"
METRICS=es_edit,gradient_steps,locality_drawdown,locality_disagreement,efficacy_generated_exact,locality_generated_unchanged

row() {  # model, name of the row, settings of the method
  local model="$1" name="$2"
  shift 2
  local settings=(model="$model" dataset=digits dataset.others=50 "$@" "${OVERRIDES[@]}")
  if [[ "$*" != *method=ft* ]]; then
    edit-cli train-editor "${settings[@]}" run_dir="$OUT/$model/train/$name" > /dev/null
  fi
  edit-cli evaluate "${settings[@]}" limit="$LIMIT" protocol.batch_size=1 protocol.observe.top_tokens=0 run_dir="$OUT/$model/evaluate/$name" tag="$name" > /dev/null
}

OVERRIDES=("$@")
for model in $MODELS; do
  row "$model" ft method=ft
  row "$model" ke method=ke
  row "$model" mend method=mend
  row "$model" enn-untrained method=enn method.trains=nothing
  row "$model" enn method=enn
  edit-cli compare "$OUT/$model/evaluate"/*/ --by tag --metrics "$METRICS" --out "$OUT/$model"
done
