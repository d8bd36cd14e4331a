"""The repository keeps its own rules (structure.py), and every rule can fail."""

from __future__ import annotations

import configparser
import functools
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import structure as rules

ROOT = Path(__file__).resolve().parents[2]
STANDARD = frozenset(sys.stdlib_module_names)

# Functions over 60 lines, "path:name" -> why it is one piece. None may be over 100.
LONG_FUNCTIONS = {
    "megatron_steel/runtime/world.py:start": "hands out every process group of megatron-core, one line each",
}

# Import name -> distribution, where they differ.
DISTRIBUTIONS = {
    "yaml": "PyYAML",
    "megatron": "megatron-core",
    "transformer_engine": "transformer-engine",
}


@functools.cache
def sources(*folders: str) -> dict[str, str]:
    """Path relative to the repository -> text of every Python file under the folders."""
    files = sorted(file for folder in folders for file in (ROOT / folder).rglob("*.py"))
    assert files, f"no Python files under {folders}"
    return {file.relative_to(ROOT).as_posix(): file.read_text(encoding="utf-8") for file in files}


budget = rules.function_budget
light = functools.partial(rules.light_imports, standard=STANDARD)
hard_budget = functools.partial(budget, limit=rules.HARD_FUNCTION_LINES)

RULES: dict[str, Callable[[str, str], list[str]]] = {
    "left-only imports": rules.left_only_imports,
    "device names in runtime": rules.device_names,
    "megatron.core in its rooms": rules.megatron_imports,
    "config and plan stay light": light,
    "optional libraries in one file": rules.library_imports,
    "file budget": rules.file_budget,
    "function hard limit": hard_budget,
    "docstrings": rules.documented,
    "types": rules.typed,
    "no swallowed errors": rules.swallowed_errors,
    "nothing unfinished": rules.stubs,
    "ASCII": rules.ascii_only,
}


@pytest.mark.parametrize("name", RULES)
def test_library_and_tools_keep_the_rule(name: str) -> None:
    violations = [line for path, text in sources("megatron_steel", "tools").items() for line in RULES[name](path, text)]
    assert not violations, "\n" + "\n".join(violations)


def test_functions_fit_their_budget() -> None:
    limit = rules.MAX_FUNCTION_LINES
    long = [line for path, text in sources("megatron_steel", "tools").items() for line in budget(path, text, limit)]
    named = {f"{line.split(':')[0]}:{line.split()[1]}": line for line in long}
    assert set(named) == set(LONG_FUNCTIONS), "\n" + "\n".join(named.values())


LIBRARY = "megatron_steel/train/loop.py"
DOC = '"""Doc."""\n'

