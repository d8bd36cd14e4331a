"""The structure rules of CONTRIBUTING.md as functions of source text; test_structure.py applies them here.

Every rule takes the path of a file relative to the repository (with /) and its source, and returns its violations, one
line each: ``path:line: what``.
"""

from __future__ import annotations

import ast
import functools
import re
from collections.abc import Iterator

ROOMS = (
    "config",
    "plan",
    "runtime",
    "text",
    "data",
    "model",
    "objective",
    "optim",
    "checkpoint",
    "metrics",
    "evaluate",
    "train",
)
ENTRIES, TOOLS = len(ROOMS), len(ROOMS) + 1

MEGATRON_ROOMS = {"runtime", "data", "model", "objective", "optim", "checkpoint", "train"}
MEGATRON_DATA_MODULES = ("megatron.core.datasets.helpers", "megatron.core.datasets.indexed_dataset")

# What a login node without torch has: config and plan may import nothing else from outside the standard library.
LIGHT_LIBRARIES = {"yaml", "tyro", "typing_extensions"}

# The one file of each optional or heavy library. transformers has two: its tokenizers, and the model of an exported
# folder that ours is compared with. What is written beside exported weights is for transformers alone.
MODELING = "megatron_steel/checkpoint/modeling/"
LIBRARY_FILES = {
    "wandb": {"megatron_steel/metrics/wandb_process.py"},
    "tensorboard": {"megatron_steel/metrics/sinks.py"},
    "transformer_engine": {"megatron_steel/model/backends.py"},
    "datatrove": {"megatron_steel/data/clean_datatrove.py"},
    "transformers": {"megatron_steel/text/huggingface.py", "megatron_steel/checkpoint/verify.py"},
}

MAX_FILE_LINES, MAX_FUNCTION_LINES, HARD_FUNCTION_LINES = 400, 60, 100

DEVICE_MODULES = ("torch.cuda", "torch.backends.cuda", "torch.backends.cudnn", "torch.xpu", "torch.mps", "torch.npu")
# Spelled in two parts, so that this file does not break its own rule.
UNFINISHED = re.compile(r"\b(TO" r"DO|FIX" r"ME|X" r"XX|NotImplemented" r"Error)\b")


@functools.cache
def parse(source: str) -> ast.Module:
    """The syntax tree of a file; every rule looks at the same one."""
    return ast.parse(source)


@functools.cache
def nodes(source: str) -> list[ast.AST]:
    """Every node of that tree."""
    return list(ast.walk(parse(source)))


def dotted(node: ast.AST) -> str:
    """``a.b.c`` for a chain of attributes, ``.c`` after anything else, an empty string for other nodes."""
    if isinstance(node, ast.Name):
        return node.id
    return f"{dotted(node.value)}.{node.attr}" if isinstance(node, ast.Attribute) else ""


def room_of(path: str) -> int:
    """Position of a file in the river; the package's own ``__init__`` stands left of every room."""
    parts = path.split("/")
    if parts[0] == "tools":
        return TOOLS
    if len(parts) == 2:
        return -1 if parts[1] == "__init__.py" else ENTRIES
    return ROOMS.index(parts[1])


