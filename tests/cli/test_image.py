"""``purify image``: what is written is what the purifier gave, for every kind of input."""

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms.functional import to_pil_image

from purify.cli.image import main
from purify.data import load_dataset
from purify.wrap import build_purifier

LEVELS = (load_dataset("digits", "test")[0][:3] * 255).round().to(torch.uint8)
FEW = ["--steps", "2"]


@pytest.fixture
def pictures(tmp_path):
    place = tmp_path / "in"
    place.mkdir()
    for i, image in enumerate(LEVELS):
        to_pil_image(image).save(place / f"{i}.png")
    return place


def read(path):
    return torch.from_numpy(np.array(Image.open(path)))


def expected(draw=0, seed=0):
    purifier = build_purifier("diffpure", None, "digits", steps=2)
    with torch.no_grad():
        found = purifier.purify(LEVELS.float() / 255, sample_ids=range(3), draw=draw, seed=seed)
    return (found.images * 255).round().to(torch.uint8)[:, 0]


def test_pictures_are_what_the_purifier_gives(pictures, tmp_path, capsys):
    out = tmp_path / "out"
    given = [str(pictures), "--out", str(out), "--purifications", "2", "--seed", "3", "--picture", *FEW]
    assert main(given) == 0
    for draw in range(2):
        for i, image in enumerate(expected(draw, seed=3)):
            assert (read(out / f"{i}-{draw + 1}.png").int() - image.int()).abs().max() <= 1  # the batch rounds
    assert (out / "0-before-after.png").stat().st_size > 1000
    assert "Wrote 6 files" in capsys.readouterr().out


def test_arrays_are_what_the_purifier_gives(tmp_path):
    np.savez(tmp_path / "a.npz", images=LEVELS.numpy())
    assert main([str(tmp_path / "a.npz"), "--out", str(tmp_path / "out"), *FEW]) == 0
    stored = np.load(tmp_path / "out" / "a.npz")["images"]
    assert stored.shape == (3, 1, 8, 8)
    assert np.abs(255 * stored[:, 0] - expected().numpy()).max() <= 0.51


def test_a_purifier_that_diffuses_nothing_has_two_columns(pictures, tmp_path):
    call = [
        str(pictures / "0.png"),
        "--out",
        str(tmp_path / "out"),
        "--purifier",
        "likelihood",
        "--steps",
        "2",
        "--picture",
    ]
    assert main(call) == 0
    with Image.open(tmp_path / "out" / "0-before-after.png") as picture:
        assert picture.width < 500


def test_a_picture_of_what_was_done_replaces_nothing(pictures, tmp_path, capsys):
    result = pictures / "0-before-after.png"
    result.write_bytes((pictures / "0.png").read_bytes())
    call = [str(pictures / "0.png"), "--out", str(tmp_path / "out"), "--picture", *FEW]
    assert main([str(result), *call]) == 2
    assert "Two inputs would be written to" in capsys.readouterr().err
    assert main(call) == 0
    (tmp_path / "out" / "0.png").unlink()
    assert main(call) == 2
    assert "0-before-after.png is there already; pass --overwrite" in capsys.readouterr().err


def test_other_sizes_and_colours_are_asked_about_and_then_taken(tmp_path, capsys):
    photo = tmp_path / "photo.jpg"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (20, 12, 3), np.uint8)).save(photo)
    call = [str(photo), "--out", str(tmp_path / "out"), *FEW]
    assert main(call) == 2
    assert "coloured but the network takes grey images; pass --grey" in capsys.readouterr().err
    assert main([*call, "--grey"]) == 2
    assert "12 x 20 pixels but the network takes 8 x 8; pass --resize" in capsys.readouterr().err
    assert main([*call, "--grey", "--resize"]) == 0
    assert read(tmp_path / "out" / "photo.png").shape == (20, 12)


def test_bad_input_is_one_sentence_before_anything_is_written(pictures, tmp_path, capsys):
    (tmp_path / "broken.png").write_bytes((pictures / "0.png").read_bytes()[:40])
    (tmp_path / "text.txt").write_text("no picture")
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    np.savez(tmp_path / "b.npz", pictures=LEVELS.numpy())
    out = ["--out", str(tmp_path / "out")]
    for given, message in [
        ([str(tmp_path / "nowhere.png"), *out], "There is no file"),
        ([str(tmp_path / "broken.png"), *out], "is no picture that can be read"),
        ([str(tmp_path / "text.txt"), *out], "give PNG, JPEG"),
        ([str(tmp_path / "empty"), *out], "holds no PNG"),
        ([str(tmp_path / "b.npz"), *out], "lacks images; it has pictures"),
        ([str(pictures), "--out", str(pictures)], "is an input and would be replaced"),
        ([str(pictures), "--out", str(tmp_path / "file")], "--out takes a folder"),
        ([str(pictures), str(pictures), *out], "Two inputs would be written to"),
        ([str(pictures), *out, "--purifier", "difpure"], "did you mean 'diffpure'"),
        ([str(pictures), *out, "--purifications", "0"], "at least 1"),
        ([str(pictures), *out, "--t-star", "2"], "must lie in (0, 1]"),
        ([str(pictures), *out, "--device", "cuda:7"], "There is no GPU"),
        ([str(pictures), *out, "--dataset", "cifar10"], "is not here; run `purify download"),
        ([str(pictures), *out, "--pictures"], "did you mean '--picture'"),
    ]:
        assert main(given) == 2, given
        assert message in capsys.readouterr().err, message
    assert not (tmp_path / "out").exists()
    assert main([str(pictures), *out, *FEW]) == 0
    assert main([str(pictures), *out, *FEW]) == 2
    assert "pass --overwrite" in capsys.readouterr().err
    assert main([str(pictures), *out, *FEW, "--overwrite"]) == 0
