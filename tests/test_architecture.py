"""Promises about the structure: who imports whom, how large things are, what the wheel holds."""

from __future__ import annotations

import ast
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("train", "data", "models", "launch")
ALLOWED = {  # our own packages that each may import
    "models": {"models"},
    "data": {"data"},
    "train": {"train", "data", "models"},
    "launch": {"launch", "train", "data", "models"},
}
# A command that shows position ids has to bring the model and the data together, as train.py does. Nothing imports it.
COMMANDS = {"data/inspect.py": {"train", "models"}}
ONLY_IN = {  # a library -> the files that may import it
    "deepspeed": ("train/engines/",),
    "megatron": ("train/engines/megatron/",),
    "transformers": ("data/mimi.py",),
    "av": ("data/video.py", "data/ffmpeg.py", "data/demo_media.py"),
    "PIL": ("data/vision.py", "data/demo_media.py"),
    "aiohttp": ("data/remote.py",),
    "botocore": ("data/remote.py",),
    "fsspec": ("data/remote.py",),
    "s3fs": ("data/remote.py",),
    "wandb": ("train/trackers.py",),
    "rich": ("train/views.py",),
    "datasets": ("data/convert", "data/sources"),
    "espeakng_loader": ("data/espeak.py",),
    "fastapi": ("launch/demo.py",),
    "starlette": ("launch/demo.py",),
    "uvicorn": ("launch/demo.py",),
}
FORBIDDEN = {"pickle", "cloudpickle", "dill", "shelve", "marshal"}
MAX_FILE_LINES, MAX_FUNCTION_LINES = 400, 80


def sources() -> list[Path]:
    return [path for name in PACKAGES for path in sorted((ROOT / name).rglob("*.py"))]


def imports(path: Path) -> list[str]:
    """Every module that a file imports, inside functions too."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
    return found


@pytest.mark.parametrize("path", sources(), ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_go_one_way(path: Path) -> None:
    relative = str(path.relative_to(ROOT))
    package = relative.split("/")[0]
    for name in imports(path):
        top = name.split(".")[0]
        if top in PACKAGES:
            assert top in ALLOWED[package] | COMMANDS.get(relative, set()), f"{relative} imports {name}"
            assert name.replace(".", "/") + ".py" not in COMMANDS, f"{relative} imports the command {name}"
        if top in ONLY_IN:
            assert relative.startswith(ONLY_IN[top]), f"{relative} imports {top}"
        assert top not in FORBIDDEN, f"{relative} imports {top}: it runs code from files"
        assert not name.startswith("omniloom.") or relative == "launch/cli/__main__.py", f"{relative} imports {name}"
    if package == "models":
        foreign = {name.split(".")[0] for name in imports(path)} - {"torch", "models", *sys.stdlib_module_names}
        assert not foreign, f"{relative} imports {foreign}; models import torch only"


def test_no_import_cycles() -> None:
    modules = {_module(path): path for path in sources()}
    graph = {
        name: {target for target in imports(path) if target in modules and target != name}
        for name, path in modules.items()
    }
    done: set[str] = set()

    def visit(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, "cycle: " + " -> ".join((*trail[trail.index(name) :], name))
        if name not in done:
            for target in sorted(graph[name]):
                visit(target, (*trail, name))
            done.add(name)

    for name in graph:
        visit(name, ())


def _module(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@pytest.mark.parametrize("path", sources(), ids=lambda p: str(p.relative_to(ROOT)))
def test_sizes(path: Path) -> None:
    text = path.read_text()
    assert text.count("\n") <= MAX_FILE_LINES, "split it by meaning"
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            assert length <= MAX_FUNCTION_LINES, f"{node.name} has {length} lines"


@pytest.mark.parametrize("path", sources(), ids=lambda p: str(p.relative_to(ROOT)))
def test_no_mutable_module_state(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text())):
        assert not isinstance(node, ast.Global), f"global statement in line {node.lineno}"


def test_every_package_has_an_init() -> None:
    for name in PACKAGES:
        for folder in {path.parent for path in (ROOT / name).rglob("*.py")}:
            assert (folder / "__init__.py").is_file(), folder


def test_train_is_the_package() -> None:
    """train.py lies beside train/; the package must win, which it does only with its __init__.py."""
    import train

    assert Path(str(train.__file__)) == ROOT / "train" / "__init__.py"
    assert not [node for node in ast.parse((ROOT / "train/__init__.py").read_text()).body if not _is_text(node)]


def _is_text(node: ast.stmt) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)


def test_the_wheel_lists_every_package() -> None:
    tools = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    folders = {path.parent.relative_to(ROOT) for path in sources()} - {Path("launch/cli")}
    tree = {"omniloom", "omniloom.recipes"} | {"omniloom." + ".".join(folder.parts) for folder in folders}
    assert set(tools["packages"]) == tree
    for name, folder in tools["package-dir"].items():
        assert (ROOT / folder).is_dir(), name


def test_packages_are_tracked() -> None:
    """A careless ignore pattern such as data/ would hide a package from git."""
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    ignored = subprocess.run(
        ["git", "check-ignore", *[str(path) for path in sources()]], cwd=ROOT, capture_output=True, text=True
    )
    assert ignored.stdout == ""
