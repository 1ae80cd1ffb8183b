"""Strategies that do not suit a merge are refused before anything starts."""

from __future__ import annotations

import pytest
from lightning.pytorch.strategies import ModelParallelStrategy

from gradmerge.common.errors import ConfigError
from tiny import module_of, trainer_of, vectors


def test_a_strategy_that_divides_parameters_names_the_one_to_use(tmp_path):
    strategy = ModelParallelStrategy(data_parallel_size=1, tensor_parallel_size=1)
    trainer = trainer_of(tmp_path, strategy=strategy, max_steps=1)
    with pytest.raises(ConfigError, match=r"expected auto or ddp, got ModelParallelStrategy"):
        trainer.fit(module_of(), datamodule=vectors())


def test_shards_divide_the_number_of_processes(tmp_path):
    with pytest.raises(ConfigError, match=r"expected a divisor of the number of processes \(1\)"):
        trainer_of(tmp_path, max_steps=1).fit(module_of(source_shards=2), datamodule=vectors())


def test_a_negative_number_of_shards():
    with pytest.raises(ConfigError, match="source_shards: expected at least 0, got -1"):
        module_of(source_shards=-1)
