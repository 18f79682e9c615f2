#!/usr/bin/env bash
# A small GPT-2 that knows the true facts of a records file, so that editors can be compared on real records without a large model.
# Takes about ten minutes of one CPU core for 2,000 records.
#
#   experiments/make_fact_model.sh counterfact.json fact-model
#   LIMIT=1000 EPOCHS=40 experiments/make_fact_model.sh counterfact.json fact-model
#   SCALE=tiny experiments/make_fact_model.sh counterfact.json fact-model
#
# The same command goes on with a training that was killed. SCALE: scale.sh; at paper scale all of the file is learned, by a wider model
# (experiments of the papers need none: their models know).
# FILE is a JSON list in CounterFact's full schema or in the flat one of counterfact-edit. OUT gets the model, manifest.json with the
# recall that was measured, corpus.txt (the training text, for second moments) and records.json: the records of FILE whose true fact
# the model recalls and whose new target it has met as an answer. Edit them with
#
#   edit-cli evaluate method=memit model=hf model.id=OUT dataset.path=OUT/records.json corpus=file corpus.path=OUT/corpus.txt \
#     'method.layers=[0,1,2,3]' method.covariance_weight=60 protocol.batch_size=100 limit=100
#
# The facts are localized by the training (docs/tiny-model.md): results show how editors compare, not how real models store facts.
set -euo pipefail
. "$(dirname "$0")/scale.sh"

if [[ $# -ne 2 ]]; then
  echo "usage: $0 FILE OUT   (environment: SCALE LIMIT VOCAB EPOCHS ROWS WIDTH LAYERS SEED THREADS)" >&2
  exit 2
fi

scaled LIMIT 8 2000 21919
scaled VOCAB 512 4096 16384
scaled EPOCHS 20 70 70
scaled WIDTH 32 128 256
export PYTHONPATH="$(dirname "$0")/..${PYTHONPATH:+:$PYTHONPATH}"   # where tools/ is
"${PYTHON:-python}" -m tools.tiny_world records "$1" --out "$2" \
  --limit "$LIMIT" \
  --vocab "$VOCAB" \
  --epochs "$EPOCHS" \
  --batch-rows "${ROWS:-16}" \
  --width "$WIDTH" \
  --layers "${LAYERS:-6}" \
  --seed "${SEED:-0}" \
  --threads "${THREADS:-1}"
