"""NaN and infinity as options are refused when they are parsed, in every command."""

from __future__ import annotations

import pytest

from commands import fails
from tiny import write_yaml

RECIPE = {"base": "base", "sources": {"a": "a", "b": "b"}}


@pytest.mark.parametrize("text", [".nan", ".inf", "-.inf", "1e400"])
def test_a_static_merge(tmp_path, capsys, text):
    message = fails(
        [
            *("merge", "--recipe.base", "base", "--recipe.sources", "{a: a, b: b}"),
            *("--recipe.init", "Constant", f"--recipe.init.value={text}"),
            *("--output", str(tmp_path / "out")),
        ],
        capsys,
    )
    assert "recipe.init.init_args.value: " in message


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"optimizer": {"class_path": "torch.optim.SGD", "init_args": {"lr": 1e999}}}, "lr: inf"),
        ({"trainer": {"gradient_clip_val": float("nan")}}, "trainer.gradient_clip_val: nan"),
        ({"model": {"learning_rate": float("nan")}}, "model.learning_rate: nan"),
        ({"model": {"recipe": {"frozen": {"bias": float("inf")}}}}, "recipe.frozen.bias: inf"),
        (
            {"search": {"class_path": "Scales", "init_args": {"values": [0.5, float("nan")]}}},
            "search.init_args.values[1]: nan",
        ),
        (
            {
                "optimizer": {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.1}},
                "lr_scheduler": {
                    "class_path": "torch.optim.lr_scheduler.ExponentialLR",
                    "init_args": {"gamma": float("nan")},
                },
            },
            "lr_scheduler.init_args.gamma: nan",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_fit(tmp_path, capsys, options, named):
    tasks = {"data": {"tasks": {"a": {"path": "json"}}}, "model": {"recipe": RECIPE}}
    file = write_yaml(tmp_path / "fit.yaml", tasks, options)
    message = fails(["fit", "--config", file], capsys)
    assert "expected finite numbers as options" in message
    assert named in message


def test_all_are_named_at_once(tmp_path, capsys):
    given = {
        "recipe": {
            **RECIPE,
            "init": {"class_path": "Constant", "init_args": {"value": [float("nan"), 1.0]}},
            "preprocess": [{"class_path": "Trim", "init_args": {"density": float("nan")}}],
        }
    }
    file = write_yaml(tmp_path / "m.yaml", given)
    message = fails(["merge", "--config", file, "--output", str(tmp_path / "out")], capsys)
    assert "init.init_args.value[0]: nan" in message
    assert "preprocess[0].init_args.density: nan" in message
