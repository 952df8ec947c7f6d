"""The rules of the house: which room may import which, and how large a file or function may be."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "greenroom"
SOURCES = sorted(PACKAGE.rglob("*.py"))
NATIVE = sorted(p for p in (ROOT / "csrc").rglob("*") if p.suffix in {".h", ".cpp"})

LOW = {"errors", "lazy", "native"}
# A room may import itself and the rooms named here.
MAY_IMPORT = {
    "errors": set(),
    "lazy": set(),
    "native": {"errors"},
    "gguf": {"errors"},
    "tokenizer": {"gguf"} | LOW,
    "kernels": LOW,
    "experts": {"gguf", "kernels"} | LOW,
    "layers": {"gguf", "kernels", "experts"} | LOW,
    "models": {"gguf", "layers", "kernels", "experts"} | LOW,
    "placement": {"gguf", "models", "layers", "kernels", "experts"} | LOW,
    "engine": {"gguf", "tokenizer", "models", "layers", "kernels", "experts", "placement"} | LOW,
}
TOP = {"server", "convert", "bench"}
BELOW_TOP = set(MAY_IMPORT)
for room in TOP:
    MAY_IMPORT[room] = BELOW_TOP
MAY_IMPORT["commands"] = BELOW_TOP | TOP | {"data"}
MAY_IMPORT["__init__"] = BELOW_TOP
MAY_IMPORT["__main__"] = {"commands"}

MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 40
MAX_KERNEL_LINES = 120  # a Triton kernel is one function, its arguments one a line


def room_of(path: Path) -> str:
    relative = path.relative_to(PACKAGE)
    return relative.parts[0].removesuffix(".py")


def imported_rooms(tree: ast.AST) -> set[str]:
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            names = [f"{node.module}.{a.name}" for a in node.names]
        elif isinstance(node, ast.Import):
            names = [a.name for a in node.names]
        else:
            continue
        for name in names:
            parts = name.split(".")
            if parts[0] == "greenroom" and len(parts) > 1:
                found.add(parts[1])
    return found


def docstring_lines(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    if ast.get_docstring(node) is None:
        return 0
    first = node.body[0]
    return (first.end_lineno or first.lineno) - first.lineno + 1


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_run_one_way(path: Path) -> None:
    room = room_of(path)
    rooms = {p.stem for p in PACKAGE.iterdir()}
    used = imported_rooms(ast.parse(path.read_text())) & rooms - {room}
    assert used <= MAY_IMPORT.get(room, BELOW_TOP), f"{room} may not import {used}"


@pytest.mark.parametrize("path", SOURCES + NATIVE, ids=lambda p: str(p.relative_to(ROOT)))
def test_files_stay_readable(path: Path) -> None:
    lines = path.read_text().count("\n")
    assert lines <= MAX_FILE_LINES


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_functions_stay_small(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        lines = (node.end_lineno or node.lineno) - node.lineno + 1 - docstring_lines(node)
        decorators = [ast.unparse(decorator) for decorator in node.decorator_list]
        kernel = any(text.startswith(("triton.jit", "kernel")) for text in decorators)
        limit = MAX_KERNEL_LINES if kernel else MAX_FUNCTION_LINES
        assert lines <= limit, f"{node.name} has {lines} lines"


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_modules_say_what_they_do(path: Path) -> None:
    source = path.read_text()
    if source.strip():
        assert ast.get_docstring(ast.parse(source)), "a module opens with what it does"
