"""PNGs give back the facts they were written with, whatever is in the prompt."""

import io

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from workers.images import ImageFacts, ImageFactsError, encode_png, read_facts, to_uint8

FACTS = ImageFacts(
    prompt="A red colored car.",
    negative_prompt="",
    seed=2**53 - 1,
    weights={"colourfulness": 0.1, "compressibility": 0.9},
    kl_lambda=1.5,
    method="mpa",
    num_inference_steps=20,
    guidance_scale=3.0,
    eta=1.0,
    width=4,
    height=2,
    bundle="sprites@3",
    bundle_digest="ab" * 32,
)
PIXELS = np.arange(24, dtype=np.uint8).reshape(2, 4, 3)


def test_pixels_and_facts_come_back(tmp_path):
    png = encode_png(PIXELS, FACTS)
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(png))), PIXELS)
    assert read_facts(png) == FACTS
    path = tmp_path / "image.png"
    path.write_bytes(png)
    assert read_facts(path) == FACTS


def test_any_viewer_finds_each_fact_under_its_own_name():
    chunks = Image.open(io.BytesIO(encode_png(PIXELS, FACTS))).text
    assert set(ImageFacts.model_fields) < set(chunks)
    assert chunks["prompt"] == "A red colored car."
    assert chunks["weights"] == '{"colourfulness": 0.1, "compressibility": 0.9}'


@given(
    prompt=st.text(st.characters(exclude_categories=["Cs"]), max_size=60),
    weight=st.floats(0, 1),
    guidance=st.floats(0, 50),
)
def test_no_text_or_number_is_changed(prompt, weight, guidance):
    facts = FACTS.model_copy(
        update={"prompt": prompt, "weights": {"é": weight}, "guidance_scale": guidance, "method": "42"}
    )
    assert read_facts(encode_png(PIXELS, facts)) == facts


def test_other_images_and_damaged_files_are_refused():
    plain = io.BytesIO()
    Image.fromarray(PIXELS).save(plain, format="PNG")
    with pytest.raises(ImageFactsError, match="no facts"):
        read_facts(plain.getvalue())
    with pytest.raises(ImageFactsError, match="not an image"):
        read_facts(b"no png")
    damaged = encode_png(PIXELS, FACTS.model_copy(update={"bundle": "x"})).replace(b"kl_lambda", b"kl_lambdX")
    with pytest.raises(ImageFactsError):
        read_facts(damaged)


def test_pixel_values_are_rounded_and_clipped():
    images = np.array([-0.2, 0.0, 0.5, 1.0, 1.7, 0.999], dtype=np.float32).reshape(1, 3, 1, 2)
    assert to_uint8(images).reshape(-1).tolist() == [0, 128, 255, 0, 255, 255]
