#!/usr/bin/env bash
# Real records on real pretrained models of any make: settings found on other facts by `tune`, then one table a question.
#
#   experiments/real_models.sh smollm2-135m-instruct counterfact.json wikitext2-valid.txt                   # a folder, its records, running text
#   PARTS="tune methods" METHODS="memit rome" LIMIT=40 experiments/real_models.sh FOLDER counterfact.json wikitext2-valid.txt runs/mine seed=1
#   PARTS=questions QUESTIONS=zsre.json experiments/real_models.sh FOLDER counterfact.json wikitext2-valid.txt
#
# Parts, in the order in which they are best run; each takes up what OUT holds already:
#   tune      settings of every method of METHODS that has any to find, on the last TUNED_ON records, BUDGET each (into OUT/config)
#   methods   LIMIT facts one at a time, all at once, and in steps of STEP (TABLES): one.*, at_once.*, steps.*
#   emmet     EMMET, near its equality and relaxed (EPSILON), and MEMIT, by batch size, at one layer and at several: emmet.*
#   scaling   MEMIT by the number of facts at once: scaling.*
#   sequence  LONG facts in steps of each of STRIDES, earlier keys held or not, beside other methods: sequence-STRIDE.*
#   questions trained editors beside their untrained control on zsRE, of the file QUESTIONS if it is named: questions.*
#   trace     where the known facts are, beside the layers that were found: trace/
# SCALE: scale.sh. What comes after OUT are settings of all runs.
set -euo pipefail
. "$(dirname "$0")/scale.sh"

