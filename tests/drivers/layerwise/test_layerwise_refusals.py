"""Which networks and settings the layer-wise driver rejects."""

from __future__ import annotations

import pytest
import torch
import transformers
from torch import nn

from gradmerge.coefficients import Element, Group, Model, Tensor
from gradmerge.common.errors import ConfigError
from gradmerge.common.spec import to_plain
from gradmerge.drivers import LayerWise
from gradmerge.drivers.layerwise.chain import BlockChain
from gradmerge.engine.opening import open_plan
from gradmerge.finalisers import REPAIR
from gradmerge.objectives import L1, CrossEntropy, KLToSource, Objective
from layerwise_jobs import ADAM, data_of, job_of, network_of
from tiny import build, recipe_of, relatives

pytestmark = pytest.mark.usefixtures("small_collections")


SMALL = {
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 32,
}
REAL = {
    "GPT2LMHeadModel": {"vocab_size": 32, "n_embd": 16, "n_layer": 2, "n_head": 2},
    "Gemma3ForCausalLM": {**SMALL, "num_key_value_heads": 2, "head_dim": 4, "sliding_window": 4},
    "MixtralForCausalLM": {**SMALL, "num_key_value_heads": 2, "num_local_experts": 2},
    "DebertaV2ForSequenceClassification": {
        **SMALL,
        "relative_attention": True,
        "pos_att_type": ["p2c", "c2p"],
    },
    "ResNetForImageClassification": {
        "embedding_size": 8,
        "hidden_sizes": [8, 16],
        "depths": [1, 2],
        "layer_type": "basic",
    },
    "AlbertForSequenceClassification": {**SMALL, "embedding_size": 8},
    "T5EncoderModel": {"vocab_size": 32, "d_model": 16, "d_ff": 24, "num_layers": 2, "d_kv": 4},
}
NO_CHAIN = {
    "AlbertForSequenceClassification": r"albert_layer_groups\.0 runs 2 times in one pass",
    "T5EncoderModel": r"args\[2\] of encoder\.block\.1 depends on what the blocks before",
}


@pytest.mark.parametrize("name", REAL)
def test_real_networks_are_found_to_be_chains_or_not(name):
    torch.manual_seed(0)
    kind = getattr(transformers, name)
    models = relatives(kind(kind.config_class(**REAL[name])), 2, 0.1)
    plan = open_plan(recipe_of(models))
    chain = BlockChain(plan, None, torch.float32, torch.device("cpu"))
    assert len(chain.blocks) == (1 if name.startswith("Albert") else 2)
    if "Image" in name:
        inputs = {"pixel_values": torch.randn(1, 3, 32, 32)}
    else:
        mask = torch.tensor([[1] * 7 + [0] * 2])
        inputs = {"input_ids": torch.randint(3, 32, (1, 9)), "attention_mask": mask}
    if name in NO_CHAIN:
        with pytest.raises(ConfigError, match=NO_CHAIN[name]):
            chain.verify(inputs, "a")
    else:
        assert chain.verify(inputs, "a") <= 1e-6


class Borrowing(nn.Bilinear):
    """A block that uses a tensor of another."""

    def __init__(self, other):
        super().__init__(6, 6, 6)
        self.others = (other,)

    def forward(self, x, beside):
        return super().forward(x, beside) * self.others[0].bias


class Chained(nn.Module):
    """Two blocks that fail to be a chain in one way."""

    def __init__(self, how=""):
        super().__init__()
        self.how = how
        self.blocks = nn.ModuleList([nn.Bilinear(6, 6, 6), nn.Bilinear(6, 6, 6)])
        if how == "tied":
            self.blocks[1].weight = self.blocks[0].weight
        if how == "earlier":
            self.blocks[1] = Borrowing(self.blocks[0])
        if how == "several":
            self.others = nn.ModuleList([nn.Linear(6, 6)])

    def forward(self, x):
        beside = x
        if self.how == "outside":
            x = x + self.blocks[1].bias
        for block in self.blocks:
            for _ in range(2 if self.how == "twice" else 1):
                got = block(x, beside)
                beside = got.relu() if self.how == "beside" else beside
                x = got + x if self.how == "between" else got
        return x


REFUSED = {
    "several": "got several",
    "tied": r"blocks\.0\.weight is tied",
    "twice": r"blocks\.0 runs 2 times",
    "between": r"no argument of blocks\.1 .* is what the block before returned",
    "outside": r"blocks\.1\.bias is used outside of its block",
    "earlier": r"blocks\.0\.bias is used outside of its block",
    "beside": r"args\[1\] of blocks\.1 depends on what the blocks before it computed",
}


