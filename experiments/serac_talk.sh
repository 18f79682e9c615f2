#!/usr/bin/env bash
# SERAC's comparison (Mitchell et al., 2022): fine-tuning, a lookup cache, ENN, MEND, retrieve-and-prompt (RP) and SERAC. A table a task, K facts at
# once; a figure of success and damage by the number of simultaneous facts; and the same networks beside a larger model of another family.
#
#   experiments/serac_talk.sh                                                     # everything, three seeds: hours of one core
#   PARTS=tables TASKS="qa hard" SEEDS=0 experiments/serac_talk.sh runs/mine      # and fc, evidence, convsent
#   PARTS=figure METHODS="lookup rp serac" SIZES="1 250" experiments/serac_talk.sh runs/mine cache_dir=elsewhere
#   PARTS=bases SEEDS=0 experiments/serac_talk.sh
#   SCALE=paper TASKS=qa experiments/serac_talk.sh runs/t5                        # zsRE on T5 large; hard, fc and convsent: dataset.path=FILE
#
# Tasks: questions, harder ones, claims whose label is flipped, evidence that claims follow from or contradict, opinions.
# SCALE: scale.sh. ENN and MEND are trained for each number of facts, on ENN_FACTS and MEND_FACTS facts in all, as published; mend-one and enn-one are
# trained for one fact and used for all. SERAC is trained once a task and seed, and RP takes what it learned. Every batch is taken back before the next.
# What comes after OUT are settings of trainings and runs alike. Writes TASK.{md,csv}, simultaneous.{md,csv,png,svg} and bases.{md,csv} into OUT;
# the curves of a training lie beside it, in OUT/training.
set -euo pipefail
. "$(dirname "$0")/scale.sh"

OUT="${1:-runs/serac_talk}"
shift $(( $# > 0 ))
scaled PARTS "tables figure" "tables figure bases" "tables figure"
scaled TASKS "evidence convsent" "qa hard fc convsent" "qa"
scaled FIGURE statements statements qa            # the task of the figure; SERAC's is qa
scaled METHODS "lookup mend rp serac" "ft lookup enn mend rp serac" "ft lookup enn mend rp serac"
scaled SEEDS 0 "0 1 2" "0 1 2"
scaled K 2 10 10                                  # published: 10; ConvSent 5
scaled SIZES "1 2" "1 5 25 75 125" "1 5 25 75 125"
scaled LIMIT 4 100 1000                           # facts of a table
scaled FACTS 2 25 500                             # facts that the figure asks about at least, in batches
scaled MEND_FACTS 16 10000 200000
scaled ENN_FACTS 16 1000 200000

task() {  # TASK: model and data
  case "$SCALE-$1" in
    paper-qa) echo "model=t5-large-ssm-nq dataset=zsre_qa" ;;
    paper-hard) echo "model=t5-large-ssm-nq dataset=zsre_hard" ;;
    paper-fc | paper-evidence) echo "model=bert-base-uncased dataset=vitaminc" ;;
    paper-convsent) echo "model=hf dataset=convsent" ;;
    *-qa) echo "model=tiny-t5 dataset=world_qa" ;;
    *-hard) echo "model=tiny-t5 dataset=world_hard" ;;
    *-fc) echo "model=tiny-bert dataset=world_claims" ;;
    *-evidence) echo "model=tiny-bert dataset=world_evidence" ;;
    *-convsent) echo "model=tiny-gpt2 dataset=world_opinions" ;;
    *-statements) echo "model=tiny-gpt2 dataset=world" ;;
    *) echo "$1: choose qa, hard, fc, evidence, convsent or statements" >&2; exit 2 ;;
  esac
}

together() {  # TASK METHOD SIZE: settings of a training for that many facts at once; of one they are those of conf/tuned
  [[ $SCALE-$2 == paper-ft && $1 != fc && $1 != evidence && $1 != convsent ]] && echo "method.layers=[22,23,46,47]"   # those that MEND edits
  [[ $1-$2 == evidence-mend* ]] && echo "method.draw.outer=any"   # a claim's label does not swap with another's, as answers do
  [[ $2 == mend || $2 == enn ]] || return 0
  [[ $3 == 1 ]] && return
  local facts="$MEND_FACTS" rows=16 step=200 unit=e-5       # independent facts a step, and the size of a step for one fact
  [[ $1 == fc || $1 == evidence ]] && step=30
  if [[ $2 == enn ]]; then
    facts="$ENN_FACTS" rows=8 step=80 unit=e-3
    [[ $1 == fc || $1 == evidence ]] && step=10
  fi
  local edits=$(( $3 < rows ? rows / $3 : 1 ))
  local steps=$(( facts / (edits * $3) > 6 ? facts / (edits * $3) : 6 ))
  case "$2" in
    mend) step=$(( $3 < 25 ? step / 2 : step / 4 )) ;;      # the gradients of all facts are summed
    enn) step=$(( $3 < 75 ? step : step / 2 )) ;;
  esac
  echo "method.edits=$3"
  [[ $SCALE == paper ]] || echo "method.step_size=$step$unit" "method.training.edits=$edits" "method.training.steps=$steps" \
    "method.training.validate_every=$(( (steps + 3) / 4 ))" "method.training.validation_edits=$(( 200 / $3 > 1 ? 200 / $3 : 1 ))"
}

