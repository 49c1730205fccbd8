"""Checkpoints that do not fit, are damaged or malicious: one clear sentence, and nothing is executed."""

import io
import json
import os
import zipfile

import numpy as np
import pytest
import torch
from layouts import (
    FOLDER,
    SMALL,
    saved_pipeline,
    small_model,
    small_unet,
    small_weights,
    written,
)

from purify import DiscreteVP, load_score_model, zoo
from purify.checkpoints import PUBLIC
from purify.weights.files import read

ONE = torch.ones(1)


@pytest.mark.parametrize("name", SMALL)
def test_missing_and_unexpected_keys_are_listed(name, tmp_path):
    weights = small_weights(name)
    key = {"score_sde": "all_modules.6.NIN_1.W"}.get(name, "middle_block.1.qkv.bias")
    weights["extra.weight"] = weights.pop(key)
    if name == "score_sde":
        weights["all_modules.4.Extra.weight"] = weights.pop("extra.weight")
    path = written(tmp_path / "w.pt", weights)
    with pytest.raises(ValueError, match=rf"does not fit this network: missing {key}; unexpected .*xtra\.weight"):
        load_score_model(path, **SMALL[name])


def test_wrong_shapes_types_and_values_are_listed(tmp_path):
    for change, message in (
        (lambda w: w.update({"out.2.bias": torch.zeros(7)}), r"conv_out\.bias has shape \(7,\) instead of \(6,\)"),
        (lambda w: w.update({"out.2.bias": torch.zeros(6).half()}), r"is torch\.float16 instead of torch\.float32"),
        (lambda w: w["out.2.bias"].fill_(torch.nan), r"conv_out\.bias holds NaN"),
        (lambda w: w["out.2.bias"][:1].fill_(torch.inf), r"conv_out\.bias holds NaN or infinity"),
    ):
        weights = small_weights("guided")
        change(weights)
        with pytest.raises(ValueError, match=message):
            load_score_model(written(tmp_path / "w.pt", weights), head_channels=16)


def test_damaged_averages_are_refused(tmp_path):
    state = read(FOLDER / "score_sde_training_state.pth")
    state["ema"]["shadow_params"] = state["ema"]["shadow_params"][:-1]
    with pytest.raises(ValueError, match=r"parameters but .* averaged ones"):
        load_score_model(written(tmp_path / "w.pth", state))
    state = read(FOLDER / "score_sde_training_state.pth")
    shadow = state["ema"]["shadow_params"]
    shadow[4], shadow[5] = shadow[5], shadow[4]
    with pytest.raises(ValueError, match=r"the average of all_modules\.2\.weight has shape"):
        load_score_model(written(tmp_path / "w.pth", state))


def test_unknown_formats_and_names(tmp_path):
    with pytest.raises(ValueError, match=r"is of no known format .* first keys are a\.b"):
        load_score_model(written(tmp_path / "w.pt", {"a.b": torch.zeros(1)}))
    with pytest.raises(ValueError, match="holds a list, not a dict"):
        load_score_model(written(tmp_path / "w.pt", [torch.zeros(1)]))
    conditional = written(tmp_path / "w.pt", {**small_weights("guided"), "label_emb.weight": torch.zeros(10, 128)})
    with pytest.raises(ValueError, match="conditional on 10 classes; say which it is told"):
        load_score_model(conditional, head_channels=16)
    u, t = torch.rand(2, 3, 16, 16), torch.full((2,), 0.1, dtype=torch.float64)
    told = load_score_model(conditional, head_channels=16, classes=3)  # zeros in the table: as without it
    plain = load_score_model(written(tmp_path / "plain.pt", small_weights("guided")), head_channels=16)
    assert torch.equal(told.eps(u, t), plain.eps(u, t))
    with pytest.raises(ValueError, match=r"is no DDPM\+\+ of score_sde"):
        load_score_model(written(tmp_path / "w.pt", {"all_modules.0.W": torch.zeros(1)}))
    with pytest.raises(ValueError, match=r"no score network 'nothing'.* none of digits.* score-sde-cif"):
        load_score_model("nothing")
    (tmp_path / "text.pt").write_text("<html>quota exceeded</html>")
    with pytest.raises(ValueError, match=r"text\.pt"):
        load_score_model(tmp_path / "text.pt")
    (tmp_path / "text.safetensors").write_text("<html>")
    with pytest.raises(ValueError, match="not a readable safetensors file"):
        load_score_model(tmp_path / "text.safetensors")


@pytest.mark.parametrize("share", [0, 1e-9, 0.001, 0.01, 0.3, 0.9, 0.999, 1 - 1e-9])
@pytest.mark.parametrize("kind", ["zip", "legacy", "safetensors"])
def test_truncated_files_are_refused(kind, share, tmp_path):
    path = tmp_path / ("w.safetensors" if kind == "safetensors" else "w.pt")
    weights = small_weights("guided")
    if kind == "legacy":
        torch.save(weights, path, _use_new_zipfile_serialization=False)
    else:
        written(path, weights)
    whole = path.read_bytes()
    path.write_bytes(whole[: min(int(np.ceil(share * len(whole))), len(whole) - 1)])
    with pytest.raises(ValueError, match=r"w\.\w+ is not a readable .* file .*; fetch it again") as error:
        load_score_model(path, head_channels=16)
    assert "weights_only" not in str(error.value)


