"""Every command of README.md and docs/*.md runs, as it is written, in a small world (tests/docs/world.py, table.py)."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.docs.commands import Command, commands, pages
from tests.docs.forks import Forks
from tests.docs.table import Plan, plan
from tests.docs.world import build, linked
from tests.run_kit import free_port

LIMIT_S = 280
ALL = [command for page in pages() for command in commands(page)]


def marked(place: int, command: Command):
    """A parameter; slow where the table says so, and where an earlier page has the same command."""
    found = plan(command)
    again = command.text in {other.text for other in ALL[:place] if other.page != command.page}
    slow = found is not None and (found.slow or again)
    return pytest.param(command, id=f"{command.page}:{command.line}", marks=[pytest.mark.slow] if slow else [])


def skipped(command: Command) -> bool:
    found = plan(command)
    return found is not None and found.how == "skip"


@pytest.fixture(scope="session")
def forks() -> Iterator[Forks]:
    made = Forks()
    yield made
    made.close()


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory, forks: Forks) -> Path:
    folder = tmp_path_factory.mktemp("world")

    def run(*words: str) -> None:
        status, output = forks.run(list(words), folder, LIMIT_S, {})
        assert status == 0, f"{' '.join(words)}\n{output}"

    return build(folder, run)


@pytest.fixture(scope="module")
def page_worlds(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Path]]:
    """Page -> a world of its own, in which its commands run one after the other."""
    made: dict[str, Path] = {}
    yield made
    for folder in made.values():
        shutil.rmtree(folder)


def test_every_command_is_in_a_category() -> None:
    lost = [str(command) for command in ALL if plan(command) is None]
    assert not lost, "no rule of tests/docs/table.py says how these are run:\n" + "\n".join(lost)
    assert len(ALL) > 90 and {"README.md", "docs/tutorial.md", "docs/slurm.md"} <= {command.page for command in ALL}


@pytest.mark.timeout(600)
@pytest.mark.parametrize("command", [marked(place, each) for place, each in enumerate(ALL) if not skipped(each)])
def test_command(command: Command, world: Path, page_worlds: dict[str, Path], forks: Forks, tmp_path_factory) -> None:
    found = plan(command)
    assert found is not None, f"no rule of tests/docs/table.py says how this is run: {command}"
    if command.page not in page_worlds:
        page_worlds[command.page] = tmp_path_factory.mktemp("page") / "world"
        linked(world, page_worlds[command.page])
    folder = page_worlds[command.page]
    if found.how == "serve":
        return serves(found, folder)
    if found.how == "fresh":
        shutil.rmtree(folder / run_folder(found.words), ignore_errors=True)
    for word in found.words:  # a folder that the world has already is not overwritten
        if word.startswith("to=") or word == "outputs/chats":
            shutil.rmtree(folder / word.removeprefix("to="), ignore_errors=True)
    status, output = run(found.words, folder, forks)
    assert status == found.status, f"{command}\nran as: {' '.join(found.words)}\nstatus {status}\n{output[-6000:]}"
    assert "Traceback" not in output, f"{command}\n{output[-6000:]}"
    assert found.says in output, f"{command} should say {found.says!r}:\n{output[-6000:]}"


def run(words: list[str], folder: Path, forks: Forks) -> tuple[int, str]:
    """Exit status and output."""
    environment = {"OMP_NUM_THREADS": "1", "PET_MASTER_PORT": str(free_port()), "PYTHON": sys.executable}
    if words[0] == "python":
        return forks.run(words[1:], folder, LIMIT_S, environment)
    if words[0] == "torchrun":
        words = [sys.executable, "-m", "torch.distributed.run", *words[1:]]
    done = subprocess.run(
        words,
        cwd=folder,
        env=os.environ | environment,
        text=True,
        timeout=LIMIT_S,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    return done.returncode, done.stdout


def run_folder(words: list[str]) -> str:
    """Where a training command writes: run=FOLDER, or the recipe's outputs/NAME."""
    settings = dict(word.split("=", 1) for word in words if "=" in word and not word.startswith("-"))
    recipe = settings.get("recipe", "")
    names = {"curriculum_demo": "demo"}
    return settings.get("run", f"outputs/{settings.get('name', names.get(recipe, Path(recipe).stem))}")


def serves(found: Plan, folder: Path) -> None:
    """Start a server, ask for its page, stop it as Ctrl-C does."""
    words = [word for word in found.words[1:] if not word.startswith("port=")] + [f"port={free_port()}"]
    with subprocess.Popen(
        [sys.executable, *words],
        cwd=folder,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    ) as process:
        try:
            assert process.stdout
            lines, deadline = "", time.monotonic() + 120
            while not (address := re.search(r"http://[\w.]+:\d+", lines)):
                line = process.stdout.readline()
                assert line and time.monotonic() < deadline, lines
                lines += line
            for _ in range(100):
                try:
                    page = urllib.request.urlopen(address[0], timeout=20).read()
                    break
                except OSError:
                    time.sleep(0.2)
            assert b"<html" in page.lower()
            process.send_signal(signal.SIGINT)
            rest, _ = process.communicate(timeout=60)
            assert process.returncode in (0, 130) and "Traceback" not in rest, rest
        finally:
            process.kill()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a\n\n    python -m x y  # why\n", ["python -m x y"]),
        ("```bash\nanything at all\n```\n```yaml\npython: 1\n```\n", ["anything at all"]),
        ("1. a\n\n       torchrun a \\\n         'b # c'  # d\n", ["torchrun a 'b # c'"]),
        ("text\n    python is prose here, a wrapped line\n", []),
    ],
)
def test_commands_are_found(text: str, expected: list[str], tmp_path: Path) -> None:
    (tmp_path / "page.md").write_text(text)
    assert [command.text for command in commands(tmp_path / "page.md", "page.md")] == expected
    assert all(plan(command) is None for command in [Command("page.md", 1, "python -m nothing.known")])
