"""The page in a real browser before the shipped bundle: making images, and moving everything that can be moved."""

import json

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.long]
pytest_plugins = ["page_browser"]

NAMES = ("brightness", "colourfulness", "compressibility")
# Seconds of work on a busy machine: time enough to interrupt it.
LONG = "steps=200&guidance=3"


def corner(tab, shares):
    """Where in the window a mix lies in the triangle."""
    box = tab.locate("#triangle svg").bounding_box()
    x = shares[0] * 170 + shares[1] * 20 + shares[2] * 320
    y = shares[0] * 32 + shares[1] * 290 + shares[2] * 290
    return box["x"] + box["width"] * x / 340, box["y"] + box["height"] * y / 318


def test_the_first_visit_makes_an_image_and_its_neighbours_without_any_input(visit):
    tab = visit().open("")
    facts = tab.settle()
    assert facts.weights == pytest.approx(dict.fromkeys(NAMES, 1 / 3), abs=1e-3)
    assert (facts.kl_lambda, facts.method, facts.num_inference_steps) == (1.0, "mpa", 20)
    assert tab.locate("#image").get_attribute("alt").startswith(facts.prompt)
    [body] = tab.own
    assert body["partial_images"] > 0
    tiles = tab.locate("#strip .tile img[src]")
    tab.until(lambda: tiles.count() == 5)
    assert len({tiles.nth(index).get_attribute("src") for index in range(3)}) == 3
    assert len(tab.bodies) == 4, "the centre is at hand: it is what is shown"


def test_previews_and_progress_show_while_it_denoises(visit):
    tab = visit().open(LONG)
    tab.until(lambda: tab.locate("#image").is_visible())
    tab.until(lambda: tab.locate("#caption").inner_text().startswith("Step"))
    assert tab.locate("#frame").get_attribute("aria-busy") == "true"
    assert tab.locate("#progress").is_visible()
    assert tab.png() is None
    first = tab.locate("#image").get_attribute("src")
    tab.until(lambda: tab.locate("#image").get_attribute("src") != first)
    tab.locate("#steps").evaluate("field => field.closest('details').open = true")
    tab.locate("#steps").fill("4")
    tab.locate("#steps").press("Enter")
    assert tab.settle().num_inference_steps == 4
    assert tab.locate("#progress").is_hidden()


def test_a_drag_cancels_what_is_stale_and_ends_at_the_image_of_the_picker(visit, page_service):
    aborted = page_service.loop.counts["aborted"]
    tab = visit().open("steps=40&guidance=3")
    tab.until(lambda: tab.locate("#frame").get_attribute("aria-busy") == "true")
    mouse = tab.page.mouse
    mouse.move(*corner(tab, (0.3, 0.4, 0.3)))
    mouse.down()
    for share in (0.3, 0.4, 0.5, 0.6, 0.7, 0.8):
        mouse.move(*corner(tab, (share, 0.8 - share, 0.2)))
        tab.page.wait_for_timeout(150)
    mouse.up()
    facts = tab.settle()
    assert facts.weights == pytest.approx({NAMES[0]: 0.8, NAMES[1]: 0.0, NAMES[2]: 0.2}, abs=0.02)
    assert tab.locate("#triangle svg").get_attribute("aria-valuetext") == ", ".join(
        f"{name} {facts.weights[name] * 100:g} %" for name in NAMES
    )
    assert page_service.loop.counts["aborted"] > aborted
    assert len({json.dumps(body["weights"]) for body in tab.own}) > 2
    for label, weight in facts.weights.items():
        assert float(tab.page.get_by_label(label, exact=True).first.input_value()) == pytest.approx(100 * weight)


# Counts the requests for the own image that are neither answered in full nor given up.
WATCH_FETCH = """
const ask = window.fetch;
window.own = { begun: 0, running: new Set(), most: 0 };
window.fetch = async (path, options) => {
  if (!options?.body || !JSON.parse(options.body).stream) return ask(path, options);
  own.begun += 1;
  own.running.add(options.signal);
  own.most = Math.max(own.most, own.running.size);
  const end = () => own.running.delete(options.signal);
  options.signal.addEventListener("abort", end);
  const answer = await ask(path, options);
  answer.clone().text().then(end, end);
  return answer;
};
"""


def test_only_one_request_for_the_own_image_is_ever_under_way(visit):
    tab = visit()
    tab.page.add_init_script(WATCH_FETCH)
    tab.open("steps=40&guidance=3")
    tab.until(lambda: tab.own)
    for _ in range(4):
        tab.locate("#new-seed").click()
        tab.page.wait_for_timeout(200)
    tab.settle()
    begun, most = tab.page.evaluate("[own.begun, own.most]")
    assert most == 1
    assert begun > 2


