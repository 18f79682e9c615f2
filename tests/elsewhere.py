"""Another process, which attaches saved edits to models of its own: one line of JSON in, one out.

In: [edit directory, dtype, [prompt, target] pairs]. Out: [negative log-likelihoods, texts].
"""

from __future__ import annotations

import json
import sys

from edit_cli.edits import store as edit_store
from edit_cli.lm.loading import ModelOptions


def main() -> None:
    for line in sys.stdin:
        directory, dtype, pairs = json.loads(line)
        lm = ModelOptions("tiny-gpt2", "embedded:tiny-gpt2", dtype=dtype, device="cpu").load()
        edit_store.attach(directory, lm)
        scores = lm.loglikelihood([(prompt, target) for prompt, target in pairs])
        print(json.dumps([[s.nll for s in scores], lm.generate([prompt for prompt, _ in pairs], 4)]), flush=True)


if __name__ == "__main__":
    main()
