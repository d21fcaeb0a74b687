"""What pages name beside their commands is there: modules, recipes and targets of make in the text and in tables."""

from __future__ import annotations

import importlib.util
import re

import pytest

from tests.docs.commands import ROOT, pages
from train.recipe import recipe_names

MODULE = re.compile(r"python3? -m ((?:data|launch|bench|train|tests)\.[\w.]+)")
RECIPE = re.compile(r"\brecipe=([a-z]\w+)")
TARGET = re.compile(r"`make ([\w-]+)")
FILE = re.compile(r"`((?:train|data|models|launch|recipes|tests|bench)/[a-z0-9_/]+\.(?:py|yaml|sh|sbatch))`")


@pytest.mark.parametrize("page", pages(), ids=lambda path: path.name)
def test_it_is_there(page) -> None:
    text = page.read_text()
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    modules = {name.rstrip(".") for name in MODULE.findall(text)}
    missing = [f"python -m {name}" for name in sorted(modules) if importlib.util.find_spec(name) is None]
    missing += [f"recipe={name}" for name in RECIPE.findall(text) if name not in recipe_names()]
    missing += [f"make {name}" for name in TARGET.findall(text) if name not in targets]
    missing += [name for name in FILE.findall(text) if not (ROOT / name).is_file()]
    assert not missing
