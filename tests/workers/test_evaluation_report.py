"""The HTML report: what it says of an evaluation, with and without oracles and a comparison, and who can read it."""

import re
from html.parser import HTMLParser
from itertools import pairwise

import evaluated
import numpy as np
import pytest
from colours import contrast

from workers.evaluation import style
from workers.evaluation.files import FIGURES
from workers.evaluation.grid import plan_cells
from workers.evaluation.pictures import LARGEST_THUMBNAIL, data_uri, pictured_cells
from workers.evaluation.report import render_report
from workers.evaluation.report_comparison import insert, verdict
from workers.evaluation.report_pages import Chart
from workers.evaluation.report_words import lede

VOID = {"meta", "img", "br", "link", "input"}


class Page(HTMLParser):
    """The elements of a report, their attributes and texts; fails where tags do not close in order."""

    def __init__(self, html):
        super().__init__()
        self.elements, self.open = [], []
        self.feed(html)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        element = {"tag": tag, "text": "", "within": [one["tag"] for one in self.open], **dict(attrs)}
        self.elements.append(element)
        if tag not in VOID:
            self.open.append(element)

    def handle_endtag(self, tag):
        assert self.open.pop()["tag"] == tag

    def handle_data(self, data):
        for element in self.open:
            element["text"] += data

    def all(self, *tags):
        return [element for element in self.elements if element["tag"] in tags]

    def text_of(self, name):
        """Text of the section with that id in its heading."""
        return next(one["text"] for one in self.all("section") if one.get("aria-labelledby") == name)

    def has(self, name):
        return any(element.get("id") == name for element in self.elements)


