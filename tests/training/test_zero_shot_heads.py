"""Frozen zero-shot heads: equal to the whole network's forward, without running its text tower."""

from __future__ import annotations

import warnings
from dataclasses import replace

import pytest
import torch
import transformers
from torch.func import functional_call
from torch.nn.functional import cross_entropy, normalize

from gradmerge import MergeDataModule, MergedModel, MergeModule, Recipe
from gradmerge.coefficients import Constant
from gradmerge.coefficients import Tensor as TensorGranularity
from gradmerge.engine.predict import expert_rows, predict
from gradmerge.engine.teacher import Teacher
from gradmerge.engine.teacher_store import TeacherStore
from gradmerge.objectives import CrossEntropy, HardLabels, HiddenStates, KLToSource, Objective
from kinds import CASES, folders, task_of
from networks import seeded
from tiny import trainer_of

CASE = CASES["zero_shot_image_classification"]
TOWERS = {"clip": transformers.CLIPVisionModel, "siglip": transformers.SiglipVisionModel}
LOSS = Objective([CrossEntropy()])


def siglip(vocab_size=32):
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    sizes["num_attention_heads"] = 2
    text = {**sizes, "vocab_size": vocab_size, "max_position_embeddings": 16}
    vision = {**sizes, "image_size": 8, "patch_size": 4}
    network = seeded(transformers.SiglipModel, text_config=text, vision_config=vision)
    network.logit_scale.data.fill_(1.5)
    network.logit_bias.data.fill_(-3.0)
    return network


NETWORKS = {"clip": CASE.network, "siglip": siglip}


@pytest.fixture(scope="module", params=list(NETWORKS))
def world(request, tmp_path_factory):
    """Folders of a whole network and of vision towers of two others, and data for them."""
    root = tmp_path_factory.mktemp(request.param)
    paths = folders(root, replace(CASE, network=NETWORKS[request.param]))
    for name in "ab":
        whole = transformers.AutoModel.from_pretrained(paths[name])
        kind = TOWERS[request.param]
        tower = kind(kind.config_class(**whole.config.vision_config.to_dict()))
        tower.load_state_dict(whole.vision_model.state_dict())
        whole.save_pretrained(root / f"whole_{name}")
        paths[f"whole {name}"] = str(root / f"whole_{name}")
        tower.save_pretrained(paths[name])
    return paths


def model_of(paths, sources=("a", "b"), dtype=torch.float64, memory="resident", **options):
    given = {name[-1]: paths[name] for name in sources}
    recipe = Recipe(
        given, base=paths["base"], init=Constant(0.25), coefficients=TensorGranularity(), **options
    )
    return MergedModel(recipe, memory=memory, dtype=dtype)


def data_of(paths, model, **options):
    tasks = {name: task_of(CASE, i, **options) for i, name in enumerate("ab")}
    data = MergeDataModule(tasks, batch_size=3, processor=paths["base"])
    data.attach(model)
    data.setup()
    return data


def batch_of(paths, model, task="a", **options):
    return next(iter(data_of(paths, model, **options).train_dataloader()))[task]


class Runs:
    """The number of times that a layer of the text tower runs."""

    def __init__(self, model):
        self.count = 0
        model.skeleton.text_model.encoder.layers[0].register_forward_hook(self._add)

    def _add(self, *_):
        self.count += 1


def whole_of(path):
    return transformers.AutoModel.from_pretrained(path).double().eval()


def logits_of(network, theta, batch):
    """The whole network's forward; several templates as the mean of normalised embeddings."""
    inputs = {k: v for k, v in batch.items() if k in ("input_ids", "attention_mask")}
    output = functional_call(
        network, theta, (), {**inputs, "pixel_values": batch["pixel_values"].double()}
    )
    count = batch["reading"].templates
    if count == 1:
        return output.logits_per_image
    texts = normalize(output.text_embeds.unflatten(0, (-1, count)).mean(dim=1), dim=-1)
    bias = theta.get("logit_bias", 0.0)
    return theta["logit_scale"].exp() * output.image_embeds @ texts.T + bias


def tensors(network):
    return {name: value.detach() for name, value in network.named_parameters()}


@pytest.mark.parametrize(
    ("memory", "templates", "dtype", "tolerance"),
    [
        ("resident", ["{} w5", "w6 w7 {} w8"], torch.float64, 1e-9),
        ("streamed", ["{} w5"], torch.float64, 1e-9),
        ("resident", ["{} w5"], torch.float32, 1e-6),
    ],
    ids=["resident", "streamed", "float32"],
)
def test_logits_and_gradients_are_those_of_the_whole_network(
    world, memory, templates, dtype, tolerance
):
    model = model_of(world, dtype=dtype, memory=memory)
    batch = batch_of(world, model, templates=templates)
    predict(model, LOSS, "a", batch, False)
    runs = Runs(model)
    found = predict(model, LOSS, "a", batch, False)
    LOSS.loss(found).backward()
    assert runs.count == 0

    network = whole_of(world["base"])
    base, ends = tensors(network), [tensors(whole_of(world[f"whole {name}"])) for name in "ab"]
    owners, fixed = model.plan.binding.owners, model.state.fixed
    z = {n: torch.full((2,), 0.25).double().requires_grad_() for n in owners if n not in fixed}
    theta = dict(base)
    for name, own in z.items():
        for place in owners[name]:
            assert place.startswith("vision_model."), place
            parts = [c * (end[place] - base[place]) for c, end in zip(own, ends, strict=True)]
            theta[place] = base[place] + sum(parts)
    expected = logits_of(network, theta, batch)
    loss = cross_entropy(expected, batch["labels"])
    grads = dict(zip(z, torch.autograd.grad(loss, list(z.values())), strict=True))
    scale = tolerance * float(expected.detach().abs().max())
    assert torch.allclose(found.logits.double(), expected, rtol=0, atol=scale)
    largest = max(float(grad.abs().max()) for grad in grads.values())
    assert largest > 1e-3
    for name, grad in grads.items():
        own = model.plan.z(name, {k: raw.grad for k, raw in model.raw.items()})
        assert torch.allclose(own.double(), grad, rtol=0, atol=tolerance * largest), name


