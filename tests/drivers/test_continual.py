"""New sources onto an earlier merge, with and without projection."""

from __future__ import annotations

import copy
import json
import warnings

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from folds import (
    NAMES,
    assert_equal,
    average,
    job_of,
    of_several_classes,
    provenance,
    tensors,
)
from gradmerge.coefficients import (
    Constant,
)
from gradmerge.common.errors import ConfigError
from gradmerge.drivers import Continual, Pairwise
from gradmerge.drivers.fold import FoldedRecipe
from gradmerge.engine.opening import open_plan
from gradmerge.engine.state import FitState
from gradmerge.objectives import KLToSource, Objective
from gradmerge.preprocess import Trim
from tiny import (
    build,
    relatives,
    vectors,
)


def continue_(tmp_path, models, earlier, names, data=None, recipe=None, **options):
    """Further sources onto a folder."""
    own = {name: options.pop(name) for name in ("projection", "alpha") if name in options}
    chosen = {n: models[1 + NAMES.index(n)] for n in names}
    recipe = recipe or FoldedRecipe(chosen, base=models[0])
    job = job_of(tmp_path, models, data, recipe=recipe, **options)
    return Continual(earlier=str(earlier), **own).run(job)


def test_new_sources_join_an_earlier_merge_with_equal_shares(tmp_path):
    models = relatives(build(), 5)
    recipe = FoldedRecipe({"a": models[1], "b": models[2]}, base=models[0])
    earlier = Pairwise().run(job_of(tmp_path / "0", models, recipe=recipe))
    folder = continue_(tmp_path / "1", models, earlier, "cd")
    assert_equal(folder, average(models[1:]))
    said = provenance(folder)
    assert said["members"] == ["a", "b", "c", "d"]
    assert list(said["sources"]) == ["base", "a", "b", "c", "d"]
    assert [list(step["coefficients"].values()) for step in said["steps"]] == [
        pytest.approx([2 / 3, 1 / 3]),
        pytest.approx([3 / 4, 1 / 4]),
    ]
    # the folder states its members, so that a further merge can follow
    more = relatives(build(), 6)
    last = continue_(tmp_path / "2", more, folder, "e")
    assert_equal(last, average(more[1:]))


def test_learning_on_new_tasks_alone_gives_a_warning(tmp_path):
    """With some data of the earlier tasks there is no warning."""
    models = relatives(build(), 4)
    recipe = FoldedRecipe({"a": models[1], "b": models[2]}, base=models[0])
    earlier = Pairwise().run(job_of(tmp_path / "0", models, recipe=recipe))
    with pytest.warns(UserWarning, match=r"no task belongs to a, b of the earlier merge"):
        continue_(tmp_path / "1", models, earlier, "c", vectors("c"))
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "Continual: no task")
        continue_(tmp_path / "2", models, earlier, "c", vectors("bc", check_disjoint=False))


def opcm(base, sources, alpha, scale=1.0, count=1):
    """Return the published recursion's result in float64, with norms over the whole model.

    The first of `sources` may be a merge of `count` sources with lambda `scale`.
    """
    deltas = [
        {k: v.double().numpy() - base[k].double().numpy() for k, v in s.items()} for s in sources
    ]
    length = lambda d: np.sqrt(sum((v**2).sum() for v in d.values()))  # noqa: E731
    merged, mean = deltas[0], length(deltas[0])
    scales = []
    for new in deltas[1:]:
        total = {}
        for name, delta in new.items():
            old = merged[name]
            if delta.ndim == 2:
                u, s, vt = np.linalg.svd(old)
                rank = int(np.argmax(np.cumsum(s) > alpha * s.sum()))
                inner = u.T @ delta @ vt.T
                np.fill_diagonal(inner, 0)
                inner[:rank, :rank] = 0
                delta = u @ inner @ vt
            total[name] = scale * old + delta
        mean = (count * mean + length(new)) / (count + 1)
        count += 1
        scale = length(total) / mean
        scales.append(scale)
        merged = {name: value / scale for name, value in total.items()}
    return {k: torch.from_numpy(base[k].double().numpy() + v) for k, v in merged.items()}, scales


def test_projection_is_opcm_s_recursion_one_source_at_a_time(tmp_path):
    """First onto a single source, whose lambda is 1; then onto the folder that this wrote."""
    models = relatives(build(), 5)
    states = [model.state_dict() for model in models]
    first = tmp_path / "first"
    recipe = FoldedRecipe({"a": models[1]}, base=models[0], init=Constant(1.0))
    write_single(first, recipe)
    folder = continue_(tmp_path / "1", models, first, "bc", projection=True, alpha=0.4)
    expected, scales = opcm(states[0], states[1:4], 0.4)
    assert_equal(folder, expected, 2e-5)
    steps = provenance(folder)["steps"]
    assert [step["lambda"] for step in steps] == pytest.approx(scales, rel=1e-5)
    assert scales[0] > 1.1
    folder = continue_(tmp_path / "2", models, folder, "d", projection=True, alpha=0.4)
    expected, _ = opcm(states[0], states[1:], 0.4)
    assert_equal(folder, expected, 2e-5)


