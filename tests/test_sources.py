"""Data and parts of one's own: folders, arrays and functions give the tensors that they were made from."""

import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torchvision.transforms.functional import to_pil_image

import purify
from purify.cli.attack import main
from purify.data import load_dataset
from purify.evaluate.attacking import load_samples
from purify.evaluate.description import Evaluation
from purify.plugin import load_function
from purify.sources import read_picture, resolve_data

IMAGES, LABELS = (t[:40] for t in load_dataset("digits", "test"))
LEVELS = (IMAGES * 255).round().to(torch.uint8)  # what a PNG can hold


def folder_of_pngs(root):
    for i, (image, label) in enumerate(zip(LEVELS, LABELS, strict=True)):
        place = root / str(int(label))
        place.mkdir(parents=True, exist_ok=True)
        to_pil_image(image).save(place / f"{i:03}.png")
    return root


def arrays(path, **changed):
    content = {"images": IMAGES.numpy(), "labels": LABELS.numpy(), **changed}
    np.savez(path, **content)
    return path


def test_a_folder_of_pictures_is_the_images_it_was_made_from(tmp_path):
    data = resolve_data(str(folder_of_pngs(tmp_path / "mine")))
    images, labels = data.load("test", None)
    order = LABELS.argsort(stable=True)
    assert torch.equal(images, LEVELS[order].float() / 255)
    assert torch.equal(labels, LABELS[order])
    assert (data.shape, data.num_classes, data.like) == ((1, 8, 8), 10, "digits")


@pytest.mark.parametrize("form", ["chw", "hwc", "hw", "bytes"])
def test_arrays_of_every_form_are_the_same_images(form, tmp_path):
    forms = {
        "chw": IMAGES,
        "hwc": IMAGES.permute(0, 2, 3, 1),
        "hw": IMAGES[:, 0],
        "bytes": LEVELS,
    }
    expected = LEVELS.float() / 255 if form == "bytes" else IMAGES
    file = arrays(tmp_path / "a.npz", images=forms[form].numpy())
    save_file({"images": forms[form].contiguous(), "labels": LABELS}, tmp_path / "a.safetensors")
    for source in (file, tmp_path / "a.safetensors"):
        images, labels = resolve_data(str(source)).load("test", None)
        assert torch.equal(images, expected)
        assert torch.equal(labels, LABELS)


def test_a_function_gives_data_and_may_import_its_neighbour(tmp_path):
    arrays(tmp_path / "a.npz")
    (tmp_path / "neighbour.py").write_text(f"PATH = {str(tmp_path / 'a.npz')!r}\n")
    (tmp_path / "own.py").write_text(
        "import numpy as np\nfrom neighbour import PATH\n\ndef data():\n    stored = np.load(PATH)\n"
        "    return stored['images'], stored['labels']\n"
    )
    images, labels = resolve_data(f"{tmp_path}/own.py:data").load("test", None)
    assert torch.equal(images, IMAGES)
    assert torch.equal(labels, LABELS)


