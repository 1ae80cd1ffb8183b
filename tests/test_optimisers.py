"""SAM, noise and MoFO against their formulas, alone, with the engine and in a stock Trainer."""

from __future__ import annotations

import copy
import math

import pytest
import scipy.stats
import torch
from lightning.pytorch.plugins import MixedPrecision
from torch.func import functional_call
from torch.nn.functional import cross_entropy

from gradmerge import MergedModel
from gradmerge.coefficients import Column, ConcreteMask, Constant, Element, Mixup, Shared, Tensor
from gradmerge.common.errors import ConfigError
from gradmerge.optimisers import SAM, CosineDecay, LogisticNoise, MoFO
from tiny import build, fit, module_of, raws, recipe_of, relatives, trainer_of, vectors

SGD = {"class_path": "torch.optim.SGD", "init_args": {"momentum": 0.9}}


def explicit(models, batches, weights):
    """The weighted loss as a function of z, one number per tensor, by plain autograd in float64."""
    base, *sources = [copy.deepcopy(model).double() for model in models]
    own = {n: p.detach() for n, p in base.named_parameters()}
    stacked = {
        n: torch.stack([dict(s.named_parameters())[n].detach() - own[n] for s in sources])
        for n in own
    }

    def gradient(z):
        z = z.detach().requires_grad_()
        theta = {
            n: own[n] + torch.einsum("k,k...->...", z[:, i], stacked[n]) for i, n in enumerate(own)
        }
        losses = [
            weights[t]
            * cross_entropy(functional_call(base, theta, (b["x"].double(),)), b["labels"])
            for t, b in batches.items()
        ]
        (found,) = torch.autograd.grad(sum(losses) / sum(weights.values()), z)
        return found

    return gradient


def uphill(gradient, z, rho):
    """The gradient at `z + rho g / |g|`."""
    first = gradient(z)
    return gradient(z + rho * first / first.norm())


# ---- SAM --------------------------------------------------------------------------------------


@pytest.mark.parametrize("memory", ["resident", "streamed"])
def test_a_step_of_sam_is_its_formula_through_the_engine(memory):
    """Two tasks through `accumulate`, in float64, SGD with momentum as the base, three steps."""
    models = [model.double() for model in relatives(build())]
    merged = MergedModel(recipe_of(models, init=Mixup(seed=1)), memory=memory, dtype=torch.float64)
    generator = torch.Generator().manual_seed(2)
    batches = {
        task: {
            "x": torch.randn(5, 6, generator=generator, dtype=torch.float64),
            "labels": torch.randint(3, (5,), generator=generator),
        }
        for task in "ab"
    }
    optimiser = SAM(merged.parameters(), lr=0.5, rho=0.3, base=SGD)
    seen = []

    def closure():
        optimiser.zero_grad()
        runs = [
            lambda b=b: cross_entropy(merged(b["x"]), b["labels"]) / 2 for b in batches.values()
        ]
        loss, _ = merged.accumulate(runs)
        loss.backward()
        seen.append(float(loss.detach()))
        return loss

    gradient = explicit(models, batches, {"a": 1.0, "b": 1.0})
    z, velocity = merged.raw["tensor"].detach().clone(), 0.0
    for step in range(3):
        velocity = 0.9 * velocity + uphill(gradient, z, 0.3)
        plain = z - 0.5 * gradient(z)
        z = z - 0.5 * velocity
        loss = optimiser.step(closure)
        assert float(loss.detach()) == seen[2 * step], "the loss at the parameters themselves"
        assert seen[2 * step + 1] > seen[2 * step], "the second is evaluated uphill"
        torch.testing.assert_close(merged.raw["tensor"].detach(), z, rtol=0, atol=1e-12)
        assert (plain - z).abs().max() > 1e-3


def sam_module(**options):
    module = module_of(**options)
    module.configure_optimizers = lambda: SAM(module.parameters(), lr=0.5, rho=0.3, base=SGD)
    return module


@pytest.mark.parametrize("memory", ["resident", "streamed"])
@pytest.mark.parametrize("clip", [None, 0.05])
def test_sam_in_a_trainer_takes_the_steps_of_its_formula(tmp_path, memory, clip):
    models = relatives(build())
    data = vectors()
    data.setup()
    stream = iter(data.train_dataloader())
    z, velocity = torch.full((2, 4), 0.3, dtype=torch.float64), 0.0
    for _ in range(3):
        found = uphill(explicit(models, next(stream), {"a": 1.0, "b": 1.0}), z, 0.3)
        if clip is not None:
            found = found * min(1.0, clip / float(found.norm() + 1e-6))
        velocity = 0.9 * velocity + found
        z = z - 0.5 * velocity
    module = sam_module(models=models, memory=memory)
    fit(tmp_path, module, max_steps=3, gradient_clip_val=clip)
    torch.testing.assert_close(raws(module)["tensor"].double(), z, rtol=0, atol=2e-6)


