#!/usr/bin/env bash
# A long GRACE memory: made fact by fact and saved, taken up in a new process, asked again, and taken off.
#
#   experiments/grace_memory.sh                             # 1,000 facts of the embedded world
#   FACTS=50 experiments/grace_memory.sh runs/short
#   METHOD=wise experiments/grace_memory.sh runs/wise       # any lifelong method
#   SCALE=paper experiments/grace_memory.sh runs/t5         # 1,000 of zsRE on T5 small, as published
#
# SCALE: scale.sh. The first process leaves OUT/run, as every sequence does. The second knows that directory alone: it attaches the saved edits
# to the unedited model, asks all facts, their other wordings and what must stay, compares with what the first process wrote down at its end, and
# takes the edits off. Told are the size on disk, seconds, the largest difference in −log P of an answer (nats a token), replies that differ, and whether every
# weight is afterwards, bit for bit, what it was. A run that was killed goes on where it stopped.
set -euo pipefail
. "$(dirname "$0")/scale.sh"

OUT="${1:-runs/grace-memory}"
shift $(( $# > 0 ))
scaled FACTS 3 1000 1000
WORLD="dataset=world dataset.split=all dataset.shuffle_seed=0"
scaled SETUP "$WORLD" "$WORLD" "model=t5-small-ssm-nq dataset=zsre_qa"
METHOD="${METHOD:-grace}"

# shellcheck disable=SC2086  # settings are split at spaces
edit-cli sequential method="$METHOD" $SETUP "${BRIEF[@]}" "$@" limit="$FACTS" protocol.batch_size=1 \
  "protocol.checkpoints=[$FACTS]" protocol.sample=null protocol.holdout=0 protocol.observe.top_tokens=0 protocol.observe.perplexity=false run_dir="$OUT/run" > /dev/null
edit-cli compare "$OUT/run" --metrics efficacy_accuracy,paraphrase_accuracy,efficacy_generated_exact,locality_generated_unchanged --published grace

"${PYTHON:-python}" - "$OUT/run" <<'PYTHON'
import sys
import time
from pathlib import Path

from transformers.utils import logging

from edit_cli.edits import store as edit_store
from edit_cli.experiment.saved_edits import Base
from edit_cli.monitor import Monitor
from edit_cli.runs.run import read_run

logging.set_verbosity_error()
run = read_run(sys.argv[1])
lines = [line for line in run.lines if line["when"] == "checkpoint" and line["after"]]
told = [probe for line in lines for probe in line["after"]["probes"]]
files = [file for file in (run.path / "edits").rglob("*") if file.is_file()]
print(f"{len(lines):,} facts in {run.path / 'edits'}: {sum(file.stat().st_size for file in files) / 1e6:.1f} MB")

lm = Base().load(edit_store.sequence(run.path / "edits")[0], Monitor())
unedited = lm.fingerprint()
began = time.perf_counter()
edits = edit_store.attach(run.path / "edits", lm)
print(f"loaded and attached in {time.perf_counter() - began:.2f} s")

scores = lm.loglikelihood([(probe["prompt"], probe["target"]) for probe in told])
apart = max(abs(score.nll - probe["target_nll"]) for score, probe in zip(scores, told, strict=True))
writes = [probe for probe in told if probe["generated"] is not None]
replies = lm.generate([probe["prompt"] for probe in writes], run.manifest["config"]["protocol"]["observe"]["max_new_tokens"])
other = sum(reply != probe["generated"] for reply, probe in zip(replies, writes, strict=True))
known = [all(score.hits) for score, probe in zip(scores, told, strict=True) if probe["kind"] == "rewrite"]
print(f"asked {len(told):,} times: edited prompts answered {100 * sum(known) / len(known):.1f} %; −log P differs by at most {apart:.1e} nats; "
      f"{other:,} of {len(writes):,} replies differ")

began = time.perf_counter()
for _ in edits:
    lm.detach()
same = lm.fingerprint() == unedited
print(f"taken off in {time.perf_counter() - began:.2f} s: every weight is {'the same bits as before' if same else 'NOT what it was'}")
sys.exit(not (same and apart < 1e-4 and not other))
PYTHON
