"""Bad input to every command: one sentence, exit code 2, before any work and without a file written."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from purify.__main__ import main
from purify.cli import COMMANDS


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder of things that are not what they should be."""
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (8, 8)).save("colour.png")
    Image.new("L", (9, 8)).save("odd.png")
    Path("broken.png").write_bytes(b"not a picture")
    Path("text.txt").write_text("text")
    Path("empty").mkdir()
    Path("flat").mkdir()
    Image.new("L", (8, 8)).save("flat/a.png")
    np.savez("nolabels.npz", images=np.zeros((2, 1, 8, 8), np.float32))
    np.savez("oblong.npz", images=np.zeros((2, 1, 8, 10), np.float32), labels=np.zeros(2, np.int64))
    np.savez("long.npz", images=np.zeros((2, 1, 8, 8), np.float32), labels=np.zeros(3, np.int64))
    np.savez("bright.npz", images=np.full((2, 1, 8, 8), 3.0, np.float32), labels=np.zeros(2, np.int64))
    np.savez("float.npz", images=np.zeros((2, 1, 8, 8), np.float32), labels=np.zeros(2, np.float32))
    np.savez("pickled.npz", images=np.array([{}, {}], dtype=object), labels=np.zeros(2, np.int64))
    save_file({"images": torch.zeros(0, 1, 8, 8), "labels": torch.zeros(0).long()}, "none.safetensors")
    Path("cut.safetensors").write_bytes(b"\x10\x00")
    Path("three.py").write_text(
        "import torch\nfrom torch import nn\n\nclass Net(nn.Module):\n    def forward(self, x):\n"
        "        return x.flatten(1)[:, :3]\n\ndef net():\n    return Net().eval()\n\n"
        "def training():\n    return Net()\n\ndef fails():\n    return 1 / 0\n\ndef nothing():\n    return None\n"
    )
    Path("odd.py").write_text(
        "import torch\nfrom torch import nn\n\nclass Net(nn.Module):\n    def __init__(self, answer):\n"
        "        super().__init__()\n        self.answer = answer\n        self.eval()\n\n"
        "    def forward(self, x):\n        return self.answer(x.flatten(1)[:, 10:20])\n\n"
        "def pair():\n    return Net(lambda z: (z, z))\n\ndef vector():\n    return Net(lambda z: z[:, 0])\n\n"
        "def few():\n    return Net(lambda z: z[:, :9])\n\ndef named():\n    return Net(lambda z: {'scores': z})\n\n"
        "def empty():\n    return Net(lambda z: z * float('nan'))\n\ndef same():\n    return Net(torch.zeros_like)\n\n"
        "def numpy():\n    return Net(lambda z: torch.from_numpy(z.numpy() * 2))\n\n"
        "def cut():\n    return Net(lambda z: 2 * z.detach())\n"
    )
    Path("calibration.json").write_text("{}")
    Path("runs.json").write_text("[]")
    return tmp_path


