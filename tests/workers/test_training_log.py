"""What a running fit writes and shows: metrics.jsonl and TensorBoard events without repetition, terminal and plain."""

import io
import json
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from PIL import Image
from rich.console import Console

from blend.finetune.config import TrainConfig
from workers import training_display
from workers.tensorboard import EventLog, write_sheets
from workers.training_display import Clock, LivePanel, PlainLines, Silence, duration, open_display, progress_line
from workers.training_log import TENSORBOARD, ProgressLog, read_metrics, scalars_of

CONFIG = TrainConfig.parse({"name": "colour", "reward": "colourfulness", "iterations": 6, "eval_every": 2})


def line(iteration: int, take: int = 0):
    """Metrics of an iteration; `take` tells a repeated one from the first."""
    metrics = {"iteration": iteration, "iterations": 6}
    if iteration:
        metrics |= {"reward_mean": 0.5 + take, "reward_ci": 0.1, "path_kl": 2.0 * iteration, "kl_weight": 0.01}
        metrics |= {"images_per_second": 12.5, "seconds": 4.0, "grad_norm": 0.3, "policy_loss": 0.1}
    if iteration % 2 == 0:
        metrics |= {"held_out_mean": 0.6 + 0.1 * iteration, "held_out_std": 0.2, "held_out_ci": 0.05}
        metrics |= {"held_out_path_kl": 3.0 * iteration, "held_out_diversity": 0.2}
        metrics |= {"watched": {"alignment": {"mean": 0.9, "std": 0.1, "ci": 0.02}}}
    return metrics


def read_events(directory: Path) -> list:
    """All events of a run's files in order, without what a later START purged: what TensorBoard shows."""
    from tensorboardX.proto.event_pb2 import Event, SessionLog

    events: list[Event] = []
    for path in sorted(directory.glob("*tfevents*")):
        data, at = path.read_bytes(), 0
        while at < len(data):  # length [8], its checksum [4], the message, its checksum [4]
            size = int.from_bytes(data[at : at + 8], "little")
            event = Event.FromString(data[at + 12 : at + 12 + size])
            if event.HasField("session_log") and event.session_log.status == SessionLog.START:
                events = [earlier for earlier in events if earlier.step < event.step]
            else:
                events.append(event)
            at += 12 + size + 4
    return events


def scalar_points(directory: Path) -> list[tuple[int, str, float]]:
    values = [(event.step, value) for event in read_events(directory) for value in event.summary.value]
    return [(step, value.tag, value.simple_value) for step, value in values if value.HasField("simple_value")]


def run(path: Path, lines, **options):
    with ProgressLog(CONFIG, path, options.get("on_progress"), options.get("show_bar", False)) as log:
        for metrics in lines:
            log(metrics)


@pytest.mark.parametrize(
    "sessions",
    [
        [[line(i) for i in range(7)]],
        # resumed from the checkpoint of iteration 2
        [[line(i) for i in range(5)], [line(i, take=1) for i in range(3, 7)]],
        # workers restarted within one session
        [[*(line(i) for i in range(5)), *(line(i, take=1) for i in range(3, 7))]],
        # interrupted before the first checkpoint, twice
        [[line(0)], [line(0), line(1)], [line(i, take=1) for i in range(7)]],
    ],
)
def test_every_iteration_is_in_the_files_once(tmp_path, sessions):
    path = tmp_path / "metrics.jsonl"
    for lines in sessions:
        run(path, lines)
    written = [json.loads(text) for text in path.read_text().splitlines()]
    assert [metrics["iteration"] for metrics in written] == list(range(7))
    latest = {metrics["iteration"]: metrics for lines in sessions for metrics in lines}
    assert written == [latest[i] for i in range(7)]
    points = scalar_points(tmp_path / TENSORBOARD)
    expected = [(m["iteration"], tag, value) for m in written for tag, value in scalars_of(m).items()]
    assert [point[:2] for point in points] == [point[:2] for point in expected]
    assert [point[2] for point in points] == pytest.approx([point[2] for point in expected])


def test_the_curves_of_one_line():
    assert scalars_of(line(2)) == {
        "reward/rollouts": 0.5,
        "reward/held_out": 0.8,
        "path_kl/rollouts": 4.0,
        "path_kl/held_out": 6.0,
        "path_kl/alpha": 0.01,
        "diversity/held_out": 0.2,
        "speed/images_per_second": 12.5,
        "speed/seconds": 4.0,
        "update/policy_loss": 0.1,
        "update/grad_norm": 0.3,
        "watched/alignment": 0.9,
    }
    assert "diversity/held_out" not in scalars_of({**line(2), "held_out_diversity": None})


def test_a_line_that_was_cut_short_is_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    run(path, [line(0), line(1)])
    with path.open("a") as file:
        file.write('{"iteration": 2, "rew')
    run(path, [line(2), line(3)])
    assert [metrics["iteration"] for metrics in read_metrics(path)] == [0, 1, 2, 3]
    assert len(path.read_text().splitlines()) == 4


