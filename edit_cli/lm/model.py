"""LM: a model, its tokenizer, where it keeps things, and the edits that are attached to it."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from edit_cli.distributed import SINGLE, ProcessGroup
from edit_cli.errors import UsageError
from edit_cli.lm.edit import Added, Edit, MergedEdit, Restore
from edit_cli.lm.fast.edits_by_row import EditsByRow
from edit_cli.lm.fast.prefix_cache import shortcuts_work
from edit_cli.lm.heads.answers import Likelihood
from edit_cli.lm.heads.base import Head
from edit_cli.lm.heads.kinds import head_of
from edit_cli.lm.hooks import StopForward, hidden_of, on_output, skip_blocks
from edit_cli.lm.layout import Layout, LayoutOptions, discover, entrance, widths
from edit_cli.lm.matrices import matrix_of
from edit_cli.lm.routing import Answerer, Routed, is_route
from edit_cli.lm.weights.access import Undo, WeightAccess, access_to
from edit_cli.lm.weights.offload import execution_device
from edit_cli.monitor import Monitor

if TYPE_CHECKING:
    from transformers import PreTrainedModel

BATCH_TOKENS = {"cpu": 2048}  # what still fits a processor's caches; elsewhere more at once is faster


class LM:
    """One model behind two questions: how likely is a target after a prompt, and how does the text go on?

    `attach` and `detach` work last in, first out, and restore every bit. All parameters are frozen; dropout is off.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: Any,
        name: str = "model",
        revision: str | None = None,
        layout: LayoutOptions | None = None,
        monitor: Monitor | None = None,
        batch_tokens: int | None = None,
        model_id: str | None = None,
        labels: Sequence[str] | None = None,
        process_group: ProcessGroup = SINGLE,
        quantize: str | None = None,
    ) -> None:
        self.model = model.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.name = name
        self.id = model_id or name  # where it was loaded from
        self.revision = revision
        self.quantize = quantize  # into how many bits its matrices were brought while it was loaded
        self.monitor = monitor or Monitor()
        self.process_group = process_group  # processes that hold a copy of this model and share its work
        self.layout: Layout = discover(model, layout)
        self.head: Head[Any] = head_of(
            model, tokenizer, self.device, batch_tokens or BATCH_TOKENS.get(self.device.type, 8192), labels
        )
        self.masters: dict[str, Tensor] = {}  # float32 copies of edited 16-bit weights, so that small updates add up
        self._stack: list[tuple[Edit, Undo]] = []

    # --- the two questions ------------------------------------------------------------------------------------------

    @property
    def answerer(self) -> Answerer:
        """The model behind all attached routes, the latest in front."""
        answerer: Answerer = self.head
        for edit in self.attached:
            if is_route(edit) and not edit.covered:
                answerer = Routed(answerer, edit)
        return answerer

    def loglikelihood(self, pairs: Sequence[tuple[str, str]], edits: Sequence[int] | None = None) -> list[Likelihood]:
        """Teacher-forced scores of (prompt, target) pairs, in order.

        edits: inside `edited_by_row`, the number of the edit that each pair is to meet; likewise in all questions.
        """
        return self.answerer.loglikelihood(pairs) if edits is None else self.head.loglikelihood(pairs, edits)

    def target_logprobs(
        self, pairs: Sequence[tuple[str, str]], edits: Sequence[int] | None = None
    ) -> Sequence[Tensor | None]:
        """Log-probabilities (target tokens, vocabulary) at the targets of (prompt, target) pairs, float32; None
        where a route has none.
        """
        return self.answerer.target_logprobs(pairs) if edits is None else self.head.target_logprobs(pairs, edits)

    def generate(self, prompts: Sequence[str], max_new_tokens: int, edits: Sequence[int] | None = None) -> list[str]:
        """Greedy continuations without the prompt, up to EOS, a line break or `max_new_tokens`."""
        if edits is not None:
            return self.head.generate(prompts, max_new_tokens, edits)
        return self.answerer.generate(prompts, max_new_tokens)

    def alternatives(self, prompts: Sequence[str], count: int, max_new_tokens: int) -> list[list[str]]:
        """The `count` likeliest answers to each prompt by beam search, best first, fewer where some are alike; of a
        classifier, its labels. Edits that answer for the model play no part.
        """
        return self.head.alternatives(prompts, count, max_new_tokens)

    def sample(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        max_tokens: int,
        top_k: int,
        edits: Sequence[int] | None = None,
    ) -> list[str]:
        """Prompt plus sampled continuation, `max_tokens` tokens in all, one seed a row."""
        if edits is not None:
            return self.head.sample(prompts, seeds, max_tokens, top_k, edits)
        return self.answerer.sample(prompts, seeds, max_tokens, top_k)

    def token_nlls(self, texts: Sequence[str], window: int, edit: int | None = None) -> tuple[float, int]:
        """(summed negative log-likelihood in nats, tokens) of running text. edit: the number of the one that it meets.

        Routes answer prompts, so they play no part here.
        """
        return self.head.token_nlls(texts, window, edit)

    @contextmanager
    def telling(self, done: Callable[[int], None]) -> Iterator[None]:
        """Inside the block `done` hears how many rows of a question have been answered, batch by batch."""
        before, self.head.done = self.head.done, done
        try:
            yield
        finally:
            self.head.done = before

    # --- edits ------------------------------------------------------------------------------------------------------

    @property
    def attached(self) -> list[Edit]:
        """Attached edits, oldest first."""
        return [edit for edit, _ in self._stack]

    def attach(self, edit: Edit) -> None:
        self._stack.append((edit, edit.attach(self)))

    def detach(self) -> Edit:
        """Take the latest edit off; every weight and module is bit for bit what it was before `attach`.

        Raises:
            UsageError: nothing is attached.
        """
        if not self._stack:
            raise UsageError("no edit is attached")
        edit, undo = self._stack.pop()
        if isinstance(edit, MergedEdit):
            edit.hold(self)
        undo()
        return edit

    def merge_top_edits(self) -> None:
        """Join the two latest edits, if both change weights: they come off together, and one original of each weight
        is kept.
        """
        if len(self._stack) < 2:
            return
        (_, below), (_, above) = self._stack[-2:]
        if isinstance(below, Restore) and isinstance(above, Restore):
            both = below.before(above)
            self._stack[-2:] = [(MergedEdit(both), both)]

    @contextmanager
    def edited(self, edit: Edit) -> Iterator[LM]:
        """The model with `edit` attached, inside the block only."""
        self.attach(edit)
        depth = len(self._stack)
        try:
            yield self
        finally:
            while len(self._stack) >= depth:
                self.detach()

    @contextmanager
    def edited_by_row(self, added: Sequence[dict[str, Added]]) -> Iterator[LM]:
        """The model with edits beside it (`Edit.added`), inside the block only: of every question that says so by
        `edits`, each row meets the edit of that number. To all others the model is what it is; no weight is touched.
        """
        before, self.head.edits_by_row = self.head.edits_by_row, EditsByRow(added)
        try:
            with self.head.edits_by_row.beside(self):
                yield self
        finally:
            self.head.edits_by_row = before

    @contextmanager
    def pristine(self) -> Iterator[LM]:
        """The unedited model: attached edits are taken off inside the block and put back after it."""
        edits = [self.detach() for _ in range(len(self._stack))]
        try:
            yield self
        finally:
            for edit in reversed(edits):
                self.attach(edit)

    # --- parts ------------------------------------------------------------------------------------------------------

    @property
    def device(self) -> torch.device:
        """Where inputs go: the device of what meets them first."""
        return execution_device(entrance(self.model))

    @property
    def dtype(self) -> torch.dtype:
        return next(entrance(self.model).parameters()).dtype

    @property
    def is_quantized(self) -> bool:
        """Whether some matrices are kept in a few bits, with their edits beside them."""
        return not all(parameter.is_floating_point() for parameter in self.model.parameters())

    def module(self, name: str) -> nn.Module:
        return self.model.get_submodule(name)

    def parameter(self, name: str) -> nn.Parameter:
        return self.model.get_parameter(name)

    def access(self, parameter: str) -> WeightAccess:
        """Where a parameter's value is and can be changed, be it in its module, off the device, or quantized."""
        return access_to(self.model, parameter, self.dtype)

    def weight(self, module: str) -> Tensor:
        """Weight of a projection as (d_out, d_in), whatever the class stores and wherever it is (not always on the
        device).
        """
        return matrix_of(self.module(module)).of(self.access(f"{module}.weight").value())

    def key_width(self, layer: int) -> int:
        """Input width of the layer's MLP output projection."""
        return widths(self.module(self.layout.mlp_out(layer)))[1]

    @property
    def weight_names(self) -> list[str]:
        """Names of all parameters, of tied ones (which are two off the device) a single one."""
        tied = getattr(self.model, "all_tied_weights_keys", {})
        return list(dict.fromkeys(tied.get(name, name) for name, _ in self.model.named_parameters()))

    def fingerprint(self, names: Sequence[str] | None = None) -> str:
        """sha256 over parameters in their present state; without `names`, over all of the unedited model (computed
        once).
        """
        if names is None:
            return self._base_fingerprint
        digest = hashlib.sha256()
        for name in names:
            for value in self.access(name).bits():
                value = value.detach().contiguous().cpu()
                digest.update(f"{name}:{value.dtype}:{tuple(value.shape)}".encode())
                digest.update(value.view(-1).view(torch.uint8).numpy().data)
        return digest.hexdigest()

    @cached_property
    def _base_fingerprint(self) -> str:
        with self.pristine():
            return self.fingerprint(self.weight_names)

    # --- what only a forward pass tells -------------------------------------------------------------------------------

    @cached_property
    def blocks_return_tuples(self) -> bool:
        """Whether this family's blocks return tuples or lists (differs between families and versions of
        transformers).
        """
        return isinstance(self._probe(self.layout.block(0), lambda output: output), (tuple, list))

    @property
    def takes_shortcuts(self) -> bool:
        """Whether rows may go on from shared beginnings, and MLPs be spared the tokens that nobody reads, without a
        change in logits.

        Not while a module looks at whole prompts (see lm.prompt_position).
        """
        return not self.head.trackers and self._takes_shortcuts

    @cached_property
    def _takes_shortcuts(self) -> bool:
        return shortcuts_work(self)

    def skipping(self, layer: int, states: Tensor) -> Any:
        """Context in which blocks up to `layer` cost nothing and `states` (rows, tokens, width) leave block `layer`."""
        blocks = [self.module(self.layout.block(i)) for i in range(layer + 1)]
        return skip_blocks(blocks, states, self.blocks_return_tuples)

    def writes_are_additive(self, layer: int) -> bool:
        """Whether adding r to the MLP projection's output adds exactly r to the block's output.

        Not so in post-norm blocks and with scaled residuals: there, residuals measured on block outputs cannot be
        written to the projection.
        """
        block, projection = self.layout.block(layer), self.layout.mlp_out(layer)
        plain = self._probe(block, hidden_of)
        shift = (
            torch.randn(self.layout.width, generator=torch.Generator().manual_seed(0)).to(plain) * plain.float().std()
        )
        with on_output(self.module(projection), lambda hidden: hidden + shift.to(hidden)):
            moved = self._probe(block, hidden_of)
        error = ((moved - plain).float() - shift.float()).norm(dim=-1) / shift.float().norm()
        return bool(error.max() < (1e-3 if self.dtype == torch.float32 else 5e-2))

    @torch.no_grad()
    def _probe(self, module: str, take: Callable[[Any], Any]) -> Any:
        seen: list[Any] = []

        def hook(_: nn.Module, __: Any, output: Any) -> None:
            seen.append(take(output))
            raise StopForward

        handle = self.module(module).register_forward_hook(hook)
        try:
            self.model(**self.head.trial())
        except StopForward:
            pass
        finally:
            handle.remove()
        return seen[0]
