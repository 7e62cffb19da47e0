"""Fixtures that several test modules share."""

import gc
import os
from pathlib import Path

import composing  # noqa: F401  # its import makes Hydra remember
import numpy as np
import pytest
from PIL import Image

SMALL_COUNT = 25  # 16 for training, 4 for validation, 5 for test
LONGEST = (
    "sweep",
    "cluster",
    "faults",
    "tuner",
    "chaos",
    "install",
    "loop",
    "tables",
    "quantize",
    "rehearsal",
    "report",
    "group",
    "golden",
    "sync",
    "readme",
    "bad_input",
    "boundary",
    "preview",
    "figures",
)  # longest first


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the longest files: several processes, each of which takes whole files, then end at about one time."""
    for item in items:
        if item.get_closest_marker("gpu"):  # a card comes with its version of PyTorch, which may warn of other things
            item.add_marker(pytest.mark.filterwarnings("default"))
    ranks = {f"test_{name}": rank for rank, name in enumerate(LONGEST)}
    items.sort(key=lambda item: ranks.get(item.path.stem, len(ranks)))


def pytest_collection_finish() -> None:
    """Take what the imports have made out of garbage collection: else the package's own calls of it take 0.3 s each."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure() -> None:
    """Give it back, so that the end of the program finds it."""
    gc.unfreeze()


@pytest.fixture(scope="session")
def small_busi(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """25 synthetic images of 80 to 100 pixels in BUSI's layout: dark noise with one bright ellipse, the lesion."""
    root = tmp_path_factory.mktemp("small-busi")
    for number in range(SMALL_COUNT):
        rng = np.random.default_rng([7, number])
        label = "malignant" if number % 3 == 0 else "benign"
        height, width = rng.integers(80, 101, size=2)
        y, x = np.mgrid[:height, :width]
        center_y, center_x, radius_y, radius_x = rng.uniform([0.4, 0.4, 0.15, 0.15], [0.6, 0.6, 0.3, 0.3])
        mask = ((y / height - center_y) / radius_y) ** 2 + ((x / width - center_x) / radius_x) ** 2 < 1
        image = (rng.integers(20, 90, size=mask.shape) + 120 * mask).astype(np.uint8)
        folder = root / label
        folder.mkdir(exist_ok=True)
        Image.fromarray(image).save(folder / f"{label} ({number + 1}).png")
        Image.fromarray(mask).save(folder / f"{label} ({number + 1})_mask.png")
    return root


@pytest.fixture(scope="session")
def empty_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store without runs, to be copied: creating the database takes seconds."""
    from kdsweep.tracking import mirror  # here: it takes seconds to import, and most tests do without

    folder = tmp_path_factory.mktemp("empty")
    mirror.Tracker(store=folder, uri=None)
    return folder


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of published breast-ultrasound images, read where it lies."""
    folder = os.environ.get("KDSWEEP_REAL_DATA")
    if not folder:
        pytest.skip("set KDSWEEP_REAL_DATA to the folder that holds busi163 and busi-originals")
    return Path(folder)
