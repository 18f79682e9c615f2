#!/usr/bin/env bash
# A small GPT-2 that knows the true facts of a records file, so that editors can be compared on real records without a large model.
#
#   experiments/make_fact_model.sh counterfact.json fact-model
#   LIMIT=1000 EPOCHS=40 experiments/make_fact_model.sh counterfact.json fact-model
#
# FILE is a JSON list in CounterFact's full schema or in the flat one of counterfact-edit. OUT gets the model, manifest.json with the
# recall that was measured, and records.json: the records of FILE whose true fact the model recalls. Edit it with
#
#   edit-cli evaluate method=memit model=OUT dataset.path=OUT/records.json
#
# The facts are localised by the training (docs/tiny-model.md): results show how editors compare, not how real models store facts.
set -euo pipefail

if [[ $# -ne 2 ]]; then
  echo "usage: $0 FILE OUT   (environment: LIMIT VOCAB EPOCHS WIDTH LAYERS SEED THREADS)" >&2
  exit 2
fi

exec "${PYTHON:-python}" -m edit_cli.tiny records "$1" --out "$2" \
  --limit "${LIMIT:-2000}" \
  --vocab "${VOCAB:-4096}" \
  --epochs "${EPOCHS:-70}" \
  --width "${WIDTH:-128}" \
  --layers "${LAYERS:-6}" \
  --seed "${SEED:-0}" \
  --threads "${THREADS:-1}"