def test_schedules_reach_the_base_of_sam(tmp_path):
    module = module_of()

    def configure():
        optimiser = SAM(module.parameters(), lr=0.5, base="torch.optim.SGD")
        schedule = torch.optim.lr_scheduler.StepLR(optimiser, 1, gamma=0.5)
        return {
            "optimizer": optimiser,
            "lr_scheduler": {"scheduler": schedule, "interval": "step"},
        }

    module.configure_optimizers = configure
    _, trainer = fit(tmp_path, module, max_steps=3)
    (optimiser,) = trainer.optimizers
    assert optimiser.base.param_groups[0]["lr"] == 0.5 * 0.5**3
    assert trainer.global_step == 3


def test_a_resumed_fit_with_sam_takes_the_same_steps(tmp_path):
    whole, _ = fit(tmp_path, sam_module(), max_steps=4)
    half, trainer = fit(tmp_path, sam_module(), max_steps=2)
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    (saved,) = torch.load(tmp_path / "half.ckpt", weights_only=True)["optimizer_states"]
    assert "momentum_buffer" in saved["state"][0]
    rest = sam_module()
    trainer_of(tmp_path, max_steps=4).fit(
        rest, datamodule=vectors(), ckpt_path=tmp_path / "half.ckpt"
    )
    assert torch.equal(raws(rest)["tensor"], raws(whole)["tensor"])
    assert not torch.equal(raws(half)["tensor"], raws(whole)["tensor"])


def test_sam_rejects_trainer_settings_for_one_gradient_per_step(tmp_path):
    with pytest.raises(ConfigError, match="accumulate_grad_batches 2 keeps only the last batch"):
        fit(tmp_path, sam_module(), accumulate_grad_batches=2)
    scaler = torch.amp.GradScaler("cpu")
    with pytest.raises(ConfigError, match="closure, which float16's gradient scaler does not"):
        fit(tmp_path, sam_module(), plugins=[MixedPrecision("16-mixed", "cpu", scaler)])
    parameter = torch.nn.Parameter(torch.ones(2))
    with pytest.raises(ConfigError, match="expected a closure"):
        SAM([parameter]).step()


def test_bfloat16_autocast_goes_with_sam(tmp_path):
    module, trainer = fit(tmp_path, sam_module(), max_steps=2, precision="bf16-mixed")
    assert trainer.global_step == 2
    assert (raws(module)["tensor"] - 0.3).abs().max() > 1e-2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rho": -1.0}, "rho: expected at least 0, got -1.0"),
        ({"base": "torch.optim.Adm"}, "expected the class path of an optimiser"),
        ({"base": "nowhere.Adam"}, "expected the class path of an optimiser"),
        ({"base": "torch.nn.Linear"}, "expected the class path of an optimiser"),
        ({"base": {"class_path": "torch.optim.Adam", "init_args": {"x": 1}}}, "cannot create"),
        ({"base": "torch.optim.LBFGS"}, "LBFGS evaluates the loss itself, but SAM passes"),
    ],
)
def test_sam_rejects_invalid_options(options, message):
    with pytest.raises(ConfigError, match=message):
        SAM([torch.nn.Parameter(torch.ones(2))], **options)


def test_sam_without_a_slope_is_its_base():
    parameter = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
    optimiser = SAM([parameter], lr=0.1, base="SGD")

    def closure():
        optimiser.zero_grad()
        loss = (parameter * 0).sum()
        loss.backward()
        return loss

    optimiser.step(closure)
    assert parameter.tolist() == [1.0, 2.0]


# ---- noise on coefficients ----------------------------------------------------------------------


def noisy_module(**options):
    """A mask per weight for both task vectors, drawn anew in each step."""
    module = module_of(coefficients=Shared(ConcreteMask(Element())), init=Constant(0.3), **options)
    own = [{"params": list(module.merged.raw.values())}]
    module.configure_optimizers = lambda: LogisticNoise(own, lr=20.0, base="SGD", seed=3)
    return module