@pytest.mark.parametrize("how", REFUSED)
def test_networks_that_are_no_chain_are_rejected_by_name(how, tmp_path):
    torch.manual_seed(0)
    recipe = recipe_of(relatives(Chained(how)), coefficients=Element())
    with pytest.raises(ConfigError, match=REFUSED[how]):
        LayerWise(steps=1).run(job_of(tmp_path, recipe, data_of(dtype=torch.float32), ADAM))


@pytest.mark.parametrize(
    ("driver", "recipe", "message"),
    [
        (
            {"blocks": ["block"]},
            {},
            "no module of Stack .* 'block' as a whole. Did you mean 'blocks'",
        ),
        ({"blocks": [r"blocks\.\d", r"blocks\.0\.0"]}, {}, "lies within the block"),
        ({}, {"coefficients": Model()}, "share a coefficient"),
        ({}, {"coefficients": Group((r"\.weight",))}, "share a coefficient"),
        ({}, {"frozen": {r"^blocks\.": 0.3}}, "hold no tensor whose coefficients are learned"),
    ],
)
def test_recipes_that_cannot_be_learned_block_by_block_are_rejected(
    driver, recipe, message, tmp_path
):
    models, kind, _ = network_of("stack", torch.float32)
    job = job_of(tmp_path, recipe_of(models, **{"coefficients": Tensor(), **recipe}), data_of(kind))
    with pytest.raises(ConfigError, match=message):
        LayerWise(steps=1, **driver).run(job)
    assert not job.folder.exists(), "the corrected job is another"


def test_other_refusals(tmp_path):
    models, kind, _ = network_of("stack", torch.float32)
    with pytest.raises(ConfigError, match=r"blocks: invalid regular expression '\[bad'"):
        LayerWise(blocks=["[bad"])
    job = job_of(tmp_path / "r", recipe_of(models, finalisers=[REPAIR()]), data_of(kind))
    with pytest.raises(ConfigError, match="REPAIR takes passes of the whole merged network"):
        LayerWise().run(job)
    assert not (tmp_path / "r").exists() or not list((tmp_path / "r").rglob("job.json"))
    with pytest.raises(ConfigError, match=r"LayerWise\.steps: expected a number of at least 1"):
        LayerWise(steps=0)
    with pytest.raises(ConfigError, match="activation_memory: expected a number of at least 0"):
        LayerWise(activation_memory=-1)
    recipe = recipe_of(models)
    job = job_of(tmp_path / "a", recipe, data_of(kind), activation_checkpointing=True)
    with pytest.raises(ConfigError, match="activation_checkpointing recomputes"):
        LayerWise().run(job)
    with pytest.raises(ConfigError, match="tasks name no source: c -> c"):
        LayerWise().run(job_of(tmp_path / "b", recipe, data_of(kind, tasks="ac")))
    perceptrons = recipe_of(relatives(build()))
    with pytest.raises(ConfigError, match=r"in one nn\.ModuleList, got none"):
        LayerWise().run(job_of(tmp_path / "c", perceptrons, data_of(kind)))
    t5 = transformers.T5ForConditionalGeneration(
        transformers.T5Config(
            vocab_size=32,
            d_model=8,
            d_ff=8,
            num_layers=1,
            num_heads=2,
            d_kv=4,
            decoder_start_token_id=0,
        )
    )
    with pytest.raises(ConfigError, match=r"got the encoder-decoder T5.*leave `driver` out"):
        LayerWise().run(job_of(tmp_path / "d", recipe_of(relatives(t5)), data_of("tokens")))


def test_options_of_another_loss_are_rejected_and_terms_are_reported_as_unused(tmp_path):
    models, kind, _ = network_of("stack", torch.float32)
    recipe = recipe_of(models)
    refused = (
        ({"objective": Objective(regularisers=[L1(0.1)])}, r"objective\.regularisers .* \['L1'\]"),
        ({"objective": to_plain(Objective(task_weights={"a": 2.0}))}, "task_weights .*'a': 2"),
        ({"logit_scale": 2.0}, "logit_scale changes the loss of a fit, got 2.0.*logit_scale null"),
    )
    for options, message in refused:
        with pytest.raises(ConfigError, match=f"LayerWise: .*{message}"):
            LayerWise().run(job_of(tmp_path / "refused", recipe, data_of(kind), **options))
    assert not (tmp_path / "refused").exists()
    data = data_of(kind, dtype=torch.float32)
    line = "objective KLToSource: not used, each block is matched to the experts' own"
    for given in (KLToSource(), Objective([KLToSource()]), None, Objective([CrossEntropy()])):
        job = job_of(tmp_path / type(given).__name__ / str(given), recipe, data, objective=given)
        LayerWise(steps=1).run(job)
        assert (line in job.said) == ("KLToSource" in str(given))
