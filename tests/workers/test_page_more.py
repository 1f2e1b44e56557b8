"""The rest of the page in a real browser: addresses, copies, history, comparison, plot, refusals and small screens."""

import base64
import contextlib
import io
import json
import shutil
import subprocess
import sys

import httpx
import pytest
from endpoints import serve, token_file
from PIL import Image, ImageChops

pytestmark = [pytest.mark.slow, pytest.mark.long]
pytest_plugins = ["page_browser"]

NAMES = ("brightness", "colourfulness", "compressibility")
NAMED_ROLES = {"button", "checkbox", "combobox", "link", "progressbar", "slider", "spinbutton", "textbox"}


def furthest(one, other) -> int:
    """The largest difference between two pictures, of 255."""
    return max(high for _, high in ImageChops.difference(Image.open(one), Image.open(other)).getextrema())


def test_an_address_brings_everything_back(visit):
    tab = visit().open(
        "prompt=A+green+colored+cat.&weights=brightness:0.1,colourfulness:0.2,compressibility:0.7"
        "&lambda=1.25&method=soup&seed=11&steps=5&guidance=2.5"
    )
    facts = tab.settle()
    assert (facts.prompt, facts.seed, facts.method, facts.kl_lambda) == ("A green colored cat.", 11, "soup", 1.25)
    assert facts.weights == pytest.approx(dict(zip(NAMES, (0.1, 0.2, 0.7), strict=True)))
    assert (facts.num_inference_steps, facts.guidance_scale) == (5, 2.5)
    assert tab.page.get_by_label("Prompt", exact=True).input_value() == facts.prompt
    other = visit()
    other.page.goto(tab.page.url)
    assert other.settle() == facts


def test_nonsense_in_an_address_becomes_something_that_works(visit):
    facts = visit().open("weights=brightness:9,x:1&lambda=99&method=ls&seed=-4&steps=4&guidance=no").settle()
    assert (facts.weights[NAMES[0]], facts.kl_lambda, facts.seed, facts.guidance_scale) == (1.0, 1.0, 0, 3.0)


def test_back_and_forward_undo_whole_gestures(visit):
    tab = visit().open_quick()
    first = tab.settle()
    picker = tab.page.get_by_role("slider", name="Preference between the rewards")
    for _ in range(3):
        picker.press("ArrowUp")
    second = tab.settle()
    tab.page.get_by_role("button", name="A yellow colored fish.").click()
    third = tab.settle()
    assert third.prompt == "A yellow colored fish."
    tab.page.go_back()
    assert tab.settle() == second
    tab.page.go_back()
    assert tab.settle() == first
    tab.page.go_forward()
    tab.page.go_forward()
    assert tab.settle() == third


def test_history_brings_back_the_image_and_all_its_settings(visit):
    tab = visit().open_quick()
    first, png = tab.settle(), tab.png()
    tab.page.get_by_label("Prompt", exact=True).fill("A pink colored tree.")
    tab.page.keyboard.press("Enter")
    tab.page.get_by_label("Method").select_option("soup")
    assert tab.settle().prompt == "A pink colored tree."
    asked = len(tab.own)
    tab.locate("#history button").last.click()
    assert tab.settle() == first
    assert tab.png() == png
    assert tab.page.get_by_label("Method").input_value() == "mpa"
    assert len(tab.own) == asked, "the image is still at hand"


def test_a_click_in_the_comparison_moves_there(visit):
    tab = visit().open_quick()
    tab.settle()
    tile = tab.page.get_by_role("button", name="Move to colourfulness")
    tab.until(lambda: tile.locator("img[src]").count())
    source = tile.locator("img").get_attribute("src")
    tile.click()
    assert tab.settle().weights[NAMES[1]] == 1.0
    assert tab.locate("#image").get_attribute("src") == source
    assert tile.get_attribute("aria-pressed") == "true"
    assert tab.locate("#strip .you img").get_attribute("src") == source