def test_a_step_with_noise_is_that_of_relaxed_bernoulli_masks():
    """Against plain autograd in float64, by the sampling formula of `torch.distributions`."""
    models = [model.double() for model in relatives(build())]
    coefficients = Shared(ConcreteMask(Element(), temperature=0.7, scale=0.4))
    recipe = recipe_of(models, init=Constant(0.4), coefficients=coefficients)
    merged = MergedModel(recipe, dtype=torch.float64)
    base, *sources = [dict(model.named_parameters()) for model in models]
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(8, 6, generator=generator, dtype=torch.float64)
    labels = torch.randint(3, (8,), generator=generator)
    optimiser = LogisticNoise(merged.raw.values(), lr=30.0, base="torch.optim.SGD", seed=5)
    seen = {}

    def closure():
        optimiser.zero_grad()
        seen.update({name: z.detach().double().clone() for name, z in merged.raw.items()})
        loss = cross_entropy(merged(x), labels)
        loss.backward()
        return loss

    for _ in range(2):
        start = {name: z.detach().double().clone() for name, z in merged.raw.items()}
        assert all(len(z) == 1 for z in start.values()), "one row for both sources"
        loss = optimiser.step(closure)
        logits = {name: z.requires_grad_() for name, z in seen.items()}
        theta = {}
        for name, z in logits.items():
            own = name.replace("/", ".")
            mask = torch.sigmoid(z[0] / 0.7)
            total = sum(source[own].detach() - base[own].detach() for source in sources)
            theta[own] = base[own].detach() + 0.4 * mask / mask.mean() * total
        expected = cross_entropy(functional_call(models[0], theta, (x,)), labels)
        assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
        slopes = torch.autograd.grad(expected, list(logits.values()))
        for (name, z), slope in zip(logits.items(), slopes, strict=True):
            moved = merged.raw[name].detach().double() - start[name]
            torch.testing.assert_close(moved, -30.0 * slope, rtol=1e-4, atol=2e-6)
            assert slope.abs().max() * 30 > 1e-3
            assert (z.detach() - start[name]).abs().max() > 0.5
        seen = {}


def test_noise_is_logistic_and_depends_on_seed_and_step_alone():
    def draws(seed, steps=2):
        parameter = torch.nn.Parameter(torch.full((4000,), 2.0))
        optimiser, found = LogisticNoise([parameter], lr=0.0, base="SGD", seed=seed), []

        def closure():
            found.append(parameter.detach().clone() - 2.0)
            loss = parameter.sum()
            loss.backward()
            return loss

        for _ in range(steps):
            optimiser.step(closure)
        assert (parameter == 2.0).all()
        return found

    torch.manual_seed(1)
    first, second = draws(0)
    torch.manual_seed(2)
    again, _ = draws(0)
    assert torch.equal(first, again)
    for noise in (first, second, *draws(1)):
        assert scipy.stats.kstest(noise.double().numpy(), "logistic").pvalue > 0.01
    assert abs(torch.corrcoef(torch.stack([first, second, draws(1)[0]])).triu(1)).max() < 0.06


def test_a_resumed_fit_with_noise_takes_the_same_steps(tmp_path):
    whole, _ = fit(tmp_path, noisy_module(), max_steps=4)
    half, trainer = fit(tmp_path, noisy_module(), max_steps=2)
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    rest = noisy_module()
    trainer_of(tmp_path, max_steps=4).fit(
        rest, datamodule=vectors(), ckpt_path=tmp_path / "half.ckpt"
    )
    for key, raw in raws(whole).items():
        assert torch.equal(raws(rest)[key], raw)
        assert not torch.equal(raws(half)[key], raw)


def test_noise_is_for_coefficients_and_whole_steps_alone(tmp_path):
    module = noisy_module(private=["^head"], trained=["^head"])
    module.configure_optimizers = lambda: LogisticNoise(module.parameter_groups())
    with pytest.raises(ConfigError, match=r"expected coefficients alone, got 4 other parameters"):
        fit(tmp_path, module)
    with pytest.raises(ConfigError, match="accumulate_grad_batches 2 keeps only the last batch"):
        fit(tmp_path, noisy_module(), accumulate_grad_batches=2)
    with pytest.raises(ConfigError, match=r"LogisticNoise.step: expected a closure"):
        LogisticNoise([torch.nn.Parameter(torch.ones(2))]).step()
    with pytest.raises(ConfigError, match=r"LogisticNoise.base: expected the class path"):
        LogisticNoise([torch.nn.Parameter(torch.ones(2))], base="gradmerge.optimisers.SAM")


# ---- MoFO -------------------------------------------------------------------------------------


def mofo(gradients, z, lr, decay, fraction, betas=(0.8, 0.95), eps=1e-6):
    """The paper's update, one number at a time."""
    z, n = list(z), len(z)
    m, v = [0.0] * n, [0.0] * n
    for t, gradient in enumerate(gradients, 1):
        for i, g in enumerate(gradient):
            m[i] = betas[0] * m[i] + (1 - betas[0]) * g
            v[i] = betas[1] * v[i] + (1 - betas[1]) * g * g
        largest = sorted(range(n), key=lambda i: -abs(m[i]))[: math.ceil(fraction * n)]
        for i in range(n):
            z[i] -= lr * decay * z[i]
            if i in largest:
                root = math.sqrt(v[i] / (1 - betas[1] ** t)) + eps
                z[i] -= lr * m[i] / (1 - betas[0] ** t) / root
    return z