def test_a_fit_runs_the_text_tower_for_its_first_batch_only(world, tmp_path):
    """Validation, in inference mode, makes the heads that training differentiates through."""
    counts = []
    for steps in (1, 3):
        start = steps == 1  # else a step of training makes the heads
        recipe = model_of(world).plan.recipe
        module = MergeModule(recipe, Objective([KLToSource()]), score_start=start)
        runs = Runs(module.merged)
        trainer = trainer_of(tmp_path, max_steps=steps, val_check_interval=1)
        trainer.fit(module, datamodule=data_of(world, module.merged))
        counts.append(runs.count)
        assert (module.merged.raw["tensor"] != 0.25).any()
    # an inspection runs it twice; both tasks have the same texts, and the sources the base's tower
    assert counts == [3, 3]


@pytest.mark.parametrize("frozen", [False, True], ids=["learned", "frozen"])
def test_whole_networks_with_text_towers_of_their_own(world, frozen):
    """A learned tower runs in every step, with a warning; a frozen one is the base's."""
    pattern = {"text_*": "origin"} if frozen else {}
    model = model_of(world, ("whole a", "whole b"), frozen=pattern)
    batch = batch_of(world, model)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        first = predict(model, LOSS, "a", batch, False).logits
    told = [str(w.message) for w in caught if "text tower is learned" in str(w.message)]
    assert len(told) == (not frozen)
    assert frozen or "recipe.frozen: {'text_model.*': origin" in told[0]
    runs = Runs(model)
    assert torch.equal(predict(model, LOSS, "a", batch, False).logits, first)
    assert bool(runs.count) is not frozen

    base = tensors(whole_of(world["base"]))
    ends = [tensors(whole_of(world[f"whole {name}"])) for name in "ab"]
    theta = {
        name: value
        if frozen and name.startswith("text_")
        else value + sum(0.25 * (end[name] - value) for end in ends)
        for name, value in base.items()
    }
    expected = logits_of(whole_of(world["base"]), theta, batch)
    assert torch.allclose(first, expected, rtol=0, atol=1e-9)
    # a source keeps its own tower, whose heads are made once too
    for name, end in zip("ab", ends, strict=True):
        own = logits_of(whole_of(world["base"]), end, batch)
        assert torch.allclose(expert_rows(model, name, batch), own, rtol=0, atol=1e-9)
    runs.count = 0
    expert_rows(model, "a", batch)
    assert runs.count == 0


def test_other_texts_have_heads_of_their_own(world):
    model = model_of(world)
    found = []
    for names in (["w1", "w2 w3", "w4"], ["w7", "w2 w3", "w9"]):
        batch = batch_of(world, model, class_names=names)
        found.append(predict(model, LOSS, "a", batch, False).logits)
    same = (found[0] - found[1]).abs().amax(dim=0) < 1e-9
    assert same.tolist() == [False, True, False]


def test_networks_that_scale_similarities_otherwise_run_whole(world):
    """As ALIGN does, which divides by a temperature."""
    model = model_of(world)
    batch = batch_of(world, model, templates=["{} w5"])
    plain = predict(model, LOSS, "a", batch, False).logits
    forward = type(model.skeleton).forward

    class Doubled(type(model.skeleton)):
        def forward(self, *args, **options):
            output = forward(self, *args, **options)
            output.logits_per_image = 2 * output.logits_per_image
            return output

    model = model_of(world)
    model.skeleton.__class__ = Doubled
    runs = Runs(model)
    for _ in range(2):
        runs.count = 0
        doubled = predict(model, LOSS, "a", batch, False).logits
        assert torch.allclose(doubled, 2 * plain, rtol=0, atol=1e-9)
        assert runs.count > 0


def test_sources_are_asked_about_each_image_once_and_their_hidden_states_are_of_images(world):
    """Vision towers: the objective compares the images' blocks, whatever the texts' are called."""
    model = model_of(world)
    batch = batch_of(world, model)
    objective = Objective([KLToSource(), HardLabels()])
    teacher = Teacher(model, objective, TeacherStore(0.01))
    expert_rows(model, "a", batch)  # the first pass asks the network how it computes logits
    runs = []
    model.skeleton.vision_model.encoder.layers[0].register_forward_hook(
        lambda *given: runs.append(len(given[2] if torch.is_tensor(given[2]) else given[2][0]))
    )
    parts = [[0, 1], [2, 1, 0], [2]]
    for part, asked in zip(parts, (2, 1, 0), strict=True):
        own = {k: v[part] if k in ("pixel_values", "labels") else v for k, v in batch.items()}
        runs.clear()
        found = predict(model, objective, "a", own, False, teacher)
        assert sum(runs) == asked + len(part)
        expected = predict(model, objective, "a", own, False)
        torch.testing.assert_close(found.teacher, expected.teacher, rtol=1e-9, atol=1e-12)
    hidden = predict(model, Objective([HiddenStates()]), "a", batch, False)
    assert [name.partition(".")[0] for name in hidden.hidden] == ["vision_model"]
    assert hidden.hidden.keys() == hidden.teacher_hidden.keys()
    images = len(batch["pixel_values"])
    assert all(state.shape[0] % images == 0 for state in hidden.hidden.values())
