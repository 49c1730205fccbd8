"""torch.compile, export, func, autocast, several devices: the values of plain calls, or a sentence."""

import os

import pytest
import torch
from conftest import SmoothNet, TinyClassifier, smooth_model
from torch import nn
from torch.testing import assert_close

from purify import (
    ContinuousVP,
    DefendedClassifier,
    Purifier,
    ScoreModel,
    SSNISigmoid,
    agdm,
    calibrate,
    diffpure,
    gdmp,
)
from purify.attacks import PGD, Adaptive, GuidePGD, LowLevelPGD, NormAutoAttackRand, NormPGD, StepsPGD
from purify.fingerprint import weights_digest
from purify.purification.plans import FixedDt
from purify.transforms import copied

X = torch.rand(3, 1, 4, 4, generator=torch.Generator().manual_seed(0))
IDS, Y = torch.arange(3), torch.tensor([1, 2, 3])
ATTACK = PGD("Linf", 0.1, steps=2, eot=2)


def slope(call, x=X):
    z = x.clone().requires_grad_()
    return torch.autograd.grad(call(z, sample_ids=IDS).square().sum(), z)[0]


def defended(network=None, classifier=None, gradient="checkpoint"):
    classifier = TinyClassifier() if classifier is None else classifier  # a compiled module has no truth value
    score_model = smooth_model() if network is None else ScoreModel(network, ContinuousVP(), image_shape=(1, 4, 4))
    return DefendedClassifier(classifier, diffpure(score_model, 0.1, 2, "ddpm", gradient))


WHOLE = {
    "default": lambda: defended(gradient={"kind": "checkpoint", "memory_budget": 2**20}),
    "full": lambda: defended(gradient="full"),
    "adjoint": lambda: defended(gradient="adjoint"),
    "ode": lambda: DefendedClassifier(TinyClassifier(), Purifier(smooth_model(), 0.1, "ode", 2)),
    "packed": lambda: DefendedClassifier(TinyClassifier(), Purifier(smooth_model(), 0.1, "sde", FixedDt(0.04, 2))),
    "guided": lambda: DefendedClassifier(TinyClassifier(), gdmp(smooth_model(), 0.1, 2, rounds=1)),
}


@pytest.mark.parametrize("name", WHOLE)
def test_a_compiled_defence_is_the_same_to_the_bit(name):
    model = WHOLE[name]()
    torch._dynamo.reset()
    compiled = torch.compile(model)
    with torch.no_grad():
        assert torch.equal(compiled(X, sample_ids=IDS), model(X, sample_ids=IDS))
    assert torch.equal(slope(compiled), slope(model))
    assert torch.equal(torch.compile(model.purifier)(X, sample_ids=IDS), model.purifier(X, sample_ids=IDS))
    if name == "default":
        assert torch.equal(ATTACK(compiled, X, Y).images, ATTACK(model, X, Y).images)
    torch.manual_seed(0)
    fresh = compiled(X)
    torch.manual_seed(0)
    assert torch.equal(fresh, model(X))


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_networks_inside_a_defence(backend):
    torch._dynamo.reset()
    parts = (torch.compile(part, backend=backend) for part in (SmoothNet(), TinyClassifier()))
    plain, compiled = defended(), defended(*parts)
    assert_close(compiled(X, sample_ids=IDS), plain(X, sample_ids=IDS))
    assert_close(slope(compiled), slope(plain))
    assert compiled.purifier.score_model.fingerprint() == plain.purifier.score_model.fingerprint()
    anything = ScoreModel(torch.compile(SmoothNet(), backend=backend), ContinuousVP())
    with pytest.raises(ValueError, match="The compiled network cannot take these images; use images of the channels"):
        diffpure(anything, 0.1, 2, "ddpm")(torch.rand(2, 3, 4, 4))


