"""The sprites world: captions, art, scenes, tokenizer."""

from __future__ import annotations

import random

import numpy as np
import pytest
from transformers import CLIPTokenizer

from blend.sprites import captions
from blend.sprites.art import COLOUR_RGB, draw_sprite
from blend.sprites.captions import COLOURS, HELD_OUT, OBJECTS, Thing, parse_caption, write_caption
from blend.sprites.scene import render
from blend.sprites.tokenizer import MAX_TOKENS, write_tokenizer


def test_caption_grammar_is_the_papers():
    assert write_caption((Thing("red", "car"),)) == "A red colored car."
    assert write_caption((Thing("blue", "cup"), Thing("green", "cell phone"))) == ("A blue cup and a green cell phone.")
    assert write_caption((Thing("orange", "apple"),)) == "An orange colored apple."


def test_every_prompt_parses_back_to_itself():
    prompts = captions.train_prompts() + captions.held_out_prompts()
    assert [write_caption(parse_caption(prompt)) for prompt in prompts] == prompts


def test_parse_refuses_other_sentences_and_names_the_choices():
    with pytest.raises(ValueError, match=r"(?s)zebra.*red, orange.*apple, banana"):
        parse_caption("A red colored zebra.")


def test_splits_do_not_overlap_and_hold_out_one_colour_of_every_object():
    train, test = captions.single_prompts("train"), captions.single_prompts("test")
    assert (len(train), len(test)) == (112, 48)
    assert not set(train) & set(test)
    held_out = {write_caption((thing,)) for thing in HELD_OUT}
    assert set(test[:16]) == held_out
    assert sorted(thing.object for thing in HELD_OUT) == sorted(OBJECTS)
    for prompt in captions.pair_prompts("test"):
        assert any(write_caption((thing,)) in test for thing in parse_caption(prompt))
    for prompt in captions.pair_prompts("train"):
        assert all(write_caption((thing,)) in train for thing in parse_caption(prompt))


def test_prompt_sets_mix_one_and_two_objects_without_overlap():
    train, test = captions.train_prompts(), captions.held_out_prompts()
    assert (len(train), len(test)) == (208, 144)
    assert not set(train) & set(test)
    for prompts in (train, test):
        assert [len(parse_caption(prompt)) for prompt in prompts[:90]] == [1, 2] * 45
    assert captions.held_out_prompts(5) == test[:5]


def test_training_scenes_never_show_a_held_out_pair():
    rng = random.Random(3)
    drawn = {thing for _ in range(4000) for thing in captions.sample_things(rng)}
    assert not drawn & HELD_OUT
    assert len(drawn) == len(COLOURS) * len(OBJECTS) - len(HELD_OUT)


def test_scenes_are_deterministic_and_vary_with_the_seed():
    caption = "A blue cup and a green cell phone."
    first, again, other = render(caption, 1), render(caption, 1), render(caption, 2)
    assert first.shape == (64, 64, 3)
    assert first.dtype == np.uint8
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


def test_first_named_object_stands_on_the_left():
    for seed in range(8):
        scene = render("A red car and a blue tree.", seed).astype(int)
        red = np.abs(scene - COLOUR_RGB["red"]).sum(-1) < 30
        blue = np.abs(scene - COLOUR_RGB["blue"]).sum(-1) < 30
        assert np.nonzero(red)[1].mean() < 32 < np.nonzero(blue)[1].mean()


@pytest.mark.parametrize("name", OBJECTS)
def test_each_sprite_shows_its_colour_and_an_outline(name: str):
    for colour in COLOURS:
        pixels = np.asarray(draw_sprite(name, colour))
        opaque = pixels[pixels[..., 3] > 0][:, :3].astype(int)
        share = (np.abs(opaque - COLOUR_RGB[colour]).sum(-1) < 6).mean()
        assert share > 0.12, (name, colour, share)
        border = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
        assert not border[:, 3].any(), f"{name} touches the edge of its canvas"


def test_tokenizer_gives_one_token_a_word_and_reads_back(tmp_path):
    write_tokenizer(tmp_path)
    tokenizer = CLIPTokenizer.from_pretrained(tmp_path)
    for prompt in captions.train_prompts() + captions.held_out_prompts():
        ids = tokenizer(prompt).input_ids
        assert len(ids) == len(prompt.replace(".", " .").split()) + 2 <= MAX_TOKENS
    assert tokenizer.decode(tokenizer("a zebra").input_ids, skip_special_tokens=True).strip() == "a zebra"
