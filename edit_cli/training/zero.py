"""DeepSpeed's ZeRO, stages 1 and 2: each process keeps a part of the optimizer's states (1) and of gathered gradients
(2) of what is trained.

Parameters stay whole on every process. Of what accelerate's launcher says of DeepSpeed only the stage is taken;
learning rates, clipping, accumulation and precision are those of `method.training`, and DeepSpeed never sees the frozen
model.
"""

from __future__ import annotations

import logging
import os
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from edit_cli.errors import MissingError, UsageError

# set by accelerate's launcher
WANTED, ACCUMULATE = "ACCELERATE_USE_DEEPSPEED", "ACCELERATE_GRADIENT_ACCUMULATION_STEPS"
LARGEST_BUCKET = 500_000_000  # numbers; DeepSpeed's own size, memory for which is taken however small the network
STAGE = "ACCELERATE_DEEPSPEED_ZERO_STAGE"
REFUSED = {
    "deepspeed_config_file": "ACCELERATE_DEEPSPEED_CONFIG_FILE",
    "offload_optimizer_device": "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE",
    "offload_param_device": "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE",
}


def stage_of_launcher() -> int:
    """The stage that accelerate's launcher was told to use, 0 for none; it is told no more, so that accelerate takes no
    step itself.

    Raises:
        UsageError: another stage than 1 or 2, or more of DeepSpeed than its stages.
    """
    if os.environ.pop(WANTED, "false").lower() not in ("true", "1"):
        return 0
    os.environ.pop(ACCUMULATE, None)
    stage = os.environ.get(STAGE, "2")
    if stage not in ("1", "2"):
        raise UsageError(
            f"train-editor does not work with DeepSpeed's zero_stage={stage}: give 1 or 2, or launch with"
            " conf/accelerate/fsdp.yaml, which spreads parameters too"
        )
    for name, variable in REFUSED.items():
        if os.environ.get(variable, "none") != "none":
            raise UsageError(
                f"train-editor does not work with DeepSpeed's {name}: leave it out, zero_stage is all that is taken"
            )
    return int(stage)


class Zero:
    """In the place of a `Descent`, and of its optimizer: states are given and taken whole, so that any number of
    processes can go on.
    """

    def __init__(
        self,
        step: nn.Module,
        optimizer: torch.optim.Optimizer,
        stage: int,
        accumulate: int,
        clip: float,
        accelerator: Any,
    ) -> None:
        """To be called on all processes together.

        Raises:
            MissingError: DeepSpeed is not installed.
        """
        try:
            import deepspeed
        except ImportError:
            raise MissingError(
                "DeepSpeed is not installed: pip install 'edit-cli[deepspeed]', or use conf/accelerate/fsdp.yaml"
            ) from None
        logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
        self.accelerator, self.base = accelerator, optimizer
        # of `base` DeepSpeed makes groups of one flat part each
        self.param_groups = [dict(group) for group in optimizer.param_groups]
        settings = {
            "train_micro_batch_size_per_gpu": 1,  # counts nothing but DeepSpeed's samples
            "gradient_accumulation_steps": accumulate,
            "gradient_clipping": max(clip, 0.0),
            "zero_optimization": {
                "stage": stage,
                "reduce_bucket_size": min(sum(part.numel() for part in self._parts()), LARGEST_BUCKET),
            },
            "zero_allow_untested_optimizer": True,
            "steps_per_print": None,
        }
        self.engine, *_ = deepspeed.initialize(model=step, optimizer=optimizer, config=settings)
        self.engine.set_gradient_accumulation_boundary(True)  # a step is when `apply` is called
        self.optimizer, self.micro_batches = self, ExitStack()
        self._begin()

    def _begin(self) -> None:
        """Optimizer states from the start, where DeepSpeed would have them from the first step on: with gradients of
        0, that changes no weight.
        """
        from deepspeed.utils import lazy_init_hp_params_optimizer_state

        parts = self._parts()
        for part in parts:
            part.grad = torch.zeros_like(part)
        self.base.step()
        for part, group in zip(parts, self.param_groups, strict=True):
            part.grad = None
            self.base.state[part]["step"].zero_()
            lazy_init_hp_params_optimizer_state(group["params"], part, self.base.state)

    def _parts(self) -> list[Tensor]:
        """This process's flat part of each group; before DeepSpeed begins, the parameters."""
        return [part for group in self.base.param_groups for part in group["params"]]

    def step(self, batch: Any) -> Any:
        return self.engine(batch)

    def backward(self, loss: Tensor) -> None:
        """Add a micro-batch's gradients, and bring those of all processes together after the last one.

        Not while they come, as DeepSpeed would: it takes them for those of the same parameters in the order in which
        they come, and that of an LSTM's is not the same on all processes.
        """
        if not self.engine.inside_no_sync_ctxt:
            self.micro_batches.enter_context(self.engine.coalesce_grad_reduction())
        self.engine.backward(loss)
        if self.accelerator.sync_gradients:
            self.micro_batches.close()

    def apply(self) -> float:
        for group, own in zip(self.base.param_groups, self.param_groups, strict=True):
            group["lr"] = own["lr"]
        self.engine.optimizer.refresh_fp32_params()  # parameters may have been loaded or put right since the last step
        self.engine.step()  # clips; leaves out gradients that are no numbers, and tells an infinite norm for them
        return float(self.engine.get_global_grad_norm())

    def state_dict(self) -> dict[str, Any]:
        """As that of `torch.optim.Optimizer` without ZeRO. To be called on all processes together."""
        from deepspeed.utils import safe_get_full_optimizer_state

        every: list[dict[str, Tensor]] = []
        for part, group in zip(self._parts(), self.param_groups, strict=True):
            own = self.base.state[part]
            every += [
                {
                    name: safe_get_full_optimizer_state(parameter, name) if value.shape == part.shape else value
                    for name, value in own.items()
                }
                for parameter in group["params"]
            ]
        return {"state": dict(enumerate(every)), "param_groups": self.param_groups}

    def load_state_dict(self, values: dict[str, Any]) -> None:
        """Take up what `state_dict` gave, here or without ZeRO."""
        from deepspeed.utils import safe_set_full_optimizer_state

        number = 0
        for part, group in zip(self._parts(), self.param_groups, strict=True):
            own = self.base.state[part]
            for parameter in group["params"]:
                for name, value in values["state"].get(number, {}).items():
                    if own[name].shape == part.shape:
                        safe_set_full_optimizer_state(parameter, value, name)
                    else:
                        own[name].copy_(value)
                number += 1
