"""The rules of the package, checked on its source: run by `make check`, which prints which room imports which."""

import ast
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# Their files travel to the Hub, side by side: only siblings and the runtime dependencies may be imported there.
FLAT = ("modeling_uground", "processing")
# What files that travel may import besides one another and the standard library.
RUNTIME = {"torch", "transformers", "huggingface_hub", "safetensors", "accelerate", "numpy", "PIL"}
# Shared by all commands, in the root of the package.
LEAVES = (
    "checkpoint_loading.py",
    "command_line.py",
    "extras.py",
    "job_processes.py",
    "matrix_optimizer.py",
    "whole_files.py",
)
BASE = ("modeling_uground", "processing", "leaves")
# Room to the rooms that it may import. `leaves` are the files above; the root's `__init__` and `__main__` are free.
ARROWS = {
    "modeling_uground": (),
    "processing": (),
    "leaves": ("modeling_uground", "processing"),
    "apps": BASE,
    "training/scenes": BASE,
    "training/data": (*BASE, "training/scenes"),
    "training/objectives": BASE,
    "training/evaluation": (*BASE, "training/data", "training/scenes"),
    "training/metric_modules": (*BASE, "training/data", "training/evaluation"),
    "training": (
        *BASE,
        "training/data",
        "training/objectives",
        "training/evaluation",
        "training/scenes",
        "hub/publish",
    ),
    "hub/weights": BASE,
    "hub/convert": (*BASE, "hub/weights"),
    "hub/publish": (*BASE, "hub/weights", "training/scenes"),
    "hub": (*BASE, "hub/weights", "hub/convert", "hub/publish", "training/data", "training/scenes"),
}


def imports_of(path: Path) -> list[tuple[int, int, str, list[str]]]:
    """Line, level (number of leading dots), module and imported names of every import in a file."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [(node.lineno, 0, alias.name, []) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            found.append((node.lineno, node.level, node.module or "", [alias.name for alias in node.names]))
    return found


def room_of(parts: list[str]) -> str | None:
    """The room of a file or module, given by its path below the root without an ending; `None` for the root itself."""
    if not parts:
        return None
    if len(parts) == 1:
        return "leaves" if f"{parts[0]}.py" in LEAVES else parts[0] if parts[0] in ARROWS else None
    inner = "/".join(parts[:2])
    return inner if inner in ARROWS else parts[0] if parts[0] in ARROWS else None


def sources() -> list[Path]:
    """All files of the package but those of tests and of bundled checkpoints."""
    folders = sorted({room.split("/")[0] for room in ARROWS if room != "leaves"})
    found = [ROOT / name for name in (*LEAVES, "__init__.py", "__main__.py")]
    for folder in folders:
        found += sorted(path for path in (ROOT / folder).rglob("*.py") if "checkpoints" not in path.parts)
    return found


def arrows_and_problems() -> tuple[dict[str, set[str]], list[str]]:
    """Which room imports which, and what breaks the rules, one line each."""
    arrows, found = {room: set() for room in ARROWS}, []
    files = {folder: sorted((ROOT / folder).glob("*.py")) for folder in FLAT}
    names = [path.name for paths in files.values() for path in paths if path.name != "__init__.py"]
    found += [f"{name}: stands in both of {FLAT}" for name in sorted(set(names)) if names.count(name) > 1]
    for path in sources():
        parts = list(path.relative_to(ROOT).with_suffix("").parts)
        room, place = room_of(parts), path.relative_to(ROOT)
        for line, level, module, imported in imports_of(path):
            if room in FLAT:
                found += flat_problem(path, f"{place}:{line}", level, module)
                continue
            if level:
                found.append(f"{place}:{line}: imports by whole names only, got {'.' * level}{module}")
            if room is None or not module.startswith("uground"):
                continue
            target = room_of(module.split(".")[1:] or imported[:1])
            if target in (None, room):
                continue
            arrows[room].add(target)
            if target not in ARROWS[room]:
                found.append(f"{place}:{line}: {room} may not import {target}, got {module}")
        found += too_long(path) + foreign_code(path) + untyped(path)
    return arrows, found


def flat_problem(path: Path, place: str, level: int, module: str) -> list[str]:
    """What is wrong with an import in a file that travels."""
    siblings = {sibling.stem for sibling in path.parent.glob("*.py")}
    top = module.split(".")[0]
    if level > 1 or (level == 1 and (top not in siblings or "." in module)):
        return [f"{place}: may import siblings of its folder only, got {'.' * level}{module}"]
    if level == 0 and top not in RUNTIME and top not in sys.stdlib_module_names:
        return [f"{place}: {top} is no runtime dependency"]
    return []


def foreign_code(path: Path) -> list[str]:
    """Calls that may run code of a checkpoint: `trust_remote_code=True`, `torch.load` of more than weights."""
    place, found = path.relative_to(ROOT), []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.Call):
            continue
        given = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
        if given.get("trust_remote_code") == "True":
            found.append(f"{place}:{node.lineno}: trust_remote_code=True runs code of a checkpoint")
        called = ast.unparse(node.func)
        if called in ("pickle.load", "pickle.loads") or (
            called == "torch.load" and given.get("weights_only") != "True"
        ):
            found.append(f"{place}:{node.lineno}: {called} of anything but weights runs what a file says")
    return found


def untyped(path: Path) -> list[str]:
    """Public functions and methods, constructors among them, whose parameters or result have no type."""
    found, place = [], path.relative_to(ROOT)

    def look_into(node: ast.AST) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.ClassDef) and not child.name.startswith("_"):
                look_into(child)
            if not isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef)):
                continue
            if child.name.startswith("_") and child.name not in ("__init__", "__call__"):
                continue
            given = child.args
            every = [*given.posonlyargs, *given.args, *given.kwonlyargs, given.vararg, given.kwarg]
            bare = [one.arg for one in every if one and not one.annotation and one.arg not in ("self", "cls")]
            bare += ["its result"] if child.returns is None and child.name != "__init__" else []
            if bare:
                found.append(f"{place}:{child.lineno}: {child.name} has no type for {', '.join(bare)}")

    look_into(ast.parse(path.read_text(encoding="utf-8")))
    return found


def too_long(path: Path) -> list[str]:
    """Files of more than 500 lines and functions of more than 80."""
    source = path.read_text(encoding="utf-8")
    place = path.relative_to(ROOT)
    lines = len(source.splitlines())
    found = [f"{place}: {lines} lines, expected at most 500"] if lines > 500 else []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            length = node.end_lineno - node.lineno + 1
            if length > 80:
                found.append(f"{place}:{node.lineno}: {node.name} has {length} lines, expected at most 80")
    return found


if __name__ == "__main__":
    found_arrows, broken = arrows_and_problems()
    for name, targets in found_arrows.items():
        print(f"{name} -> {', '.join(sorted(targets)) or 'nothing'}")
    for line in broken:
        print(line)
    sys.exit(1 if broken else 0)