@pytest.mark.parametrize("fraction", [0.05, 0.3, 1.0])
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_mofo_is_its_formula(fraction, decay):
    generator = torch.Generator().manual_seed(4)
    gradients = torch.randn(6, 2, 5, generator=generator, dtype=torch.float64)
    parameter = torch.nn.Parameter(torch.randn(2, 5, generator=generator, dtype=torch.float64))
    start = parameter.detach().flatten().tolist()
    options = {"betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": decay, "fraction": fraction}
    optimiser = MoFO([parameter], lr=0.1, **options)
    for gradient in gradients:
        parameter.grad = gradient.clone()
        optimiser.step()
    expected = mofo(gradients.flatten(1).tolist(), start, 0.1, decay, fraction)
    found = parameter.detach().flatten()
    torch.testing.assert_close(
        found, torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=0
    )


def test_mofo_with_all_entries_is_adamw():
    generator = torch.Generator().manual_seed(5)
    gradients = torch.randn(8, 3, 4, generator=generator)
    pair = [torch.nn.Parameter(torch.ones(3, 4)) for _ in range(2)]
    both = [
        MoFO([pair[0]], lr=0.05, weight_decay=0.2, fraction=1.0),
        torch.optim.AdamW([pair[1]], lr=0.05, weight_decay=0.2),
    ]
    for gradient in gradients:
        for parameter, optimiser in zip(pair, both, strict=True):
            parameter.grad = gradient.clone()
            optimiser.step()
    torch.testing.assert_close(*pair, rtol=0, atol=1e-6)


def test_mofo_moves_its_share_of_each_tensor_in_a_fit(tmp_path):
    module = module_of(coefficients=Element())
    start = raws(module)
    module.configure_optimizers = lambda: MoFO(module.parameters(), lr=0.01)
    fit(tmp_path, module, max_steps=1)
    for key, raw in raws(module).items():
        moved = int((raw != start[key]).sum())
        assert moved == math.ceil(0.3 * raw.numel()), key


def test_mofo_checks_its_numbers():
    parameter = torch.nn.Parameter(torch.ones(2))
    with pytest.raises(ConfigError, match=r"fraction: expected a number in \(0, 1\], got 0"):
        MoFO([parameter], fraction=0)
    with pytest.raises(ConfigError, match=r"betas: expected numbers in \[0, 1\)"):
        MoFO([parameter], betas=(0.9, 1.0))


@pytest.mark.parametrize("coefficients", [Tensor(), Column()], ids=repr)
def test_mofo_learns(tmp_path, coefficients):
    module = module_of(coefficients=coefficients)
    module.configure_optimizers = lambda: MoFO(module.parameters(), lr=0.05)
    _, trainer = fit(tmp_path, module, vectors(batch_size=12), max_steps=1)
    first = float(trainer.callback_metrics["train/loss"])
    trainer = trainer_of(tmp_path, max_steps=30)
    trainer.fit(module, datamodule=vectors(batch_size=12))
    assert float(trainer.callback_metrics["train/loss"]) < 0.9 * first


def test_a_cosine_takes_its_length_from_the_fit_and_a_longer_one_when_it_resumes():
    parameter = torch.nn.Parameter(torch.zeros(1))

    def rates(schedule, optimiser, steps):
        found = []
        for _ in range(steps):
            found.append(optimiser.param_groups[0]["lr"])
            optimiser.step()
            schedule.step()
        return [*found, optimiser.param_groups[0]["lr"]]

    optimiser = torch.optim.SGD([parameter], lr=0.5)
    schedule = CosineDecay(optimiser, end=0.1)
    schedule.follow(8)
    expected = [0.5 * (0.1 + 0.45 * (1 + math.cos(math.pi * t / 8))) for t in range(9)]
    assert rates(schedule, optimiser, 8) == pytest.approx(expected, abs=1e-12)

    again = torch.optim.SGD([parameter], lr=0.5)
    longer = CosineDecay(again, end=0.1)
    longer.follow(16)
    longer.load_state_dict(schedule.state_dict())
    again.load_state_dict(optimiser.state_dict())
    end = [0.5 * (0.1 + 0.45 * (1 + math.cos(math.pi * t / 16))) for t in range(9, 17)]
    assert rates(longer, again, 8)[1:] == pytest.approx(end, abs=1e-12)
    with pytest.raises(ConfigError, match=r"CosineDecay\.end: expected a share in"):
        CosineDecay(again, end=2.0)
