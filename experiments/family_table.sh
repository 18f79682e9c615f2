#!/usr/bin/env bash
# The locate-then-edit family and its options in one table: one fact at a time, 50 at once, and 10 steps of 20 without taking anything back.
#
#   experiments/family_table.sh                                    # the embedded world, about a quarter of an hour on two cores
set -euo pipefail

OUT="${OUT:-runs/family_table}"
QUIET="protocol.observe.sample=false protocol.observe.generate=false"

row() {
  name="$1"; shift
  edit-cli evaluate "$@" $QUIET limit=50 protocol.batch_size=1 run_dir="$OUT/one/$name" > /dev/null
  edit-cli evaluate "$@" $QUIET limit=50 protocol.batch_size=50 run_dir="$OUT/fifty/$name" > /dev/null
  edit-cli sequential "$@" $QUIET limit=200 protocol.batch_size=20 'protocol.checkpoints=[200]' run_dir="$OUT/sequence/$name" > /dev/null
}
for method in rome r-rome memit emmet pmet alphaedit blue memit-merge ultraedit; do
  row "$method" method="$method"
done
row memit-keys method=memit method.past_keys=write
row memit-encore method=memit method.past_keys=write method.covariance_weight=50 method.norm_weight=0.1 method.value.mpes=4
row memit-rect method=memit method.rect=0.4
row memit-prune method=memit method.prune=1.2
row emmet-exact method=emmet method.epsilon=0

for part in one fifty; do
  edit-cli compare "$OUT/$part"/*/ --out "$OUT/$part"
done
edit-cli compare "$OUT/sequence"/*/ --x facts --out "$OUT/sequence"
