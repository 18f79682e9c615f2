#!/usr/bin/env bash
# A hundred and five hundred facts at once: MALMEN, MEND (trained for a hundred, and trained for one and summed) and constrained fine-tuning.
# On a world four times as large as the shipped one, and a wider model that knows it. About an hour of one CPU core in all.
#
#   experiments/malmen_vs_mend.sh FOLDER
#   SIZES=100 METHODS="malmen mend" experiments/malmen_vs_mend.sh FOLDER seed=1
#   SCALE=paper experiments/malmen_vs_mend.sh FOLDER               # zsRE on GPT-J, with the published settings
#
# SCALE: scale.sh; at tiny scale the model is the shipped one. FOLDER gets the model, the world, the runs and
# malmen_vs_mend.{md,csv}. What follows FOLDER are settings of trainings and runs alike.
# Every fact is about another subject: two about one would count as damage what another edit of the batch asks for.
set -euo pipefail
. "$(dirname "$0")/scale.sh"

if [[ $# -lt 1 ]]; then
  echo "usage: $0 FOLDER [SETTING…]   (environment: SCALE SIZES FACTS METHODS NORMS RUNS PYTHON)" >&2
  exit 2
fi
mkdir -p "$1"
folder=$(cd "$1" && pwd); shift
scaled SIZES 4 "100 500" "512 1900"   # facts edited at once
scaled FACTS 4 500 1900               # of the test split, edited in batches; 880 subjects are there
scaled METHODS "malmen mend ft-l" "malmen mend mend-summed ft-l" "malmen mend ft-l memit"
scaled NORMS 2.0e-2 "2.0e-2 2.5e-2 3.0e-2 5.0e-2" 5.0e-5   # of fine-tuning; the one whose ES comes nearest is to be compared
RUNS="${RUNS:-$folder/runs}"

if [[ $SCALE == small && ! -d $folder/tiny-gpt2 ]]; then
  PYTHONPATH="$(dirname "$0")/..${PYTHONPATH:+:$PYTHONPATH}" "${PYTHON:-python}" -m tools.tiny_world world --size 4 --width 192 --epochs 30 --out "$folder"
fi
case "$SCALE" in
  tiny) common=(dataset=world "cache_dir=$folder/cache") ;;
  small) common=(model=tiny-gpt2 "model.id=$folder/tiny-gpt2" model.name=world-4 dataset=world "dataset.path=$folder/world/statements.json" "cache_dir=$folder/cache") ;;
  paper) common=(model=gpt-j-6b dataset=zsre_qa) ;;
esac
asked=(); if [[ $SCALE != paper ]]; then asked=(dataset.one_a_subject=true); fi   # by runs, not by trainings
trainings=("method.training.trackers=[]" method.training.memory_mib=2048)

trained() {  # NAME SETTING…; a training that is finished already is not repeated
  local name=$1
  shift
  echo "== training $name"
  edit-cli train-editor "${common[@]}" run_dir="$RUNS/training/$name" "$@" > /dev/null
}

evaluated() {  # NAME SIZE SETTING…
  local name=$1 size=$2
  shift 2
  echo "== $name, $size facts at once"
  edit-cli evaluate "${common[@]}" "${asked[@]}" protocol.observe.max_new_tokens=8 protocol.observe.sample=false limit="$FACTS" "${BRIEF[@]}" \
    protocol.batch_size="$size" tag="$name" run_dir="$RUNS/$size/$name" "$@" > /dev/null
}

for size in $SIZES; do
  for method in $METHODS; do
    case $SCALE-$method in
      paper-malmen | paper-mend)   # as published, for so many facts
        own=(method="$method" method.edits="$size" "$@")
        trained "$method-$size" "${own[@]}"
        evaluated "$method" "$size" "${own[@]}" ;;
      paper-memit) evaluated memit "$size" method=memit "$@" ;;
      *-malmen)
        own=(method=malmen method.edits="$size" 'method.layers=[0,1,2,3,4,5]' method.tokens=subject method.asked=100 method.step_size=1.8e-3
             method.training.lr=2.0e-3 method.training.steps=60 method.training.validate_every=20 method.training.validation_edits="$((size >= 500 ? 1 : 4))" "${trainings[@]}" "${TRAINING[@]}" "$@")
        trained "malmen-$size" "${own[@]}"
        evaluated malmen "$size" "${own[@]}" ;;
      *-mend)   # for a hundred at most: what it makes of more is summed as well
        own=(method=mend method.edits="$((size > 100 ? 100 : size))" method.training.edits=1 method.training.steps=80 method.step_size=5.0e-4 method.edit_weight=0.3
             method.training.validate_every=50 method.training.validation_edits=2 'method.draw.locality=[random,same_relation]' "${trainings[@]}" "${TRAINING[@]}" "$@")
        trained mend-100 "${own[@]}"
        evaluated mend "$size" "${own[@]}" ;;
      *-mend-summed)
        own=(method=mend method.training.steps=200 "${trainings[@]}" "${TRAINING[@]}" "$@")
        trained mend-1 "${own[@]}"
        evaluated mend-summed "$size" "${own[@]}" ;;
      *)
        for norm in $NORMS; do evaluated "$method-$norm" "$size" method="$method" method.norm_constraint="$norm" "$@"; done ;;
    esac
  done
done
edit-cli compare $(for size in $SIZES; do printf '%s ' "$RUNS/$size"/*/; done) --x protocol.batch_size --by tag --published malmen-zsre-10k --out "$folder/malmen_vs_mend" \
  --metrics es_edit,efficacy_token_accuracy,paraphrase_token_accuracy,paraphrase_seen_accuracy,paraphrase_unseen_accuracy,locality_random_drawdown,locality_same_relation_drawdown,locality_same_subject_drawdown,efficacy_generated_exact,paraphrase_generated_exact,locality_generated_unchanged
