"""The shape of the repository.

Direction of imports, what importing loads, sizes, docstrings, the top level.
"""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest
from support.order import ORDER

REPO = Path(__file__).resolve().parents[2]
PACKAGE = REPO / "tsq_ray"
INSIDE = {
    "asking": ("answers", "client", "questions"),
    "bundle": ("settings", "overrides", "weights"),
    "commands": ("jobs", "pipeline", "labelling", "results", "endpoint"),
    "config": ("base", "method", "recognizer", "resources", "settings", "load"),
    "decode": (
        *("types", "fetch", "plan", "clock", "nvdec", "frames", "probe", "pyav_backend"),
        *("decord_backend", "indexed", "survivors", "job", "video", "child", "sandbox"),
    ),
    "evaluation": (
        *("annotations", "videos", "selectors", "samplers", "trainings", "measures"),
        *("agreement", "store", "tables", "plots", "bench", "catalogue", "methods"),
        *("ablations", "compare", "comparisons", "custom", "paper", "run"),
    ),
    "labels": ("classes", "entries", "json_files", "formats", "match"),
    "manifest": ("videos", "files", "listing", "build"),
    "model": (
        *("layers", "tsq", "task", "losses", "diversity", "selection", "baselines", "choosers"),
        "flops",
    ),
    "networks": (
        *("weights", "preprocessing", "transformers_models", "encoder", "text", "batch_norm"),
        "inference",
    ),
    "reporting": (
        *("agreement", "choice", "curves", "losses", "predictions", "pictures", "summary"),
        *("html", "tables", "batch", "interchange", "export"),
    ),
    "runs": ("identity", "lease", "columns", "done", "folder", "tables", "bulk", "verify"),
    "runtime": (
        *(
            "nodes",
            "pools",
            "placement",
            "session",
            "reach",
            "driver",
            "cluster",
            "usage",
            "waiting",
            "progress",
        ),
        *("metrics", "observer", "blocks", "packing", "parts", "bulk", "overview", "jobs"),
    ),
    "serving": (
        *("access", "loopback", "facts", "microbatching", "warmup", "metrics", "requests", "graph"),
        *(
            "recognizers",
            "deployments",
            "batch_folders",
            "batch_manifests",
            "batch_webhooks",
            "batch_runner",
            "batches",
            "openapi",
            "api",
            "ingress",
            "app",
            "replicas",
            "front",
            "endpoint",
            "bench",
        ),
    ),
    "serving/requests": (
        *(
            "problems",
            "shares",
            "forms",
            "models",
            "uris",
            "tokens",
            "admission",
            "uploads",
            "fetching",
            "webhooks",
            "parse",
        ),
    ),
    "stages": ("encode", "sample", "recognize"),
    "storage": ("local_files", "advice", "s3", "paths", "listing", "files"),
    "training": (
        "cache",
        "teacher",
        "head",
        "features",
        "teachable",
        "on_worker",
        "resumable",
        "classifier",
        "sampler",
    ),
    "training/classifier": (
        *("augment", "optim", "clips", "worker", "full", "frozen", "finetune"),
    ),
    "training/sampler": ("loop", "launch", "components", "tsqnet"),
}
"""The same inside each folder."""
STAGES = ("extraction", "training", "serving", "scoring")
"""They meet through Parquet, the bundle and the modules before them, never through one another.

Only scoring drives serving's graph.
"""
ALLOWED_STAGES = {("scoring", "serving")}
RAY_AT_IMPORT = {
    "serving/api.py",
    "serving/app.py",
    "serving/batches.py",
    "serving/deployments.py",
    "serving/ingress.py",
    "serving/metrics.py",
    "serving/requests/uploads.py",
}
"""Serve's decorators need ray when the module is imported; all others import it when called."""
MAX_LINES = 400
TOP = {"pyproject.toml", "README.md", "LICENSE", "tsq_ray", "jobs", "cluster", "tests", "docs"}
SOURCES = sorted(PACKAGE.rglob("*.py"))


def name_of(path: Path) -> str:
    return str(path.relative_to(PACKAGE))