def imports(path: str, source: str) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of every import anywhere in the file; ``from a import b`` gives ``a.b``."""
    package = path.removesuffix(".py").split("/")[:-1]
    for node in nodes(source):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            for alias in node.names:
                yield node.lineno, f"{module}.{alias.name}"
        elif isinstance(node, ast.Call) and dotted(node.func).endswith(("import_module", "__import__")):
            if node.args and isinstance(node.args[0], ast.Constant) and isinstance(node.args[0].value, str):
                yield node.lineno, node.args[0].value


def inside(name: str, module: str) -> bool:
    """Whether a dotted name is the module or something in it."""
    return name == module or name.startswith(module + ".")


def left_only_imports(path: str, source: str) -> list[str]:
    """A room imports only itself and rooms to its left."""
    found, here = [], room_of(path)
    for line, name in imports(path, source):
        first, _, rest = name.partition(".")
        if first == "tools":
            there = TOOLS
        elif first == "megatron_steel" and rest:
            second = rest.split(".")[0]
            there = ROOMS.index(second) if second in ROOMS else (-1 if second.startswith("__") else ENTRIES)
        else:
            continue
        if there > here or (there == here == ENTRIES):
            found.append(f"{path}:{line}: imports {name}, which is to its right")
    return found


def device_names(path: str, source: str) -> list[str]:
    """Device APIs and device strings are named only in runtime/."""
    if path.startswith("megatron_steel/runtime/"):
        return []
    found = []
    for line, name in imports(path, source):
        if any(inside(name, module) for module in DEVICE_MODULES):
            found.append(f"{path}:{line}: imports {name}")
    for node in nodes(source):
        if isinstance(node, ast.Attribute) and (dotted(node) in DEVICE_MODULES or node.attr == "is_cuda"):
            found.append(f"{path}:{node.lineno}: names {dotted(node)}")
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "cuda":
            found.append(f"{path}:{node.lineno}: calls .cuda()")
        elif isinstance(node, ast.Constant) and re.fullmatch(r"cuda(:.*)?", str(node.value)):
            found.append(f"{path}:{node.lineno}: device string {node.value!r}")
    return found


def megatron_imports(path: str, source: str) -> list[str]:
    """megatron.core is imported only where an upgrade is expected to be felt."""
    found = []
    for line, name in imports(path, source):
        if not inside(name, "megatron"):
            continue
        room = path.split("/")[1]
        allowed = room in MEGATRON_ROOMS
        if not allowed or (room == "data" and not name.startswith(MEGATRON_DATA_MODULES)):
            found.append(f"{path}:{line}: imports {name}")
    return found


def light_imports(path: str, source: str, standard: frozenset[str]) -> list[str]:
    """config, plan and tools/plan.py import the standard library, a few light libraries and each other."""
    if not path.startswith(("megatron_steel/config/", "megatron_steel/plan/")) and path != "tools/plan.py":
        return []
    found = []
    for line, name in imports(path, source):
        first = name.split(".")[0]
        if first not in standard | LIGHT_LIBRARIES | {"megatron_steel"}:
            found.append(f"{path}:{line}: imports {name}")
    return found


def library_imports(path: str, source: str) -> list[str]:
    """An optional library is imported in its one file."""
    found = []
    for line, name in imports(path, source):
        library = "tensorboard" if inside(name, "torch.utils.tensorboard") else name.split(".")[0]
        if library == "transformers" and path.startswith(MODELING):
            continue
        if path not in LIBRARY_FILES.get(library, {path}):
            found.append(f"{path}:{line}: imports {library}, which belongs in {' or '.join(LIBRARY_FILES[library])}")
    return found


def file_budget(path: str, source: str) -> list[str]:
    """A file has at most MAX_FILE_LINES lines."""
    lines = source.count("\n")
    return [f"{path}:1: {lines} lines, more than {MAX_FILE_LINES}"] if lines > MAX_FILE_LINES else []


def function_budget(path: str, source: str, limit: int) -> list[str]:
    """A function has at most ``limit`` lines, from its ``def`` to its end."""
    found = []
    for node in nodes(source):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines = (node.end_lineno or node.lineno) - node.lineno + 1
            if lines > limit:
                found.append(f"{path}:{node.lineno}: {node.name} has {lines} lines, more than {limit}")
    return found


def documented(path: str, source: str) -> list[str]:
    """Modules, and public functions and classes at module level, have a docstring."""
    tree = parse(source)
    found = [] if ast.get_docstring(tree) else [f"{path}:1: no module docstring"]
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            if not node.name.startswith("_") and not ast.get_docstring(node):
                found.append(f"{path}:{node.lineno}: {node.name} has no docstring")
    return found


def typed(path: str, source: str) -> list[str]:
    """Every argument and return value has a type."""
    found = []
    for node in nodes(source):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        spec = node.args
        arguments = [*spec.posonlyargs, *spec.args, *spec.kwonlyargs, *filter(None, (spec.vararg, spec.kwarg))]
        missing = [a.arg for a in arguments if a.annotation is None and a.arg not in ("self", "cls")]
        missing += [] if node.returns else ["return value"]
        if missing:
            found.append(f"{path}:{node.lineno}: {node.name} has no type for {', '.join(missing)}")
    return found


def swallowed_errors(path: str, source: str) -> list[str]:
    """No bare ``except``, no handler that does nothing, no suppressing of everything."""
    found = []
    for node in nodes(source):
        if isinstance(node, ast.ExceptHandler):
            if node.type is None:
                found.append(f"{path}:{node.lineno}: bare except")
            if all(isinstance(s, ast.Pass) or (isinstance(s, ast.Expr) and is_ellipsis(s.value)) for s in node.body):
                found.append(f"{path}:{node.lineno}: except that does nothing")
        elif isinstance(node, ast.Call) and dotted(node.func).endswith("suppress"):
            if set(map(dotted, node.args)) & {"Exception", "BaseException"}:
                found.append(f"{path}:{node.lineno}: suppresses every error")
    return found


def is_ellipsis(node: ast.expr) -> bool:
    """Whether an expression is a bare ``...``."""
    return isinstance(node, ast.Constant) and node.value is ...


def stubs(path: str, source: str) -> list[str]:
    """No unfinished work: markers anywhere in the text, functions without a body outside protocols and ABCs."""
    found = [
        f"{path}:{number}: {match.group()}"
        for number, line in enumerate(source.splitlines(), 1)
        for match in UNFINISHED.finditer(line)
    ]
    protocols = [
        node for node in nodes(source) if isinstance(node, ast.ClassDef) and "Protocol" in map(dotted, node.bases)
    ]
    exempt = {id(item) for node in protocols for item in node.body}
    for node in nodes(source):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and id(node) not in exempt:
            body = node.body[1:] if ast.get_docstring(node) else node.body
            abstract = any(dotted(d).endswith(("abstractmethod", "overload")) for d in node.decorator_list)
            if not abstract and body and all(isinstance(s, ast.Expr) and is_ellipsis(s.value) for s in body):
                found.append(f"{path}:{node.lineno}: {node.name} has no body")
    return found


def ascii_only(path: str, source: str) -> list[str]:
    """Code is ASCII; data strings can be written with escapes."""
    lines = enumerate(source.splitlines(), 1)
    return [f"{path}:{number}: not ASCII: {line.strip()!a}" for number, line in lines if not line.isascii()]
