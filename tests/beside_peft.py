"""Another process, which knows transformers and peft and nothing of this project: it loads adapters beside models.

In: a line of JSON a job, [model folder, name of its auto class, adapter folder, token ids, file for the logits]. Out:
nothing, but for the files.
"""

from __future__ import annotations

import json
import sys

import torch
import transformers
from peft import PeftModel
from safetensors.torch import save_file


@torch.no_grad()
def main() -> None:
    torch.set_num_threads(1)
    for line in sys.stdin:
        folder, auto, adapter, ids, out = json.loads(line)
        base = getattr(transformers, auto).from_pretrained(folder, dtype=torch.float32).eval()
        inputs = {"input_ids": torch.tensor([ids])}
        if auto == "AutoModelForSeq2SeqLM":
            inputs["decoder_input_ids"] = inputs["input_ids"][:, :3]
        before = base(**inputs).logits
        model = PeftModel.from_pretrained(base, adapter)
        found = {"before": before, "beside": model(**inputs).logits}
        with model.disable_adapter():
            found["disabled"] = model(**inputs).logits
        found["merged"] = model.merge_and_unload()(**inputs).logits
        save_file({name: logits.contiguous() for name, logits in found.items()}, out)
    assert not [name for name in sys.modules if name.startswith("edit_cli")]


if __name__ == "__main__":
    main()