def write_single(folder, recipe):
    from gradmerge.export.folder import export_state

    plan = open_plan(recipe, with_skeleton=False)
    export_state(FitState.start(plan), folder)


def test_an_earlier_merge_of_another_kind_counts_as_orthogonal_directions(tmp_path):
    models = relatives(build(), 4)
    states = [model.state_dict() for model in models]
    recipe = FoldedRecipe({"a": models[1], "b": models[2]}, base=models[0])
    earlier = Pairwise().run(job_of(tmp_path / "0", models, recipe=recipe))
    folder = continue_(tmp_path / "1", models, earlier, "c", projection=True)
    merged = tensors(earlier)
    expected, _ = opcm(states[0], [merged, states[3]], 0.5, 2**0.5, 2)
    assert_equal(folder, expected, 2e-5)


def test_a_continual_merge_keeps_heads_and_takes_the_earlier_merge_as_teacher(tmp_path):
    models, data = of_several_classes()
    first = data.restricted("ab")
    recipe = FoldedRecipe({"a": models[1], "b": models[2]}, base=models[0], private=["head"])
    earlier = Pairwise().run(job_of(tmp_path / "0", models, first, 0.1, recipe=recipe))
    recipe = FoldedRecipe({"c": models[3]}, base=models[0], private=["head"])
    objective = Objective([KLToSource(temperature=1.0)])
    options = {"recipe": recipe, "objective": objective}
    folder = continue_(tmp_path / "1", models, earlier, "c", data, **options)
    found, before = tensors(folder), tensors(earlier)
    results = json.loads((folder / "provenance.json").read_text())["results"]["selection"]
    for name, model in zip("abc", models[1:], strict=True):
        own = load_file(folder / "tasks" / name / "model-00002-of-00002.safetensors")
        assert torch.equal(own["head.weight"], model.head.weight)
        rows = torch.stack([row["x"] for row in data.tasks[name].path["selection"]])

        def logits(weights, x=rows, model=model):
            hidden = x @ weights["body.weight"].T + weights["body.bias"]
            return model.head(hidden.tanh()).log_softmax(-1)

        with torch.no_grad():
            teacher = logits(before if name in "ab" else model.state_dict())
            loss = nn.functional.kl_div(
                logits(found), teacher, log_target=True, reduction="batchmean"
            )
        assert results[name]["loss"] == pytest.approx(loss.item(), rel=1e-4)
    # without the earlier tasks' data their heads travel all the same
    folder = continue_(tmp_path / "2", models, earlier, "c", data.restricted("c"), recipe=recipe)
    for name, model in zip("abc", models[1:], strict=True):
        own = load_file(folder / "tasks" / name / "model-00002-of-00002.safetensors")
        assert torch.equal(own["head.weight"], model.head.weight)


def test_unsuitable_earlier_merges_are_rejected(tmp_path):
    models = relatives(build(), 4)
    recipe = FoldedRecipe({"a": models[1], "b": models[2]}, base=models[0])
    earlier = Pairwise().run(job_of(tmp_path / "0", models, recipe=recipe))
    with pytest.raises(ConfigError, match="earlier: absent: expected a model folder"):
        continue_(tmp_path / "1", models, "absent", "c")
    with pytest.raises(ConfigError, match=r"b: the earlier merge .* has a source of that name"):
        continue_(tmp_path / "1", models, earlier, "bc")
    moved = copy.deepcopy(models)
    with torch.no_grad():
        moved[0].head.bias.add_(1)
    with pytest.raises(ConfigError, match="is a merge over another base"):
        continue_(tmp_path / "1", moved, earlier, "c")
    recipe = FoldedRecipe({"c": models[3]})
    with pytest.raises(ConfigError, match="projection: expected origin base"):
        continue_(tmp_path / "1", models, earlier, "c", recipe=recipe, projection=True)
    recipe = FoldedRecipe({"c": models[3]}, base=models[0], preprocess=[Trim()])
    with pytest.raises(
        ConfigError, match="projection: expected directions without preprocess, got Trim"
    ):
        continue_(tmp_path / "1", models, earlier, "c", recipe=recipe, projection=True)
    (earlier / "provenance.json").unlink()
    with pytest.raises(ConfigError, match=r"no provenance\.json that states how many sources"):
        continue_(tmp_path / "1", models, earlier, "c")