def test_the_copied_texts_make_the_same_image(visit, tmp_path):
    pytest.importorskip("openai")
    if not shutil.which("curl"):
        pytest.skip("curl is not installed: apt-get install curl")
    tab = visit(permissions=["clipboard-read", "clipboard-write"])
    tab.open_quick("prompt=A+car's+%22cup%22&seed=21&lambda=1.5&method=soup")
    facts = tab.settle()
    from workers.images import read_facts

    for name, command in {"Copy as curl": ["bash", "-ec"], "Copy as Python": [sys.executable, "-c"]}.items():
        tab.page.get_by_role("button", name=name).click()
        tab.page.get_by_role("status").filter(has_text="copied").wait_for()
        text = tab.page.evaluate("navigator.clipboard.readText()")
        assert tab.url in text
        place = tmp_path / name
        place.mkdir()
        done = subprocess.run([*command, text], cwd=place, capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == 0, done.stderr
        assert read_facts((place / "image.png").read_bytes()) == facts
        assert furthest(place / "image.png", io.BytesIO(tab.png())) <= 2, "but for its neighbours in the batch"


def test_the_plot_shows_what_was_measured_and_leads_there(visit, evaluated):
    tab = visit().open_quick()
    tab.settle()
    points = tab.locate("#plot .point")
    cells = json.loads((evaluated / "summary.json").read_text())["cells"]
    tab.until(lambda: points.count() == len(cells))
    assert "expected, interpolated" in tab.locate("#expected").inner_text()
    ring = tab.locate("#plot .here")
    before = ring.get_attribute("transform")
    point = tab.page.get_by_role("button", name="Blend (MPA), brightness 50 % + compressibility 50 %")
    point.hover()
    assert "brightness 50 %" in tab.locate("#tip").inner_text()
    point.click()
    assert tab.settle().weights == pytest.approx(dict(zip(NAMES, (0.5, 0, 0.5), strict=True)))
    assert ring.get_attribute("transform") != before
    expected, measured = tab.locate("#expected").inner_text(), point.get_attribute("aria-label")
    values = [float(text.split("brightness 0.")[-1][:2]) for text in (expected, measured)]
    assert values[0] == pytest.approx(values[1], abs=1), "at a measured point, what was measured"
    tab.page.get_by_label("Up", exact=True).select_option("compressibility")
    assert tab.page.get_by_role("group", name="brightness against compressibility").is_visible()
    tab.locate("#plot [tabindex='0']").focus()
    tab.page.keyboard.press("ArrowLeft")
    tab.page.keyboard.press("Enter")
    assert tab.settle()
    assert tab.locate("#plot .point:focus").count() == 1, "the keyboard goes on from here"
    tab.page.get_by_label("Method").select_option("cached")
    assert "was not evaluated" in tab.locate("#expected").inner_text()


def test_without_an_evaluation_the_plot_says_how_to_make_one(visit, evaluated):
    hidden = evaluated.parent.with_suffix(".away")
    evaluated.parent.rename(hidden)
    try:
        tab = visit().open_quick()
        command = tab.locate("#evaluate-command")
        command.wait_for()
        assert command.inner_text().endswith("--bundle sprites@2")
        assert tab.locate("#plot").is_hidden()
    finally:
        hidden.rename(evaluated.parent)


def test_refusals_stand_beside_the_field_they_name(visit):
    tab = visit().open_quick()
    tab.settle()
    field = tab.page.get_by_label("Prompt", exact=True)
    field.fill("many words that this small model has never heard of and cannot fit into its text")
    field.press("Enter")
    error = tab.locate("#error-prompt")
    error.wait_for()
    assert "tokens" in error.inner_text()
    assert field.get_attribute("aria-invalid") == "true"
    field.fill("A white colored house.")
    tab.page.get_by_role("button", name="Generate").click()
    assert tab.settle().prompt == "A white colored house."
    assert error.is_hidden()


def test_a_busy_server_is_asked_again(visit, page_service, page_url, monkeypatch):
    tab = visit().open_quick()
    tab.settle()
    tab.until(lambda: tab.locate("#strip .tile img[src]").count() == 5 and page_service.loop.in_flight == 0)
    bound = page_service.loop.max_queue_s
    weights = dict.fromkeys(NAMES, 1 / len(NAMES))
    body = {"prompt": "x", "weights": weights, "n": 8, "num_inference_steps": 200, "stream": True}
    with httpx.stream("POST", f"{page_url}/v1/images/generations", json=body, timeout=60) as answer:
        events = answer.iter_bytes()  # dropping it would hang up
        next(events)
        # only now: what is taken in under this bound has a millisecond to begin
        monkeypatch.setattr(page_service.loop, "max_queue_s", 0.001)
        tab.page.get_by_role("button", name="New seed").click()
        tab.page.get_by_role("button", name="Try now").wait_for()
        assert "busy" in tab.locate("#message").inner_text()
        assert "Trying again in" in tab.locate("#message").inner_text()
    tab.until(lambda: page_service.loop.in_flight == 0)
    monkeypatch.setattr(page_service.loop, "max_queue_s", bound)
    with contextlib.suppress(Exception):
        # unless the page has asked again by itself meanwhile
        tab.page.get_by_role("button", name="Try now").click(timeout=3_000)
    assert tab.settle()


def test_a_server_that_wants_a_token_gets_one(visit, page_service, tmp_path):
    from workers.routes import create_http
    from workers.tokens import Tokens

    tokens = Tokens(token_file(tmp_path / "tokens", alice=("images", "open sesame")))
    with serve(create_http(page_service, tokens=tokens)) as url:
        tab = visit(url, permissions=["clipboard-read", "clipboard-write"]).open_quick()
        field = tab.page.get_by_label("This endpoint asks for a token")
        field.fill("wrong")
        field.press("Enter")
        tab.page.get_by_text("That token was not accepted.").wait_for()
        field.fill("open sesame")
        tab.page.get_by_role("button", name="Continue").click()
        assert tab.settle()
        assert field.is_hidden()
        assert tab.page.evaluate("Object.values(localStorage).length") == 0
        tab.page.get_by_role("button", name="Copy as curl").click()
        tab.page.get_by_role("status").filter(has_text="copied").wait_for()
        text = tab.page.evaluate("navigator.clipboard.readText()")
        assert "Authorization: Bearer $DIFFUSION_BLEND_TOKEN" in text
        assert "sesame" not in text
        tab.page.close()


def test_behind_a_prefix_everything_is_asked_for_there(visit, page_service):
    from starlette.applications import Starlette
    from starlette.routing import Mount

    from workers.routes import create_http

    with serve(Starlette(routes=[Mount("/blend", create_http(page_service))])) as url:
        tab = visit(f"{url}/blend", permissions=["clipboard-read", "clipboard-write"]).open_quick()
        assert tab.settle()
        tab.page.get_by_role("button", name="Copy as curl").click()
        tab.page.get_by_role("status").filter(has_text="copied").wait_for()
        assert f"{url}/blend/v1/images/generations" in tab.page.evaluate("navigator.clipboard.readText()")
        tab.page.close()


def test_a_small_dark_screen(visit, evaluated):
    tab = visit(width=360, height=740, color_scheme="dark", has_touch=True).open_quick()
    tab.settle()
    tab.locate("#plot .point").first.wait_for()
    assert tab.page.evaluate("document.documentElement.scrollWidth") <= 360
    dark = tab.page.evaluate("getComputedStyle(document.body).backgroundColor")
    tab.page.emulate_media(color_scheme="light")
    light = tab.page.evaluate("getComputedStyle(document.body).backgroundColor")
    brightness = [sum(map(int, colour.strip("rgb()").split(","))) for colour in (dark, light)]
    assert brightness[0] < 150
    assert brightness[1] > 600


def test_every_control_has_a_name(visit, evaluated):
    tab = visit().open_quick()
    tab.settle()
    tab.locate("#plot .point").first.wait_for()
    tab.locate("#more summary").click()
    session = tab.page.context.new_cdp_session(tab.page)
    nodes = [node for node in session.send("Accessibility.getFullAXTree")["nodes"] if not node["ignored"]]
    named = {(node["role"]["value"], node.get("name", {}).get("value", "")) for node in nodes}
    assert [role for role, name in named if role in NAMED_ROLES and not name.strip()] == []
    assert {role for role, _ in named} >= {"button", "combobox", "slider", "spinbutton", "textbox", "main"}
    assert tab.locate("img:not([alt])").count() == 0


@pytest.mark.parametrize("count", [1, 2])
def test_other_numbers_of_adapters(visit, tiny_sd_dir, tiny_adapters, count):
    """One needs no preference; two have sliders alone."""
    from workers.engine_args import EngineArgs
    from workers.loading import open_engine
    from workers.routes import create_http
    from workers.service import GenerationService

    args = EngineArgs(base=str(tiny_sd_dir), adapters=dict(list(tiny_adapters.items())[:count]))
    service = GenerationService(open_engine(args), max_queue_s=60)
    with serve(create_http(service)) as url:
        tab = visit(url).open_quick()
        facts = tab.settle()
        assert facts.weights == pytest.approx(dict.fromkeys(list(tiny_adapters)[:count], 1 / count))
        assert tab.locate("#triangle svg").count() == 0
        assert tab.locate("#sliders input:visible").count() == (0 if count == 1 else 2)
        if count == 2:
            tab.page.get_by_role("slider", name="warm").fill("75")
            assert tab.settle().weights == pytest.approx({"warm": 0.75, "small": 0.25})
        png = base64.b64decode(tab.locate("#image").get_attribute("src").partition(",")[2])
        assert png == tab.png()
        tab.page.close()
    service.close()
