"""Names of methods, data sets, edits and metrics, and the classes behind them: those of this package, and plug-ins.

A configuration names a class by `_target_`, where Python finds it. What runs, edits and trained editors save names it
by its name here, so that files outlive moves in the code, and no file that comes from elsewhere can name code.

A plug-in is an installed package with entry points of `GROUPS`, or a package that the user names by
`plugins=[mypackage]`, whose `ENTRY_POINTS` says the same: {group: {name: "mypackage.module:Class"}}. Nothing of it is
imported before it is asked for.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from types import ModuleType
from typing import Any

from edit_cli.errors import MissingError, UsageError

METHODS, DATASETS, EDITS, METRICS = "edit_cli.methods", "edit_cli.datasets", "edit_cli.edits", "edit_cli.metrics"
PARTS = "parts"  # of a configuration that no plug-in brings
GROUPS = (METHODS, DATASETS, EDITS, METRICS)
DECLARED = "ENTRY_POINTS"
TARGET, TYPE = "_target_", "type"  # how a configuration names a class, and how files do

BUILT_IN: dict[str, dict[str, str]] = {
    METHODS: {
        "alphaedit": "edit_cli.editors.locate.alphaedit:AlphaEdit",
        "blue": "edit_cli.editors.locate.blue:BLUE",
        "defer": "edit_cli.editors.memory.defer:DEFER",
        "emmet": "edit_cli.editors.locate.emmet:EMMET",
        "enn": "edit_cli.editors.meta.enn:ENN",
        "ewc": "edit_cli.editors.finetune.ewc:EWC",
        "ft": "edit_cli.editors.finetune.ft:FT",
        "grace": "edit_cli.editors.memory.grace:GRACE",
        "icl-oracle": "edit_cli.editors.retrieval.icl_oracle:ICLOracle",
        "ike": "edit_cli.editors.retrieval.ike:IKE",
        "ke": "edit_cli.editors.meta.ke:KE",
        "kn": "edit_cli.editors.locate.kn:KN",
        "locft": "edit_cli.editors.finetune.locft:LocFT",
        "lookup": "edit_cli.editors.retrieval.lookup:Lookup",
        "lora": "edit_cli.editors.finetune.lora:Lora",
        "malmen": "edit_cli.editors.meta.malmen:MALMEN",
        "melo": "edit_cli.editors.memory.melo:MELO",
        "memit": "edit_cli.editors.locate.memit:MEMIT",
        "memit-merge": "edit_cli.editors.locate.memit_merge:MEMITMerge",
        "mend": "edit_cli.editors.meta.mend:MEND",
        "none": "edit_cli.editors.none:NoEditing",
        "pmet": "edit_cli.editors.locate.pmet:PMET",
        "rag": "edit_cli.editors.retrieval.rag:RAG",
        "replay": "edit_cli.editors.finetune.replay:Replay",
        "retrain": "edit_cli.editors.finetune.retrain:Retrain",
        "rome": "edit_cli.editors.locate.rome:ROME",
        "rp": "edit_cli.editors.retrieval.rp:RP",
        "serac": "edit_cli.editors.retrieval.serac:SERAC",
        "tpatcher": "edit_cli.editors.memory.tpatcher:TPatcher",
        "ultraedit": "edit_cli.editors.locate.ultraedit:UltraEdit",
        "wise": "edit_cli.editors.memory.wise:WISE",
    },
    DATASETS: {
        "cifar10": "edit_cli.datasets.cifar10:Cifar10",
        "continuations": "edit_cli.datasets.generation:Continuations",
        "convsent": "edit_cli.datasets.convsent:ConvSent",
        "counterfact": "edit_cli.datasets.counterfact:CounterFact",
        "digits": "edit_cli.datasets.digits:Digits",
        "facts": "edit_cli.datasets.facts:Facts",
        "questions": "edit_cli.datasets.questions:Questions",
        "fever": "edit_cli.datasets.fever:Fever",
        "images": "edit_cli.datasets.images:ImageFiles",
        "known-facts": "edit_cli.datasets.known_facts:KnownFacts",
        "pairs": "edit_cli.datasets.pairs:Pairs",
        "trex": "edit_cli.datasets.trex:TREx",
        "vitaminc": "edit_cli.datasets.vitaminc:VitaminC",
        "world": "edit_cli.datasets.world:WorldEdits",
        "world-hard": "edit_cli.datasets.world_tasks:WorldHard",
        "world-opinions": "edit_cli.datasets.world_tasks:WorldOpinions",
        "world-texts": "edit_cli.datasets.world_tasks:WorldTexts",
        "zsre": "edit_cli.datasets.zsre:ZsRE",
        "zsre-hard": "edit_cli.datasets.zsre_hard:ZsREHard",
        "zsre-questions": "edit_cli.datasets.zsre_qa:ZsREQuestions",
    },
    EDITS: {
        "defer": "edit_cli.editors.memory.defer:DeferPatch",
        "grace": "edit_cli.editors.memory.grace:GracePatch",
        "icl-oracle": "edit_cli.editors.retrieval.icl_oracle:OracleRoute",
        "ike": "edit_cli.editors.retrieval.ike:IkeRoute",
        "lookup": "edit_cli.editors.retrieval.lookup:CacheRoute",
        "melo": "edit_cli.editors.memory.melo:MeloPatch",
        "rag": "edit_cli.editors.retrieval.rag:RagRoute",
        "rp": "edit_cli.editors.retrieval.rp:RpRoute",
        "serac": "edit_cli.editors.retrieval.serac:SeracRoute",
        "tpatcher": "edit_cli.editors.memory.tpatcher:NeuronPatch",
        "weights": "edit_cli.edits.edit:WeightDelta",
        "weights-after": "edit_cli.edits.edit:WeightState",
        "wise": "edit_cli.editors.memory.side_memory:WisePatch",
    },
    PARTS: {
        "calibrate-settings": "edit_cli.experiment.settings:CalibrationSettings",
        "edit-protocol": "edit_cli.experiment.protocol:EditProtocol",
        "doctor-settings": "edit_cli.experiment.settings:DoctorSettings",
        "edit-settings": "edit_cli.experiment.settings:EditSettings",
        "embedded-text": "edit_cli.statistics.corpora:EmbeddedText",
        "evaluate-protocol": "edit_cli.experiment.protocol:EvaluateProtocol",
        "hub-text": "edit_cli.statistics.corpora:HubText",
        "inspect-protocol": "edit_cli.inspection.settings:InspectOptions",
        "inspect-settings": "edit_cli.experiment.settings:InspectSettings",
        "lifelong": "edit_cli.experiment.protocol:SequentialProtocol",
        "model": "edit_cli.lm.loading:ModelOptions",
        "second-moments": "edit_cli.statistics.moments:MomentStore",
        "settings": "edit_cli.experiment.settings:Settings",
        "sme": "edit_cli.experiment.sme_protocol:SmeProtocol",
        "prepare-settings": "edit_cli.experiment.settings:PrepareSettings",
        "statistics-settings": "edit_cli.experiment.settings:MomentSettings",
        "text-file": "edit_cli.statistics.corpora:TextFile",
        "trace-protocol": "edit_cli.tracing.settings:TraceOptions",
        "trace-settings": "edit_cli.experiment.settings:TraceSettings",
        "tuning-protocol": "edit_cli.experiment.protocol:TuningProtocol",
        "tuning-settings": "edit_cli.experiment.settings:TuningSettings",
        "train-editor-settings": "edit_cli.experiment.settings:TrainingSettings",
    },
}


@dataclass
class _Named:
    """The packages that the user of this process has named, and what has been loaded of plug-ins."""

    packages: dict[str, ModuleType] = field(default_factory=dict)
    loaded: dict[str, dict[str, Any]] = field(default_factory=dict)


_named = _Named()


def admit(packages: Iterable[str]) -> None:
    """From now on these packages are the user's plug-ins, beside those that are installed as such; no others are.

    Call it with what the user has said, never with what stands in a file.

    Raises:
        UsageError: Python cannot import one of them.
    """
    wanted = list(dict.fromkeys(packages))
    if wanted == list(_named.packages):
        return
    for package in wanted:
        if not package.isidentifier():
            raise UsageError(f"plugins=[{package}]: give names of packages, as `import` has them, such as [mypackage]")
    _named.packages = {package: _imported(package, f"plugins=[{package}]") for package in wanted}
    _named.loaded = {}


def admitted() -> tuple[str, ...]:
    """The packages that the user has named."""
    return tuple(_named.packages)


def check() -> None:
    """Refuse what plug-ins declare if it cannot be. Raises as `plugins`."""
    for group in GROUPS:
        plugins(group)


def plugins(group: str) -> list[EntryPoint]:
    """What plug-ins bring of a group, by name; nothing of it is imported.

    Raises:
        UsageError: a named package declares something else than entry points into itself, or a name is taken.
    """
    found = list(_installed(group, tuple(sys.path)))
    for package, module in _named.packages.items():
        declared = getattr(module, DECLARED, {})
        if not isinstance(declared, Mapping) or not declared.keys() <= set(GROUPS):
            raise UsageError(f"plugins=[{package}]: {package}.{DECLARED} holds {{group: …}}, of {', '.join(GROUPS)}")
        for name, value in declared.get(group, {}).items():
            if str(value).partition(":")[0].partition(".")[0] != package or ":" not in str(value):
                raise UsageError(
                    f"plugins=[{package}]: {package}.{DECLARED} has {name}={value!r}: give '{package}.module:Class'"
                )
            found.append(EntryPoint(name, value, group))
    for entry in found:
        if entry.name in BUILT_IN.get(group, {}):
            raise UsageError(
                f"{origin(entry)} brings {entry.name} to {group}, which is the name of one of edit-cli's own: give it"
                " another name, or uninstall it"
            )
    # an installed package may be named as well
    return sorted(set(found), key=lambda entry: (entry.name, entry.value))


@cache
def _installed(group: str, path: tuple[str, ...]) -> tuple[EntryPoint, ...]:
    """Entry points of what is installed along the path: looked up once, since that reads a file of every package."""
    return tuple(entry_points(group=group))


def origin(entry: EntryPoint) -> str:
    """The package that an entry point is from, with its version where it is known."""
    if entry.dist is not None:
        return f"{entry.dist.name} {entry.dist.version}"
    package = entry.module.partition(".")[0]
    return f"{package} {version}" if (version := _version(package)) else package


def sources() -> dict[str, str]:
    """{package: version} of all that is a plug-in here."""
    found = {name: _version(name) for name in _named.packages}
    for dist in (entry.dist for group in GROUPS for entry in plugins(group)):
        if dist is not None:
            found[dist.name] = dist.version
    return dict(sorted(found.items()))


# --- from names to classes --------------------------------------------------------------------------------------------


def target(path: str, key: str) -> Any:
    """What a `_target_` names; key: where it stands.

    Raises:
        UsageError: it is neither of this package nor of a plug-in, or is not there.
    """
    module, _, name = path.rpartition(".")
    package = module.partition(".")[0]
    known = {entry.value.replace(":", ".") for group in (METHODS, DATASETS) for entry in plugins(group)}
    if package != "edit_cli" and package not in _named.packages and path not in known:
        raise UsageError(
            f"{key}={path}: only classes inside edit_cli and of plug-ins can be named: install the package as one, or"
            f" name it by plugins=[{package or 'mypackage'}]"
        )
    try:
        found = getattr(importlib.import_module(module), name)
    except AttributeError:
        found = None
    except ImportError as error:
        if not (isinstance(error, ModuleNotFoundError) and (error.name or "").startswith(f"{package}.")):
            if package == "edit_cli":
                raise
            raise UsageError(f"{key}={path} cannot be imported: {error}") from None
        found = None
    if not isinstance(found, type) or found.__module__.partition(".")[0] != package:
        version = " in this version" if package == "edit_cli" else ""
        raise UsageError(f"{key}={path}: there is no such class of settings{version}")
    return found


def edit_class(name: str, where: str) -> Any:
    """The class of edits of that name; where: what says so, for messages.

    Raises:
        MissingError: neither this version nor a plug-in has edits of that name.
    """
    if path := BUILT_IN[EDITS].get(name):
        return EntryPoint(name, path, EDITS).load()
    found = [entry for entry in plugins(EDITS) if entry.name == name]
    if len(found) == 1:
        return loaded(found[0])
    if found:
        raise MissingError(f"{where}: edits of the kind {name} come from {' and '.join(map(origin, found))}: use one")
    raise MissingError(
        f"{where}: edits of the kind {name!r} are not known to this version of edit-cli; if a plug-in made it, install"
        " that, or name its package by plugins=[mypackage]"
    )


def loaded(entry: EntryPoint) -> Any:
    """What an entry point of a plug-in names.

    Raises:
        UsageError: it cannot be imported, or is not there.
    """
    try:
        return entry.load()
    except (ImportError, AttributeError) as error:
        raise UsageError(f"{entry.name} of the plug-in {origin(entry)} cannot be loaded: {error}") from None


def metrics() -> dict[str, Any]:
    """{name: what it names} of the metrics of plug-ins.

    Raises:
        UsageError: two have one name, or one cannot be loaded.
    """
    if METRICS not in _named.loaded:
        found: dict[str, Any] = {}
        for entry in plugins(METRICS):
            if entry.name in found:
                raise UsageError(f"two plug-ins bring a metric {entry.name}, one of them {origin(entry)}: use one")
            found[entry.name] = loaded(entry)
        _named.loaded[METRICS] = found
    return _named.loaded[METRICS]


# --- from classes to names --------------------------------------------------------------------------------------------


def name_of(cls: type | str, groups: Sequence[str] = (METHODS, DATASETS, PARTS)) -> str:
    """The name of a class, or of what a `_target_` names: its own, or `package/Class` if it has none."""
    path = _path(cls)
    return _name(cls, groups) or f"{path.partition('.')[0]}/{path.rpartition('.')[2]}"


def edit_name(cls: type) -> str:
    """The name that edits of a class are saved under.

    Raises:
        UsageError: it has none, so that nobody could load them.
    """
    if name := _name(cls, (EDITS,)):
        return name
    raise UsageError(
        f"{_path(cls)} has no name under which its edits could be saved: give it one in the entry points {EDITS} of its"
        " package"
    )


def without_paths(config: Any) -> Any:
    """Plain containers with names in the place of every `_target_`."""
    if isinstance(config, Mapping):
        return {
            **({TYPE: name_of(str(config[TARGET]))} if TARGET in config else {}),
            **{key: without_paths(value) for key, value in config.items() if key != TARGET},
        }
    return [without_paths(value) for value in config] if isinstance(config, list) else config


def _path(cls: type | str) -> str:
    return cls if isinstance(cls, str) else f"{cls.__module__}.{cls.__qualname__}"


def _name(cls: type | str, groups: Sequence[str]) -> str | None:
    """The registered name of a class, or of what lies at a path."""
    path = _path(cls)
    package = path.partition(".")[0]
    for group in groups:
        for name, value in BUILT_IN.get(group, {}).items():
            if value.replace(":", ".") == path:
                return name
        for entry in plugins(group) if group in GROUPS and package != "edit_cli" else ():
            known = entry.value.replace(":", ".") == path
            # its package may hand it on from another module than its own
            if known or (isinstance(cls, type) and entry.module.partition(".")[0] == package and loaded(entry) is cls):
                return entry.name
    return None


def _imported(package: str, key: str) -> ModuleType:
    try:
        return importlib.import_module(package)
    except ModuleNotFoundError as error:
        if error.name != package:
            raise UsageError(f"{key}: {package} needs {error.name}, which is not installed") from None
        raise UsageError(
            f"{key}: Python finds no package of that name; install it, or put its folder into PYTHONPATH"
        ) from None
    except ImportError as error:
        raise UsageError(f"{key}: {package} cannot be imported: {error}") from None


def _version(package: str) -> str:
    return str(getattr(_named.packages.get(package), "__version__", ""))
