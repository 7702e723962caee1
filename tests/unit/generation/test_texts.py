"""Prompts in, texts out, with a real tokenizer and small random models."""

from __future__ import annotations

import time
from dataclasses import replace

import pytest

from megatron_dlm.generation.hybrid_samplers import HybridDecoding
from megatron_dlm.generation.masked_samplers import MaskedDecoding
from megatron_dlm.generation.samplers import TokenChoice
from megatron_dlm.generation.texts import Sampling, generate_texts
from megatron_dlm.hf.load import load_model

PROMPTS = ["def ", "", "for x in range(", "import sys, "]
STEPS = HybridDecoding(num_steps=6)
KINDS = ["ar", "masked", "block", "hybrid", "prompted"]


@pytest.fixture
def load(models):
    def load(kind):
        model = load_model(models[kind])
        model.model.double()  # so that the size of a batch cannot flip a draw
        return model

    return load


@pytest.mark.parametrize("kind", KINDS)
def test_texts_come_in_order_whatever_the_batch(load, kind):
    model = load(kind)

    def texts(**changes):
        sampling = Sampling(num_tokens=10, hybrid=STEPS, seed=changes.pop("seed", 0))
        return list(generate_texts(model, PROMPTS, sampling, num_samples=3, **changes))

    batched = texts(batch_size=5)
    assert [text.prompt for text in batched] == [p for p in PROMPTS for _ in range(3)]
    assert [text.sample for text in batched] == [0, 1, 2] * 4
    assert [text.batch_size for text in batched] == [5] * 10 + [2] * 2
    assert len({text.text for text in batched}) == 12
    for other in (texts(batch_size=1), texts(batch_size=12)):
        assert [text.tokens for text in other] == [text.tokens for text in batched]
        assert [text.num_evaluations for text in other] == [t.num_evaluations for t in batched]
    assert [text.tokens for text in texts(seed=1)] != [text.tokens for text in batched]


@pytest.mark.parametrize("kind", KINDS)
def test_only_text_is_emitted_and_only_the_new_part_returned(load, kind):
    model = load(kind)
    tokenizer = model.tokenizer
    choice = TokenChoice(temperature=3.0)
    sampling = Sampling(num_tokens=40, choice=choice, hybrid=STEPS, stop=False)
    found = set()
    for text in generate_texts(model, PROMPTS, sampling, num_samples=10, batch_size=40):
        assert len(text.tokens) == 40
        assert text.num_evaluations == (6 if kind in ("hybrid", "prompted") else 40)
        whole = tokenizer.decode([*tokenizer.encode(text.prompt), *text.tokens])
        assert whole == text.prompt + text.text
        found.update(text.tokens)
    allowed = {*range(tokenizer.vocab_size)} - {*tokenizer.special_ids} | {tokenizer.eod_id}
    assert found <= allowed
    assert len(found) > 0.8 * len(allowed)


@pytest.mark.parametrize("kind", KINDS)
def test_texts_stop_at_the_end_of_the_document(load, kind):
    model = load(kind)
    end, letter = model.tokenizer.eod_id, model.tokenizer.encode("x")[-1]
    others = {*range(model.model.config.vocab_size)} - {end, letter}
    choice = TokenChoice(5.0, forbidden_ids=tuple(others))
    sampling = Sampling(num_tokens=30, choice=choice, hybrid=STEPS)
    stopped = list(generate_texts(model, PROMPTS, sampling, num_samples=5))
    assert all({*text.tokens} <= {letter} for text in stopped)
    assert any(len(text.tokens) < 30 for text in stopped)
    if kind not in ("hybrid", "prompted"):  # there every token may change until the last step
        assert any(text.num_evaluations < 30 for text in stopped)
    speed = sum(len(text.tokens) for text in stopped[:8]) / stopped[0].seconds
    assert stopped[0].tokens_per_second == pytest.approx(speed)
    unstopped = generate_texts(model, PROMPTS, replace(sampling, stop=False), num_samples=5)
    assert any(end in text.tokens for text in unstopped)


@pytest.mark.parametrize("kind", ["block", "hybrid", "prompted"])
def test_gaps_of_other_kinds(load, kind):
    model = load(kind)
    sampling = Sampling(infill=True, hybrid=HybridDecoding("adaptive"))
    templates = ["<mask:3>(self):<mask:2>\n", "x = <mask:4>"]
    texts = list(generate_texts(model, templates, sampling, batch_size=2))
    assert [len(text.tokens) for text in texts] == [5, 4]
    assert "(self):" in texts[0].text
    assert texts[1].text.startswith("x = ")
    for text in texts:
        assert not {model.mask_token_id, model.tokenizer.eod_id} & {*text.tokens}


@pytest.mark.parametrize("cache", ["exact", "prompt"])
def test_gaps_are_filled_and_the_rest_stays(load, cache):
    model = load("masked")
    tokenizer = model.tokenizer
    templates = ["<mask:3>(self):<mask:2>\n", "x = <mask:4>", "<mask:1>"]
    sampling = Sampling(infill=True, decoding=MaskedDecoding(cache=cache))
    size = 3 if cache == "exact" else 1
    texts = list(generate_texts(model, templates, sampling, batch_size=size))
    assert [len(text.tokens) for text in texts] == [5, 4, 1]
    assert [text.num_evaluations for text in texts] == [5, 4, 1]
    assert texts[0].text == "".join(
        [
            tokenizer.decode(texts[0].tokens[:3]),
            "(self):",
            tokenizer.decode(texts[0].tokens[3:]),
            "\n",
        ]
    )
    assert texts[1].text.startswith("x = ")
    assert tokenizer.eod_id not in [token for text in texts for token in text.tokens]


def test_watching_does_not_count_as_time(load):
    seen = []

    def watch(prompt, tokens):
        seen.append((prompt.text, len(tokens)))
        time.sleep(0.1)

    model = load("ar")
    (text,) = generate_texts(model, ["def "], Sampling(num_tokens=12, stop=False), watch=watch)
    start = len(model.tokenizer.encode("def "))
    assert seen == [("def ", start + step) for step in range(1, 13)]
    assert text.seconds < 1.0


def test_bad_input_is_named(load):
    masked, ar = load("masked"), load("ar")
    endless = "abc " * 60

    def texts(model, prompts, **changes):
        return lambda: list(generate_texts(model, prompts, Sampling(**changes)))

    cases = [
        (texts(replace(ar, tokenizer=None), ["a"]), "no tokenizer; text needs one"),
        (texts(replace(masked, mask_token_id=None), ["a"]), "names no mask id"),
        (texts(ar, ["<mask:2>"], infill=True), "only diffusion models fill gaps"),
        (texts(masked, ["def "], infill=True), r"'def ' has no gap to fill; write one as <mask:8>"),
        (texts(masked, ["<mask:0>"], infill=True), "has no gap to fill"),
        (
            texts(ar, ["a", endless], num_tokens=4),
            r"prompt 2 \('abc abc.* has \d+ tokens and 4 follow; .* was trained on 64",
        ),
        (texts(masked, ["<mask:65>"], infill=True), "has 65 tokens and 0 follow"),
        (texts(masked, ["a"], num_tokens=65), "65 follow"),
    ]
    for call, message in cases:
        with pytest.raises(ValueError, match=message):
            call()
