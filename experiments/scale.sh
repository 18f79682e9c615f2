# Sourced by the scripts beside it: how large an experiment is.
#
#   SCALE=tiny    a few facts, steps and columns on embedded models, seconds to minutes: shows that a script runs from end to end
#   SCALE=small   the default, minutes to hours on embedded or small models: what the tables of docs/experiments.md were made with
#   SCALE=paper   model, data and sizes of the publication; models and data come from the hub and their published addresses
#
# A variable that the environment sets keeps its value, at any scale.
SCALE="${SCALE:-small}"
case "$SCALE" in
  tiny | small | paper) ;;
  *) echo "SCALE=$SCALE: choose tiny, small or paper" >&2; exit 2 ;;
esac

scaled() {  # NAME TINY SMALL PAPER: the value of a variable at this scale
  [[ -n "${!1+set}" ]] && return
  case "$SCALE" in
    tiny) printf -v "$1" %s "$2" ;;
    small) printf -v "$1" %s "$3" ;;
    paper) printf -v "$1" %s "$4" ;;
  esac
}

# Settings that only make tiny runs (BRIEF) and trainings (TRAINING) short. What a training learns depends on the latter,
# so that they go with every run of a method that was trained.
BRIEF=() TRAINING=()
if [[ $SCALE == tiny ]]; then
  BRIEF=(protocol.observe.max_new_tokens=3 protocol.observe.sample=false stats.documents=40 figures=false)
  TRAINING=(method.training.steps=2 method.training.validate_every=1 method.training.validation_edits=2 "method.training.trackers=[]")
fi

learns() {  # METHOD: whether it is trained before it edits
  [[ " enn ke malmen mend mend-identity serac " == *" $1 "* ]]
}