@pytest.mark.parametrize("donated", [True, False])  # torch refuses at the first derivative, or at the second
@pytest.mark.parametrize("options", [{}, {"through_score": True}], ids=str)
def test_guidance_of_compiled_networks(options, donated):
    """Their values; second derivatives they do not have."""
    torch._dynamo.reset()
    parts = [torch.compile(part, backend="aot_eager") for part in (SmoothNet(), TinyClassifier())]
    compiled, plain = (
        agdm(ScoreModel(net, ContinuousVP(), image_shape=(1, 4, 4)), 0.1, 2, auxiliary=aux, **options)
        for net, aux in (parts, (SmoothNet(), TinyClassifier()))
    )
    assert_close(compiled(X, sample_ids=IDS), plain(X, sample_ids=IDS))
    sentence = "second derivatives, which networks inside torch.compile do not have; pass"
    with pytest.raises(ValueError, match=sentence), torch._functorch.config.patch(donated_buffer=donated):
        torch.autograd.grad(compiled(z := X.clone().requires_grad_(), sample_ids=IDS).sum(), z)


TWO_GRADIENTS = {
    "norm": NormPGD("Linf", 0.1, 2, 2),
    "low level": LowLevelPGD("Linf", 0.1, 2, 2),
    "steps": StepsPGD("Linf", 0.1, 2, 2),
    "autoattack": NormAutoAttackRand("Linf", 0.1, steps=2, eot=1),
    "adaptive": Adaptive("Linf", 0.1, calls=400),
    "guide": GuidePGD("Linf", 0.1, 2, 2),
}


@pytest.mark.parametrize("name", TWO_GRADIENTS)
def test_attacks_that_take_two_gradients_of_one_graph_meet_compiled_networks(name):
    """Graphs of torch.compile go when they are gone back through, unless donated_buffer is off."""
    torch._dynamo.reset()
    found = []
    for network in (SmoothNet(), torch.compile(SmoothNet(), backend="aot_eager")):
        score_model = ScoreModel(network, ContinuousVP(), image_shape=(1, 4, 4))
        if name == "guide":
            purifier = agdm(score_model, 0.1, 2, auxiliary=TinyClassifier())
        else:
            purifier = diffpure(score_model, SSNISigmoid(0.4, calibrate(score_model, X)), 2, "ddpm")
        model = DefendedClassifier(TinyClassifier(), purifier)
        found.append(TWO_GRADIENTS[name](model, X, Y, sample_ids=IDS).images)
    assert_close(*found)


@pytest.mark.parametrize("register", ["register_forward_pre_hook", "register_forward_hook"])
def test_copies_of_compiled_networks_with_hooks_are_refused(register):
    """Where the hook is inside, the copy has it."""
    inside = nn.Sequential(nn.Identity())
    inside.register_forward_hook(lambda module, inputs, output: 2 * output)
    compiled = torch.compile(inside, backend="eager")
    assert torch.equal(copied(nn.Sequential(compiled))(X), 2 * X)
    getattr(compiled, register)(lambda *_: None)
    with pytest.raises(ValueError, match=r"lose the hooks .*; register them on the network before torch\.compile"):
        copied(nn.Sequential(compiled))


def test_exported_networks_inside_a_defence():
    auto = torch.export.Dim.AUTO
    classifier = torch.export.export(TinyClassifier(), (X,), dynamic_shapes=({0: auto},)).module()
    shapes = ({0: auto}, {0: auto})
    network = torch.export.export(SmoothNet(), (X, torch.zeros(3)), dynamic_shapes=shapes).module()
    plain, exported = defended(), defended(network, classifier)
    for x, ids in ((X, IDS), (X[:2], IDS[:2])):
        assert_close(exported(x, sample_ids=ids), plain(x, sample_ids=ids))
    assert_close(slope(exported.eval()), slope(plain))
    with pytest.raises(ValueError, match=r"cannot be exported: .* export the classifier and the score network"):
        torch.export.export(plain, (X,))
    assert torch.equal(defended()(X, sample_ids=IDS), plain(X, sample_ids=IDS))  # a plain call still works


