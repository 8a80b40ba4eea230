"""The import rules of the package, checked on its source: run by `make check`."""

import ast
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FLAT = ("modeling_uground", "processing")
# Commands stay at home: the entry files of the Hub closure do not import them.
COMMANDS = {"annotate.py", "annotation_inputs.py", "job_processes.py"}
COMMAND_PACKAGES = {"uground", "datasets", "pyarrow", "pycocotools", "tqdm"}
# Shared by all commands: they import the two flat folders, and neither training nor hub.
SHARED = ("checkpoint_loading.py", "command_line.py")
SHARED_PARTS = ("uground.modeling_uground", "uground.processing")
# What files that travel to the Hub may import besides one another and the standard library.
RUNTIME = {"torch", "transformers", "huggingface_hub", "safetensors", "accelerate", "numpy", "PIL"}


def imports_of(path: Path) -> list[tuple[int, int, str]]:
    """Line, level (number of leading dots) and module of every import in a file."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [(node.lineno, 0, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            found.append((node.lineno, node.level, node.module or ""))
    return found


def problems() -> list[str]:
    """What breaks the rules, one line each."""
    files = {folder: sorted((ROOT / folder).rglob("*.py")) for folder in FLAT}
    found = []
    names = [path.name for paths in files.values() for path in paths if path.name != "__init__.py"]
    found += [f"{name}: stands in both of {FLAT}" for name in sorted(set(names)) if names.count(name) > 1]
    for folder, paths in files.items():
        siblings = {path.stem for path in paths}
        for path in paths:
            allowed = RUNTIME | COMMAND_PACKAGES if path.name in COMMANDS else RUNTIME
            for line, level, module in imports_of(path):
                top = module.split(".")[0]
                place = f"{folder}/{path.name}:{line}"
                if level > 1 or (level == 1 and (top not in siblings or "." in module)):
                    found.append(f"{place}: may import siblings of its folder only, got {'.' * level}{module}")
                elif level == 0 and top not in allowed and top not in sys.stdlib_module_names:
                    found.append(f"{place}: {top} is no runtime dependency")
    for name in SHARED:
        for line, level, module in imports_of(ROOT / name):
            if level or (module.startswith("uground") and not module.startswith(SHARED_PARTS)):
                found.append(f"{name}:{line}: may import {' and '.join(SHARED_PARTS)} only, got {module}")
    paths = [ROOT / name for name in (*SHARED, "__init__.py", "__main__.py")]
    for folder in (*FLAT, "training", "hub"):
        paths += sorted((ROOT / folder).rglob("*.py"))
    for path in paths:
        found += too_long(path) + foreign_code(path)
    return found


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
    broken = problems()
    for line in broken:
        print(line)
    sys.exit(1 if broken else 0)
