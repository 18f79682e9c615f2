#!/usr/bin/env bash
# One table a task: every editor that applies, one fact at a time, on facts of subjects that no training has seen.
#
#   experiments/trained_editors.sh                                 # every task; the trainings take most of the time
#   TASKS=statements LIMIT=50 experiments/trained_editors.sh runs/mine seed=1
#   SCALE=paper TASKS="questions claims" experiments/trained_editors.sh runs/mend
#   SCALE=paper TASKS=texts experiments/trained_editors.sh runs/mend dataset.path=CONTINUATIONS.json
#
# SCALE: scale.sh. Tasks: statements, texts and opinions on tiny-gpt2; questions on tiny-t5 and tiny-bart, hard ones on tiny-t5; claims on tiny-bert.
# At paper scale they are MEND's: questions (zsRE) on BART base and T5 XL, hard ones on BART base, claims (FEVER) on BERT base, for which
# model.id names a classifier of claims, and texts on DistilGPT-2, GPT-Neo and GPT-J. Texts and hard questions are files to be named by dataset.path.
# A method takes part where conf/tuned has settings of it for the model. Editors that learn are trained first, on the training split; a training that OUT holds already is not repeated.
# Writes TASK-MODEL.{md,csv} into OUT.
set -euo pipefail
. "$(dirname "$0")/scale.sh"

OUT="${1:-runs/trained_editors}"
shift $(( $# > 0 ))
scaled LIMIT 2 100 500
scaled TASKS "statements claims" "statements texts opinions questions hard claims" "questions claims"
scaled METHODS "ft-l mend serac" "" ""   # none named: all
TUNED="$(dirname "$0")/../conf/tuned"
FACTS=es_edit,paraphrase_seen_accuracy,paraphrase_unseen_accuracy,locality_random_drawdown,locality_same_relation_drawdown,locality_same_subject_drawdown,efficacy_generated_exact,paraphrase_generated_exact,locality_generated_unchanged
QUESTIONS=es_edit,es_outer,locality_random_drawdown,locality_same_relation_drawdown,locality_same_subject_drawdown,efficacy_generated_exact,paraphrase_generated_exact,locality_generated_unchanged
HARD=es_edit,es_outer,portability_implied_token_accuracy,portability_true_false_success,locality_hard_drawdown,locality_disagreement,efficacy_generated_exact,paraphrase_generated_exact,locality_generated_unchanged
TEXTS=es_edit,paraphrase_token_accuracy,perplexity_drawdown,locality_kl,locality_disagreement,efficacy_generated_exact,efficacy_generated_contains,locality_generated_unchanged
OPINIONS=convsent_es,convsent_sentiment,convsent_topic,locality_disagreement,locality_generated_unchanged

compare() {  # task, model, data set, metrics, published table, methods
  local task="$1" model="$2" data="$3" metrics="$4" published="$5"
  shift 5
  for method in ${METHODS:-"$@"}; do
    [[ -f "$TUNED/$method/$model.yaml" ]] || continue  # nobody has chosen settings for it
    local settings=(method="$method" model="$model" dataset="$data" "${OVERRIDES[@]}")
    if learns "$method"; then
      settings+=("${TRAINING[@]}")
      edit-cli train-editor "${settings[@]}" run_dir="$OUT/$task-$model/train/$method" > /dev/null
    fi
    edit-cli evaluate "${settings[@]}" limit="$LIMIT" protocol.batch_size=1 protocol.observe.sample=false "${BRIEF[@]}" "${OVERRIDES[@]}" \
      run_dir="$OUT/$task-$model/evaluate/$method" tag="$method" > /dev/null
  done
  compgen -G "$OUT/$task-$model/evaluate/*/" > /dev/null || return 0  # none of the methods takes part
  edit-cli compare "$OUT/$task-$model/evaluate"/*/ --by tag --metrics "$metrics" ${published:+--published "$published"} --out "$OUT/$task-$model"
}

OVERRIDES=("$@")
WEIGHTS="ft ft-l lora mend-identity ke enn mend malmen"
ANY="$WEIGHTS serac lookup"
for task in $TASKS; do
  case "$SCALE-$task" in
    paper-questions) for model in bart-base t5-xl-ssm-nq; do compare "$task" "$model" zsre_qa "$QUESTIONS" mend-zsre $ANY; done ;;
    paper-hard) compare "$task" bart-base zsre_hard "$HARD" mend-zsre-hard $ANY ;;
    paper-claims) compare "$task" bert-base-uncased fever "$QUESTIONS" mend-fever $ANY ;;
    paper-texts) for model in distilgpt2 gpt-neo-2.7b gpt-j-6b; do compare "$task" "$model" wikitext "$TEXTS" mend-generation $WEIGHTS lookup; done ;;
    *-statements) compare "$task" tiny-gpt2 world "$FACTS" "" $ANY ike rome memit ;;
    *-texts) compare "$task" tiny-gpt2 world_texts "$TEXTS" mend-generation $WEIGHTS lookup ;;
    *-opinions) compare "$task" tiny-gpt2 world_opinions "$OPINIONS" "" $ANY ;;
    *-questions) for model in tiny-t5 tiny-bart; do compare "$task" "$model" world_qa "$QUESTIONS" mend-zsre $ANY; done ;;
    *-hard) compare "$task" tiny-t5 world_hard "$HARD" mend-zsre-hard $ANY ;;
    *-claims) compare "$task" tiny-bert world_claims "$QUESTIONS" mend-fever $ANY ;;
    *) echo "$task: choose statements, texts, opinions, questions, hard or claims (at paper scale questions, hard, claims or texts)" >&2; exit 2 ;;
  esac
done
