"""What a run leaves for people: curve, sample sheet, model card and report, from metrics known in advance."""

import base64
import io
import math
import re

import pytest
import torch
from matplotlib.axes import Axes
from PIL import Image

from blend.finetune.config import TrainConfig
from workers.provenance import base_licence, git_commit, package_version
from workers.training_curve import curve_of, draw_curve
from workers.training_report import Outcome, markdown_report, outcome_sentence, write_card
from workers.training_sheet import (
    CELL,
    LABEL_WIDTH,
    MARGIN,
    choose_rows,
    draw_sheet,
    row_label,
    row_pixels,
    sheet_of,
    sheet_prompts,
)

CONFIG = TrainConfig.parse(
    {
        "name": "colour",
        "reward": "colourfulness",
        "prompts": ("A red colored car.", "A blue colored cup."),
        "held_out_prompts": ("A green colored car.",),
        "iterations": 9,
        "eval_every": 3,
        "kl_weight": 0.01,
        "kl_target": 40.0,
        "guard": {"kl": 50.0, "drop": 1.0, "watch": {"alignment": 1.0}},
        "prompts_per_iteration": 2,
        "images_per_prompt": 4,
    }
)


def make_history(*, plain: bool = False, stopped: bool = False):
    """Nine iterations whose reward rises by 0.1 each, with evaluations at 0, 3, 6 and 9."""
    history = []
    for at in range(10):
        line = {"iteration": at, "iterations": 9}
        if at:
            line |= {"reward_mean": 1 + 0.1 * at, "reward_ci": 0.05, "path_kl": 5.0 * at, "images_per_second": 20.0}
            line |= {} if plain else {"kl_weight": 0.01 * 1.5**at}
        if at % 3 == 0:
            line |= {"held_out_mean": 1 + 0.1 * at, "held_out_std": 0.2, "held_out_ci": 0.04}
            line |= {"held_out_path_kl": 4.0 * at}
            if not plain:
                watched = {"alignment": {"mean": 0.9 - 0.02 * at, "std": 0.1, "ci": 0.01}}
                line |= {"held_out_diversity": 0.25 - 0.01 * at, "watched": watched}
        history.append(line)
    if stopped:
        history[-1] |= {"stopped": "path KL 51.0 nats, above guard.kl 50", "kept_iteration": 6}
    return history


def lines_of(axes: Axes) -> dict[str, list[tuple[float, float]]]:
    drawn = {line.get_label(): line for line in axes.get_lines()}
    drawn |= {bar.get_label(): bar.lines[0] for bar in axes.containers}
    points = {label: zip(*line.get_data(), strict=True) for label, line in drawn.items()}
    return {label: [(float(x), round(float(y), 9)) for x, y in pairs] for label, pairs in points.items()}


def rounded(points) -> list[tuple[float, float]]:
    return [(float(x), round(y, 9)) for x, y in points]


def test_the_curve_shows_every_figure_of_the_metrics():
    figure = curve_of(CONFIG, make_history())
    reward, kl, alpha, watched, diversity = figure.axes
    assert "kl_target 40" in reward.get_title()
    assert lines_of(reward)["rollouts"] == rounded((i, 1 + 0.1 * i) for i in range(1, 10))
    assert lines_of(reward)["held out\n(95 % interval)"] == rounded((i, 1 + 0.1 * i) for i in (0, 3, 6, 9))
    assert lines_of(kl)["held out"] == rounded((i, 4.0 * i) for i in (0, 3, 6, 9))
    assert {y for _, y in lines_of(kl)["kl_target"]} == {40.0}
    assert {y for _, y in lines_of(kl)["guard.kl"]} == {50.0}
    assert lines_of(alpha)["in force"][-1] == (9, pytest.approx(0.01 * 1.5**9))
    assert lines_of(watched)["alignment"] == rounded((i, -0.2 * i) for i in (0, 3, 6, 9))
    assert lines_of(diversity)["held out"] == rounded((i, 0.25 - 0.01 * i) for i in (0, 3, 6, 9))
    assert {y for _, y in lines_of(watched)["guard.watch.alignment"]} == {-1.0}
    shown = [text.get_text() for text in kl.get_legend().get_texts()]
    assert shown == ["rollouts", "held out", "guard.kl", "kl_target"]


def test_a_plain_run_has_two_panels_and_a_stopped_one_marks_what_is_published():
    config = CONFIG.model_copy(update={"kl_target": None})
    assert len(curve_of(config, make_history(plain=True)).axes) == 2
    for axes in curve_of(CONFIG, make_history(stopped=True)).axes:
        assert lines_of(axes)["published"][0][0] == 6