# Rule, path, source that breaks it, source next to it that does not.
BROKEN: list[tuple[str, str, str, str]] = [
    (
        "left-only imports",
        "megatron_steel/data/order.py",
        "from megatron_steel.model import build",
        "from megatron_steel.text import tokenizer",
    ),
    (
        "left-only imports",
        "megatron_steel/data/order.py",
        "def f():\n    import megatron_steel.train.loop",
        "def f():\n    import megatron_steel.config.schema",
    ),
    ("left-only imports", "megatron_steel/data/order.py", "from ..model import build", "from ..data import loader"),
    ("left-only imports", "megatron_steel/data/order.py", "from .. import model", "from . import loader"),
    (
        "left-only imports",
        "megatron_steel/plan/estimate.py",
        "importlib.import_module('megatron_steel.runtime.world')",
        "importlib.import_module('megatron_steel.config.check')",
    ),
    (
        "left-only imports",
        LIBRARY,
        "from megatron_steel import pretrain",
        "from megatron_steel import __version__",
    ),
    (
        "left-only imports",
        "megatron_steel/finetune.py",
        "import megatron_steel.pretrain",
        "import megatron_steel.train",
    ),
    (
        "left-only imports",
        "megatron_steel/pretrain.py",
        "from tools import plan",
        "from megatron_steel.train import run",
    ),
    ("device names in runtime", LIBRARY, "torch.cuda.synchronize()", "device.synchronize()"),
    ("device names in runtime", LIBRARY, "from torch import cuda", "from torch import nn"),
    ("device names in runtime", LIBRARY, "import torch.cuda.amp", "import torch.nn"),
    ("device names in runtime", LIBRARY, "x = x.cuda()", "x = x.to(device)"),
    ("device names in runtime", LIBRARY, "x.to('cuda')", "x.to('cpu')"),
    ("device names in runtime", "tools/plan.py", "x = 'cuda:0'", "x = 'cuda-graphs'"),
    ("device names in runtime", LIBRARY, "if x.is_cuda: f()", "if device.has_gpu(): f()"),
    ("device names in runtime", LIBRARY, "torch.backends.cudnn.benchmark = True", "torch.backends.mkldnn.flags()"),
    (
        "megatron.core in its rooms",
        "megatron_steel/metrics/record.py",
        "def f():\n    from megatron.core import parallel_state",
        "from megatron_steel.runtime import world",
    ),
    (
        "megatron.core in its rooms",
        "megatron_steel/data/loader.py",
        "from megatron.core import parallel_state",
        "from megatron.core.datasets.helpers_cpp import build_sample_idx_int32",
    ),
    (
        "megatron.core in its rooms",
        "megatron_steel/evaluate/heldout.py",
        "import megatron.core",
        "import megatron_steel.model",
    ),
    ("megatron.core in its rooms", "tools/plan.py", "import megatron.core", "import json"),
    ("config and plan stay light", "megatron_steel/plan/estimate.py", "import numpy", "import math, yaml"),
    ("config and plan stay light", "megatron_steel/config/check.py", "def f():\n    import torch", "import tyro"),
    ("optional libraries in one file", LIBRARY, "def f():\n    import wandb", "import json"),
    (
        "optional libraries in one file",
        LIBRARY,
        "from torch.utils.tensorboard import SummaryWriter",
        "from torch.utils import data",
    ),
    (
        "optional libraries in one file",
        "megatron_steel/checkpoint/hf.py",
        "from transformers import AutoModel",
        "import safetensors",
    ),
    ("file budget", LIBRARY, "x = 1\n" * 401, "x = 1\n" * 400),
    ("function hard limit", LIBRARY, "def f():\n" + "    x = 1\n" * 100, "def f():\n" + "    x = 1\n" * 99),
    ("docstrings", LIBRARY, "x = 1", DOC + "x = 1"),
    ("docstrings", LIBRARY, DOC + "def f(): x = 1", DOC + "def _f(): x = 1"),
    ("docstrings", LIBRARY, DOC + "class A: x = 1", DOC + "class A:\n    'Doc.'"),
    ("types", LIBRARY, "def f(a) -> int: return 1", "def f(a: int) -> int: return 1"),
    ("types", LIBRARY, "def f(a: int): return 1", "class A:\n    def f(self) -> int: return 1"),
    ("types", LIBRARY, "def f(*a, **b) -> int: return 1", "def f(*a: int, **b: int) -> int: return 1"),
    ("no swallowed errors", LIBRARY, "try: f()\nexcept OSError: pass", "try: f()\nexcept OSError: g()"),
    ("no swallowed errors", LIBRARY, "try: f()\nexcept: g()", "try: f()\nexcept Exception as e: g(e)"),
    ("no swallowed errors", LIBRARY, "try: f()\nexcept OSError: ...", "try: f()\nfinally: g()"),
    ("no swallowed errors", LIBRARY, "with suppress(Exception): f()", "with suppress(FileNotFoundError): f()"),
    ("nothing unfinished", LIBRARY, "x = 1  # TODO: y", "x = 1  # to do"),
    ("nothing unfinished", LIBRARY, "def f(): raise NotImplementedError", "def f(): raise ValueError"),
    ("nothing unfinished", LIBRARY, "def f():\n    'Doc.'\n    ...", "class A(Protocol):\n    def f(self): ..."),
    ("ASCII", LIBRARY, "x = '\u3002'", r"x = '\u3002'"),
]


@pytest.mark.parametrize(("name", "path", "bad", "good"), BROKEN)
def test_every_rule_can_fail(name: str, path: str, bad: str, good: str) -> None:
    assert RULES[name](path, bad), f"{name} accepts:\n{bad}"
    assert not RULES[name](path, good)