BASE=()   # what tells the model that is edited from the one of the training

ask() {  # TASK METHOD SIZE LIMIT PLACE, settings: train if need be, then edit SIZE facts at a time, with each seed
  local task="$1" name="$2" size="$3" limit="$4" place="$5" seeds="$SEEDS" method="${2%-one}"
  shift 5
  [[ $method == ft || $method == lookup ]] && seeds="${SEEDS%% *}"   # nothing is drawn
  for seed in $seeds; do
    local more="$(together "$task" "$name" "$size" | tr '\n' ' ')"
    local own=(); read -r -a own <<< "method=$method $(task "$task") $more"
    own+=(seed="$seed")
    if learns "$method"; then   # once where the settings are the same: a finished training is not repeated
      own+=("${TRAINING[@]}")
      edit-cli train-editor "${own[@]}" "$@" run_dir="$OUT/training/$task/$name$([[ $more == *edits=* ]] && echo "-$size")/$seed" > /dev/null
    elif [[ $method == rp ]]; then
      own+=("${TRAINING[@]}")
      edit-cli train-editor "${own[@]/method=rp/method=serac}" "$@" run_dir="$OUT/training/$task/serac/$seed" > /dev/null
    fi
    edit-cli evaluate "${own[@]}" protocol.batch_size="$size" limit="$limit" protocol.observe.sample=false protocol.observe.max_new_tokens=8 \
      "${BRIEF[@]}" "$@" "${BASE[@]}" tag="$name" run_dir="$place/$name/$size/$seed" > /dev/null
  done
}

written() { echo "efficacy_generated_exact,paraphrase_generated_exact,locality_generated_unchanged"; }

tables() {
  for task in $TASKS; do
    for name in $METHODS; do ask "$task" "$name" "$K" "$LIMIT" "$OUT/tables/$task" "$@"; done
    case "$task" in
      qa | fc | evidence | statements) metrics="es_outer,es_edit,locality_disagreement,locality_random_disagreement,locality_same_relation_disagreement,$(written)" ;;
      hard) metrics="es_outer,es_edit,portability_implied_token_accuracy,portability_true_false_success,locality_disagreement,$(written)" ;;
      convsent) metrics="convsent_es,convsent_sentiment,convsent_topic,locality_kl,locality_disagreement,locality_generated_unchanged" ;;
    esac
    edit-cli compare "$OUT/tables/$task"/*/*/*/ --by tag --metrics "$metrics" --out "$OUT/$task"
  done
}

figure() {
  for name in $METHODS; do
    for size in $SIZES; do ask "$FIGURE" "$name" "$size" "$(( size > FACTS ? size : FACTS / size * size ))" "$OUT/figure/$FIGURE" "$@"; done
  done
  edit-cli compare "$OUT/figure/$FIGURE"/*/*/*/ --x protocol.batch_size --by tag --out "$OUT/simultaneous" \
    --published mend-batched \
    --metrics "es_outer,locality_drawdown,locality_disagreement,locality_random_drawdown,locality_same_relation_drawdown,$(written)"
}

bases() {  # trained beside the embedded GPT-2; used beside a Llama that is wider and has the same words
  local llama="$OUT/llama"
  [[ -f $llama/tiny-llama/model.safetensors ]] || PYTHONPATH="$(dirname "$0")/..${PYTHONPATH:+:$PYTHONPATH}" "${PYTHON:-python}" -m tools.tiny_world world --family llama --width "${WIDTH:-256}" --epochs "${EPOCHS:-52}" --out "$llama"
  for name in rp serac; do
    ask statements "$name" "$K" "$LIMIT" "$OUT/bases/gpt2" "$@"
    BASE=(model.id="$llama/tiny-llama" model.name=llama)
    ask statements "$name" "$K" "$LIMIT" "$OUT/bases/llama" "$@"
    BASE=()
  done
  edit-cli compare "$OUT"/bases/*/*/*/*/ --by tag --anyway --out "$OUT/bases" \
    --metrics "es_outer,es_edit,locality_random_drawdown,locality_same_relation_drawdown,perplexity,$(written)"
}

for part in $PARTS; do
  case "$part" in
    tables | figure | bases) "$part" "$@" ;;
    *) echo "$part: choose tables, figure or bases" >&2; exit 2 ;;
  esac
done
