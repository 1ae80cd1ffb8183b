"""Kinds of task data: losses against those of transformers, columns, templates, and reports."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from functools import partial

import pytest
import torch
import transformers
from torch.nn.functional import cosine_similarity, cross_entropy

from gradmerge import MergeDataModule, TaskData
from gradmerge.common.errors import ConfigError
from gradmerge.objectives import CrossEntropy, Entropy, KLToSource, SquaredError
from gradmerge.training.examples import Kind
from gradmerge.training.generation import Generation
from gradmerge.training.kinds import KINDS, detect_kind
from gradmerge.training.kinds.texts import pooling_of
from gradmerge.training.loaders import Shared
from kinds import CASES, MARKING, PLAIN, rows, task_of, tokenizer, world
from networks import seeded
from tiny import SPLITS, trainer_of, validate

DISTRIBUTIONS = [name for name in CASES if name != "scored embeddings"]
PLAIN_LOSSES = [name for name in CASES if "embeddings" not in name and "zero" not in name]


def own_loss(network, example):
    """The loss of transformers on one example, and the number of decisions in its mean."""
    inputs = {key: value[None] for key, value in example.items() if isinstance(value, torch.Tensor)}
    labels = inputs["labels"]
    if isinstance(network, transformers.BertForQuestionAnswering):
        start, end = inputs.pop("labels").T
        output = network(**inputs, start_positions=start, end_positions=end)
        return output.loss, 2
    if isinstance(network, transformers.T5ForConditionalGeneration):
        inputs = {key: value for key, value in inputs.items() if "decoder" not in key}
    if "position_ids" in inputs:  # packed: each example alone
        parts, losses = (inputs["position_ids"][0] == 0).nonzero().flatten().tolist(), []
        for begin, end in zip(parts, [*parts[1:], len(labels[0])], strict=True):
            ids, wanted = (inputs[key][:, begin:end] for key in ("input_ids", "labels"))
            losses.append((network(ids, labels=wanted).loss, (wanted != -100).sum()))
        total = sum(count for _, count in losses)
        return sum(loss * count for loss, count in losses) / total, total
    return network(**inputs).loss, (labels != -100).sum()


@pytest.mark.parametrize("name", PLAIN_LOSSES)
def test_the_loss_of_a_split_is_that_of_transformers_on_each_example_alone(tmp_path, name):
    case = CASES[name]
    module, data, paths = world(tmp_path, case)
    found = validate(trainer_of(tmp_path), module, data)
    network = type(case.network()).from_pretrained(paths["base"]).eval()
    for task in "ab":
        with torch.no_grad():
            examples = list(data.examples("selection")[task])
            # an example of masked_lm may have no hidden token
            learned = [each for each in examples if (each["labels"] != -100).any()]
            each = [own_loss(network, example) for example in learned]
        expected = sum(loss * count for loss, count in each) / sum(count for _, count in each)
        assert found[f"selection/{task}/loss"] == pytest.approx(float(expected), rel=2e-5)
        assert "image" in name or len({len(e["input_ids"]) for e in examples}) > 1


@pytest.mark.parametrize("name", DISTRIBUTIONS)
@pytest.mark.parametrize("term", [KLToSource(), Entropy()], ids=["distillation", "entropy"])
def test_every_kind_learns_with_every_term(tmp_path, name, term):
    module, data, _ = world(tmp_path, CASES[name], term, start=0.5)
    trainer = trainer_of(tmp_path, max_steps=3)
    before = {key: raw.detach().clone() for key, raw in module.merged.raw.items()}
    trainer.fit(module, datamodule=data)
    assert any(not torch.equal(before[key], raw) for key, raw in module.merged.raw.items())
    scores = module.results["selection"]
    # relative to an expert that is always wrong is NaN
    finite = [v for task in "ab" for k, v in scores[task].items() if k != "normalised"]
    assert torch.tensor(finite).isfinite().all()
    if isinstance(term, Entropy):
        assert 0 < scores["a"]["loss"] <= 1


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_a_merge_that_equals_the_source_has_no_divergence_from_it(tmp_path, name):
    module, data, _ = world(tmp_path, CASES[name], KLToSource(), start=0.5)
    for raw in module.merged.raw.values():
        raw.data[:] = torch.tensor([1.0, 0.0])[(...,) + (None,) * (raw.dim() - 1)]
    found = validate(trainer_of(tmp_path), module, data)
    assert abs(found["selection/a/loss"]) < 1e-5
    assert found["selection/b/loss"] > 1e-4
    relative = found["selection/a/normalised"]
    assert relative == pytest.approx(1, abs=1e-4) or math.isnan(relative)  # expert is never right


# ---- embeddings and images --------------------------------------------------------------------


def embedded(network, words, texts):
    tokens = words(texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        hidden = network(**tokens).last_hidden_state
    kept = tokens["attention_mask"][..., None]
    return (hidden * kept).sum(1) / kept.sum(1)


def test_losses_of_embeddings_equal_their_definitions(tmp_path):
    for name, objective in (("embeddings", CrossEntropy()), ("scored embeddings", SquaredError())):
        module, data, paths = world(tmp_path / name, CASES[name], objective, similarity_scale=5.0)
        found = validate(trainer_of(tmp_path), module, data)
        network = transformers.BertModel.from_pretrained(paths["base"]).eval()
        words = transformers.AutoTokenizer.from_pretrained(paths["base"])
        given = list(data.splits("a")["selection"])
        first, second = list(given[0])[:2]
        a, b = (embedded(network, words, [row[key] for row in given]) for key in (first, second))
        if name == "embeddings":
            losses = []
            for part in (slice(0, 4), slice(4, 6)):  # batches of evaluation
                table = 5 * cosine_similarity(a[part, None], b[None, part], dim=-1)
                losses.append(cross_entropy(table, torch.arange(len(table)), reduction="sum"))
            expected = sum(losses) / 6
        else:
            scores = torch.tensor([row["score"] for row in given])
            expected = (cosine_similarity(a, b) - scores).square().mean()
            assert found["selection/a/squared_error"] == pytest.approx(float(expected), rel=1e-4)
        assert found["selection/a/loss"] == pytest.approx(float(expected), rel=1e-4)


def test_scores_as_labels_of_classes_are_refused(tmp_path):
    module, data, _ = world(tmp_path, CASES["scored embeddings"])
    with pytest.raises(ConfigError, match=r"expected class numbers as labels.*use SquaredError"):
        validate(trainer_of(tmp_path), module, data)
    for i, term in enumerate((KLToSource(), Entropy())):
        module, data, _ = world(tmp_path / str(i), CASES["scored embeddings"], term)
        with pytest.raises(ConfigError, match=rf"{type(term).__name__}: expected .*distribution"):
            validate(trainer_of(tmp_path), module, data)
    module, data, _ = world(tmp_path / "b", CASES["embeddings"], SquaredError())
    with pytest.raises(ConfigError, match="SquaredError: expected one number per row"):
        validate(trainer_of(tmp_path), module, data)


def test_classes_are_described_as_clip_does(tmp_path):
    case = CASES["zero_shot_image_classification"]
    module, data, paths = world(tmp_path, case)
    found = validate(trainer_of(tmp_path), module, data)
    network = transformers.CLIPModel.from_pretrained(paths["base"]).eval()
    processor = transformers.AutoProcessor.from_pretrained(paths["base"])
    given = list(data.splits("a")["selection"])
    weights = []
    with torch.no_grad():
        for name in case.options["class_names"]:
            texts = [template.format(name) for template in case.options["templates"]]
            tokens = processor.tokenizer(
                texts, padding="max_length", truncation=True, return_tensors="pt"
            )
            each = network.get_text_features(**tokens).pooler_output
            mean = (each / each.norm(dim=-1, keepdim=True)).mean(dim=0)
            weights.append(mean / mean.norm())
        pixels = processor(images=[row["image"] for row in given], return_tensors="pt")
        images = network.get_image_features(**pixels).pooler_output
        images = images / images.norm(dim=-1, keepdim=True)
        logits = network.logit_scale.exp() * images @ torch.stack(weights).T
    labels = torch.tensor([row["label"] for row in given])
    assert found["selection/a/loss"] == pytest.approx(
        float(cross_entropy(logits, labels)), rel=1e-5
    )
    right = (logits.argmax(dim=1) == labels).float().mean()
    assert found["selection/a/accuracy"] == pytest.approx(float(right))


def test_the_pooling_of_a_folder_is_used(tmp_path):
    words = tokenizer(tmp_path)
    assert pooling_of(words) == "mean"
    path = tmp_path / "1_Pooling" / "config.json"
    path.parent.mkdir()
    modes = {"pooling_mode_mean_tokens": False, "pooling_mode_cls_token": True}
    path.write_text(json.dumps({"word_embedding_dimension": 8, **modes}))
    assert pooling_of(words) == "cls"
    path.write_text(json.dumps({"pooling_mode": "lasttoken"}))
    assert pooling_of(words) == "last"
    path.write_text(json.dumps({"pooling_mode_weightedmean_tokens": True}))
    with pytest.raises(ConfigError, match=r"expected one pooling .* Set `pooling` of the task"):
        pooling_of(words)


# ---- chat -------------------------------------------------------------------------------------


def prepared(folder, case, template=PLAIN, given=None, **options):
    """The data module of one task, prepared without a network."""
    tokenizer(folder, template)
    task = task_of(case, **options)
    if given is not None:
        task.path.update(dict.fromkeys(SPLITS, given))
    data = MergeDataModule({"t": task}, processor=str(folder), check_disjoint=False)
    data.setup()
    return data


def said(data, stage="adaptation"):
    """The texts that have a loss, by example."""
    words = transformers.AutoTokenizer.from_pretrained(data.processor_path)
    return [words.decode(e["labels"][e["labels"] != -100]) for e in data.examples(stage)["t"]]


@pytest.mark.parametrize("turns", ["all", "last"])
@pytest.mark.parametrize("template", [PLAIN, MARKING], ids=["prefixes", "marks"])
def test_the_loss_of_a_chat_is_on_what_the_assistant_says(tmp_path, template, turns):
    data = prepared(tmp_path, CASES["chat"], template, turns=turns)
    for row, text in zip(rows(CASES["chat"], 0), said(data), strict=True):
        answers = [m["content"] + " </s>" for m in row["messages"] if m["role"] == "assistant"]
        assert text == " ".join(answers if turns == "all" else answers[-1:])


def test_messages_of_sharegpt_are_read(tmp_path):
    turns = [{"from": "human", "value": "w1 w2"}, {"from": "gpt", "value": "w3"}]
    given = [{"conversations": turns}]
    assert said(prepared(tmp_path, CASES["chat"], given=given)) == ["w3 </s>"]


FORGETFUL = PLAIN.replace(
    "m['content'] +", "(m['content'] if loop.last or m['role'] == 'user' else 'w9') +"
)


def test_a_template_that_does_not_tell_the_turns_is_refused_with_the_row(tmp_path):
    found = r"(?s)task t, adaptation, row 0: expected a chat template.*message 1 is.*turns: last"
    with pytest.raises(ConfigError, match=found):
        prepared(tmp_path, CASES["chat"], FORGETFUL)
    texts = said(prepared(tmp_path, CASES["chat"], FORGETFUL, turns="last"))
    last = [row["messages"][-1]["content"] for row in rows(CASES["chat"], 0)]
    assert texts == [f"{text} </s>" for text in last]
    silent = MARKING.replace("m['content'] + ' </s>' }}{% endgen", "'' }}{% endgen")
    with pytest.raises(ConfigError, match=r"row 0: .*marks no token"):
        prepared(tmp_path, CASES["chat"], silent)


@pytest.mark.parametrize(
    ("given", "found"),
    [
        ([{"messages": []}], r"row 0: expected a list of messages in column 'messages'"),
        ([{"messages": [{"who": "me"}]}], "row 0: expected messages with `role` and `content`"),
        ([{"text": "w1"}], r"expected a column for messages \(messages or conversations or"),
    ],
)
def test_rows_that_are_no_chat_are_named(tmp_path, given, found):
    with pytest.raises(ConfigError, match=found):
        prepared(tmp_path, CASES["chat"], given=given)


def test_a_chat_needs_a_template_and_an_instruction_does_without(tmp_path):
    with pytest.raises(ConfigError, match="expected a tokenizer with a chat template"):
        prepared(tmp_path, CASES["chat"], None)
    given = [{"instruction": "w1", "input": "w2", "output": "w3 w4"}]
    assert said(prepared(tmp_path, CASES["instruction"], None, given)) == ["w3 w4 </s>"]
    assert said(prepared(tmp_path, CASES["instruction"], PLAIN, given)) == ["w3 w4 </s>"]
    data = prepared(tmp_path, CASES["instruction"], PLAIN, given)
    words = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert "w1 w2 </s>" in words.decode(data.examples("test")["t"][0]["input_ids"])


# ---- tokens -----------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["right", "left"])
def test_texts_are_cut_on_one_side_and_tokens_are_counted(tmp_path, side):
    given = [{"prompt": "w1 w2 w3", "completion": "w4 w5"}, {"prompt": "w6", "completion": "w7"}]
    data = prepared(tmp_path, CASES["completion"], given=given, max_length=4, truncation=side)
    tally = data.tallies["t"]["test"]
    assert (tally.examples, tally.tokens, tally.truncated) == (2, 4 + 3, 1)
    if side == "right":
        assert said(data) == ["w4", "w7 </s>"]
        assert tally.loss_tokens == 3
    else:
        assert said(data) == ["w4 w5 </s>", "w7 </s>"]
        assert tally.loss_tokens == 5
    assert str(tally).startswith(f"2 examples, {tally.loss_tokens} of 7 tokens have a loss, 1 rows")


@pytest.mark.parametrize("side", ["right", "left"])
def test_texts_to_classify_are_cut_on_one_side(tmp_path, side):
    tokenizer(tmp_path)
    path = {stage: [{"text": f"w1 w2 w3 w{i}", "label": 0} for i in (4, 5)] for stage in SPLITS}
    task = TaskData(path, kind="text_classification", max_length=2, truncation=side)
    data = MergeDataModule({"t": task}, processor=str(tmp_path), check_disjoint=False)
    data.setup()
    words = transformers.AutoTokenizer.from_pretrained(tmp_path)
    texts = [words.decode(example["input_ids"]) for example in data.examples("test")["t"]]
    assert texts == (["w1 w2", "w1 w2"] if side == "right" else ["w3 w4", "w3 w5"])


def test_data_without_a_token_to_learn_are_refused(tmp_path):
    given = [{"prompt": "w1 w2 w3 w4", "completion": "w5"}]
    found = r"(?s)task t, adaptation: expected tokens with a loss, got none in 1 examples: 1 of its"
    with pytest.raises(ConfigError, match=found):
        prepared(tmp_path, CASES["completion"], given=given, max_length=3)


def test_packed_examples_stay_whole(tmp_path):
    data = prepared(tmp_path, CASES["packed chat"], max_length=80)
    windows = list(data.examples("adaptation")["t"])
    alone = list(prepared(tmp_path, CASES["chat"]).examples("adaptation")["t"])
    assert len(windows) < len(alone)
    assert all(len(window["input_ids"]) <= 80 for window in windows)
    parts = []
    for window in windows:
        starts = (window["position_ids"] == 0).nonzero().flatten().tolist()
        ends = [*starts[1:], len(window["input_ids"])]
        parts += [window["input_ids"][a:b].tolist() for a, b in zip(starts, ends, strict=True)]
    assert sorted(parts) == sorted(example["input_ids"].tolist() for example in alone)
    assert data.tallies["t"]["test"].packed


def test_a_network_in_which_packed_examples_see_one_another_is_refused(tmp_path):
    sizes = {"ffn_dim": 8, "word_embed_proj_dim": 8, "max_position_embeddings": 96}
    network = partial(seeded, transformers.OPTForCausalLM, **sizes)
    case = replace(CASES["packed chat"], network=lambda **o: network(**o))
    module, data, _ = world(tmp_path, case)
    with pytest.raises(ConfigError, match=r"task a: expected .*OPTForCausalLM.*packing: false"):
        trainer_of(tmp_path, max_steps=1).fit(module, datamodule=data)
    module, data, _ = world(tmp_path / "alone", case, packing=False)
    trainer_of(tmp_path, max_steps=1).fit(module, datamodule=data)


def test_hidden_tokens_are_the_same_in_every_evaluation(tmp_path):
    case = CASES["masked_lm"]
    tokenizer(tmp_path, **case.tokenizer)
    given = {stage: [{"text": " ".join(["w1 w2 w3 w4 w5"] * 80)}] for stage in SPLITS}

    def hidden(seed):
        task = TaskData(given, kind="masked_lm", masked=0.3)
        data = MergeDataModule(
            {"t": task}, processor=str(tmp_path), seed=seed, check_disjoint=False
        )
        data.setup()
        return {stage: data.examples(stage)["t"][0] for stage in SPLITS}

    first, again, other = hidden(0), hidden(0), hidden(1)
    for stage in SPLITS:
        assert all(first[stage][key].equal(again[stage][key]) for key in ("input_ids", "labels"))
        assert not first[stage]["labels"].equal(other[stage]["labels"])
    assert not first["selection"]["labels"].equal(first["test"]["labels"])
    wanted = first["test"]["labels"] != -100
    assert 0.2 < wanted.float().mean() < 0.4
    replaced = first["test"]["input_ids"][wanted] == 31  # w28, the mask token
    assert 0.65 < replaced.float().mean() < 0.95


def test_an_answer_that_is_cut_off_has_no_label_and_none_is_the_first_token(tmp_path):
    text = "w1 w2 w3 w4 w5 w6"
    place = {"text": ["w5 w6"], "answer_start": [text.index("w5")]}
    given = [
        {"question": "w7", "context": text, "answers": place},
        {"question": "w7", "context": text, "answers": {"text": [], "answer_start": []}},
    ]
    whole = prepared(tmp_path, CASES["question_answering"], given=given)
    assert [e["labels"].tolist() for e in whole.examples("test")["t"]] == [[5, 6], [0, 0]]
    short = prepared(tmp_path, CASES["question_answering"], given=given, max_length=6)
    assert [e["labels"].tolist() for e in short.examples("test")["t"]] == [[-100, -100], [0, 0]]
    assert short.tallies["t"]["test"].without_loss == 1
    wrong = [{**given[0], "answers": {"text": ["w5"], "answer_start": [0]}}]
    with pytest.raises(ConfigError, match=r"row 0: cannot be prepared.*'w1' where 'w5' should"):
        prepared(tmp_path, CASES["question_answering"], given=wrong)


def test_the_first_token_of_each_word_has_its_tag(tmp_path):
    import tokenizers

    words = tokenizer(tmp_path)
    inner = tokenizers.Tokenizer.from_str(words.backend_tokenizer.to_str())
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
        [tokenizers.pre_tokenizers.WhitespaceSplit(), tokenizers.pre_tokenizers.Punctuation()]
    )
    transformers.PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>").save_pretrained(
        tmp_path
    )
    path = {stage: [{"words": ["w1-w2", "w3"], "tags": [2, 1]}] for stage in SPLITS}
    task = TaskData(path, kind="token_classification")
    data = MergeDataModule({"t": task}, processor=str(tmp_path), check_disjoint=False)
    data.setup()
    assert data.examples("test")["t"][0]["labels"].tolist() == [2, -100, -100, 1]
    path["test"][0]["tags"].append(0)
    with pytest.raises(ConfigError, match=r"test, row 0: expected a tag per word, got 2 words"):
        MergeDataModule({"t": task}, processor=str(tmp_path)).setup()


# ---- columns and networks ---------------------------------------------------------------------


def test_columns_are_found_by_their_usual_names_or_named(tmp_path):
    given = [{"question": "w1", "prompt": "w2", "answer": "w3"}]
    assert said(prepared(tmp_path, CASES["completion"], given=given)) == ["w3 </s>"]
    data = prepared(tmp_path, CASES["completion"], given=given)
    words = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert words.decode(data.examples("test")["t"][0]["input_ids"]).startswith("w2 w3")
    named = {"prompt": "answer", "completion": "question"}
    assert said(prepared(tmp_path, CASES["completion"], given=given, columns=named)) == ["w1 </s>"]
    with pytest.raises(ConfigError, match=r"unknown roles promt for kind completion .*'prompt'"):
        prepared(tmp_path, CASES["completion"], given=given, columns={"promt": "answer"})
    with pytest.raises(ConfigError, match="expected a column 'text', got question, prompt"):
        prepared(tmp_path, CASES["completion"], given=given, columns={"prompt": "text"})


def test_every_kind_is_known_and_detected_from_its_columns():
    assert list(KINDS) == list(Kind.__args__)
    for name in ("chat", "completion", "instruction", "token_classification", "embeddings"):
        assert detect_kind(list(rows(CASES[name], 0, 1)[0])) == name
    assert detect_kind(["question", "context", "answers", "id"]) == "question_answering"
    assert detect_kind(["text", "label"]) == "text_classification"
    assert detect_kind(["text"]) == "causal_lm"
    assert detect_kind(["text"], "masked tokens") == "masked_lm"
    assert detect_kind(["image", "label"]) == "image_classification"
    assert detect_kind(["a", "b"]) is None


@pytest.mark.parametrize(
    ("name", "kind", "predicts"),
    [
        ("chat", "text_classification", "the next token"),
        ("seq2seq", "causal_lm", "a target text"),
        ("masked_lm", "token_classification", "masked tokens"),
        ("embeddings", "question_answering", "embeddings"),
    ],
)
def test_kinds_that_do_not_fit_the_network_are_refused(tmp_path, name, kind, predicts):
    module, data, _ = world(tmp_path, CASES[name], kind=kind)
    with pytest.raises(ConfigError, match=rf"which predicts {predicts}, got {kind}"):
        validate(trainer_of(tmp_path), module, data)


# ---- generation -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "memory"),
    [
        ("chat", "resident"),
        ("chat", "streamed"),
        ("completion", "resident"),
        ("seq2seq", "resident"),
    ],
)
def test_generated_texts_are_those_of_transformers_on_each_prompt_alone(tmp_path, name, memory):
    case, seen = CASES[name], {}

    def check(text, row):
        seen[str(row)] = text
        return len(text) % 2 == 0

    options = Generation(metrics=["exact_match", "rouge"], max_new_tokens=5, limit=5, check=check)
    module, data, paths = world(tmp_path, case, generation=options)
    module.merged.memory = memory
    found = validate(trainer_of(tmp_path), module, data)
    network = type(case.network()).from_pretrained(paths["base"]).eval()
    words = transformers.AutoTokenizer.from_pretrained(paths["base"])
    questions = data.questions("a", "selection")
    assert len(questions) == 5
    assert len({len(question.ids) for question in questions}) > 1
    passed = 0
    for question in questions:
        ids = torch.tensor([question.ids])
        new = network.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=5,
            pad_token_id=0, eos_token_id=2,
        )  # fmt: skip
        new = new if name == "seq2seq" else new[:, ids.shape[1] :]
        text = words.decode(new[0], skip_special_tokens=True)
        assert seen[str(question.row)] == text
        passed += len(text) % 2 == 0
    assert found["selection/a/passed"] == pytest.approx(passed / 5)
    assert {"exact_match", "rouge1", "rouge2", "rougeL"} <= set(module.results["selection"]["a"])


def test_scores_of_generated_texts():
    both = Generation(metrics=["exact_match", "rouge"])
    assert both.names == ("exact_match", "rouge1", "rouge2", "rougeL")
    same = both.scores(" w1 w2 w3\n", "w1 w2 w3", {})
    assert set(same.values()) == {1.0}
    # two of three words in common, one of two pairs of words
    part = both.scores("w1 w2 w4", "w1 w2 w3", {})
    assert part["exact_match"] == 0
    assert [part[key] for key in ("rouge1", "rouge2", "rougeL")] == pytest.approx(
        [2 / 3, 1 / 2, 2 / 3]
    )
    with pytest.raises(ConfigError, match=r"generation.metrics: expected some of"):
        Generation(metrics=[])
    with pytest.raises(ConfigError, match=r"generation.max_new_tokens: expected 1 to"):
        Generation(max_new_tokens=0)
    with pytest.raises(ConfigError, match=r"generation.splits: expected selection, test or both"):
        Generation(splits=[])


def test_texts_to_generate_must_fit_the_positions(tmp_path):
    network = partial(seeded, transformers.GPT2LMHeadModel, n_positions=32, n_embd=8, n_head=2)
    case = replace(CASES["completion"], network=lambda **o: network(n_layer=1, **o))
    module, data, _ = world(tmp_path, case, max_length=32, generation=Generation(max_new_tokens=31))
    with pytest.raises(ConfigError, match=r"task a: expected at most 32 tokens, .* prompts of \d"):
        validate(trainer_of(tmp_path), module, data)


def test_texts_are_generated_on_the_stated_splits_alone(tmp_path):
    options = Generation(max_new_tokens=2, splits=["test"])
    module, data, _ = world(tmp_path, CASES["chat"], generation=options)
    validate(trainer_of(tmp_path), module, data)
    trainer_of(tmp_path).test(module, datamodule=data, verbose=False)
    assert "exact_match" not in module.results["selection"]["a"]
    assert "exact_match" in module.results["test"]["a"]


def test_generation_is_refused_for_kinds_without_an_answer(tmp_path):
    module, data, _ = world(tmp_path, CASES["masked_lm"], generation=Generation())
    with pytest.raises(ConfigError, match="task a, selection: expected a task with texts to gen"):
        validate(trainer_of(tmp_path), module, data)


def test_shared_values_stand_in_a_batch_as_they_are():
    from gradmerge.training.loaders import collate

    value = torch.ones(3, 2)
    pair = [torch.tensor([1, 2]), torch.tensor([3])]
    batch = collate([{"shared": Shared(value), "input_ids": pair}] * 2, pad=9)
    assert batch["shared"] is value
    assert batch["input_ids"].tolist() == [[1, 2], [3, 9], [1, 2], [3, 9]]
