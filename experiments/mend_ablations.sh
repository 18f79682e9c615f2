#!/usr/bin/env bash
# MEND's ablations (Mitchell et al., 2022): without normalization, without beginning as the identity, with one factor alone, not shared; one fact at a time.
#
#   experiments/mend_ablations.sh                                # statements on the embedded GPT-2
#   SCALE=paper experiments/mend_ablations.sh runs/bart          # zsRE on BART base
#   SCALE=paper SETUP="model=distilgpt2 dataset=wikitext" experiments/mend_ablations.sh runs/gpt dataset.path=CONTINUATIONS.json
#
# SCALE: scale.sh. Each is trained first, on the training split. Writes mend_ablations.{md,csv} into OUT.
set -euo pipefail
. "$(dirname "$0")/scale.sh"

OUT="${1:-runs/mend_ablations}"
shift $(( $# > 0 ))
scaled SETUP "dataset=world" "dataset=world" "model=bart-base dataset=zsre_qa"
scaled LIMIT 2 100 500
ROWS="mend no-normalization no-identity inputs-only outputs-only smaller-only not-shared"
scaled NAMES "mend not-shared" "$ROWS" "$ROWS"

for name in $NAMES; do
  case "$name" in
    mend) changed="" ;;
    no-normalization) changed=method.normalize=false ;;
    no-identity) changed=method.xavier=true ;;
    inputs-only) changed=method.transformed=inputs ;;
    outputs-only) changed=method.transformed=outputs ;;
    smaller-only) changed=method.transformed=smaller ;;
    not-shared) changed=method.shared=false ;;
    *) echo "$name: choose some of $ROWS" >&2; exit 2 ;;
  esac
  read -r -a own <<< "method=mend $SETUP $changed"
  own+=("${TRAINING[@]}" "$@")
  edit-cli train-editor "${own[@]}" run_dir="$OUT/training/$name" > /dev/null
  edit-cli evaluate "${own[@]}" limit="$LIMIT" protocol.batch_size=1 protocol.observe.sample=false protocol.observe.max_new_tokens=12 "${BRIEF[@]}" \
    tag="$name" run_dir="$OUT/evaluate/$name" > /dev/null
done
edit-cli compare "$OUT"/evaluate/*/ --by tag --published mend-ablations --out "$OUT/mend_ablations" \
  --metrics es_outer,es_edit,locality_drawdown,perplexity_drawdown,efficacy_generated_exact,paraphrase_generated_exact,locality_generated_unchanged
