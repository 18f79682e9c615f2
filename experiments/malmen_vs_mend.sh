#!/usr/bin/env bash
# A hundred and five hundred facts at once: MALMEN, MEND (trained for as many, and trained for one and summed) and constrained fine-tuning.
# On a world four times as large as the shipped one, and a wider model that knows it. About an hour and a half of one CPU core in all.
#
#   experiments/malmen_vs_mend.sh FOLDER
#   SIZES=100 FACTS=500 METHODS="malmen mend" experiments/malmen_vs_mend.sh FOLDER limit=1000
#
# FOLDER gets the model, the world and the runs. What follows FOLDER goes to the trainings.
set -euo pipefail

if [[ $# -lt 1 ]]; then
  echo "usage: $0 FOLDER [SETTING…]   (environment: SIZES FACTS METHODS NORMS PYTHON)" >&2
  exit 2
fi
mkdir -p "$1"
folder=$(cd "$1" && pwd); shift
SIZES="${SIZES:-100 500}"          # facts edited at once
FACTS="${FACTS:-1000}"             # of the test split, edited in batches
METHODS="${METHODS:-malmen mend mend-summed ft-l}"
NORMS="${NORMS:-2.0e-2 5.0e-2 1.0e-1}"   # of fine-tuning; the one whose ES comes nearest is to be compared

if [[ ! -d $folder/tiny-gpt2 ]]; then
  "${PYTHON:-python}" -m edit_cli.tiny world --size 4 --width 192 --epochs 30 --out "$folder"
fi
common=(model=tiny-gpt2 "model.id=$folder/tiny-gpt2" model.name=world-4 dataset=world "dataset.path=$folder/world/statements.json")
places=("cache_dir=$folder/cache" "runs_dir=$folder/runs")
trainings=("method.training.trackers=[]" method.training.memory_mib=2048 "$@")

evaluated() {  # NAME SIZE SETTING…
  local name=$1 size=$2
  shift 2
  echo "== $name, $size facts at once"
  edit-cli evaluate "${common[@]}" "${places[@]}" protocol.observe.generate=false limit="$FACTS" protocol.batch_size="$size" tag="$name-$size" "$@"
}

for size in $SIZES; do
  steps=$((size >= 500 ? 12 : 60))
  for method in $METHODS; do
    case $method in
      malmen)
        own=(method=malmen 'method.layers=[2,3,4,5]' method.tokens=all method.step_size=1.5e-3 method.edits="$size" method.training.steps="$steps" method.training.validation_edits=2 "${trainings[@]}")
        edit-cli train-editor "${common[@]}" "${places[@]}" tag="malmen-$size" "${own[@]}"
        evaluated malmen "$size" "${own[@]}" ;;
      mend)
        own=(method=mend method.edits="$size" method.training.edits=1 method.training.steps="$steps" method.step_size=5.0e-4 method.edit_weight=0.3
             method.training.validate_every=50 method.training.validation_edits=2 'method.draw.locality=[random,same_relation]' "${trainings[@]}")
        edit-cli train-editor "${common[@]}" "${places[@]}" tag="mend-$size" "${own[@]}"
        evaluated mend "$size" "${own[@]}" ;;
      mend-summed)
        own=(method=mend method.training.steps=200 "${trainings[@]}")
        edit-cli train-editor "${common[@]}" "${places[@]}" tag=mend-1 "${own[@]}"
        evaluated mend-summed "$size" "${own[@]}" ;;
      *)
        for norm in $NORMS; do evaluated "$method-$norm" "$size" method="$method" method.norm_constraint="$norm"; done ;;
    esac
  done
done