def test_splits_of_a_folder_and_colours(tmp_path):
    for split, value in (("train", 10), ("test", 200)):
        for name in "ab":
            place = tmp_path / "mine" / split / name
            place.mkdir(parents=True)
            Image.new("RGB", (5, 7), (value, 0, 0)).save(place / "x.png")
    Image.new("L", (5, 7), 200).save(tmp_path / "mine" / "test" / "a" / "grey.png")
    data = resolve_data(str(tmp_path / "mine"))
    assert data.shape == (3, 7, 5)
    assert data.like is None
    assert float(data.load("train", None)[0].max()) == pytest.approx(10 / 255)
    images = data.load("test", None)[0]
    assert len(images) == 3
    assert torch.equal(images[0], torch.full((3, 7, 5), 200 / 255))  # the grey one, in three channels


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"labels": np.arange(39)}, "There are 40 images but labels of shape"),
        ({"labels": np.full(40, -1)}, "Labels must be classes 0"),
        ({"labels": np.full(40, 0.5)}, "Labels must be an integer tensor"),
        ({"images": 2 * IMAGES.numpy()}, "Images must lie in"),
        ({"images": np.full((40, 1, 8, 8), np.nan, np.float32)}, "NaN"),
        ({"images": np.zeros((40, 5, 8, 8), np.float32)}, "with 1 or 3 channels"),
        ({"images": np.zeros((0, 1, 8, 8), np.float32)}, "have shape"),
        ({"labels": np.array(40 * ["cat"])}, "labels of .* are of type <U3 and no numbers"),
        ({"images": np.array([None, object()])}, "cannot be read"),  # would be pickled
    ],
)
def test_arrays_that_are_no_data_are_refused_in_a_sentence(changed, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        resolve_data(str(arrays(tmp_path / "a.npz", **changed)))


def test_files_that_are_no_data_are_refused_in_a_sentence(tmp_path):
    np.savez(tmp_path / "b.npz", pictures=IMAGES.numpy())
    (tmp_path / "broken.safetensors").write_bytes(b"nothing")
    (tmp_path / "empty").mkdir()
    mixed = folder_of_pngs(tmp_path / "mixed")
    Image.new("L", (9, 8)).save(mixed / "0" / "odd.png")
    for source, message in {
        "b.npz": "lacks images and labels; it has pictures",
        "broken.safetensors": "broken.safetensors cannot be read",
        "empty": "has no folder of PNG or JPEG",
        "mixed": "is 9 x 8 pixels but .* is 8 x 8",
        "nowhere": "Unknown data set",
    }.items():
        with pytest.raises(ValueError, match=message):
            resolve_data(str(tmp_path / source))
    with pytest.raises(ValueError, match=r"did you mean 'fashion_mnist'"):
        resolve_data("FashionMNIST")


def png(bits, colour, row, extra=b""):
    """A PNG of 2 x 2 pixels by hand: what PIL writes is not all that there is."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 2, 2, bits, colour, 0, 0, 0)
    data = zlib.compress(2 * (b"\0" + row))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + extra + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def test_what_pictures_hold_beyond_8_opaque_bits_is_refused(tmp_path):
    key = struct.pack(">I", 2) + b"tRNS" + b"\0\1" + struct.pack(">I", zlib.crc32(b"tRNS\0\1"))
    for content, message in (
        (png(16, 2, 12 * b"\x12"), "more than 8 bits per channel"),
        (png(16, 4, 8 * b"\xff"), "more than 8 bits per channel"),
        (png(2, 0, b"\x50", key), "transparent pixels"),
        (png(2, 0, b"\x50", key[:-9]), "is no picture that can be read"),
    ):
        path = tmp_path / "picture.png"
        path.write_bytes(content)
        with pytest.raises(ValueError, match=rf"picture\.png (has|is).*{message.removeprefix('is ')}"):
            read_picture(path)
    path.write_bytes(png(2, 0, b"\x50"))
    assert read_picture(path).tolist() == [[[85, 85], [85, 85]]]


def test_a_palette_of_greys_is_grey(tmp_path):
    """A picture with another palette is coloured, as one in RGB is, whatever its pixels are."""
    grey = np.array([[0, 40], [90, 255]], dtype=np.uint8)
    coloured = np.stack([grey, grey, grey], 2)
    Image.fromarray(grey).convert("P").save(tmp_path / "grey.png")
    Image.fromarray(coloured).save(tmp_path / "rgb.png")
    coloured[0, 0, 2] = 255
    Image.fromarray(coloured).convert("P", palette=Image.Palette.ADAPTIVE).save(tmp_path / "blue.png")
    assert read_picture(tmp_path / "grey.png").tolist() == grey[None].tolist()
    assert len(read_picture(tmp_path / "rgb.png")) == 3
    assert read_picture(tmp_path / "blue.png").permute(1, 2, 0).tolist() == coloured.tolist()
    Image.new("RGB", (2, 2), "white").convert("P").save(tmp_path / "web.png")  # with colours that it does not take
    assert read_picture(tmp_path / "web.png").tolist() == torch.full((3, 2, 2), 255).tolist()


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparent_pixels_are_refused_and_opaque_ones_are_as_without_alpha(tmp_path, mode):
    plain = Image.new("RGB" if mode == "RGBA" else "L", (3, 2), 7)
    opaque, clear = tmp_path / "opaque.png", tmp_path / "clear.png"
    plain.convert("LA" if mode == "P" else mode).save(opaque)
    if mode == "P":
        plain.convert("P").save(clear, transparency=7)
    else:
        seen = plain.convert(mode)
        seen.putalpha(254)
        seen.save(clear)
    assert torch.equal(read_picture(opaque), torch.from_numpy(np.atleast_3d(np.array(plain))).permute(2, 0, 1))
    with pytest.raises(ValueError, match="transparent pixels"):
        read_picture(clear)


def test_pictures_are_turned_as_they_say_and_deep_ones_refused(tmp_path):
    turned = Image.new("L", (4, 2))
    turned.putpixel((0, 0), 255)
    exif = turned.getexif()
    exif[274] = 6  # turn by a quarter
    turned.save(tmp_path / "turned.png", exif=exif)
    assert read_picture(tmp_path / "turned.png").shape == (1, 4, 2)
    Image.fromarray(np.full((3, 3), 40000, np.uint16)).save(tmp_path / "deep.png")
    with pytest.raises(ValueError, match="more than 8 bits per channel"):
        read_picture(tmp_path / "deep.png")


def test_errors_of_ones_own_code_name_their_kind_and_line(tmp_path):
    (tmp_path / "bad.py").write_text("def f():\n    x = 1\n    return x / 0\n\nvalue = 3\n")
    with pytest.raises(ValueError, match=r"bad.py, line 3, failed with ZeroDivisionError: division by zero"):
        resolve_data(f"{tmp_path}/bad.py:f")
    for name, message in (("g", "no function 'g'"), ("value", "no function 'value'")):
        with pytest.raises(ValueError, match=message):
            load_function(f"{tmp_path}/bad.py:{name}")
    (tmp_path / "worse.py").write_text("import purify\n\n\nraise RuntimeError('no')\n")
    with pytest.raises(ValueError, match=r"worse.py, line 4, failed with RuntimeError: no"):
        load_function(f"{tmp_path}/worse.py:f")


def test_a_folder_of_pngs_and_a_classifier_of_ones_own_are_attacked(tmp_path, monkeypatch, capsys):
    """Data, model and purifier of one's own, from the folder they lie in."""
    monkeypatch.chdir(tmp_path)
    folder_of_pngs(tmp_path / "mine")
    (tmp_path / "own.py").write_text(
        "import purify\nfrom purify import zoo\n\ndef model():\n    return zoo.classifier('digits-standard')\n\n"
        "def twice(score_model, t_star=0.1, steps=2, reverse='ddpm', gradient='full'):\n"
        "    return purify.Purifier(score_model, t_star, reverse, steps, gradient=gradient, rounds=2)\n"
    )
    small = ["--n-examples", "2", "--attack-steps", "1", "--eot", "1", "--judge-draws", "2", "--steps", "2"]
    given = ["--data", "mine", "--model", "own.py:model", "--attacks", "pgd-eot", "--noise-level", "constant"]
    assert main([*given, *small, "--purifier", "diffpure,own.py:twice", "--out", "run"]) == 0
    shown = capsys.readouterr().out
    assert "mine has the shape of digits and gets its score network and settings" in shown
    assert "own.py:twice" in shown
    wrapped = purify.wrap("own.py:model", "digits", purifier="own.py:twice", steps=2)
    assert wrapped.purifier.rounds == (1.0, 1.0)
    assert main(["--data", "mine", "--attacks", "pgd-eot"]) == 2
    assert "needs a classifier; pass --model" in capsys.readouterr().err


def test_fewer_images_than_the_budget_asks_for_are_all_attacked(tmp_path):
    asked = Evaluation(dataset=str(arrays(tmp_path / "a.npz")))
    assert len(load_samples(asked, resolve_data(asked.dataset), 128, torch.device("cpu"))) == 40