@pytest.fixture(scope="module", autouse=True)
def coarse():
    """Figures of few pixels, which are drawn faster."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(style, "DPI", 50)
        yield


def rendered(config, comparison=None, **values):
    analysis = evaluated.analysed(config, **values)
    drawn = {name: draw(analysis) for name, draw in FIGURES.items()}
    charts = {name: Chart(png, png) for name, png in drawn.items() if png is not None}
    rows = pictured_cells(plan_cells(config, evaluated.BASIS))
    pixels = np.full((8, 8, 3), 200, dtype=np.uint8)
    pictures = {(cell, prompt): pixels for cell in rows for prompt in range(2)}
    return render_report(analysis, evaluated.facts(analysis, config), charts, pictures, rows, comparison)


@pytest.fixture(scope="module")
def plain():
    return rendered(evaluated.PLAIN)


@pytest.fixture(scope="module")
def full():
    return rendered(evaluated.WITH_ORACLES, evaluated.comparison("improvement"))


@pytest.fixture(scope="module", params=["plain", "full"])
def page(request):
    return Page(request.getfixturevalue(request.param))


def test_seconds_are_left_out_where_they_hold_the_measuring_of_path_kl(plain, full):
    assert "Seconds per image" in plain
    assert "Seconds per image" not in full
    assert "Seconds are left out: they hold what measuring the path KL took" in full


def test_every_figure_says_in_words_what_it_shows(page):
    figures = page.all("figure")
    images = [element for element in page.all("img") if "figure" in element["within"]]
    assert len(images) == 2 * len(figures)  # light and dark
    assert all(len(image["alt"]) > 60 and re.search(r"\d", image["alt"]) for image in images)
    captions = page.all("figcaption")
    assert len(captions) == len(figures)
    assert all(caption["text"].strip() for caption in captions)
    assert all(image["alt"] for image in page.all("img"))


def test_headings_descend_without_a_gap(page):
    levels = [int(element["tag"][1]) for element in page.all("h1", "h2", "h3", "h4")]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(below - above <= 1 for above, below in pairwise(levels))
    assert all(element["text"].strip() for element in page.all("h1", "h2", "h3"))


def test_landmarks_names_and_links_hold_together(page):
    assert [len(page.all(tag)) for tag in ("header", "nav", "main", "footer")] == [1, 1, 1, 1]
    assert page.all("html")[0]["lang"] == "en"
    names = [element["id"] for element in page.elements if "id" in element]
    assert len(names) == len(set(names))
    sections = page.all("section")
    assert {element["aria-labelledby"] for element in sections} <= set(names)
    assert {element["href"] for element in page.all("a")} <= {f"#{name}" for name in names}
    # what scrolls can be reached with the keyboard, and says what it is
    scrolled = [element for element in page.all("div") if "scroll" in element.get("class", "")]
    assert all(one["tabindex"] == "0" and one["role"] == "region" and one["aria-label"] for one in scrolled)


def test_tables_have_captions_and_scopes(page):
    tables = page.all("table")
    assert len(page.all("caption")) == len(tables)
    assert all(caption["text"].strip() for caption in page.all("caption"))
    assert all(element["scope"] in ("col", "row") for element in page.all("th"))


def test_nothing_is_fetched_and_nothing_is_run(page):
    references = [element[key] for element in page.elements for key in ("src", "href", "srcset") if key in element]
    assert all(
        reference.startswith(("data:image/png;base64,", "data:image/jpeg;base64,", "#")) for reference in references
    )
    assert not page.all("script", "link", "iframe", "object", "form")
    style = page.all("style")[0]["text"]
    assert "url(" not in style
    assert "@import" not in style


def test_paper_is_light_and_shows_what_is_folded(full):
    style = Page(full).all("style")[0]["text"]
    printed = style[style.index("@media print") :]
    assert "details::details-content" in printed
    assert "color-scheme:light" in printed
    assert "break-inside:avoid" in printed
    # the dark theme and its figures are for screens alone
    assert re.findall(r"@media ([^{]*)prefers-color-scheme", style) == ["screen and ("] * 2


@pytest.mark.parametrize("theme", [0, 1])
def test_text_stands_out_in_both_themes(full, theme):
    style = Page(full).all("style")[0]["text"]
    palette = [dict(re.findall(r"--(\w+):(#\w+)", block)) for block in re.findall(r":root \{([^}]*)\}", style)]
    colours = {
        name: value if len(value) == 7 else "#" + "".join(2 * digit for digit in value[1:])
        for name, value in palette[theme].items()
    }
    for background in ("paper", "raised"):
        assert (
            min(contrast(colours[background], colours[name]) for name in ("ink", "muted", "accent", "good", "bad"))
            >= 4.5
        )


def test_the_retraining_section_is_there_with_oracles_alone(plain, full):
    with_oracles, without = Page(full), Page(plain)
    assert not without.has("retraining")
    assert "oracle" not in " ".join(element["text"] for element in without.all("body"))
    text = with_oracles.text_of("retraining")
    for name in (
        "Retrained (oracle)",
        "Blend (MPA)",
        "Best of 4",
        "CoDe",
        "LoRA Switch",
        "Rows run backward",
        "Memory",
    ):
        assert name in text
    assert "The dial against retraining" in with_oracles.text_of("dial")
    assert with_oracles.has("reward-kl")
    assert not without.has("reward-kl")
    assert without.has("cost")


def test_measured_columns_appear_and_others_do_not(plain, full):
    heads = {element["text"] for element in Page(full).all("th")}
    assert {
        "Path KL",
        "Decodes",
        "Colours right",
        "Things right",
        "Prompt followed",
        "Short of the best (IGD+)",
    } <= heads
    heads = {element["text"] for element in Page(plain).all("th")}
    assert not heads & {"Path KL", "Decodes", "Rows run backward", "Colours right", "Short of the best (IGD+)"}
    assert "Memory, MB" in heads


@pytest.mark.parametrize(
    ("found", "factor", "kind", "words"),
    [
        ("improvement", 1.1, "better", ["Better than the champion", "sprites@2", "10 % more", "4 clearly better"]),
        ("regression", 0.9, "worse", ["Worse than the champion", "10 % less", "4 clearly worse"]),
        ("no clear difference", 1.001, "alike", ["No clear difference from the champion", "it may be chance"]),
        ("not compared", 1.0, "unknown", ["Nothing to compare it with yet", "Compared with sprites@2"]),
    ],
)
def test_the_verdict_says_better_or_worse_by_how_much_and_how_sure(plain, found, factor, kind, words):
    comparison = evaluated.comparison(found, factor)
    assert verdict(comparison, "95 %").kind == kind
    page = Page(insert(plain, comparison, "95 %"))
    text = " ".join(page.text_of("verdict").split())
    for word in words:
        assert word in text
    assert any(element.get("class") == f"verdict {kind}" for element in page.all("section"))
    assert page.has("changes") == (kind != "unknown")


def test_a_report_without_a_comparison_gives_no_verdict(plain):
    assert verdict(None, "95 %") is None
    page = Page(plain)
    assert not page.has("verdict")
    assert not page.has("changes")


def test_a_comparison_takes_the_place_of_another(plain):
    better = insert(plain, evaluated.comparison("improvement"), "95 %")
    worse = insert(better, evaluated.comparison("regression", 0.9), "95 %")
    assert worse == insert(plain, evaluated.comparison("regression", 0.9), "95 %")
    assert "Better than" not in worse
    assert insert("an old report", evaluated.comparison("improvement"), "95 %") == "an old report"


def test_what_changed_lists_the_bundle_the_lines_and_single_settings(plain):
    comparison = evaluated.comparison("improvement")
    comparison["changed"] = ["adapter <b>x</b>: x@1 became x@2 \\1"]
    cell = {"method": "mpa", "weights": {"brightness": 0.5, "colourfulness": 0.5}, "kl_lambda": 1.0}
    comparison["cells"] = [{**cell, "rewards": {"brightness": comparison["fronts"][0]}}]
    html = insert(plain, comparison, "95 %")
    text = Page(html).text_of("changes")
    for words in ("adapter <b>x</b>: x@1 became x@2 \\1", "Reward space: Adapters alone", "Gain kept: Blend (MPA)"):
        assert words in text
    assert "Blend (MPA) · brightness 50 % + colourfulness 50 %: brightness" in text
    assert "<b>x" not in html


def test_the_cost_is_told_where_it_moved(plain):
    comparison = evaluated.comparison("improvement")
    assert any("costs as much as before" in sentence for sentence in verdict(comparison, "95 %").sentences)
    comparison["methods"][0]["rows"] = {"then": 80.0, "now": 60.0}
    told = verdict(comparison, "95 %").sentences[-1]
    assert told == "An image of Blend (MPA) costs 25 % less than before: 60 UNet rows after 80."


def test_an_evaluation_in_which_nothing_was_gained_has_a_report_without_empty_parts():
    page = Page(rendered(evaluated.PLAIN, effects=evaluated.EFFECTS * 0, noise=0.5))
    assert not page.has("shares")
    assert not page.has("cost")
    assert "do not clearly improve" in page.all("main")[0]["text"]
    assert len(page.all("figure")) == 2


def test_the_lede_tells_how_near_retraining_the_blend_comes():
    sentences = lede(evaluated.analysed(evaluated.WITH_ORACLES))
    assert re.search(r"Without retraining, Blend \(MPA\) reaches \d+ % \(\d+ to \d+ %\) of what models", sentences[1])
    assert "The best of the other approaches" in sentences[1]
    assert "Best of 4" not in sentences[2]


def test_the_picture_grid_shows_each_retrained_model_after_its_mix():
    cells = plan_cells(evaluated.WITH_ORACLES, evaluated.BASIS)
    rows = [cells[row] for row in pictured_cells(cells)]
    oracles = [place for place, cell in enumerate(rows) if cell.method == "oracle"]
    assert len(oracles) == 3
    for place in oracles:
        assert rows[place - 1].method == "mpa"
        assert rows[place - 1].weights == pytest.approx(rows[place].weights)
    assert [cell.method for cell in rows[-5:]] == ["best_of_4", "code_4_5", "rgg_2", "switch", "composite"]


def test_pictures_are_as_small_as_they_can_be_without_loss_of_colour():
    flat = np.full((64, 64, 3), 200, dtype=np.uint8)
    noisy = np.random.default_rng(0).integers(0, 255, (512, 512, 3), dtype=np.uint8)
    assert data_uri(flat).startswith("data:image/png;base64,")
    assert data_uri(noisy).startswith("data:image/jpeg;base64,")
    assert len(data_uri(noisy)) < 3 * LARGEST_THUMBNAIL**2