def test_functions_of_torch_func():
    model = defended(gradient="full")

    def alone(x, i):
        return model(x[None], sample_ids=i[None])[0]

    expected = model(X, sample_ids=IDS)
    assert_close(torch.func.vmap(alone)(X, IDS), expected)
    assert_close(torch.func.grad(lambda x: model(x, sample_ids=IDS).square().sum())(X), slope(model))
    each = torch.func.vmap(torch.func.grad(lambda x, i: alone(x, i).square().sum()))(X, IDS)
    assert_close(each, slope(model))
    jacobian = torch.func.jacrev(lambda x: model(x, sample_ids=IDS))(X)
    assert jacobian.shape == (3, 5, 3, 1, 4, 4)
    assert_close(torch.einsum("nk,nkmchw->mchw", 2 * expected, jacobian), slope(model))
    v = torch.randn(X.shape, generator=torch.Generator().manual_seed(1))
    _, along = torch.func.jvp(lambda x: model(x, sample_ids=IDS), (X,), (v,))
    assert_close(along, torch.einsum("nkmchw,mchw->nk", jacobian, v))
    with pytest.raises(ValueError, match="noise must be keyed; pass sample_ids, draw and seed"):
        torch.func.vmap(lambda x: model(x[None])[0])(X)
    guided = DefendedClassifier(TinyClassifier(), gdmp(smooth_model(), 0.1, 2, rounds=1, gradient="full"))
    for other in (defended(), defended(gradient="bpda"), guided):
        with pytest.raises(ValueError, match=r"differentiates the gradient engine full only.*with_gradient\('full'\)"):
            torch.func.grad(lambda x, other=other: other(x, sample_ids=IDS).sum())(X)


def test_vmap_over_steps_that_depend_on_the_image_is_refused():
    model = smooth_model()
    rule = SSNISigmoid(0.3, calibrate(model, torch.rand(30, 1, 4, 4, generator=torch.Generator().manual_seed(0))))
    varying = DefendedClassifier(TinyClassifier(), diffpure(model, rule, FixedDt(0.05), "ddpm", gradient="full"))
    with pytest.raises(ValueError, match="steps must not depend on the image; give steps"):
        torch.func.vmap(lambda x, i: varying(x[None], sample_ids=i[None])[0])(X, IDS)


def test_autocast_around_a_call():
    """Within the rounding of bfloat16, the image in float32, the graph rebuilt under the same types."""
    for model in (defended(), defended(gradient="full")):
        plain = slope(model)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            z = X.clone().requires_grad_()
            logits = model(z, sample_ids=IDS)
            assert model.purifier(X, sample_ids=IDS).dtype == torch.float32
            found = ATTACK(model, X, Y).images
        (around,) = torch.autograd.grad(logits.float().square().sum(), z)
        assert_close(logits.float(), model(X, sample_ids=IDS), rtol=0.02, atol=0.02)
        assert torch.nn.functional.cosine_similarity(around.flatten(), plain.flatten(), 0) > 0.99
        assert found.dtype == torch.float32
        assert ((found - X).abs() <= 0.1 + 1e-6).all()


@pytest.fixture
def group():
    """A process group of one."""
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def test_networks_for_several_devices(group):
    plain = defended()
    wrap = nn.parallel.DistributedDataParallel
    parallel = defended(wrap(SmoothNet()), wrap(TinyClassifier()).eval())
    data = defended(nn.DataParallel(SmoothNet()), nn.DataParallel(TinyClassifier()).eval())
    sharded = torch.distributed.fsdp.fully_shard(TinyClassifier())
    for model in (parallel, data, defended(classifier=sharded)):
        assert_close(model(X, sample_ids=IDS), plain(X, sample_ids=IDS))
        assert_close(slope(model), slope(plain))
        assert weights_digest(model.classifier) == weights_digest(plain.classifier)
        assert model.purifier.score_model.fingerprint() == plain.purifier.score_model.fingerprint()


def test_the_meta_device_is_refused():
    with pytest.raises(ValueError, match="The classifier is on the meta device, where weights hold no values"):
        defended(classifier=TinyClassifier().to("meta"))
    with pytest.raises(ValueError, match="Images are on the meta device"):
        defended()(X.to("meta"))