def test_every_rule_has_an_example_that_breaks_it() -> None:
    assert {name for name, *_ in BROKEN} == set(RULES)


def test_a_room_without_a_place_in_the_river_is_an_error() -> None:
    with pytest.raises(ValueError):
        rules.room_of("megatron_steel/utils/misc.py")


def test_every_library_file_exists_and_imports_its_library() -> None:
    """A stale entry in the list would let the import move anywhere."""
    texts = sources("megatron_steel")
    for library, paths in rules.LIBRARY_FILES.items():
        for path in paths:
            assert library in texts[path], f"{path} does not name {library}"


def test_importing_config_and_plan_is_fast_and_loads_nothing_heavy() -> None:
    modules = [
        path.removesuffix(".py").replace("/", ".")
        for path in sources("megatron_steel/config", "megatron_steel/plan")
        if not path.endswith("__init__.py")
    ]
    code = f"""
import sys, time
start = time.process_time()
import {", ".join(modules)}
print(time.process_time() - start)
print(*sorted({{name.split(".")[0] for name in sys.modules}}))
"""
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    seconds, loaded = result.stdout.splitlines()
    heavy = {"torch", "megatron", "transformers", "numpy", "safetensors", "tokenizers", "sentencepiece", "wandb"}
    assert "megatron_steel" in loaded.split()
    assert not heavy & set(loaded.split())
    assert float(seconds) < 1.0  # CPU seconds; measured 0.2


def declared(section: str, key: str) -> set[str]:
    """Names of the distributions a key of setup.cfg asks for, lower case with ``-``."""
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg", encoding="utf-8")
    names = (re.match(r"[A-Za-z0-9_.-]+", line.strip()) for line in setup[section][key].splitlines())
    return {name.group().lower().replace("_", "-") for name in names if name}


def third_party(*folders: str) -> set[str]:
    """Distributions the Python files under the folders import."""
    ours = {"megatron_steel", "tools"} | {Path(path).stem for path in sources("tests", "benchmarks")}
    found = set()
    for path, text in sources(*folders).items():
        tops = {name.split(".")[0] for _, name in rules.imports(path, text)}
        found |= {DISTRIBUTIONS.get(top, top) for top in tops - STANDARD - ours}
    return {name.lower().replace("_", "-") for name in found}


def test_what_is_imported_is_declared_and_pinned() -> None:
    core, extras = declared("options", "install_requires"), "options.extras_require"
    log, gpu, clean, dev = (declared(extras, key) for key in ("log", "gpu", "clean", "dev"))
    assert third_party("megatron_steel", "tools") <= core | log | gpu | clean
    assert third_party("tests") <= core | log | clean | dev
    constraints = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    pinned = {name.lower().replace("_", "-") for name in re.findall(r"^([A-Za-z0-9_.-]+)==", constraints, re.M)}
    assert core | log | clean | dev <= pinned | {"megatron-steel"}


def test_the_image_has_what_the_package_needs() -> None:
    named = {word.lower() for word in re.findall(r"[\w.-]+", (ROOT / "Dockerfile").read_text(encoding="utf-8"))}
    assert declared("options", "install_requires") <= named


@pytest.mark.parametrize("document", ["README.md", "CONTRIBUTING.md"])
def test_documents_name_files_that_exist(document: str) -> None:
    text = (ROOT / document).read_text(encoding="utf-8")
    named = set(re.findall(r"\b(?:megatron_steel|tools|tests|examples|benchmarks|docs)/[\w./-]*[\w/]", text))
    assert len(named) > 5
    assert not {name for name in named if not (ROOT / name).exists()}


def test_the_readme_names_flags_that_exist() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    known = "\n".join([(ROOT / "tests/unit/flags.txt").read_text(encoding="utf-8"), *sources("tools").values()])
    of_torchrun = {"--standalone", "--nproc-per-node"}
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z0-9-]+", text)) - of_torchrun
    assert len(named) > 15
    assert not {flag for flag in named if not re.search(rf"{flag}(?![\w-])", known)} - {"--help"}
