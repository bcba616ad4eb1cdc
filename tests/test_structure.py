"""The structure of the package: which way imports point, and what may not be written twice."""

import ast
import itertools
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(ROOT.glob("sparsify/**/*.py"))
}
FOLDERS = sorted(path.parent.name for path in ROOT.glob("sparsify/scripts/*/__init__.py"))

ROOMS = (
    ("settings",),
    ("kernels",),
    ("saes", "tlens"),
    ("losses", "splicing", "data"),
    ("sae_transformer",),
    ("training", "evaluation"),
    ("runs",),
    ("sweeps", "attribution", "formats"),
    ("scripts",),
)
"""Rooms of the package, from those that may be imported by all that follow."""

JUSTIFIED = {
    # The names that users type are on the class, and loading a run builds one.
    ("sparsify.sae_transformer", "sparsify.runs.saved"),
    ("sparsify.sae_transformer", "sparsify.formats.models"),
}
"""Imports against the order, each with its reason, which is also a comment where it stands."""


def imports_of(name: str) -> Iterator[str]:
    """The modules that a module imports, also inside functions, but not for type checking alone."""
    tree = ast.parse(MODULES[name].read_text(encoding="utf-8"))
    for_types = {
        inner
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if node in for_types:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in MODULES)
        elif isinstance(node, ast.ImportFrom) and node.module in MODULES:
            submodules = [f"{node.module}.{alias.name}" for alias in node.names]
            known = [module for module in submodules if module in MODULES]
            yield from known or [node.module]


IMPORTS = {name: set(imports_of(name)) - {name} for name in MODULES}


def room_of(module: str) -> str:
    return module.split(".")[1] if "." in module else ""


def test_every_room_has_its_place():
    placed = {name for floor in ROOMS for name in floor}
    assert {room_of(name) for name in MODULES} - {""} == placed


@pytest.mark.parametrize("room", [name for floor in ROOMS for name in floor])
def test_imports_point_one_way(room: str):
    floors = {name: index for index, floor in enumerate(ROOMS) for name in floor}
    wrong = [
        (importer, imported)
        for importer, found in IMPORTS.items()
        for imported in found
        if room_of(importer) == room
        and room_of(imported) not in ("", room)
        and floors[room_of(imported)] >= floors[room]
        and (importer, imported) not in JUSTIFIED
    ]
    assert wrong == []


def test_modules_do_not_import_each_other_in_circles():
    left = {
        name: {module for module in found if (name, module) not in JUSTIFIED}
        for name, found in IMPORTS.items()
    }
    while free := [name for name, found in left.items() if not found]:
        left = {name: found - set(free) for name, found in left.items() if found}
    assert left == {}


def test_no_script_folder_imports_another():
    def folder_of(module: str) -> str | None:
        parts = module.split(".")
        return parts[2] if len(parts) > 3 and parts[1] == "scripts" else None

    wrong = [
        (importer, imported)
        for importer, found in IMPORTS.items()
        for imported in found
        if folder_of(importer) and folder_of(imported) not in (None, folder_of(importer))
    ]
    assert wrong == []


def code_lines(folder: str) -> list[str]:
    """Lines of a script folder's code, without imports, texts about it, and what is on every line.

    Files are kept apart by a line that no other file has.
    """
    lines = []
    for path in sorted((ROOT / "sparsify/scripts" / folder).glob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            body = getattr(node, "body", None)
            if isinstance(body, list) and isinstance(
                node, ast.Module | ast.ClassDef | ast.FunctionDef
            ):
                node.body = [
                    part
                    for part in node.body
                    if not isinstance(part, ast.Import | ast.ImportFrom)
                    and not (isinstance(part, ast.Expr) and isinstance(part.value, ast.Constant))
                ] or [ast.Pass()]
        lines += [*map(str.strip, ast.unparse(tree).splitlines()), f"# {path}"]
    return [line for line in lines if line and line.strip("()[]{},:") not in ("", "pass")]


@pytest.mark.parametrize(("one", "other"), list(itertools.combinations(FOLDERS, 2)))
def test_script_folders_share_few_lines(one: str, other: str):
    length, lines, others = 6, code_lines(one), code_lines(other)
    runs = {tuple(others[i : i + length]) for i in range(len(others) - length + 1)}
    shared = {
        place
        for start in range(len(lines) - length + 1)
        if tuple(lines[start : start + length]) in runs
        for place in range(start, start + length)
    }
    assert len(shared) < 20, [lines[place] for place in sorted(shared)]