@pytest.mark.parametrize("compression", [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_compressed_archives_are_refused(compression, tmp_path):
    """Mapped, their compressed bytes would pass for weights."""
    path, packed = written(tmp_path / "w.pt", small_weights("guided")), tmp_path / "packed.pt"
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(packed, "w", compression) as new:
        for entry in old.infolist():
            new.writestr(entry.filename, old.read(entry))
    with pytest.raises(ValueError, match=r"packed\.pt is a compressed archive, .*fetch the original file again"):
        load_score_model(packed, head_channels=16)


def test_archives_that_were_stored_again_load(tmp_path):
    path, again = written(tmp_path / "w.pt", small_weights("guided")), tmp_path / "again.pt"
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(again, "w", zipfile.ZIP_STORED) as new:
        for entry in old.infolist():
            new.writestr(entry.filename, old.read(entry))
    found = load_score_model(again, head_channels=16)
    assert found.fingerprint() == load_score_model(path, head_channels=16).fingerprint()


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        (3, torch.zeros(1), r"holds a dict with the key 3"),
        ("out.2.bias", torch.zeros(6).to_sparse(), "sparse_coo on cpu; save dense tensors"),
        ("out.2.bias", torch.zeros(6, device="meta"), "strided on meta; save dense tensors"),
        ("out.2.bias", torch.zeros(6).to(torch.float8_e4m3fn), r"is torch\.float8_e4m3fn instead of torch\.float32"),
        ("out.2.bias", [torch.zeros(6)], r"out\.2\.bias is a list, not a tensor"),
        ("out.2.bias", None, r"out\.2\.bias is a NoneType, not a tensor"),
        ("out.2.weight", torch.tensor(1.0), "its weights describe none"),
        ("input_blocks.0.0.weight", torch.tensor(1.0), "its weights describe none"),
        ("input_blocks.1.0.out_layers.3.weight", torch.zeros(0, 32, 3, 3), "is empty"),
    ],
)
def test_what_is_no_dense_weight_is_refused(key, value, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        load_score_model(written(tmp_path / "w.pt", {**small_weights("guided"), key: value}), head_channels=16)


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")  # torch gives them up
def test_quantized_weights_are_refused(tmp_path):
    value = torch.quantize_per_tensor(torch.zeros(6), 0.1, 0, torch.quint8)
    with pytest.raises(ValueError, match="a tensor that is quantized; save dense tensors"):
        load_score_model(written(tmp_path / "w.pt", {**small_weights("guided"), "out.2.bias": value}), head_channels=16)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.update(model=3), "holds a int in the place of its weights"),
        (lambda s: s.update(model=[torch.zeros(1)]), "holds a list in the place of its weights"),
        (lambda s: s.update(model={1: torch.zeros(1)}), "parameters without names"),
        (lambda s: s["model"].update({"module.all_modules.0.weight": "text"}), "is a str, not a tensor"),
        (lambda s: s["ema"].update(shadow_params=3), "no list of tensors as its averaged weights"),
        (lambda s: s["ema"].update(shadow_params=[1.0, 2.0]), "no list of tensors as its averaged weights"),
        (lambda s: s.update(ema=3), "is of no known format"),
        (lambda s: s.update(model={"all_modules.x": ONE}, ema={"shadow_params": [ONE]}), "is no DDPM"),
        (lambda s: s.update(model={"all_modules.9999999999.x": ONE}, ema={"shadow_params": [ONE]}), "is no DDPM"),
    ],
)
def test_damaged_training_states_are_refused(change, message, tmp_path):
    state = read(FOLDER / "score_sde_training_state.pth")
    change(state)
    with pytest.raises(ValueError, match=message):
        load_score_model(written(tmp_path / "w.pth", state))


@pytest.mark.parametrize(
    "settings",
    [
        {"prediction": "epsilon"},
        {"schedule": {"kind": "linear", "sigma": 1}},
        {"schedule": 3},
        {"image_shape": 8},
        {"unknown": 1},
    ],
)
def test_purifys_own_description_must_describe_a_score_model(settings, tmp_path):
    for suffix in (".safetensors", ".json"):
        (tmp_path / f"mine{suffix}").write_bytes((zoo.WEIGHTS / f"digits{suffix}").read_bytes())
    entry = json.loads((tmp_path / "mine.json").read_text())
    entry["score_model"] |= settings
    (tmp_path / "mine.json").write_text(json.dumps(entry))
    with pytest.raises(ValueError, match=r"mine\.json describes no score model"):
        load_score_model(tmp_path / "mine.safetensors")


@pytest.mark.parametrize("name", [*PUBLIC, "google/ddpm-cifar10-32"])
def test_offline_says_which_file_to_put_where(name, tmp_path):
    where = tmp_path / "cache"
    with pytest.raises(ValueError, match=rf"{name} is not here.*; run `purify download {name}`.*{where}") as error:
        load_score_model(name)
    assert "\n" not in str(error.value)
    if name in PUBLIC:
        assert PUBLIC[name].file in str(error.value)


