#!/usr/bin/env bash
# Editable Neural Networks on images (Sinitsin et al., 2020): one image of the test split gets another label; success rate, drawdown in accuracy on
# other images, and gradient steps, of ENN beside its untrained control, plain fine-tuning, KE and MEND.
#
#   experiments/enn_images.sh                                            # the embedded ResNet and digits, some ten minutes of one core
#   MODELS="tiny-resnet tiny-vit" experiments/enn_images.sh runs/both
#   SCALE=paper experiments/enn_images.sh runs/cifar model.id=FOLDER dataset.path=cifar-10-batches-bin
#
# SCALE: scale.sh; at paper scale CIFAR-10 on a ResNet of yours, of which LAYERS are edited. LIMIT images are edited one at a time, each from the same weights. Editors that learn are trained first, on the training split; a training that OUT
# holds already is not repeated. Writes MODEL.{md,csv} into OUT; a run that was killed goes on where it stopped.
set -euo pipefail
. "$(dirname "$0")/scale.sh"

OUT="${1:-runs/enn_images}"
shift $(( $# > 0 ))
scaled LIMIT 2 50 50
scaled MODELS tiny-resnet tiny-resnet hf
scaled LAYERS "" "" "[4,5]"
scaled SETUP "dataset=digits dataset.others=4" "dataset=digits dataset.others=50" "dataset=cifar10 dataset.others=0 model.perplexity_text=null method.layers=$LAYERS"
scaled ROWS "ft enn" "ft ke mend enn-untrained enn" "ft ke mend enn-untrained enn"
METRICS=es_edit,gradient_steps,locality_drawdown,locality_disagreement,efficacy_generated_exact,locality_generated_unchanged

row() {  # model, name of the row; settings given to the script
  local model="$1" name="$2" own
  shift 2
  read -r -a own <<< "model=$model method=${name%-untrained} $SETUP"
  if [[ $name == *-untrained ]]; then own+=(method.trains=nothing); fi
  if learns "${name%-untrained}"; then own+=("${TRAINING[@]}"); fi
  local settings=("${own[@]}" "$@")
  if learns "${name%-untrained}"; then
    edit-cli train-editor "${settings[@]}" run_dir="$OUT/$model/train/$name" > /dev/null
  fi
  edit-cli evaluate "${settings[@]}" limit="$LIMIT" protocol.batch_size=1 protocol.observe.top_tokens=0 "${BRIEF[@]}" run_dir="$OUT/$model/evaluate/$name" tag="$name" > /dev/null
}

for model in $MODELS; do
  for name in $ROWS; do row "$model" "$name" "$@"; done
  edit-cli compare "$OUT/$model/evaluate"/*/ --by tag --metrics "$METRICS" --out "$OUT/$model"
done
