"""Second moments C = E[k kᵀ] of a layer's keys, from a file if there is one, else from a pass over a corpus.

They are always those of the unedited model, whatever is attached to it, and are stored under a key of everything that
they depend on: weights, architecture, tokenizer, text and how it was read.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypedDict
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from edit_cli.config.schema import Config, Count, FilePath, Linked, Seed
from edit_cli.errors import MissingError, UsageError
from edit_cli.files import shapes
from edit_cli.files.described import Damaged
from edit_cli.files.hub import Address, fetched
from edit_cli.files.paths import expanded
from edit_cli.files.shapes import Seconds
from edit_cli.lm.heads.kinds import require_causal
from edit_cli.statistics import files
from edit_cli.statistics.collect import Partial, Plan, Sums, sum_outer_products
from edit_cli.statistics.corpora import Corpus, EmbeddedText
from edit_cli.statistics.import_npz import find_npz, read_npz, source_of

if TYPE_CHECKING:
    from edit_cli.lm.model import LM

# Tokens a key dimension that keep at least 95 % of the overall score (Efficient Knowledge Editing via Minimal
# Precomputation).
AUTO_MULTIPLIER = 10
LONGEST = 4096  # tokens of a document, where the model could read more


class About(TypedDict):
    """What a file of second moments says of itself."""

    identity: dict[str, Any]
    tokens: shapes.Count
    documents: shapes.Count
    position0_share: float
    seconds: Seconds


@dataclass(frozen=True, eq=False)
class Moment:
    """The second moment of one layer's keys.

    `matrix`: (m, m) float64 in host memory, the mean over `tokens` tokens, symmetric.

    cached: it was there already. seconds: how long the pass took that made it (for all its layers). position0_share:
    the part of trace(C) that comes from the first token of each document, whose activations are massive in some models;
    None if imported.
    """

    layer: int
    matrix: Tensor
    tokens: int
    documents: int | None
    path: Path
    cached: bool
    seconds: float
    position0_share: float | None

    def condition(self) -> float:
        """Estimate of the condition number, never too large (m³/3 operations); infinite if singular."""
        return files.condition_estimate(self.matrix)


@dataclass(frozen=True, kw_only=True)
class MomentStore(Config):
    """Where second moments come from. Reading stops after `documents` or `tokens`, whichever comes first."""

    place = "stats"

    corpus: Annotated[Corpus, Linked("${oc.select:corpus,${corpus_config:${model.corpus}}}")] = field(
        default_factory=EmbeddedText
    )
    """The text: corpus=NAME, else the one that goes with the model."""
    documents: Count | None = 100_000
    """Stop after so many documents; null: after all."""
    tokens: Annotated[Count | Literal["auto"] | None, Linked("${model.moment_tokens}")] = None
    """Stop after so many tokens; auto: ten times the width of a key."""
    max_length: Count | None = None
    """Tokens of a document, the rest is cut; null: what the model can read, at most 4096."""
    include_bos: bool = True
    """Count the key of a leading BOS token, as published statistics do."""
    seed: Seed = 1
    """Order of the documents."""
    batch_tokens: Count = 8192
    """Tokens in one forward pass, padding included; speed and memory only."""
    dtype: Literal["float64", "float32"] = "float64"
    """Of the stored matrix; float32 halves the files and rounds."""
    cache_dir: Annotated[FilePath, Linked("${cache_dir}/stats")] = "~/.cache/edit-cli/stats"
    """Where they are kept."""
    import_npz: FilePath | None = None
    """Published statistics instead: FILE.npz, or a pattern with {layer}."""
    hub: str | None = None
    """hub:owner/name[:folder] with statistics as `push` sends them, which are looked at for what is missing here."""

    @cached_property
    def _loaded(self) -> WeakKeyDictionary[LM, dict[int, Moment]]:
        """Editors ask for the same matrix at every edit."""
        return WeakKeyDictionary()

    def require(self, model: str, layers: Sequence[int]) -> None:
        """Refuse a model of this name if its second moments are neither there nor can be computed. Whether those that
        are there are of the same weights, only the loaded model tells.

        Raises:
            MissingError: neither a file nor a text.
        """
        if self.import_npz:
            for layer in layers:
                source_of(self.import_npz, layer)
        elif self.hub is None and not all(self.found(model, layer) for layer in layers):
            self.corpus.require()

    def found(self, model: str, layer: int) -> bool:
        """Whether there is a file of that layer of a model of this name, be it of the same weights or not."""
        return any(expanded(self.cache_dir).glob(self._name(model, layer, "*")))

    def folder(self, model: str) -> Path:
        """Where the files of a model of this name lie."""
        return expanded(self.cache_dir) / files.slug(model)

    def second_moment(self, lm: LM, layer: int) -> Moment:
        """The second moment of one layer; computed and stored if it is not there yet.

        Raises:
            UsageError: no such layer, or settings that cannot work. MissingError: the corpus or the file to import
                cannot be read.
        """
        return self.collect(lm, [layer])[0]

    def collect(self, lm: LM, layers: Sequence[int]) -> list[Moment]:
        """Second moments of `layers`, in that order; those that are missing are all computed in one pass over the
        text.
        """
        require_causal(lm, "a second moment of keys")
        known = self._loaded.setdefault(lm, {})
        missing = [layer for layer in dict.fromkeys(layers) if layer not in known]
        if missing:
            with lm.monitor.phase("statistics"), lm.pristine():
                known.update(
                    self._import(lm, missing, self.import_npz)
                    if self.import_npz
                    else self._load_or_compute(lm, missing)
                )
        return [known[layer] for layer in layers]

    # --- from files -------------------------------------------------------------------------------------------------

    def _import(self, lm: LM, layers: Sequence[int], files_at: str) -> dict[int, Moment]:
        moments: dict[int, Moment] = {}
        used = {moment.path: layer for layer, moment in self._loaded[lm].items()}
        for layer in layers:
            path = find_npz(files_at, lm.layout.mlp_out(layer), layer)
            if path in used:
                both = f"layers {used[path]} and {layer}"
                raise UsageError(f"stats.import_npz={files_at} cannot serve {both}: write {{layer}} for the number")
            used[path] = layer
            matrix, tokens = read_npz(path, lm.key_width(layer))
            lm.monitor.note(
                f"second moment of layer {layer} from {path} ({tokens:,} tokens); that it is this model's is taken on"
                " trust"
            )
            moments[layer] = Moment(layer, _symmetric(matrix), tokens, None, path, True, 0.0, None)
        return moments

    def _load_or_compute(self, lm: LM, layers: Sequence[int]) -> dict[int, Moment]:
        identities = self._identities(lm, layers)
        self._fetch(lm, identities)
        found = {layer: moment for layer in layers if (moment := self._load(lm, layer, identities[layer], cached=True))}
        missing = {layer: identities[layer] for layer in sorted(layers) if layer not in found}
        missing = lm.process_group.broadcast(
            missing
        )  # the main process may be done with a file before another one looks for it
        if missing:
            self._compute(lm, missing)
            fresh = {layer: self._load(lm, layer, identity, cached=False) for layer, identity in missing.items()}
            found |= {layer: moment for layer, moment in fresh.items() if moment}
        return found

    def _fetch(self, lm: LM, identities: dict[int, dict[str, Any]]) -> None:
        """Take what is missing here, of just this model, text and settings, from the hub, where it is there."""
        paths = {layer: self._path(lm, layer, identity) for layer, identity in identities.items()}
        missing = {layer: path for layer, path in paths.items() if not path.is_file()}
        if self.hub is not None and missing and lm.process_group.is_main:
            files.make_folder(self._directory(lm))
            address = Address.parse(self.hub, "stats.hub=")
            folder = fetched(address, [path.name for path in missing.values()], "stats.hub=")
            for layer, path in missing.items():
                if (folder / path.name).is_file():
                    files.copy(folder / path.name, path)
                    lm.monitor.note(f"second moment of layer {layer} from {address}")
        lm.process_group.broadcast(None)  # the files are there

    def _load(self, lm: LM, layer: int, identity: dict[str, Any], cached: bool) -> Moment | None:
        path = self._path(lm, layer, identity)
        try:
            tensors, about = files.read(path)
            shapes.checked(about, About, path)
            if about["identity"] != identity or "second_moment" not in tensors:
                raise Damaged("it belongs to something else")
            files.check(tensors["second_moment"], about["tokens"], lm.key_width(layer))
        except FileNotFoundError:
            return None
        except (Damaged, MissingError) as error:
            lm.monitor.note(f"{path} is damaged ({error}): computing it again")
            return None
        matrix = tensors["second_moment"].double()
        return Moment(
            layer, matrix, about["tokens"], about["documents"], path, cached, about["seconds"], about["position0_share"]
        )

    # --- from text --------------------------------------------------------------------------------------------------

    def _compute(self, lm: LM, identities: dict[int, dict[str, Any]]) -> None:
        """One pass for all layers in `identities`; each is stored."""
        files.make_folder(self._directory(lm))
        layers, plan = list(identities), self.plan(lm)
        limits = [f"{n:,} {unit}" for n, unit in ((plan.documents, "documents"), (plan.tokens, "tokens")) if n]
        what = f"layer{'s' if len(layers) > 1 else ''} {', '.join(map(str, layers))} of {lm.name}"
        lm.monitor.note(
            f"no second moments of {what} yet: computing them from {self.corpus.label},"
            f" {' or '.join(limits) or 'all of it'}"
        )
        unfinished = Partial(self._directory(lm) / f"partial_{self._key(self._common(lm))}.safetensors")
        sums = sum_outer_products(lm, layers, self.corpus, plan, unfinished)
        if lm.process_group.is_main:
            for layer, identity in identities.items():
                self._store(lm, layer, identity, sums)
            unfinished.remove()
        lm.process_group.broadcast(None)  # the files are there

    def _store(self, lm: LM, layer: int, identity: dict[str, Any], sums: Sums) -> None:
        so_far = sums.so_far
        mean = _symmetric(sums.total.pop(layer).div_(so_far.tokens))
        if so_far.tokens < len(mean):
            lm.monitor.note(
                f"layer {layer}: {so_far.tokens:,} tokens are fewer than the {len(mean):,} dimensions of a key, so the"
                " second moment is singular; give more text (stats.tokens=auto, another corpus)"
            )
        about = {
            "identity": identity,
            "model": lm.name,
            "revision": lm.revision,
            "layer": layer,
            "corpus": self.corpus.label,
            "tokens": so_far.tokens,
            "documents": so_far.documents,
            "documents_sha256": so_far.text,
            "position0_share": so_far.first[str(layer)] / (so_far.tokens * mean.trace().item() or 1.0),
            "seconds": so_far.seconds,
        }
        files.write(self._path(lm, layer, identity), {"second_moment": mean.to(getattr(torch, self.dtype))}, about)

    # --- names ------------------------------------------------------------------------------------------------------

    def plan(self, lm: LM) -> Plan:
        """The settings with `auto` and null filled in for this model."""
        tokens = (
            AUTO_MULTIPLIER * max(map(lm.key_width, range(lm.layout.depth))) if self.tokens == "auto" else self.tokens
        )
        length = min(self.max_length or LONGEST, lm.head.max_length)
        return Plan(self.documents, tokens, length, self.include_bos, self.seed, self.batch_tokens)

    def _common(self, lm: LM) -> dict[str, Any]:
        """All that the numbers of any layer depend on. `batch_tokens` only moves rounding errors."""
        settings = asdict(self.plan(lm))
        settings.pop("batch_tokens")
        return {"model": files.model_identity(lm), "corpus": self.corpus.identity(), **settings}

    def _identities(self, lm: LM, layers: Sequence[int]) -> dict[int, dict[str, Any]]:
        common = {**self._common(lm), "stored_as": self.dtype}
        return {layer: {**common, "module": lm.layout.mlp_out(layer)} for layer in layers}

    def _directory(self, lm: LM) -> Path:
        return self.folder(lm.name)

    def _path(self, lm: LM, layer: int, identity: dict[str, Any]) -> Path:
        return expanded(self.cache_dir) / self._name(lm.name, layer, self._key(identity))

    def _name(self, model: str, layer: int, key: str) -> str:
        """Of a file in the cache."""
        return f"{files.slug(model)}/layer-{layer:02d}_{files.slug(self.corpus.label)}_{key}.safetensors"

    @staticmethod
    def _key(identity: dict[str, Any]) -> str:
        return files.digest_of(identity)[:16]


def _symmetric(matrix: Tensor) -> Tensor:
    return (matrix + matrix.T).div_(2)
