"""Secrets are masked in texts, plain data and configurations."""

from __future__ import annotations

import pytest
from jsonargparse import Namespace

from gradmerge.common import secrets
from gradmerge.common.errors import ConfigError
from gradmerge.common.secrets import mask, mask_given, masked
from gradmerge.common.spec import to_plain
from gradmerge.engine.recipe import Recipe
from gradmerge.sources import HuggingFace, Lora
from gradmerge.training.examples import TaskData

TOKEN = "hf_" + "a1B2" * 9


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("https://me:word@host/x.json", "https://***@host/x.json"),
        ("s3://key:secret@bucket/x and hf://x", "s3://***@bucket/x and hf://x"),
        ("https://host/x?token=abc&n=3", "https://host/x?token=***&n=3"),
        ("https://h/x?X-Amz-Signature=abc#f", "https://h/x?X-Amz-Signature=***#f"),
        ("https://h/x?sv=1&sig=a%2Fb", "https://h/x?sv=1&sig=***"),
        (f"with {TOKEN}.", "with ***."),
        ("models/hf_checkpoint@v1, me@host", "models/hf_checkpoint@v1, me@host"),
        ("https://host/a@b?page=2", "https://host/a@b?page=2"),
        ("data/token=abc/x.json", "data/token=abc/x.json"),
    ],
)
def test_addresses_and_tokens_are_masked_in_texts(text, expected):
    assert mask(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("{path: a, token: abc, n: 1}", "{path: a, token: ***, n: 1}"),
        ("{'api_key': 'abc', 'n': 1}", "{'api_key': ***, 'n': 1}"),
        ("HuggingFace(path='a', token='abc')", "HuggingFace(path='a', token=***)"),
        ("storage_options: {key: a, secret: b}, c", "storage_options: ***, c"),
        ("--model.recipe.sources.a.token=abc", "--model.recipe.sources.a.token=***"),
        ("token: null, pad_token_id: 3, tokenizer: union", None),
        ("HuggingFace.token: expected text", None),
    ],
)
def test_options_are_masked_where_they_are_quoted(text, expected):
    assert mask_given(text) == (text if expected is None else expected)
    assert mask_given(mask_given(text)) == mask_given(text)


def test_known_secrets_are_masked_everywhere(monkeypatch):
    monkeypatch.setattr(secrets, "_known", set())
    monkeypatch.setenv("HF_TOKEN", "from-environment")
    source = HuggingFace("a", token="a-known-word")
    text = "a-known-word and from-environment"
    assert mask(text) == "*** and ***"
    assert str(ConfigError(text)) == "*** and ***"
    assert "a-known-word" not in repr(source)


def test_specifications_become_plain_data_without_secrets():
    source = HuggingFace("a", token="word")
    recipe = Recipe({"token": source, "b": Lora("b", source)}, base="https://me:word@host/x")
    data = TaskData("json", data_files={"train": "https://me:word@host/x?token=word"})
    found = str([to_plain(recipe), to_plain(data)])
    assert "word" not in found
    assert to_plain(recipe)["init_args"]["sources"]["token"]["init_args"]["path"] == "a"


def test_configurations_lose_their_secrets_and_keep_names():
    config = Namespace(
        sources={"token": Namespace(class_path="X", init_args=Namespace(token="word"))},
        logger=[Namespace(class_path="Y", init_args=Namespace(api_key="word", name="a"))],
        options=Namespace(storage_options={"key": "word", "n": 1, "anon": True}),
        tasks={"secret": Namespace(path="https://me:word@host/x")},
        password=12345678,
        seed=3,
    )
    found = masked(config)
    assert (found.password, found.logger[0].init_args.api_key) == (0, "***")
    assert found.sources["token"].init_args.token is None
    assert found.tasks["secret"].path == "https://***@host/x"
    assert found.options.storage_options == {"key": "***", "n": 0, "anon": True}
    assert (found.logger[0].init_args.name, found.seed) == ("a", 3)
    assert config.sources["token"].init_args.token == "word"