def unit_of(path: Path) -> str:
    """The entry of ORDER that a file belongs to."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


@dataclass(frozen=True)
class Import:
    """One imported module, and whether its import waits until something is called."""

    module: str
    line: int
    lazy: bool


@cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


@cache
def imports_of(path: Path) -> tuple[Import, ...]:
    """Every import of a file, including lazy ones."""
    return tuple(_imports(path))


def _imports(path: Path) -> Iterator[Import]:
    for node, lazy in walk(tree_of(path), False):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(alias.name, node.lineno, lazy)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name_of(path)}:{node.lineno}: relative import"
            assert node.module is not None
            for alias in node.names:
                yield Import(f"{node.module}.{alias.name}", node.lineno, lazy)


def walk(node: ast.AST, lazy: bool) -> Iterator[tuple[ast.AST, bool]]:
    for child in ast.iter_child_nodes(node):
        inside = lazy or isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        yield child, inside
        yield from walk(child, inside)


def imported_units(path: Path) -> list[tuple[str, int]]:
    """(entry of ORDER, line) of each import from the package; ignores the package itself."""
    found = []
    for item in imports_of(path):
        parts = item.module.split(".")
        if parts[0] == "tsq_ray" and len(parts) > 1 and parts[1] != "__version__":
            found.append((parts[1], item.line))
    return found


def test_every_module_has_its_place_in_the_order() -> None:
    assert {unit_of(path) for path in SOURCES} - {"__init__"} <= set(ORDER)


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_imports_go_one_way(path: Path) -> None:
    own = unit_of(path)
    if own == "__init__":
        return  # names for type checkers; test_what_importing_loads sees that nothing is imported
    wrong = [
        f"line {line}: {unit}"
        for unit, line in imported_units(path)
        if unit != own and ORDER.index(unit) > ORDER.index(own)
    ]
    assert wrong == []


def test_every_folder_is_a_package() -> None:
    """Without its `__init__.py` a folder would be missing from an installed wheel."""
    folders = {path.parent for path in SOURCES}
    assert [name_of(folder) for folder in folders if not (folder / "__init__.py").exists()] == []


@pytest.mark.parametrize(
    "path",
    [path for path in SOURCES if path.name != "__init__.py" and path.parent != PACKAGE],
    ids=name_of,
)
def test_imports_go_one_way_inside_a_folder_too(path: Path) -> None:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    for depth in range(1, len(parts)):
        folder, own = "/".join(parts[:depth]), parts[depth]
        order = INSIDE[folder]
        above = ".".join(("tsq_ray", *parts[:depth])) + "."
        imported = {
            item.module.removeprefix(above).split(".")[0]
            for item in imports_of(path)
            if item.module.startswith(above)
        }
        later = {name for name in imported & set(order) if order.index(name) > order.index(own)}
        assert later == set(), folder


@pytest.mark.parametrize("path", [path for path in SOURCES if unit_of(path) in STAGES], ids=name_of)
def test_stages_do_not_import_each_other(path: Path) -> None:
    own = unit_of(path)
    others = {unit for unit, _ in imported_units(path) if unit in STAGES and unit != own}
    assert {(own, other) for other in others} <= ALLOWED_STAGES


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_ray_is_imported_only_when_called_except_in_serve(path: Path) -> None:
    at_import = any(
        item.module.split(".")[0] == "ray" and not item.lazy for item in imports_of(path)
    )
    assert at_import == (name_of(path) in RAY_AT_IMPORT)


@pytest.mark.parametrize("unit", ORDER[: ORDER.index("runtime")])
def test_nothing_below_runtime_imports_ray(unit: str) -> None:
    files = [path for path in SOURCES if unit_of(path) == unit]
    assert [
        name_of(path)
        for path in files
        if any(item.module.split(".")[0] == "ray" for item in imports_of(path))
    ] == []


def loaded(code: str) -> set[str]:
    """Which of the heavy packages a new interpreter has loaded after `code`."""
    heavy = ("torch", "ray", "pyarrow", "fsspec", "timm", "transformers", "av", "pydantic")
    script = (
        f"{code}\nimport sys\nprint('loaded:', *(name for name in {heavy!r} if name in "
        "sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=REPO, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return set(done.stdout.rpartition("loaded:")[2].split())


@pytest.mark.parametrize(
    ("code", "allowed"),
    [
        ("import tsq_ray", set()),
        ("import tsq_ray.errors, tsq_ray.config", {"pydantic"}),
        ("import tsq_ray.cli", set()),
        ("from tsq_ray.cli import main\nassert main(['--help']) == 0", set()),
        ("from tsq_ray.cli import main\nassert main(['score', '--help']) == 0", {"pydantic"}),
        (
            "from tsq_ray.cli import main\nassert main(['extract', 'm', '--out', 'o', "
            "'--config', 'nowhere.toml']) == 2",
            {"pydantic", "fsspec"},
        ),
        (
            "from tsq_ray.cli import main\nassert main(['serve', '--model', 'm', "
            "'--set', 'serve.drain_s=-1']) == 2",
            {"pydantic", "pyarrow", "fsspec", "av"},
        ),
        ("import tsq_ray.runs, tsq_ray.manifest", {"pydantic", "pyarrow", "fsspec"}),
        (
            "import tsq_ray.scoring, tsq_ray.rows, tsq_ray.bundle.settings",
            {"pydantic", "pyarrow", "fsspec", "av"},
        ),
        (
            "import tsq_ray.asking.questions, tsq_ray.bundle.settings",
            {"pydantic", "pyarrow", "fsspec", "av"},
        ),
        ("import tsq_ray.serving.app", {"pydantic", "pyarrow", "fsspec", "av", "ray"}),
    ],
    ids=[
        "package",
        "config",
        "cli",
        "help",
        "command help",
        "wrong settings",
        "wrong settings of serve",
        "runs",
        "score",
        "server",
        "serve",
    ],
)
def test_what_importing_loads(code: str, allowed: set[str]) -> None:
    assert loaded(code) <= allowed


@pytest.mark.parametrize(
    ("wanted", "found"),
    [({}, "system"), ({"ARROW_DEFAULT_MEMORY_POOL": "mimalloc"}, "mimalloc")],
    ids=["default", "asked for"],
)
def test_the_command_line_chooses_arrows_allocator(wanted: dict[str, str], found: str) -> None:
    code = (
        "from tsq_ray.cli import main\nmain(['--help'])\nimport pyarrow\nprint('pool:', "
        "pyarrow.default_memory_pool().backend_name)"
    )
    environment = {
        name: value for name, value in os.environ.items() if name != "ARROW_DEFAULT_MEMORY_POOL"
    } | wanted
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=REPO,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.endswith(f"pool: {found}\n")


def test_help_names_every_command(capfd: pytest.CaptureFixture[str]) -> None:
    from tsq_ray.cli import main

    assert main(["--help"]) == 0
    text = capfd.readouterr().out
    commands = (
        "index",
        "extract",
        "finetune",
        "train",
        "score",
        "predict",
        "serve",
        "evaluate",
        "report",
        "export",
        "verify",
        "info",
    )
    assert [name for name in commands if f"\n  {name} " not in text] == []


@pytest.mark.parametrize(
    "path",
    [*SOURCES, *(REPO / "jobs").rglob("*.py"), *(REPO / "docs").rglob("*.py")],
    ids=lambda path: str(path.relative_to(REPO)),
)
def test_files_are_short(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= MAX_LINES, "split it"


def test_functions_are_short() -> None:
    """Signature and docstring included; long ones remain the exception."""
    functions = [
        node.end_lineno - node.lineno + 1
        for path in SOURCES
        for node in ast.walk(tree_of(path))
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and node.end_lineno
    ]
    assert sum(lines > 30 for lines in functions) <= len(functions) / 20
    assert max(functions) <= 61


@pytest.mark.parametrize("path", (REPO / "jobs").rglob("*.py"), ids=lambda path: path.name)
def test_jobs_import_nothing_of_the_tests(path: Path) -> None:
    of_tests = {file.stem for file in (REPO / "tests" / "support").glob("*.py")}
    wrong = {
        item.module
        for item in imports_of(path)
        for top, *rest in [item.module.split(".")]
        if top in ("tests", "conftest") or (top == "support" and {*rest} & of_tests)
    }
    assert wrong == set()


def test_no_two_test_files_share_a_name() -> None:
    """pytest collects both lanes in one run only when their modules differ."""
    names = [path.name for path in (REPO / "tests").rglob("test_*.py")]
    assert len(names) == len(set(names))


def test_top_level_holds_nothing_else() -> None:
    done = subprocess.run(
        ["git", "ls-files"], cwd=REPO, capture_output=True, text=True, check=False
    )
    if done.returncode:
        pytest.skip("not a git checkout")
    found = {line.split("/")[0] for line in done.stdout.splitlines()}
    assert {name for name in found if not name.startswith(".")} == TOP


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_modules_have_docstrings(path: Path) -> None:
    assert ast.get_docstring(tree_of(path))
