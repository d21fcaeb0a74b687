"""The wheel holds everything under one name and its command runs in a clean environment."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built without isolation, so without a network."""
    out = tmp_path_factory.mktemp("dist")
    source = out / "source"
    names = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True)
    for name in names.stdout.split() if names.returncode == 0 else []:
        if (ROOT / name).is_file():
            target = source / name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes((ROOT / name).read_bytes())
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(source)]
    built = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert built.returncode == 0, built.stdout + built.stderr
    return next(out.glob("*.whl"))


def test_only_one_name_lands_in_site_packages(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0].split("-")[0] for name in names} == {"omniloom"}
    assert "omniloom/recipes/demo.yaml" in names and "omniloom/recipes/model/tiny.yaml" in names
    assert {
        f"omniloom/launch/{name}" for name in ("demo.html", "report.css", "report.js", "slurm.sbatch", "restarts.sh")
    } <= set(names)
    for package in ("train", "data", "models", "launch"):
        ours = {str(path.relative_to(ROOT)) for path in (ROOT / package).rglob("*.py") if "cli" not in path.parts}
        missing = {name for name in ours if f"omniloom/{name}" not in names}
        assert not missing


def test_the_command_runs_in_a_clean_environment(wheel: Path, tmp_path: Path) -> None:
    """A fresh venv with only this wheel; its dependencies come from ours by a .pth file: installing needs a network."""
    home = tmp_path / "venv"
    venv.create(home, with_pip=True)
    python = home / "bin" / "python"
    subprocess.run([python, "-m", "pip", "install", "-q", "--no-deps", "--no-index", wheel], check=True, timeout=120)
    site = subprocess.run(
        [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], capture_output=True, text=True
    ).stdout.strip()
    dependencies = tmp_path / "dependencies"  # all of ours but the editable install of the checkout
    dependencies.mkdir()
    for entry in Path(sysconfig.get_path("purelib")).iterdir():
        if "omniloom" not in entry.name and entry.suffix != ".pth":
            (dependencies / entry.name).symlink_to(entry)
    Path(site, "dependencies.pth").write_text(f"{dependencies}\n")
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [home / "bin" / "omniloom", *arguments], cwd=tmp_path, env=environment, capture_output=True, text=True
        )

    typo = run("recipe=dmo")
    assert typo.returncode == 2 and "did you mean 'demo'?" in typo.stderr and "Traceback" not in typo.stderr
    absent = run("recipe=transcribe", "data.shards=[nowhere.tar]", "data.tokenizer=nowhere")
    assert absent.returncode == 2 and "nowhere" in absent.stderr and "Traceback" not in absent.stderr
    evaluated = run("evaluate", "run=nowhere")
    assert evaluated.returncode == 2 and "nowhere/recipe.yaml: no such file" in evaluated.stderr
    where = subprocess.run([python, "-c", "import omniloom; print(omniloom.__file__)"], capture_output=True, text=True)
    assert where.stdout.startswith(str(home))
