"""Binder builds the book's environment from environment.yml: asked of repo2docker itself, without Docker or network."""

import pathlib
import re
import shutil

import pytest
from repo2docker.app import Repo2Docker
from repo2docker.buildpacks.conda import CondaBuildPack

ROOT = pathlib.Path(__file__).parent.parent.parent


@pytest.fixture
def pack(tmp_path, monkeypatch):
    """What repo2docker takes this repository for: the first of its kinds that knows one of the files."""
    for path in ROOT.iterdir():
        if path.is_file():
            shutil.copy(path, tmp_path)
        elif path.name in ("binder", ".binder"):  # would be looked into instead
            shutil.copytree(path, tmp_path / path.name)
    monkeypatch.chdir(tmp_path)
    app = Repo2Docker()
    kinds = (kind(base_image=app.base_image) for kind in app.buildpacks)
    return next(kind for kind in kinds if kind.detect())


def test_binder_takes_environment_yml_before_any_other_file(pack):
    assert type(pack) is CondaBuildPack and pack.binder_path("environment.yml") == "environment.yml"


def test_binder_installs_the_python_that_environment_yml_names_and_then_its_packages(pack):
    assert pack.python_version == "3.12"
    pack.platform = "linux/amd64"
    before, _ = pack.render().split('--file "environment.yml"')
    assert re.search(r"^COPY .*\bsrc/ ", before, re.M), "`-e .` needs the repository before the packages are installed"