def test_curve_png_is_the_same_each_time(tmp_path):
    for name in ("one.png", "two.png"):
        draw_curve(CONFIG, make_history(), tmp_path / name)
    assert (tmp_path / "one.png").read_bytes() == (tmp_path / "two.png").read_bytes()


def flat_sheets(iterations, size=32, count=3):
    """Sheets whose images of iteration i are all of grey 10 + i."""
    return {i: torch.full((count, 3, size, size), 10 + i, dtype=torch.uint8) for i in iterations}


def test_the_sheet_has_one_labelled_row_per_evaluation(tmp_path):
    sheets = flat_sheets((0, 3, 6, 9))
    draw_sheet(sheets, make_history(), tmp_path / "sheet.png")
    with Image.open(tmp_path / "sheet.png") as picture:
        sheet = picture.copy()
    assert sheet.size == (LABEL_WIDTH + 3 * (CELL + MARGIN), MARGIN + 4 * (CELL + MARGIN))
    for row, iteration in enumerate(sheets):
        middle = MARGIN + row * (CELL + MARGIN) + CELL // 2
        for column in range(3):
            at = LABEL_WIDTH + column * (CELL + MARGIN) + CELL // 2, middle
            assert sheet.getpixel(at) == (10 + iteration,) * 3
        label = sheet.crop((0, middle - CELL // 2, LABEL_WIDTH, middle + CELL // 2)).convert("L")
        assert label.getextrema()[0] < 100, "no text beside the row"


def test_prompts_stand_above_their_columns():
    config = CONFIG.model_copy(update={"held_out_images_per_prompt": 1})
    held_out = ("A green colored car.", "A blue cup and a green cell phone.", "A red colored bird.")
    prompts = sheet_prompts(config, held_out)
    assert prompts[:4] == [*held_out, held_out[0]]
    sheets = flat_sheets((0, 9))
    bare = sheet_of(sheets, make_history())
    sheet = sheet_of(sheets, make_history(), prompts=prompts)
    above = sheet.height - bare.height
    assert sheet.width == bare.width
    rows = sheet.crop((0, above + MARGIN, *sheet.size)), bare.crop((0, MARGIN, *bare.size))
    assert rows[0].tobytes() == rows[1].tobytes()
    for column in range(3):
        left = LABEL_WIDTH + column * (CELL + MARGIN)
        assert sheet.crop((left, 0, left + CELL, above)).convert("L").getextrema()[0] < 100
        # and none reaches into its neighbour
        assert sheet.crop((left + CELL, 0, left + CELL + MARGIN, above)).convert("L").getextrema()[0] > 200


def test_row_labels_say_which_adapter_and_how_good():
    lines = {line["iteration"]: line for line in make_history(stopped=True)}
    assert row_label(0, lines[0]) == ["base", "reward 1.000 ± 0.040", "diversity 0.250"]
    expected = ["iteration 6", "reward 1.600 ± 0.040", "KL 24.0 nats", "diversity 0.190", "published"]
    assert row_label(6, lines[6], kept=True) == expected


def test_labels_fit_beside_the_images():
    wide = make_history()
    wide[3] |= {"held_out_mean": -12.345, "held_out_ci": 10.123, "held_out_path_kl": 12345.6}
    sheet = sheet_of(flat_sheets((0, 3)), wide)
    gap = sheet.crop((LABEL_WIDTH - 3, 0, LABEL_WIDTH, sheet.height)).convert("L")
    assert gap.getextrema()[0] > 200


def test_a_long_run_shows_the_first_the_last_and_the_published_row():
    sheets = flat_sheets(range(0, 200, 5), size=2)
    chosen = choose_rows(sheets, kept=185)
    assert len(chosen) == 12
    assert list(chosen) == sorted(chosen)
    assert {0, 185, 195} <= set(chosen)
    assert choose_rows(flat_sheets((0, 3)), kept=None).keys() == {0, 3}


@pytest.mark.parametrize(("size", "expected"), [(32, 128), (64, 128), (100, 100), (512, 128), (1024, 128)])
def test_images_of_any_size_become_cells(size, expected):
    images = torch.randint(0, 256, (2, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    pixels = row_pixels(images)
    assert pixels.shape == (expected + MARGIN, 2 * (expected + MARGIN), 3)
    if size == 512:
        assert pixels[:128, :128].float().mean().item() == pytest.approx(images[0].float().mean().item(), abs=0.5)


def test_outcome_is_that_of_the_published_adapter():
    outcome = Outcome.of(CONFIG, make_history(stopped=True))
    assert outcome.tuned["iteration"] == 6
    assert outcome.gain == pytest.approx(3.0)
    assert outcome.alpha == pytest.approx(0.01 * 1.5**6)
    assert outcome.diversity == pytest.approx((0.25, 0.19))
    sentence = outcome_sentence(CONFIG, make_history(stopped=True))
    assert "stopped early: path KL 51.0 nats, above guard.kl 50, the adapter of iteration 6 is kept" in sentence
    history = make_history()
    assert "is kept" not in outcome_sentence(CONFIG, history)
    history[-1]["kept_iteration"] = 6
    assert "the adapter of iteration 6 is kept, the best within the KL budget" in outcome_sentence(CONFIG, history)
    plain = Outcome.of(CONFIG, make_history(plain=True))
    assert (plain.alpha, plain.diversity, plain.watched) == (0.01, None, {})


def table_rows(text: str) -> dict[str, list[str]]:
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]
    return {row[0]: row[1:] for row in cells}


def test_the_card_states_what_was_done(tmp_path):
    write_card(CONFIG, CONFIG.prompts, CONFIG.held_out_prompts, make_history(stopped=True), tmp_path / "README.md")
    card = (tmp_path / "README.md").read_text()
    rows = table_rows(card)
    assert rows["colourfulness (trained)"] == ["1.0000 ± 0.0400", "1.6000 ± 0.0400", "+3.00"]
    assert rows["alignment (watched)"] == ["0.9000 ± 0.0100", "0.7800 ± 0.0100", "-1.20"]
    assert rows["path KL (nats)"][1] == "24.00"
    assert rows["diversity within a prompt"][:2] == ["0.2500", "0.1900"]
    assert rows["iterations"] == ["6 of 9"]
    assert rows["images"] == ["48 from 2 prompts, 4 of each at a time"]
    assert rows["kl_weight (alpha) at the end"] == ["0.1139, raised from 0.01 to hold kl_target = 40 nats"]
    assert rows["seed"] == ["0"]
    assert rows["stopped early"] == ["path KL 51.0 nats, above guard.kl 50"]
    assert package_version() in rows["code"][0]
    assert "license: apache-2.0" in card
    assert "64 images of fixed seeds, from 1 held-out prompts" in card
    for prompt in CONFIG.prompts:
        assert f"- {prompt}\n" in card
    assert set(re.findall(r"!\[.*?\]\((.*?)\)", card)) == {"curve.png", "samples.png"}


def test_code_and_licence_are_known_or_left_out(tiny_sd_dir, tmp_path):
    commit = git_commit()
    assert commit is None or re.fullmatch(r"[0-9a-f]{40}(-dirty)?", commit)
    assert base_licence("sprites") == "Apache-2.0"
    assert base_licence(str(tiny_sd_dir)) is None


def test_the_licence_of_a_base_comes_from_its_card(tiny_sd_dir, tmp_path):
    base = tmp_path / "base"
    base.mkdir()
    for path in tiny_sd_dir.iterdir():
        (base / path.name).symlink_to(path)
    (base / "README.md").write_text("---\nlicense: creativeml-openrail-m\ntags: [x]\n---\n# Base\n")
    assert base_licence(str(base)) == "creativeml-openrail-m"
    config = CONFIG.model_copy(update={"base_model": str(base)})
    write_card(config, CONFIG.prompts, CONFIG.held_out_prompts, make_history(), tmp_path / "README.md")
    assert "\nlicense: creativeml-openrail-m\n" in (tmp_path / "README.md").read_text()


def test_the_report_carries_its_pictures_at_a_bounded_size(tmp_path):
    noise = torch.randint(0, 256, (8, 3, 128, 128), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    draw_curve(CONFIG, make_history(), tmp_path / "curve.png")
    draw_sheet({0: noise, 9: noise}, make_history(), tmp_path / "samples.png")
    text = markdown_report(CONFIG, make_history(), "colour@1", tmp_path / "curve.png", tmp_path / "samples.png")
    kinds = re.findall(r"data:image/(\w+);base64,([\w+/=]+)", text)
    assert [kind for kind, _ in kinds] == ["png", "jpeg"]
    with Image.open(tmp_path / "samples.png") as whole, Image.open(io.BytesIO(base64.b64decode(kinds[1][1]))) as shown:
        assert shown.size == whole.size
    assert len(kinds[1][1]) < (tmp_path / "samples.png").stat().st_size
    assert math.isclose(Outcome.of(CONFIG, make_history()).gain, 4.5)
