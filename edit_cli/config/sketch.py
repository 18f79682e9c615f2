"""The keys of a class of settings, and the words that they take, read from its source: completion and help must not
import what methods import. `config.schema` tells all the rest, of classes that are imported.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

PACKAGE = "edit_cli"


def keys(target: str, prefix: str = "") -> dict[str, tuple[str, ...]]:
    """{dotted key: the words that it takes, if it takes some} of a `_target_`, groups inside it included; those of a
    list in brackets, each alone, and [@GROUP] for the options of a group. Nothing of a class that is not of this
    package, or not there.
    """
    module, _, name = target.rpartition(".")
    cls = _class(module, name)
    return {} if cls is None else dict(_keys(*_settings_of(*cls), prefix))


def _keys(module: str, cls: ast.ClassDef, prefix: str) -> Iterator[tuple[str, tuple[str, ...]]]:
    for name, (place, annotation) in _fields(module, cls).items():
        group = _group(place, annotation)
        if group is None:
            listed = (f"[{word}]" for word in _listed(place, annotation))
            yield f"{prefix}{name}", tuple(dict.fromkeys((*listed, *_words(place, annotation))))
        else:
            yield from _keys(*group, f"{prefix}{name}.")


def _settings_of(module: str, cls: ast.ClassDef) -> tuple[str, ast.ClassDef]:
    """A class of settings itself, or that of the method which a class is: its own `Config`, or that of a base."""
    for place, one in _line(module, cls):
        for node in one.body:
            if isinstance(node, ast.Assign | ast.AnnAssign) and node.value is not None and _target(node) == "Config":
                found = _class(place, ast.unparse(node.value))
                if found is not None:
                    return found
    return module, cls


def _target(node: ast.Assign | ast.AnnAssign) -> str:
    return ast.unparse(node.target if isinstance(node, ast.AnnAssign) else node.targets[0])


def _fields(module: str, cls: ast.ClassDef) -> dict[str, tuple[str, ast.expr]]:
    """{field: (module where it is, its annotation)}, those of bases included."""
    found: dict[str, tuple[str, ast.expr]] = {}
    for place, one in reversed(list(_line(module, cls))):
        for node in one.body:
            if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and _is_given(node):
                found[node.target.id] = place, node.annotation
    return found


def _is_given(node: ast.AnnAssign) -> bool:
    """Whether a field is one that a user gives."""
    if ast.unparse(node.annotation).startswith(("ClassVar", "KW_ONLY")):
        return False
    value = node.value
    return not isinstance(value, ast.Call) or not any(
        word.arg == "init" and ast.unparse(word.value) == "False" for word in value.keywords
    )


def _line(module: str, cls: ast.ClassDef) -> Iterator[tuple[str, ast.ClassDef]]:
    """A class and those that it is made from, itself first."""
    yield module, cls
    for base in cls.bases:
        name = ast.unparse(base.value if isinstance(base, ast.Subscript) else base)
        found = _class(module, name)
        if found is not None:
            yield from _line(*found)


def _group(module: str, annotation: ast.expr) -> tuple[str, ast.ClassDef] | None:
    """The class of settings that a field holds, unless another key stands for it."""
    if "Linked(" in ast.unparse(annotation):
        return None
    for option in _options(annotation):
        name = ast.unparse(option)
        if (cls := _class(module, name)) is not None:
            if any(ast.unparse(mark).startswith("dataclass") for mark in cls[1].decorator_list):
                return cls
        elif (alias := _alias(module, name)) is not None and (group := _group(*alias)) is not None:
            return group
    return None


def _words(module: str, annotation: ast.expr) -> Iterator[str]:
    """What a field takes, as far as it can be listed."""
    for option in _options(annotation):
        if isinstance(option, ast.Subscript) and ast.unparse(option.value) == "Literal":
            listed = option.slice.elts if isinstance(option.slice, ast.Tuple) else [option.slice]
            yield from (str(word.value) for word in listed if isinstance(word, ast.Constant))
        elif isinstance(option, ast.Constant) and option.value is None:
            yield "null"
        elif isinstance(option, ast.Name) and option.id == "bool":
            yield from ("true", "false")
        elif (alias := _alias(module, ast.unparse(option))) is not None:
            yield from _words(*alias)


def _listed(module: str, annotation: ast.expr) -> Iterator[str]:
    """What a list may hold, as far as it can be listed."""
    for mark in ast.walk(annotation):
        if isinstance(mark, ast.Call) and ast.unparse(mark.func) == "Such":
            yield from _such(mark)
    for option in _options(annotation):
        if isinstance(option, ast.Subscript) and ast.unparse(option.value) == "list":
            yield from _words(module, option.slice)
        elif (alias := _alias(module, ast.unparse(option))) is not None:
            yield from _listed(*alias)


def _such(mark: ast.Call) -> Iterator[str]:
    """The words of a `config.schema.Such`, and its group."""
    yield from (word for part in mark.args for word in ast.literal_eval(part))
    yield from (f"@{ast.literal_eval(given.value)}" for given in mark.keywords if given.arg == "group")


def _options(annotation: ast.expr) -> Iterator[ast.expr]:
    """The types of a union, without what they are annotated with."""
    if isinstance(annotation, ast.BinOp):
        yield from _options(annotation.left)
        yield from _options(annotation.right)
    elif isinstance(annotation, ast.Subscript) and ast.unparse(annotation.value) == "Annotated":
        assert isinstance(annotation.slice, ast.Tuple)
        yield from _options(annotation.slice.elts[0])
    else:
        yield annotation


# --- where a name is defined ------------------------------------------------------------------------------------------


def _class(module: str, name: str) -> tuple[str, ast.ClassDef] | None:
    """(module, class) of a name that a module has; None if it is no class of this package."""
    module, found = _followed(module, name)
    return (module, found) if isinstance(found, ast.ClassDef) else None


def _alias(module: str, name: str) -> tuple[str, ast.expr] | None:
    """(module, what it stands for) of such a name; None if it is no alias."""
    module, found = _followed(module, name)
    return (module, found) if isinstance(found, ast.expr) else None


def _followed(module: str, name: str) -> tuple[str, ast.ClassDef | ast.expr | None]:
    """Through imports, to where a name is defined."""
    found = _names(module).get(name)
    while isinstance(found, tuple):
        module, name = found
        found = _names(module).get(name)
    return module, found


@cache
def _names(module: str) -> dict[str, ast.ClassDef | ast.expr | tuple[str, str]]:
    """{name: its class, the value of its alias, or (module, name) that it is imported from} at the top of a module."""
    file = _file(module)
    found: dict[str, ast.ClassDef | ast.expr | tuple[str, str]] = {}
    for node in ast.parse(file.read_bytes()).body if file is not None else ():
        for inner in node.body if isinstance(node, ast.If) else (node,):  # if TYPE_CHECKING
            if isinstance(inner, ast.ClassDef):
                found[inner.name] = inner
            elif isinstance(inner, ast.Assign) and isinstance(inner.targets[0], ast.Name):
                found[inner.targets[0].id] = inner.value
            elif isinstance(inner, ast.ImportFrom) and inner.module is not None:
                found |= {alias.asname or alias.name: (inner.module, alias.name) for alias in inner.names}
    return found


def _file(module: str) -> Path | None:
    """Where the source of a module of this package lies."""
    package, *parts = module.split(".")
    if package != PACKAGE:
        return None
    place = Path(__file__).parents[1].joinpath(*parts)
    files = (place.with_suffix(".py"), place / "__init__.py")
    return next(filter(Path.is_file, files), None)
