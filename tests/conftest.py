"""The installed package is what is tested, never an unbuilt source folder that happens to be on the
path.
"""

import os
import tempfile
from pathlib import Path

import pytest
import torch
from quick_interpreter import quicken

import fusedres
from fusedres import _plan_table
from fusedres._tensors import INTERPRETED

SOURCE = Path(__file__).resolve().parent.parent

if INTERPRETED:
    quicken()


def pytest_configure() -> None:
    package = Path(fusedres.__file__).resolve().parent
    if package.parent == SOURCE and not list(package.glob("_C*.so")):
        raise pytest.UsageError(
            f"fusedres was imported from the source folder {package}, where it is not built; "
            'run `pip install ".[test]" && pytest` (not `python -m pytest`), or `pip install -e .`'
        )

    if _plan_table.user_path().is_file():  # what was tuned on this machine is not what is tested
        os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="fusedres-tests-")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