def test_files_put_by_hand_are_found_by_name(tmp_path):
    folder = tmp_path / "cache" / "score-sde-cifar10"
    folder.mkdir(parents=True)
    source = FOLDER / "score_sde_training_state.pth"
    (folder / "checkpoint_8.pth").write_bytes(source.read_bytes())
    assert load_score_model("score-sde-cifar10").fingerprint() == load_score_model(source).fingerprint()
    saved_pipeline(tmp_path / "cache" / "hub" / "someone--something", small_unet())
    assert load_score_model("someone/something").image_shape == (3, 16, 16)
    saved_pipeline(tmp_path / "cache" / "hub" / "someone--ddpm-v1.5", small_unet())
    assert load_score_model("someone/ddpm-v1.5").image_shape == (3, 16, 16)
    for file in ("folder/w.pt", "folder/w.safetensors", "../ddpm"):
        with pytest.raises(ValueError, match="no file or folder of that path"):
            load_score_model(file)
    folder = tmp_path / "cache" / "guided-imagenet256"
    folder.mkdir()
    (folder / "256x256_diffusion_uncond.pt").write_bytes(b"something else")
    with pytest.raises(ValueError, match=r"has the sha256 .* instead of a37c32ff"):
        load_score_model("guided-imagenet256")


def test_settings_are_checked_before_anything_is_read():
    with pytest.raises(ValueError, match="Unknown setting of a score model 'predicton'"):
        load_score_model("nothing", predicton="eps")


def test_settings_override_the_formats(tmp_path):
    model = small_model("improved", tmp_path, schedule=DiscreteVP.linear(1000), time_scale=1000, time_offset=1,
                        image_shape=(3, 32, 32), autocast="bfloat16")  # fmt: skip
    assert model.schedule.steps == 1000
    assert model.labels(torch.tensor([0.5])).item() == 499
    assert model.image_shape == (3, 32, 32)
    assert model.autocast == "bfloat16"
    embedded = load_score_model("digits", autocast="bfloat16")
    assert embedded.autocast == "bfloat16"
    by_path = load_score_model(zoo.WEIGHTS / "digits.safetensors")
    assert by_path.fingerprint() == load_score_model("digits").fingerprint()
    for wrong in ("digits", FOLDER / "score_sde_training_state.pth"):
        with pytest.raises(ValueError, match=r"head_channels|one head"):
            load_score_model(wrong, head_channels=64)


# --- safety -------------------------------------------------------------------------------------------------------


class Evil:
    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


ARRAY = np.zeros(1).__reduce__()[0]


def payloads(target):
    return {
        f"{os.name}.system": Evil(os.system, f"touch {target}"),
        "eval": Evil(eval, f"open({str(target)!r}, 'w').close()"),
        "numpy.fromfile": Evil(np.fromfile, str(target)),
        f"{ARRAY.__module__}._reconstruct": np.array([Evil(os.system, f"touch {target}")], dtype=object),
    }


@pytest.mark.parametrize("kind", list(payloads("x")))
@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_malicious_pickles_are_refused(kind, legacy, tmp_path):
    target = tmp_path / "touched"
    content = {**small_weights("guided"), "more": payloads(target)[kind]}
    torch.save(content, tmp_path / "w.pt", _use_new_zipfile_serialization=not legacy)
    with pytest.raises(ValueError, match=rf"more than weights \(it asks for {kind}\) and was not loaded") as error:
        load_score_model(tmp_path / "w.pt", head_channels=16)
    assert "\n" not in str(error.value)
    assert "weights_only" not in str(error.value)
    assert "add_safe_globals" not in str(error.value)
    assert not target.exists()


def test_malicious_object_inside_a_numpy_scalar_is_refused(tmp_path):
    """The one function that is allowed beyond torch's own must not open a way around."""
    target = tmp_path / "touched"
    scalar = np.float64(0).__reduce__()[0]
    inner = io.BytesIO()
    torch.save(Evil(os.system, f"touch {target}"), inner)
    for payload in (inner.getvalue(), Evil(os.system, f"touch {target}")):
        torch.save({**small_weights("guided"), "more": Evil(scalar, np.dtype("O"), payload)}, tmp_path / "w.pt")
        with pytest.raises(ValueError, match=r"it asks for numpy\.dtypes\.ObjectDType") as error:
            load_score_model(tmp_path / "w.pt", head_channels=16)
        assert "weights_only" not in str(error.value)
        assert not target.exists()


def test_a_malicious_bin_of_diffusers_is_refused(tmp_path):
    folder = saved_pipeline(tmp_path / "p", small_unet(), legacy=True)
    evil = Evil(os.system, f"touch {tmp_path / 'touched'}")
    torch.save({"a": evil}, folder / "unet" / "diffusion_pytorch_model.bin")
    with pytest.raises(ValueError, match="holds more than weights"):
        load_score_model(folder)
    assert not (tmp_path / "touched").exists()