def test_a_click_outside_goes_to_the_nearest_point_of_the_triangle(visit):
    tab = visit().open_quick()
    tab.page.mouse.click(*corner(tab, (1.04, 0.0, -0.04)))
    assert tab.settle().weights[NAMES[0]] == 1.0


def test_words_that_were_typed_but_not_sent_are_not_lost_to_a_drag(visit):
    tab = visit().open_quick()
    tab.settle()
    tab.page.get_by_label("Prompt", exact=True).fill("A blue colored bird.")
    tab.page.mouse.click(*corner(tab, (0.1, 0.1, 0.8)))
    facts = tab.settle()
    assert (facts.prompt, facts.weights[NAMES[2]]) == ("A blue colored bird.", 0.8)


def test_the_keyboard_moves_the_picker(visit):
    tab = visit().open_quick()
    before = tab.settle().weights
    picker = tab.page.get_by_role("slider", name="Preference between the rewards")
    picker.focus()
    picker.press("ArrowUp")
    up = tab.settle().weights
    assert up[NAMES[0]] == pytest.approx(before[NAMES[0]] + 15 / 258, abs=2e-3)
    picker.press("Shift+ArrowRight")
    right = tab.settle().weights
    assert right[NAMES[2]] - up[NAMES[2]] == pytest.approx(0.01, abs=2e-3)
    picker.press("2")
    assert tab.settle().weights[NAMES[1]] == 1.0
    picker.press("ArrowLeft")
    assert tab.wanted()["weights"][NAMES[1]] == 1.0, "there is nothing further out"
    picker.press("Home")
    assert tab.settle().weights == pytest.approx(before)


def test_sliders_share_the_rest_and_locks_hold(visit):
    tab = visit().open_quick("weights=brightness:0.2,colourfulness:0.2,compressibility:0.6")
    first, second, third = (tab.page.get_by_role("slider", name=name, exact=True) for name in NAMES)
    second.fill("60")
    assert tab.settle().weights == pytest.approx(dict(zip(NAMES, (0.1, 0.6, 0.3), strict=True)))
    lock = tab.page.get_by_role("button", name="Lock compressibility")
    lock.click()
    assert lock.get_attribute("aria-pressed") == "true"
    assert third.is_disabled()
    first.fill("50")
    assert tab.settle().weights == pytest.approx(dict(zip(NAMES, (0.5, 0.2, 0.3), strict=True)))
    first.fill("100")
    assert first.input_value() == "70", "no more than the lock leaves"
    tab.page.mouse.click(*corner(tab, (0.05, 0.05, 0.9)))
    locked = tab.settle().weights
    assert locked[NAMES[2]] == pytest.approx(0.3)
    assert sum(locked.values()) == pytest.approx(1)


def test_lambda_goes_beyond_1_with_a_warning_and_not_for_ls(visit):
    tab = visit().open_quick()
    dial, note = tab.page.get_by_role("slider", name="Strength"), tab.locate("#lambda-note")
    dial.fill("0")
    assert "base model" in note.inner_text()
    assert tab.settle().kl_lambda == 0
    dial.fill("2.5")
    assert "recommended" in note.inner_text()
    assert tab.settle().kl_lambda == 2.5
    tab.page.get_by_label("Method").select_option("ls")
    assert dial.input_value() == "1"
    assert "no further than 1" in note.inner_text()
    assert tab.settle().method == "ls"
    dial.fill("1.6")
    assert dial.input_value() == "1"
    assert "extrapolated" not in dial.get_attribute("aria-valuetext")
    tab.page.get_by_label("Method").select_option("soup")
    dial.fill("1.2")
    assert (tab.settle().method, tab.settle().kl_lambda) == ("soup", 1.2)


@pytest.mark.parametrize("way", ["Escape", "button"])
def test_cancelling_frees_the_engine_and_can_be_taken_back(visit, page_service, way):
    tab = visit().open(LONG)
    tab.until(lambda: tab.locate("#caption").inner_text().startswith("Step"))
    if way == "Escape":
        tab.page.keyboard.press("Escape")
    else:
        tab.page.get_by_role("button", name="Cancel").click()
    again = tab.page.get_by_role("button", name="Make it again")
    again.wait_for()
    assert tab.locate("#cancel").is_hidden()
    tab.until(lambda: page_service.loop.in_flight == 0)
    asked = len(tab.own)
    again.click()
    tab.until(lambda: len(tab.own) == asked + 1)
    tab.until(lambda: tab.locate("#message").is_hidden())