USAGE="usage: $0 MODEL RECORDS CORPUS [OUT] [KEY=VALUE…]   (environment: SCALE PARTS METHODS LIMIT …)"
MODEL="${1:?$USAGE}" RECORDS="${2:?$USAGE}" CORPUS="${3:?$USAGE}"
shift 3
OUT="${1:-runs/real_models/$(basename "$MODEL")}"
shift $(( $# > 0 ))
scaled PARTS "tune methods emmet scaling sequence" "tune methods emmet scaling sequence questions trace" "tune methods emmet scaling sequence questions trace"
scaled METHODS "none memit" \
  "none rag icl-oracle ft ft-l ft-m locft lora rome r-rome memit emmet pmet alphaedit memit-merge ultraedit grace wise melo tpatcher lookup" \
  "none rag icl-oracle ft ft-l ft-m locft lora rome r-rome memit emmet pmet alphaedit memit-merge ultraedit grace wise melo tpatcher lookup"
scaled TABLES "one at_once steps" "one at_once steps" "one at_once steps"
scaled LIMIT 2 100 2000
scaled STEP 1 5 100
scaled TUNED_ON 4 20 100
scaled TRIALS 1 30 100
scaled BUDGET 10m 20m 4h
scaled LAYERS "[0,1]" "[5] [3,4,5,6,7]" "[5] [3,4,5,6,7]"   # of EMMET's figure: one, and several side by side
scaled SIZES "1 2" "1 4 16 64 256" "1 16 64 256 1024 4096"
scaled SCALED "1 2" "1 10 100 1000" "1 10 100 1000 10000"
scaled LONG 2 1000 3000
scaled STRIDES 1 "10 100" "10 100"
scaled SEQUENCED "memit memit-write" "memit memit-write memit-post alphaedit ft locft grace wise" \
  "memit memit-write memit-post alphaedit ft locft grace wise"
scaled EDITORS "mend-identity mend" "mend-identity mend ke enn serac malmen ft-l lora rag" "mend-identity mend ke enn serac malmen ft-l lora rag"
scaled KNOWN 2 40 200

if [[ -d $MODEL ]]; then COMMON=(model=hf "model.id=$MODEL" "model.name=$(basename "$MODEL")"); else COMMON=("model=$MODEL"); fi
TEXT=(corpus=file "corpus.path=$CORPUS")
FACTS=(dataset=counterfact "dataset.path=$RECORDS")
ASKED=(protocol.observe.sample=false protocol.observe.max_new_tokens=8 "${BRIEF[@]}")
METRICS=efficacy_success,paraphrase_success,neighborhood_success,efficacy_accuracy,paraphrase_accuracy,neighborhood_accuracy,efficacy_generated_exact,paraphrase_generated_exact,neighborhood_generated_unchanged,perplexity
export XDG_CONFIG_HOME="$OUT/config"   # what is found stays with the runs

FAILED=0
run() {  # a method that fails on this model is told, and those after it go on
  edit-cli "$@" || { echo "failed: edit-cli $*" >&2; FAILED=1; }
}

table() {  # NAME, further options: one table of the runs below OUT/NAME that came to their end
  local ended=()
  for summary in "$OUT/$1"/*/summary.json; do ended+=("${summary%/summary.json}"); done
  edit-cli compare "${ended[@]}" --metrics "$METRICS" --out "$OUT/$1" "${@:2}"
}

tune() {
  for method in $METHODS; do
    case "$method" in none | rag | icl-oracle | locft | lookup) continue ;; esac   # nothing to find
    run tune "method=$method" "${COMMON[@]}" "${FACTS[@]}" "${TEXT[@]}" limit="$TUNED_ON" trials="$TRIALS" budget="$BUDGET" "${ASKED[@]}" "$@" \
      run_dir="$OUT/tune/$method"
  done
}

methods() {
  for part in $TABLES; do
    for method in $METHODS; do
      local own=("method=$method" "${COMMON[@]}" "${FACTS[@]}" "${TEXT[@]}" limit="$LIMIT" "${ASKED[@]}" "$@" "tag=$method")
      case "$part" in
        one) run evaluate "${own[@]}" protocol.batch_size=1 run_dir="$OUT/one/$method" > /dev/null ;;
        at_once) run evaluate "${own[@]}" protocol.batch_size=all run_dir="$OUT/at_once/$method" > /dev/null ;;
        steps)
          run sequential "${own[@]}" protocol.batch_size="$STEP" protocol.checkpoints="[$LIMIT]" protocol.sample=null \
            run_dir="$OUT/steps/$method" > /dev/null ;;
        *) echo "$part: choose one, at_once or steps" >&2; exit 2 ;;
      esac
    done
    table "$part" --by tag --published rome-counterfact
  done
}

emmet() {
  for layers in $LAYERS; do
    for line in memit emmet emmet-relaxed; do
      local own=("method=${line%-relaxed}" "method.layers=$layers" "tag=$line-${layers//[^0-9]/}" method.value.reuse=true)
      case "$line" in
        emmet) own+=(method.covariance_weight=1 method.epsilon=0.1) ;;
        emmet-relaxed) own+=(method.covariance_weight=1 "method.epsilon=${EPSILON:-15000}") ;;
      esac
      for size in $SIZES; do
        run evaluate "${own[@]}" "${COMMON[@]}" "${FACTS[@]}" "${TEXT[@]}" "${ASKED[@]}" "$@" protocol.batch_size="$size" \
          limit="$(( size > 16 ? size : 16 ))" run_dir="$OUT/emmet/$line-${layers//[^0-9]/}-$size" > /dev/null
      done
    done
  done
  table emmet --x protocol.batch_size --by tag --published emmet-llama3-single,emmet-llama3-batch-1024
}

scaling() {
  for size in $SCALED; do
    run evaluate method=memit method.value.reuse=true "${COMMON[@]}" "${FACTS[@]}" "${TEXT[@]}" "${ASKED[@]}" "$@" protocol.batch_size=all limit="$size" \
      run_dir="$OUT/scaling/$size" > /dev/null
  done
  table scaling --x protocol.batch_size --published memit-counterfact-10k
}

sequence() {
  for stride in $STRIDES; do
    for line in $SEQUENCED; do
      local own=("method=${line%%-*}" "tag=$line")
      case "$line" in memit-*) own+=("method.past_keys=${line#memit-}") ;; esac
      run sequential "${own[@]}" "${COMMON[@]}" "${FACTS[@]}" "${TEXT[@]}" "${ASKED[@]}" "$@" limit="$LONG" protocol.batch_size="$stride" \
        protocol.sample=100 run_dir="$OUT/sequence-$stride/$line" > /dev/null
    done
    table "sequence-$stride" --by tag --published alphaedit-counterfact
  done
}

questions() {
  local data=(dataset=zsre_qa ${QUESTIONS:+"dataset.path=$QUESTIONS"})
  for method in $EDITORS; do
    local own=("method=$method" "${COMMON[@]}" "${data[@]}" "${TEXT[@]}" "$@" "tag=$method")
    if learns "$method"; then
      own+=("${TRAINING[@]}")
      run train-editor "${own[@]}" run_dir="$OUT/training/$method" > /dev/null
    fi
    run evaluate "${own[@]}" "${ASKED[@]}" limit="$LIMIT" protocol.batch_size=1 run_dir="$OUT/questions/$method" > /dev/null
  done
  edit-cli compare "$OUT"/questions/*/ --by tag --published mend-zsre --out "$OUT/questions" \
    --metrics es_edit,es_outer,locality_drawdown,locality_disagreement,efficacy_generated_exact,paraphrase_generated_exact,locality_generated_unchanged
}

trace() {
  run trace "${COMMON[@]}" "${FACTS[@]}" dataset.known=true limit="$KNOWN" "$@" run_dir="$OUT/trace"
}

for part in $PARTS; do
  case "$part" in
    tune | methods | emmet | scaling | sequence | questions | trace) "$part" "$@" ;;
    *) echo "$part: choose tune, methods, emmet, scaling, sequence, questions or trace" >&2; exit 2 ;;
  esac
done
exit "$FAILED"
