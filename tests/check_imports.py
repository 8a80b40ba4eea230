"""The import rules of the package, checked on its source: run by `make check`."""

import ast
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FLAT = ("modeling_uground", "processing")
# Commands stay at home: the entry files of the Hub closure do not import them.
COMMANDS = {"annotate.py", "annotation_inputs.py", "job_processes.py"}
COMMAND_PACKAGES = {"uground", "datasets", "pyarrow", "pycocotools", "tqdm"}
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
    for folder in (*FLAT, "training", "hub"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            found += too_long(path)
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