IMAGE = ["image", "colour.png", "--out"]
CASES = {
    # names, with the nearest one
    "atack": "Unknown command 'atack' (did you mean 'attack'?)",
    "attack --atack pgd-eot": "Unknown option --atack (did you mean '--attacks'?)",
    "attack --attacks pgd": "Unknown attack 'pgd' (did you mean 'pgd-eot'?)",
    "attack --data FashionMNIST": "(did you mean 'fashion_mnist'?)",
    "attack --data ./no/where": "Unknown data set 'no/where'",
    "attack --purifier DiffPur": "(did you mean 'diffpure'?)",
    "attack --noise-level ssni": "Unknown noise level 'ssni' (did you mean 'ssni-n'?)",
    "attack --model digits-standrd": "(did you mean 'digits-standard'?)",
    "attack --budget standart": "Unknown --budget 'standart' (did you mean 'standard'?)",
    "attack --gradient ful": "(did you mean 'full'?)",
    "attack --precision bf8": "Unknown --precision 'bf8'; known: auto, bf16, bf16+compile, float32",
    "attack --precision float16": "(did you mean 'fp16'?)",
    "attack --precision bfloat16": "(did you mean 'bf16'?)",
    "certify --precision float16+compile": "(did you mean 'fp16+compile'?)",
    "attack --step 5": "Unknown option --step (did you mean '--steps'?)",
    "certify --method cohn": "Unknown method 'cohn' (did you mean 'cohen'?)",
    "certify --mode lax": "Unknown --mode 'lax'",
    "list purifers": "(did you mean 'purifiers'?)",
    "train digits-gide": "(did you mean 'digits-guide'?)",
    "calibrate --dataset digit --out c.json": "(did you mean 'digits'?)",
    "completion fish": "Argument shell: invalid choice: 'fish'",
    "check --data digit": "(did you mean 'digits'?)",
    "check --score-model fashion_mnist": "fashion_mnist was trained on fashion_mnist",
    "image odd.png --purifier gms --out out": "(did you mean 'gns'?)",
    "download score-sde-cifar": "score-sde-cifar10",
    # numbers
    "attack --eps 8/0": "--eps takes a number, as 0.03 or 8/255, or several separated by commas, got '8/0'",
    "attack --eps -0.1": "eps must be a number of at least 0",
    "attack --memory-budget 1X": "--memory-budget takes bytes, as 1000000, 512M or 1.5G, or auto",
    "attack --n-examples 0": "--n-examples must be a whole number of at least 1",
    "attack --seed 1.5": "--seed takes a whole number, got '1.5'",
    "attack --t-star 1.5": "t_star must lie in (0, 1], got 1.5",
    "attack --t-star nan": "--t-star takes a number",
    "certify --sigma 0.25,b": "--sigma takes numbers separated by commas",
    "certify --draws ten": "--draws takes a whole number, got 'ten'",
    "image odd.png --t-star two --out out": "takes a number",
    "image odd.png --purifications 0 --out out": "purifications must be a whole number of at least 1",
    "calibrate --images few --out c.json": "takes a whole number, got 'few'",
    "check --images 0": "images must be a whole number of at least 1",
    "train digits-guide --steps many": "takes a whole number, got 'many'",
    # options that contradict each other, or lack something
    "attack --steps 5 --dt 0.1": "--steps and --dt exclude each other",
    "attack --gradient bpda --memory-budget 1G": "--memory-budget is for --gradient full, checkpoint or surrogate",
    "attack --purifier gdmp --set point=u0_hat --set through_score=true --precision fp16": "which vanish in fp16; use",
    "attack --shard 17/16": "--shard takes a part of the whole, as 1/16 to 16/16, got '17/16'",
    "certify --shard 3": "--shard takes a part of the whole",
    "attack --shard 1/2 --precision auto": "Each shard might choose another precision",
    "attack --set scale": "--set takes NAME=VALUE or PART.NAME=VALUE, got 'scale'",
    "attack --set scale=3": "None of diffpure, constant, ssni-l has a parameter 'scale'",
    "attack --purifier gdmp --set gdmp.scael=3": "(did you mean 'scale'?)",
    "certify --lam 2": "--lam says nothing about cohen",
    "attack --dataset": "Argument --data/--dataset: expected one argument",
    "attack more": "Unrecognized arguments: more",
    "image odd.png": "--out",
    "calibrate": "--out",
    "attack --protocol averages": "Unknown --protocol 'averages' (did you mean 'averaged'?)",
    "attack --protocol in-loop --attacks random-noise,transfer": "in-loop needs an attack that climbs the model's own",
    "attack --protocol deterministic --worst-only majority": "--worst-only spares broken samples the attacks",
    "attack --averages 8": "--averages is for --protocol averaged",
    "attack --protocol averaged --averages 1,0": "--averages must be a whole number of at least 1",
    "attack --protocol averaged --averages 8,8": "Two entries of --averages are called 8",
    "attack --protocol averaged --averages many": "--averages takes whole numbers separated by commas, got 'many'",
    "attack --recipe diffpure-cifar10": "Unknown recipe 'diffpure-cifar10' (did you mean 'diffpure-cifar10-linf'?)",
    "attack --recipe": "Argument --recipe: expected one argument",
    "attack --recipe lee-kim-cifar10-linf --steps 5 --dt 0.1": "--steps and --dt exclude each other",
    # no GPU
    "attack --device cuda:3": "There is no GPU 'cuda:3' here",
    "certify --device gpu": "Unknown device 'gpu'",
    "image odd.png --device cuda:3 --out out": "There is no GPU 'cuda:3' here",
    # files
    "attack --config none.yaml": "none.yaml",
    "attack --calibration none.json": "none.json",
    "attack --calibration calibration.json": "calibration.json",
    "attack --data nolabels.npz --model digits-standard": "nolabels.npz lacks labels",
    "attack --data oblong.npz --model digits-standard --t-star 0.15 --eps 0.3": "was trained on digits; "
    "for images of another shape take one of your own, or --dataset digits.",
    "attack --data long.npz --model digits-standard": "There are 2 images but labels of shape (3,)",
    "attack --data bright.npz --model digits-standard": "must lie in [0, 1]",
    "attack --data float.npz --model digits-standard": "abels",
    "attack --data pickled.npz --model digits-standard": "pickled.npz",
    "attack --data none.safetensors --model digits-standard": "none.safetensors",
    "attack --data cut.safetensors --model digits-standard": "cut.safetensors",
    "attack --data empty --model digits-standard": "empty",
    "attack --data flat --model digits-standard": "flat",
    "attack --model three.py:net --dry-run": "undefended gives all 3 classes the same logit for sample 0",
    "attack --model odd.py:pair --dry-run": "it returned tuple for one image; wrap it in a module that returns the "
    "logits alone",
    "attack --model odd.py:vector --dry-run": "it returned shape (1,) for one image",
    "attack --model odd.py:named": "it returned dict for one image",
    "attack --model odd.py:few --n-examples 2": "undefended tells 9 classes apart, the data has 10",
    "attack --model odd.py:empty --dry-run": "undefended answers NaN or infinity for sample 0, first in Net",
    "attack --model odd.py:same": "undefended gives all 10 classes the same logit for sample 0",
    "certify --model odd.py:pair --score-model none": "cohen 0.25 must return logits (N, K)",
    "attack --model odd.py:numpy --n-examples 2 --dry-run": "undefended leaves autograd (numpy, ONNX, detach or "
    "no_grad inside), so attacks have no gradient; use square, or purify.BPDAClassifier(model, surrogate)",
    "attack --model odd.py:cut --n-examples 2": "--model-gradient none or bpda",
    "certify --model odd.py:cut": "cohen 0.25 leaves autograd",
    "certify --model odd.py:numpy --score-model none": "certify it with --attack-examples 0",
    "attack --model-gradient none --protocol averaged --n-examples 2": "The protocol averaged needs gradients, and the "
    "classifier of diffpure has none; leave it out of --protocol",
    "attack --model odd.py:cut --attacks square --protocol deterministic": "The protocol deterministic needs gradients",
    "attack --model-gradient none --protocol in-loop --n-examples 2": "The protocol in-loop needs gradients",
    "attack --purifier likelihood --precision fp16": "second derivatives, which vanish in fp16; use the precision bf16",
    "attack --score-classes predicted --dry-run": "PatchUNet takes no classes, it is not class-conditional",
    "attack --score-classes 3 --n-examples 2": "(--score-classes on the command line)",
    "attack --model-gradient bdpa": "Unknown --model-gradient 'bdpa' (did you mean 'bpda'?)",
    "attack --model-gradient bpda": "takes the backward pass of another network than digits-standard",
    "attack --model-surrogate digits-at": "--model-surrogate is for --model-gradient bpda",
    "certify --model odd.py:few": "cohen 0.25 tells 9 classes apart",
    "attack --model three.py:fails": "three.py, line 15, failed with ZeroDivisionError",
    "attack --model three.py:nothing": "three.py:nothing returned NoneType",
    "attack --model three.py:absent": "three.py has no function 'absent'",
    "attack --model absent.py:net": "There is no file absent.py",
    "attack --noise-level three.py:Net": "is no noise level",
    "image broken.png --out out": "broken.png",
    "image text.txt --out out": "text.txt",
    "image absent.png --out out": "absent.png",
    "image empty --out out": "empty",
    "image colour.png --out out": "--grey",
    "image odd.png --out out": "--resize",
    "compare empty empty": "empty",
    "leaderboard empty": "empty",
    "merge empty": "empty holds no run and no shards of one",
    "merge flat empty": "say into which by --out",
    "leaderboard absent": "absent",
    # where results cannot go
    "attack --n-examples 2 --attacks random-noise --noise-level constant --out flat": "flat",
    "attack --n-examples 2 --attacks random-noise --noise-level constant --out text.txt": "text.txt",
    "image flat/a.png --out text.txt": "text.txt",
    "calibrate --out text.txt/c.json": "text.txt",
    "check --out text.txt/c.png": "text.txt",
    "leaderboard flat --out text.txt": "flat",
    # what attack and certify refuse besides
    "attack --dataset mnist": "Unknown data set 'mnist'; known: cifar10, cifar100, digits",
    "attack --purifier magic": "Unknown purifier 'magic'; known: agdm, diffap, diffpure",
    "attack --attacks pgd-eot,fgsm": "Unknown attack 'fgsm'; known: adaptive, apgd-margin-eot",
    "attack --model resnet": "Unknown model 'resnet' for digits; known: digits-at, digits-classes, digits-dssn",
    "attack --model nowhere.py:make": "no file nowhere.py",
    "attack --score-model nothing": "no score network 'nothing'",
    "attack --score-model nothing.safetensors": "no score network 'nothing.safetensors'",
    "attack --gradient exact": "Unknown --gradient 'exact'",
    "attack --budget huge": "Unknown --budget 'huge'; known: paper, quick, standard",
    "attack --reverse heun": "Unknown --reverse 'heun'",
    "attack --threat-model Linfinity": "Unknown --threat-model 'Linfinity' (did you mean 'Linf'?)",
    "attack --t-star 0": "t_star must lie in (0, 1]",
    "attack --steps 0": "steps must be a whole number",
    "attack --eps -1": "eps must be a number of at least 0",
    "attack --eot 0": "--eot must be",
    "attack --n-examples 501": "has 500 test images",
    "attack --device cuda:7": "no GPU 'cuda:7' here",
    "attack --device gpu": "Unknown device",
    "attack --device meta": "Unknown device",
    "attack --threads -1": "--threads must be",
    "attack --gradient bpda --memory-budget 7": "--memory-budget is for",
    "attack --dataset imagenet --threat-model L1": "no usual L1 radius for imagenet; pass --eps",
    "attack --dataset fashion_mnist --data-dir /nonexistent": "Fashion-MNIST is not in",
    "attack --out /proc/nothing": "cannot be written",
    "attack --score-model nowhere.py:make": "There is no file nowhere.py; a part of your own is file.py:function",
    "attack --purifier freqpure --set delta=4": "delta must be an angle in [0, pi], got 4",
    "attack --purifier freqpure --set amplitude_radius=-1": "amplitude_radius must be a number of at least 0",
    "attack --purifier diffap --set scale=-1": "The guidance scale must be a number of at least 0",
    "attack --purifier mimicdiffusion --set factor=3": "choose a factor that divides both",
    "attack --purifier heterogeneous --set threshold=2": "threshold of heterogeneous noise must lie in [0, 1], got 2",
    "attack --purifier likelihood --set rate=0": "The rate of likelihood ascent must be a number above 0",
    "attack --purifier langevin --dt 0.01": "Langevin stays at its time, which FixedDt",
    "attack --purifier agdm --set auxiliary=nowhere.py:make": "There is no file nowhere.py",
    "attack --purifier agdm --set auxiliary=magic": "Unknown model 'magic' for digits; known: digits-at",
    "attack --purifier agdm --set auxiliary=fashion_mnist-guide": "was trained on fashion_mnist",
    "attack --noise-level ssni-n --set ssni-n.tua=2": "ssni-n has no parameter 'tua' for --set",
    "attack --noise-level ssni-n --set ssni-n.tau=-2": "tau must be a positive number, got -2",
    "attack --set ssni-n.tau=2": "of this run (diffpure, constant, ssni-l), got 'ssni-n.tau'",
    "attack --set variant": "--set takes NAME=VALUE",
    "attack --set steps=2": "None of diffpure, constant, ssni-l has a parameter 'steps' for --set; known",
    "attack --noise-level magic": "Unknown noise level 'magic'; known: constant, ssni-l, ssni-n",
    "attack --attacks square@3": "square is not aimed at classes; PGD attacks are, as pgd-eot@3",
    "attack --attacks pgd-eot@12": "The model has the classes 0 to 9, and no class 12 to aim at",
    "attack --attacks pgd-eot@top-0": "classes to aim at must be a whole number of at least 1",
    "attack --attacks pgd-eot@next": "Unknown goal 'next'; a goal is any, a class",
    "attack --attacks pgd-eot@": "Unknown goal ''",
    "attack --attacks magic@next": "Unknown attack 'magic@next'",
    "attack --eps 0": "--eps 0 is no attack; name radii above 0",
    "attack --eps 0,0": "--eps 0 is no attack; name radii above 0",
    "attack --eps 0.1,0.1": "name each radius once",
    "attack --eps 0.1,3": "An L_inf eps is for images in [0, 1]",
    "attack --eps 0.1,-1": "eps must be a number of at least 0",
    "attack --eps 0.1,x": "--eps takes a number, as 0.03 or 8/255, or several separated by commas",
    "attack --eps 0.1,0.2 --precision auto": "Each eps might choose another precision; name the one",
    "distortion --rate 0": "--rate is a share in (0, 1], got 0",
    "distortion --halvings -1": "--halvings must be a whole number of at least 0",
    "distortion --eps 0": "--eps is the largest radius that is tried, and must be above 0",
    "distortion --threat-model flow --eps 1": "Radii are bisected in Linf, L2, L1, not in flow",
    "distortion --threat-model ssim --eps 0.1": "Radii are bisected in Linf, L2, L1, not in ssim",
    "distortion --eps 0.1,0.2": "--eps takes a number, as 0.03 or 8/255, got '0.1,0.2'",
    "distortion --precision auto": "Name the precision of the attacks",
    "distortion --attacks square": "square attacks fixed groups of images, which need",
    "certify --method magic": "Unknown method 'magic'; known: cohen, densepure, dssn, few-step, multiscale, ssn",
    "certify --dataset mnist": "Unknown data set 'mnist'",
    "certify --budget huge": "Unknown --budget 'huge'; known: paper, quick, standard",
    "certify --sigma 0": "sigma must be a positive number",
    "certify --sigma x": "--sigma takes numbers separated by commas",
    "certify --method multiscale --p0 0.4": "p0 must lie in [1/2, 1)",
    "certify --method multiscale --mode lax": "Unknown --mode 'lax'",
    "certify --linf-radii 0,-1": "--linf-radii takes numbers of at least 0",
    "certify --method few-step --reverse likelihood": "go to time 0, and LikelihoodAscent stays at its time",
    "certify --method densepure --reverse langevin": "go to time 0, and Langevin stays at its time",
    "certify --votes 3": "--votes says nothing about cohen; it is for densepure",
    "certify --method densepure --votes 0": "votes must be a whole number of at least 1",
    "certify --method densepure --reverse-steps 0": "steps must be a whole number of at least 1",
    "certify --method densepure --score-model none": "densepure takes reverse steps of a diffusion model",
    "certify --precision bf8": "Unknown --precision 'bf8'; known: bf16, bf16+compile, float32",
    "certify --score-model none --precision bf16": "--precision bf16 is the denoiser's; there is none with",
    "certify --method ssn --precision bf16": "--precision says nothing about ssn",
    "certify --sampling always": "Unknown --sampling 'always'; known: anytime, fixed",
    "certify --sigma 0.25 --sampling anytime --radii 2": "certify at most 0.5442 under this noise (gaussian 0.25)",
    "certify --method ssn --model digits-standard": "does not say for which lambda it was trained; pass --lam",
    "certify --method cohen,ssn --model digits-standard": "One --model cannot serve",
    "certify --method dssn --model digits-standard --lam 0.001": "lambda must lie in [0.00196",
    "certify --sigma 0.25,0.25": "Two systems are called 'cohen 0.25'",
    "certify --score-model digits,digits": "Two systems are called 'cohen 0.25, digits'; name each method and sigma",
    "certify --radii 0,-1": "--radii takes numbers of at least 0",
    "certify --radii nan": "--radii takes numbers separated by commas, got 'nan'",
    "certify --batch-size 0": "--batch-size must be a whole number",
    "certify --p0 0.6": "--p0 says nothing about cohen; it is for multiscale",
    "certify --method dssn --sampling anytime": "--sampling says nothing about dssn",
    "certify --stop-radius a": "--radii takes numbers separated by commas, got 'a'",
    "certify --score-model fashion_mnist": "fashion_mnist was trained on fashion_mnist; take a network of digits",
    "certify --model fashion_mnist-standard": "was trained on fashion_mnist",
    "certify --method dssn --model fashion_mnist-dssn": "was trained on fashion_mnist",
    "certify --score-model nothing": "There is no score network 'nothing'",
    "certify --model resnet": "Unknown model 'resnet'",
    "certify --alpha 0": "alpha must lie in (0, 0.5)",
    "certify --draws -1": "n must be a whole number",
    "certify --selection-draws 0": "n0 must be a whole number",
    "certify --attack-examples -1": "attacked samples must be a whole number",
    "certify --max-rows 0": "--max-rows must be a whole number",
    "certify --n-examples 0": "n-examples must be a whole number",
    "certify --n-examples 501": "has 500 test images",
    "certify --device cuda:7": "no GPU 'cuda:7' here",
    "certify --out /proc/nothing": "cannot be written",
}


@pytest.mark.parametrize("words", CASES)
def test_bad_input_is_one_sentence_and_status_2(words, here, capsys):
    before = sorted(here.rglob("*"))
    assert main(words.split()) == 2
    captured = capsys.readouterr()
    said = [line for line in captured.err.splitlines() if not line.startswith("note: ")]
    assert len(said) == 1, captured.err
    assert said[0].startswith("error: ")
    assert said[0].endswith(".")
    assert CASES[words] in said[0]
    assert not re.search(r"\[Errno|Traceback|<class|object at 0x", said[0])
    assert [
        p for p in sorted(here.rglob("*")) if p not in before and p.suffix != ".pyc" and "__pycache__" not in p.parts
    ] == []


def test_every_command_is_among_them():
    assert {words.split()[0] for words in CASES} >= set(COMMANDS)
    assert len(CASES) >= 40
