"""The report page of a training run, from run directories that are whole, odd or broken."""

import base64
import io
import json
import math
import re
from html.parser import HTMLParser

import pytest

np = pytest.importorskip("numpy", reason="the report needs the extra 'train'")
Image = pytest.importorskip("PIL.Image", reason="the report needs the extra 'train'")
pytest.importorskip("matplotlib", reason="the report needs the extra 'train'")
pytest.importorskip("jinja2", reason="the report needs the extra 'train'")

from rayfuse.train import report  # noqa: E402

TERMS = ["rgb_loss", "distortion_loss", "interlevel_loss", "feature_loss", "orientation_loss"]
MAPS = ["photo", "render", "error", "depth", "accumulation", "normal", "feature", "feature_target"]


class Page(HTMLParser):
    """Tags with their attributes, the text by tag, and every id."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.text, self.open = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self.open.append(tag)

    def handle_endtag(self, tag):
        while self.open and self.open.pop() != tag:
            pass

    def handle_data(self, data):
        if not {"style", "script"} & set(self.open):
            self.text.append(data)

    def all(self, tag):
        return [attrs for name, attrs in self.tags if name == tag]

    def says(self, words):
        return words in re.sub(r"\s+", " ", "".join(self.text))


def picture(height, width, seed=0):
    """A smooth colour image with a little noise, uint8 [height, width, 3]."""
    y, x = np.mgrid[0 : 1 : height * 1j, 0 : 1 : width * 1j]
    smooth = np.stack([x, y, 0.5 + 0.5 * np.sin(6 * (x + y) + seed)], axis=-1)
    noise = np.random.default_rng(seed).normal(0, 0.01, smooth.shape)
    return (255 * (smooth + noise).clip(0, 1)).astype(np.uint8)


def record(step, seconds=None, **changes):
    losses = {name: (i + 1) * 0.1 / (1 + step / 50) for i, name in enumerate(TERMS)}
    weights = dict(zip(TERMS, [1.0, 2e-3, 1.0, 1e-3, 1e-4], strict=True))
    weighted = {name: losses[name] * weights[name] for name in TERMS}
    return {
        "step": step,
        "seconds": step * 0.05 if seconds is None else seconds,
        "lr": {"grid": 0.05 * 0.5 ** (step / 500), "mlp": 0.01 * 0.5 ** (step / 500)},
        "losses": losses,
        "weights": weights,
        "weighted": weighted,
        "total": sum(weighted.values()),
        "metrics": {"psnr": 12 + 4 * math.log10(1 + step), "distortion": 0.1, "feature_error": 0.3},
    } | changes


def write_log(run_dir, records):
    lines = "".join(json.dumps(entry) + "\n" for entry in records)
    (run_dir / "metrics.jsonl").write_text(lines)


def write_views(run_dir, count, size=(60, 90), psnr=lambda i: 25.0 + i, **changes):
    (run_dir / "renders").mkdir(exist_ok=True)
    views = []
    for i in range(count):
        images = {}
        for key in MAPS:
            images[key] = f"renders/{i:04d}_{key}.png"
            Image.fromarray(picture(*size, seed=i)).save(run_dir / images[key])
        views.append({"name": f"view_{i:04d}", "psnr": psnr(i), "ssim": 0.9, "images": images})
    evaluation = {
        "scene": "motorcycle",
        "held_out": "views",
        "psnr": 26.81,
        "ssim": 0.912,
        "baseline": {"name": "neighbour fill", "psnr": 25.06},
        "views": views,
        "seconds": {"load": 0.4, "features": 3.2, "train": 152.0, "evaluate": 8.1},
        "steps": 3000,
        "parameters": 1912345,
        "peak_memory_mb": 1342.5,
    } | changes
    (run_dir / "evaluation.json").write_text(json.dumps(evaluation))


@pytest.fixture
def run_dir(tmp_path):
    write_views(tmp_path, 2)
    write_log(tmp_path, [record(step) for step in range(50, 3001, 50)])
    config = {
        "seed": 3,
        "compare_steps": 4,
        "objective": {"distortion_loss_mult": 0.002, "background": "random"},
        "field": {"levels": [16, 160], "hidden": {"width": 32}},
        "command": ["rayfuse", "train", "a b"],
        "versions": {"rayfuse": "0.1.0", "torch": "2.13.0"},
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    profile = {
        "step_ms": 50.0,
        "parts": [
            {"name": "field", "forward_ms": 12.0, "backward_ms": 13.0},
            {"name": "losses", "forward_ms": 5.0, "backward_ms": 5.0},
        ],
        "ops": [
            {"op": "normal_losses", "backend": "ref", "forward_ms": 0.5, "backward_ms": 0.5},
            {"op": "distortion_loss", "backend": "cpu", "forward_ms": 1.0, "backward_ms": 1.5},
        ],
    }
    (tmp_path / "profile.json").write_text(json.dumps(profile))
    comparison = {
        "steps": 4,
        "losses": {
            "rgb_loss": {"reference": [4.0, 3.0, 2.0, 1.0], "fused": [4.0, 3.0, 2.0, 1.0]},
            "depth_loss": {"reference": [8.0, 7.0, 6.0, 5.0], "fused": [8.0, 7.0, 6.002, 5.001]},
        },
        "step_ms": {"reference": 61.0, "fused": 52.0},
        "extra_memory_mb": {"reference": 310.0, "fused": 205.0},
        "ops": {
            "reference": [
                {"op": "normal_losses", "backend": "ref", "forward_ms": 1.0, "backward_ms": 1.0},
                {"op": "distortion_loss", "backend": "ref", "forward_ms": 4.0, "backward_ms": 6.0},
            ],
            "fused": profile["ops"],
        },
    }
    (tmp_path / "compare.json").write_text(json.dumps(comparison))
    return tmp_path


def page_of(run_dir):
    path = report.write_report(run_dir)
    assert path == run_dir / "report.html"
    return Page(path.read_text(encoding="utf-8"))


def shown_views(page):
    alts = [attrs["alt"] for attrs in page.all("img") if attrs["alt"].startswith("Photo of")]
    return [alt.rsplit(" ", 1)[1] for alt in alts]


def test_a_whole_run_needs_no_note(run_dir):
    page = page_of(run_dir)
    assert not [attrs for attrs in page.all("div") if attrs.get("class") == "note"]


def test_the_page_asks_for_nothing_outside_itself(run_dir):
    page = page_of(run_dir)
    assert not page.all("script") and not page.all("link")
    for _, attrs in page.tags:
        for name in ("src", "href", "srcset", "poster", "data"):
            assert attrs.get(name, "#").startswith(("#", "data:image/webp;base64,"))
    assert "http" not in (run_dir / "report.html").read_text()
    assert not re.search(r"url\((?!#)|@import", (run_dir / "report.html").read_text())


def test_the_headline_gives_figures_with_units_and_the_baseline(run_dir):
    page = page_of(run_dir)
    assert page.says("26.81 dB on held-out views after 3,000 steps and 2 min 32 s of training")
    assert page.says("1.75 dB above the baseline") and page.says("neighbour fill")
    for words in ("25.06 dB", "0.912", "2 min 44 s", "1.91 million", "1,912,345", "1.31 GiB"):
        assert page.says(words), words


def test_images_are_those_of_the_run(run_dir):
    page = page_of(run_dir)
    images = page.all("img")
    assert len(images) == 2 * len(MAPS)
    first = base64.b64decode(images[0]["src"].split(",", 1)[1])
    shown = np.asarray(Image.open(io.BytesIO(first)).convert("RGB"), dtype=float)
    assert np.abs(shown - picture(60, 90, seed=0)).mean() < 4
    assert all(attrs["alt"] for attrs in images)


def test_two_feature_heads_and_the_ranges_of_colour_maps_are_told(run_dir):
    path = run_dir / "evaluation.json"
    evaluation = json.loads(path.read_text())
    images = evaluation["views"][0]["images"]
    images["feature_dino"], images["feature_dino_target"] = images["feature"], images["photo"]
    evaluation["views"][0]["ranges"] = {"depth": "2.3 (bright) to 3.1 (dark)"}
    path.write_text(json.dumps(evaluation))
    page = page_of(run_dir)
    assert page.says("Features dino, rendered") and page.says("Features dino, target")
    assert page.says("Features, rendered") and page.says("Depth2.3 (bright) to 3.1 (dark)")


def test_large_images_are_scaled_down_and_keep_their_shape(run_dir):
    write_views(run_dir, 1, size=(150, 900))
    data = page_of(run_dir).all("img")[0]["src"].split(",", 1)[1]
    assert Image.open(io.BytesIO(base64.b64decode(data))).size == (report.MAX_IMAGE_SIDE, 120)


def test_every_term_stands_in_the_loss_table_with_its_share(run_dir):
    page = page_of(run_dir)
    for name in TERMS:
        assert page.says(name)
    log = report._Log.read(run_dir / "metrics.jsonl", [])
    rows = {row["name"]: row for row in report._losses(log)["terms"]}
    # rgb 1·1, distortion 2·0.002, interlevel 3·1, feature 4·0.001, orientation 5·0.0001
    assert rows["rgb_loss"]["share"] == f"{100 / 4.0085:.1f} %"
    assert rows["orientation_loss"]["share"] == "< 0.1 %"
    assert rows["distortion_loss"]["weight"] == "0.002"


def test_plots_follow_the_theme_and_have_a_text_alternative(run_dir):
    page = page_of(run_dir)
    text = (run_dir / "report.html").read_text()
    plots = [attrs for attrs in page.all("div") if attrs.get("role") == "img"]
    assert len(plots) == len(page.all("svg")) == 9
    assert all(attrs["aria-label"] for attrs in plots)
    assert "rgb_loss from" in text and "neighbour fill at 25.1" in text
    assert not re.search("#0[a1-3]0[a1-3]", text)
    ids = [attrs["id"] for _, attrs in page.tags if "id" in attrs]
    assert len(ids) == len(set(ids))
    for target in re.findall(r'(?:url\(#|href="#)([^)"]+)', text):
        assert target in ids


def test_the_same_run_gives_the_same_page(run_dir):
    first = report.write_report(run_dir).read_bytes()
    assert report.write_report(run_dir).read_bytes() == first


def test_time_goes_to_parts_and_ops_with_their_backend(run_dir):
    table = report._profile(json.loads((run_dir / "profile.json").read_text()))
    assert [row["name"] for row in table["parts"]] == ["field", "losses", "everything else"]
    assert [row["share"] for row in table["parts"]] == ["50.0 %", "20.0 %", "30.0 %"]
    assert table["parts"][0]["bars"] == [48.0, 52.0]
    assert [row["name"] for row in table["ops"]] == ["distortion_loss", "normal_losses"]
    page = page_of(run_dir)
    assert page.says("cpu") and page.says("ref") and page.says("50.0 ms")


def test_ticks_of_a_narrow_range_differ():
    steps = np.arange(1, 4)
    curve = {"loss": np.array([0.3094, 0.3087, 0.3081])}
    svg = report._plot("Loss", report._Log(step=steps), steps, curve, scale="log")["svg"]
    ticks = [text for text in re.findall(r">([\d.]+)</text>", svg) if text.startswith("0.3")]
    assert len(ticks) > 1 and len(set(ticks)) == len(ticks)


def test_reference_and_fused_are_compared(run_dir):
    page = page_of(run_dir)
    assert page.says("4 steps were made twice from the same seeds")
    assert page.says("2.5·10⁻⁴ of that term's largest value (depth_loss, step 3)")
    assert page.says("61.0") and page.says("52.0") and page.says("310") and page.says("205")
    table = report._comparison(json.loads((run_dir / "compare.json").read_text()))
    assert table["ops"] == [
        ("distortion_loss", "cpu", "10.00", "2.50", "4.0 x"),
        ("normal_losses", "ref", "2.00", "1.00", "2.0 x"),
    ]
    assert [plot["title"] for plot in table["plots"]] == ["Rgb loss", "Depth loss"]


def test_a_run_that_compared_nothing_says_nothing(run_dir):
    config = json.loads((run_dir / "config.json").read_text())
    (run_dir / "config.json").write_text(json.dumps({**config, "compare_steps": 0}))
    (run_dir / "compare.json").unlink()
    page = page_of(run_dir)
    assert not page.says("Reference against fused") and not page.says("compare.json")


def test_parts_that_add_up_to_more_than_the_step_are_explained(run_dir):
    part = {"name": "field", "forward_ms": 30.0, "backward_ms": 45.0}
    (run_dir / "profile.json").write_text(json.dumps({"step_ms": 50.0, "parts": [part, part]}))
    page = page_of(run_dir)
    assert page.says("The parts add up to 150.0 ms, more than the step of 50.0 ms")
    assert page.says("50.0 %") and not page.says("everything else")


def test_the_command_can_be_pasted_and_the_config_is_complete(run_dir):
    page = page_of(run_dir)
    assert page.says("rayfuse train 'a b'")
    assert page.says("hidden.width") and page.says("[16, 160]") and page.says("2.13.0")
    assert page.says("Configuration, 6 values")


MISSING = {
    "config.json": "config.json is missing: the set-up is not shown.",
    "metrics.jsonl": "metrics.jsonl is missing: there are no curves.",
    "evaluation.json": "evaluation.json is missing: there are no held-out figures.",
    "profile.json": "profile.json is missing: the time of a step is not shown.",
    "compare.json": "compare.json is missing: reference and fused kernels are not compared.",
}


@pytest.mark.parametrize("name", MISSING)
def test_a_missing_file_costs_one_sentence(run_dir, name):
    (run_dir / name).unlink()
    page = page_of(run_dir)
    for other, sentence in MISSING.items():
        assert page.says(sentence) == (other == name)


def test_an_empty_directory_gives_a_page_that_says_so(tmp_path):
    page = page_of(tmp_path)
    # without a set-up nobody knows whether there was a comparison
    for name, sentence in MISSING.items():
        assert page.says(sentence) == (name != "compare.json")
    assert page.says(tmp_path.name)


@pytest.mark.parametrize("content", ["", "[1]", '{"psnr": ', '{"views": 3}', '{"seconds": [1]}'])
@pytest.mark.parametrize("name", ["config.json", "evaluation.json", "profile.json", "compare.json"])
def test_a_file_that_is_cut_or_foreign_never_costs_the_page(tmp_path, name, content):
    (tmp_path / "config.json").write_text('{"compare_steps": 4}')
    (tmp_path / name).write_text(content)
    page = page_of(tmp_path)
    assert page.says("metrics.jsonl is missing") and not page.says(f"{name} is missing")


def test_optional_parts_may_be_absent(run_dir):
    write_views(run_dir, 1, baseline=None, ssim=None)
    write_log(run_dir, [{"step": 1, "seconds": 0.1, "losses": {"rgb_loss": 0.2}}])
    page = page_of(run_dir)
    assert not page.says("Baseline") and not page.says("SSIM, held out")
    assert page.says("rgb_loss")
    write_views(run_dir, 0)
    assert page_of(run_dir).says("The run held out no view")


def test_a_missing_image_is_named_and_the_others_stay(run_dir):
    (run_dir / "renders/0000_depth.png").unlink()
    (run_dir / "renders/0001_render.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    page = page_of(run_dir)
    assert len(page.all("img")) == 2 * len(MAPS) - 2
    assert page.says("renders/0000_depth.png (FileNotFoundError)")
    assert page.says("renders/0001_render.png (UnidentifiedImageError)")


def test_many_views_are_sampled_from_the_worst_to_the_best(run_dir):
    write_views(run_dir, 50, size=(8, 12), psnr=lambda i: 20 + (7 * i) % 50)
    page = page_of(run_dir)
    shown = shown_views(page)
    assert len(shown) == report.MAX_VIEWS and shown == sorted(shown)
    best = next(i for i in range(50) if (7 * i) % 50 == 49)
    assert "view_0000" in shown and f"view_{best:04d}" in shown
    assert page.says("8 of 50 held-out views are shown")
    assert len([1 for attrs in page.all("th") if attrs.get("scope") == "row"]) > 50


def test_the_page_stays_small_however_large_the_run(run_dir):
    write_views(run_dir, 2)
    noise = np.random.default_rng(0).integers(0, 255, (720, 720, 3), dtype=np.uint8)
    Image.fromarray(noise).save(run_dir / "noise.png", compress_level=0)
    evaluation = json.loads((run_dir / "evaluation.json").read_text())
    for view in evaluation["views"]:
        view["images"] = dict.fromkeys(MAPS, "noise.png")
    (run_dir / "evaluation.json").write_text(json.dumps(evaluation))
    rng = np.random.default_rng(0)
    entries = [record(step) for step in range(1, 5001)]
    for entry in entries:
        entry["losses"] = {name: v * rng.uniform(0.2, 5) for name, v in entry["losses"].items()}
    write_log(run_dir, entries)
    path = report.write_report(run_dir)
    assert path.stat().st_size < 8e6
    assert Page(path.read_text()).says("1 of 2 held-out views are shown")


def test_names_cannot_break_the_page(run_dir):
    name = "<script>alert(1)</script>" + "x" * 300
    write_views(run_dir, 1, scene=name, baseline={"name": name, "psnr": 20.0})
    write_log(run_dir, [record(1, losses={name: 1.0}), record(2, losses={name: 0.5})])
    page = page_of(run_dir)
    assert not page.all("script") and page.says("<script>alert(1)</script>")


def test_values_that_are_not_finite_leave_a_gap_and_a_sentence(run_dir):
    entries = [record(step) for step in range(1, 41)]
    for step in (7, 8):
        entries[step]["losses"]["rgb_loss"] = math.nan
        entries[step]["weighted"]["rgb_loss"] = None
    for entry in entries:
        entry["losses"]["orientation_loss"] = 0.0
        entry["metrics"]["psnr"] = math.nan
    write_log(run_dir, entries)
    write_views(run_dir, 1, psnr=lambda i: math.nan)
    page = page_of(run_dir)
    assert page.says("rgb_loss was not finite at 2 logged steps, first at step 8.")
    assert page.says("orientation_loss was never above zero")
    assert page.says("not a number")
    assert not page.says("could not be shown")


def test_a_resumed_run_keeps_the_steps_that_count(run_dir):
    first = [record(step, seconds=step) for step in range(10, 101, 10)]
    again = [record(step, seconds=step - 60) for step in range(70, 131, 10)]
    for entry in again:
        entry["losses"]["rgb_loss"] = 7.0
    write_log(run_dir, first + again)
    log = report._Log.read(run_dir / "metrics.jsonl", [])
    assert log.step.tolist() == list(range(10, 131, 10))
    assert log.resumed == [70]
    assert (log.column("losses", "rgb_loss")[6:] == 7.0).all()
    assert log.seconds.tolist() == list(range(10, 131, 10))
    assert page_of(run_dir).says("Resumed at step 70;")


def test_a_clock_that_goes_on_is_kept_and_the_resumption_still_marked(run_dir):
    write_log(run_dir, [record(step) for step in (10, 20, 30)] + [record(20, seconds=9.0)])
    log = report._Log.read(run_dir / "metrics.jsonl", [])
    assert log.seconds.tolist() == [0.5, 9.0] and log.resumed == [20]


def test_lines_cut_short_are_counted(run_dir):
    with (run_dir / "metrics.jsonl").open("a") as file:
        file.write('[1]\n{"seconds": 1}\n{"step": "4000"}\n{"step": "last"}\n{"step": 99')
    assert page_of(run_dir).says("metrics.jsonl: 4 lines could not be read, left out.")


def test_a_plot_that_fails_leaves_the_rest(run_dir, monkeypatch):
    def fail(*_):
        raise RuntimeError("no font")

    monkeypatch.setattr(report, "_svg", fail)
    page = page_of(run_dir)
    assert page.says("The losses could not be shown: RuntimeError: no font")
    assert page.says("26.81 dB on held-out views") and len(page.all("img")) == 2 * len(MAPS)


def test_a_running_mean_keeps_a_constant_and_ignores_gaps():
    values = np.full(200, 3.0)
    values[50:60] = np.nan
    mean = report._running_mean(values)
    assert np.isnan(mean[50:60]).all()
    np.testing.assert_allclose(mean[np.isfinite(values)], 3.0)


def test_thinning_keeps_extremes_and_gaps():
    y = np.zeros(10_000)
    y[1234], y[5678], y[9000] = 9.0, -9.0, np.nan
    _, thin = report._thin(np.arange(10_000.0), y)
    assert len(thin) <= report.MAX_POINTS
    assert np.nanmax(thin) == 9 and np.nanmin(thin) == -9 and np.isnan(thin).sum() == 1


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.002, "0.002"), (1e-5, "10⁻⁵"), (1.234e-7, "1.23·10⁻⁷"), (0, "0"), (12345, "1.23·10⁴")],
)
def test_short_numbers(value, text):
    assert report._short(value) == text
