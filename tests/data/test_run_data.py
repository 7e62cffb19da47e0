"""The images of a finished run: read again by its recorded configuration, from which nothing else is made."""

from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest

from kdsweep.config import composition, identity, inputs
from kdsweep.core.errors import InputError
from kdsweep.data import run_data, sources
from kdsweep.data.images import load_images
from kdsweep.data.listing import list_images


def recorded(source, *, name):
    values = {f"data.source.{key}": str(value) for key, value in asdict(source).items() if key != "name"}
    return {"data.name": source.name, "data.source._target_": f"kdsweep.data.{name}", **values}


@pytest.mark.parametrize("as_strings", [True, False])
def test_the_recorded_configuration_gives_the_same_data_set(small_busi, tmp_path, as_strings):
    cfg = composition.compose(["data=busi", f"data.root={small_busi}"])
    params = identity.params(cfg)
    params = {key: str(value) for key, value in params.items()} if as_strings else params
    data_set = run_data.source(params, store=tmp_path)
    assert data_set == sources.Busi(root=str(small_busi), include_normal=False)
    assert list_images(data_set).digest == inputs.listing(cfg).digest


def test_images_that_were_moved_are_read_from_their_new_folder(small_busi, tmp_path):
    params = recorded(sources.Busi(root="/gone"), name="Busi")
    assert run_data.source(params, store=tmp_path, root=small_busi) == sources.Busi(root=str(small_busi))
    with pytest.raises(InputError, match=r"data\.root=/gone: no such folder"):
        run_data.scored(run_data.source(params, store=tmp_path), ["x"], image_size=32)


def test_phantoms_lie_in_the_store_wherever_it_is_now(tmp_path):
    params = recorded(sources.Phantoms(count=3, seed=5, cache_dir="before/phantoms"), name="Phantoms")
    assert run_data.source(params, store=tmp_path) == sources.Phantoms(3, 5, cache_dir=str(tmp_path / "phantoms"))


def test_images_are_as_they_were_scored(small_busi):
    source = sources.Busi(small_busi)
    images = load_images(source, load_size=37, image_size=32)
    scored = run_data.scored(source, images.ids[3:5], image_size=32)
    assert list(scored) == images.ids[3:5]
    for number, one in zip((3, 4), scored.values(), strict=True):
        np.testing.assert_array_equal(one.image, images.eval_images[number])
        np.testing.assert_array_equal(one.mask, images.eval_masks[number])


def test_an_image_that_is_gone_is_named(small_busi):
    with pytest.raises(InputError, match=r"data=busi: image benign.*77.* is not in the data set any more"):
        run_data.scored(sources.Busi(small_busi), ["benign (77)"], image_size=32)


@pytest.mark.parametrize("target", ["os.system", "own_data.Clinic", "kdsweep.data.images.load_images"])
def test_nothing_is_imported_by_the_word_of_a_record(target, tmp_path):
    with pytest.raises(InputError, match=f"data.source={target}: only kdsweep.data.Udiat"):
        run_data.source({"data.source._target_": target, "data.source.root": "x"}, store=tmp_path)


def test_options_of_another_version_are_one_line(tmp_path):
    params = {"data.source._target_": "kdsweep.data.Folder", "data.source.root": "x", "data.source.depth": "2"}
    with pytest.raises(InputError, match="recorded other options than it has now"):
        run_data.source(params, store=Path(tmp_path))