def test_events_are_on_disk_before_the_run_ends(tmp_path):
    log = EventLog(tmp_path)
    log.scalars(1, {"reward/rollouts": 0.25})
    assert scalar_points(tmp_path) == [(1, "reward/rollouts", 0.25)]
    log.close()


def test_sheets_are_images_and_replace_their_older_selves(tmp_path):
    rows = {i: torch.full((3, 8, 16), 40 * i, dtype=torch.uint8) for i in (0, 2, 4)}
    write_sheets(tmp_path, {0: rows[0]})
    write_sheets(tmp_path, rows)
    found = [(event.step, value) for event in read_events(tmp_path) for value in event.summary.value]
    assert [(step, value.tag) for step, value in found] == [(i, "held_out/samples") for i in (0, 2, 4)]
    for step, value in found:
        with Image.open(io.BytesIO(value.image.encoded_image_string)) as picture:
            assert picture.size == (16, 8)
            assert picture.getpixel((3, 3)) == (40 * step,) * 3


def test_progress_reaches_the_caller_and_stderr_line_by_line(tmp_path, capsys):
    seen = []
    run(tmp_path / "metrics.jsonl", [line(0), line(1), line(2)], on_progress=seen.append, show_bar=True)
    assert seen == [line(0), line(1), line(2)]
    captured = capsys.readouterr()
    assert captured.out == ""
    lines = captured.err.splitlines()
    assert len(lines) == 3
    assert "\x1b" not in captured.err
    assert "\r" not in captured.err
    assert lines[0] == "train colour 0/6: held out reward 0.600 ± 0.050, diversity 0.200, alignment 0.900 ± 0.020"
    assert lines[1].startswith("train colour 1/6: reward 0.500 ± 0.100, KL 2.0 nats, alpha 0.01, 12.5 images/s")
    assert "held out reward 0.800 ± 0.050, KL 6.0 nats" in lines[2]


def test_a_terminal_gets_a_panel(monkeypatch):
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    assert isinstance(open_display(CONFIG), PlainLines)
    assert isinstance(open_display(CONFIG, wanted=False), Silence)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert isinstance(open_display(CONFIG), LivePanel)
    with ThreadPoolExecutor() as threads:
        assert isinstance(threads.submit(open_display, CONFIG).result(), PlainLines)


def test_the_panel_holds_rollouts_the_newest_evaluation_and_the_reason_for_stopping(monkeypatch):
    times = iter(range(0, 1000, 10))
    monkeypatch.setattr(training_display.time, "monotonic", lambda: float(next(times)))
    console = Console(file=io.StringIO(), force_terminal=True, width=160, color_system=None)
    panel = LivePanel(CONFIG, console)
    panel.show(line(0))
    panel.show(line(1))
    panel.show(line(2))
    panel.show(line(3))
    console.file = io.StringIO()
    console.print(panel.render())
    text = console.file.getvalue()
    assert "train colour" in text
    assert "3/6" in text
    assert " left" in text
    assert "reward 0.500 ± 0.100, KL 6.0 nats, alpha 0.01, 12.5 images/s" in text
    assert "reward 0.800 ± 0.050 (+1.00 base std), KL 6.0 nats, diversity 0.200 (base 0.200)" in text
    assert "at iteration 2" in text
    panel.show({**line(4), "stopped": "path KL 12.0 nats, above guard.kl 10", "kept_iteration": 2})
    console.print(panel.render())
    assert "path KL 12.0 nats, above guard.kl 10; the adapter of iteration 2 is kept" in console.file.getvalue()


def test_the_time_left_follows_the_pace(monkeypatch):
    now = 100.0
    monkeypatch.setattr(training_display.time, "monotonic", lambda: now)
    clock = Clock()
    clock.tick(line(0))
    assert clock.left() is None
    now = 110.0
    clock.tick(line(1))
    now = 112.0
    assert clock.left() == pytest.approx(5 * 10 - 2)
    clock.tick(line(1))  # restarted workers: the trainer's own seconds until two iterations were seen
    assert clock.left() == pytest.approx(5 * 4)
    clock.tick({**line(2), "stopped": "early"})
    assert clock.left() is None
    assert duration(3723.4) == "1:02:03"


def test_a_line_says_why_a_run_stopped():
    text = progress_line({**line(4), "stopped": "path KL 51.0 nats, above guard.kl 50", "kept_iteration": 2})
    assert text.endswith("stopped: path KL 51.0 nats, above guard.kl 50; the adapter of iteration 2 is kept")
    text = progress_line({**line(6), "kept_iteration": 4})
    assert text.endswith("; the adapter of iteration 4 is kept: the best within the KL budget")
