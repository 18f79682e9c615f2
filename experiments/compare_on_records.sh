#!/usr/bin/env bash
# MEMIT, EMMET, ROME and FT-L on real records: 100 edits each, on a small model that was trained on the records' true facts.
#
#   experiments/make_fact_model.sh counterfact.json fact-model
#   experiments/compare_on_records.sh fact-model
set -euo pipefail

MODEL="${1:?usage: $0 MODEL_DIR [KEY=VALUE…]}"
shift
COMMON=(model=tiny-gpt2 model.name=fact-model "model.id=$MODEL" model.records=null dataset.path="$MODEL/records.json" limit="${LIMIT:-100}"
        corpus=file corpus.path="$MODEL/corpus.txt" tag=records)

edit-cli evaluate -m method=memit,emmet protocol.batch_size=all "${COMMON[@]}" "$@"
edit-cli evaluate -m method=rome,ft-l protocol.batch_size=1 protocol.observe.sample=false "${COMMON[@]}" "$@"
