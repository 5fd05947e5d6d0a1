"""The page of a sweep: golden page, no remote references, escaping, redaction, pictures, size."""

from __future__ import annotations

import base64
import hashlib
import random
import re
import struct
import zlib
from itertools import pairwise
from pathlib import Path

import pytest
from sample_audits import EVIL
from sweep_page_samples import (
    ATTACKS,
    GOLDEN,
    PROTOCOLS,
    SAMPLES,
    golden_sweep,
    photo_sweep,
    small_sweep,
    text_sweep,
)
from test_html_report import Page

from leakaudit.errors import InputError
from leakaudit.report import sweep_album
from leakaudit.report.sweep_album import Album
from leakaudit.report.sweep_page import LEVELS, render_sweep, write_sweep_page
from leakaudit.sweep_results import SweepResult

SECTIONS = [
    "verdict",
    "figures",
    "gate",
    "heat",
    "utility",
    "adaptive",
    "bounds",
    "cells",
    "details",
    "theory",
]
SECTIONS += ["adversary", "environment", "repeat"]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[SweepResult, Path]]:
    root = tmp_path_factory.mktemp("sweeps")
    return {name: (make(root / name), root / name) for name, make in SAMPLES.items()}


@pytest.fixture(scope="module")
def pages(results: dict[str, tuple[SweepResult, Path]]) -> dict[str, str]:
    return {name: render_sweep(result, folder) for name, (result, folder) in results.items()}


def text_of(page: str) -> str:
    return "".join(Page(page).text)


def test_the_golden_page_is_unchanged() -> None:
    result = SweepResult.from_json((GOLDEN / "result.json").read_bytes())
    expected = (GOLDEN / "report.html").read_text(encoding="utf-8")
    assert render_sweep(result, GOLDEN) == expected, (
        "regenerate with: python tests/report/sweep_page_samples.py --golden, and look at it"
    )


@pytest.mark.parametrize("name", SAMPLES)
def test_every_sample_is_well_formed_with_all_sections_in_order(pages: dict[str, str], name: str) -> None:
    page = Page(pages[name])
    assert [attributes["id"] for attributes in page.named("section")] == SECTIONS
    identities = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(identities) == len(set(identities))
    links = [attributes["href"] or "" for tag in ("a", "use") for attributes in page.named(tag)]
    assert {link.removeprefix("#") for link in links} <= set(identities)
    assert [tag for tag, _ in page.tags].count("h1") == 1


@pytest.mark.parametrize("name", SAMPLES)
def test_nothing_is_fetched_from_anywhere(pages: dict[str, str], name: str) -> None:
    for tag, attributes in Page(pages[name]).tags:
        for attribute in ("src", "href", "srcset", "action", "data", "poster", "xlink:href"):
            value = attributes.get(attribute)
            assert value is None or value.startswith(("data:", "#")), (tag, attribute, value)
        assert "style" not in attributes
        assert not any(attribute.startswith("on") for attribute in attributes), (tag, attributes)


@pytest.mark.parametrize("name", SAMPLES)
def test_the_policy_allows_the_page_s_own_style_and_script_and_no_other(
    pages: dict[str, str], name: str
) -> None:
    page = pages[name]
    policies = [meta.get("content") or "" for meta in Page(page).named("meta") if "http-equiv" in meta]
    assert len(policies) == 1
    assert policies[0].startswith("default-src 'none'; img-src data:")
    for tag in ("style", "script"):
        found = re.findall(rf"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
        assert len(found) == 1
        assert "url(" not in found[0]
        assert "@import" not in found[0]
        digest = base64.b64encode(hashlib.sha256(found[0].encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}'" in policies[0]


@pytest.mark.parametrize("name", SAMPLES)
def test_every_picture_and_chart_has_a_text(pages: dict[str, str], name: str) -> None:
    for drawing in Page(pages[name]).named("svg"):
        assert drawing.get("aria-hidden") == "true" or drawing.get("aria-label")


@pytest.mark.parametrize("name", SAMPLES)
def test_every_cell_is_in_the_table_once_and_opens_its_details(
    results: dict[str, tuple[SweepResult, Path]], pages: dict[str, str], name: str
) -> None:
    page = Page(pages[name])
    rows = [attributes for attributes in page.named("tr") if "data-cell" in attributes]
    assert [row["data-cell"] for row in rows] == [cell.name for cell in results[name][0].cells]
    folds = [attributes["data-for"] for attributes in page.named("details") if "data-for" in attributes]
    assert folds == [row["data-index"] for row in rows] == [str(index) for index in range(len(rows))]
    halves = [a["href"] for a in page.named("a") if (a.get("class") or "").startswith("half ")]
    assert sorted(halves) == sorted(f"#cell-{index}" for index in range(len(rows)))


def test_strings_from_files_are_data_not_markup(pages: dict[str, str]) -> None:
    page = Page(pages["hostile"])
    assert len(page.named("script")) == 1
    assert page.named("img") == []
    assert "<script>alert" not in pages["hostile"]
    assert text_of(pages["hostile"]).count('<script>alert("x")') > 100
    assert EVIL not in pages["hostile"]


@pytest.mark.parametrize("name", SAMPLES)
def test_drawings_hold_numbers_only(pages: dict[str, str], name: str) -> None:
    page = Page(pages[name])
    for tag, attributes in page.tags:
        for attribute in ("x", "y", "cx", "cy", "r", "x1", "x2", "y1", "y2", "points", "viewbox"):
            value = attributes.get(attribute)
            if tag in ("circle", "text", "line", "polyline", "svg") and value is not None:
                assert re.fullmatch(r"[-0-9., ]*", value), (tag, attribute, value)


def test_what_the_page_says(pages: dict[str, str]) -> None:
    said = text_of(pages["photos"])
    for words in (
        "12 of 27 cells leak beyond the policy.",
        "only stop an adversary who does not know of them: gaussian-noise:std=0.01 under fedsgd",
        "psnr>20,ssim>0.5, judged on the worst case",
        "Exit code 1: leakage",
        "CUDA out of memory",
        "ml-platform, until 2027-03-01: pilot with public photos",
        "Its acceptance ran out.",
        "The positive control failed.",
        "Hayes et al. 2023, theorem 2",
        "Assumes unbiased adversary; the noise is Gaussian.",
        "0.769",  # noise of 0.01 over an update of rms 0.013
        "top-k under fedavg keeps the same coordinates",
        "sha256:3f9a",
    ):
        assert words in said, words


def test_heat_and_verdict_stand_beside_each_other(pages: dict[str, str]) -> None:
    heat = pages["photos"][pages["photos"].index('id="heat"') : pages["photos"].index('id="utility"')]
    chips = re.findall(r'<span class="chip h(\d+)">([\d.]+)', heat)
    assert len(chips) == 25  # of 27 cells one failed and one is pending
    by_score = sorted(chips, key=lambda chip: float(chip[1]))
    levels = [int(level) for level, _ in by_score]
    assert levels == sorted(levels)
    assert levels[0] < 5
    assert levels[-1] == LEVELS
    for word in ("leaks", "not recovered", "failed", "pending", "inconclusive"):
        assert f"</svg>{word}</span>" in heat


def test_a_page_of_text_shows_the_sentences(pages: dict[str, str]) -> None:
    page = pages["text"]
    heat = page[page.index('id="heat"') : page.index('id="utility"')]
    assert ">invoice</span>" in heat
    assert "<use" not in page
    assert "private sentences" in text_of(page)
    hidden = render_sweep(text_sweep(), None, redact=True)
    assert "wrong: " in page
    assert "wrong: " not in hidden
    assert "withheld" in hidden


def test_the_empty_sweep_claims_nothing(pages: dict[str, str]) -> None:
    said = text_of(pages["empty"])
    assert "The sweep has no cells." in said
    assert "Inconclusive" in said
    assert "was interrupted" in said


def encoded(path: Path) -> str:
    return base64.b64encode(path.read_bytes()).decode()


def test_pictures_are_embedded_once_and_redaction_removes_the_truth(tmp_path: Path) -> None:
    result = small_sweep(tmp_path)
    (tmp_path / "runs" / result.cells[0].runs[0].key / "report.html").write_text("a report with originals")
    open_page, closed_page = render_sweep(result, tmp_path), render_sweep(result, tmp_path, redact=True)
    examples = [example for cell in result.cells for run in cell.runs for example in run.examples]
    originals = {encoded(tmp_path / (example.original or "")) for example in examples}
    found = {encoded(tmp_path / (example.reconstruction or "")) for example in examples}
    assert len(originals) == 2  # of 25 cells with 2 runs each
    assert not originals & found
    for picture in originals:
        assert open_page.count(picture) == 1
        assert picture not in closed_page
    for picture in found:
        assert open_page.count(picture) == 1
        assert closed_page.count(picture) == 1
    assert "class 0" in open_page
    assert "class 0" not in closed_page
    assert "withheld" in closed_page
    assert len(links_of(open_page)) == 1
    assert links_of(closed_page) == []
    marked = render_sweep(result.model_copy(update={"redacted": True}), tmp_path)
    assert marked == closed_page


def links_of(page: str) -> list[str]:
    return [a["href"] or "" for a in Page(page).named("a") if not (a["href"] or "").startswith("#")]


def test_runs_with_a_report_are_linked_from_wherever_the_page_is(tmp_path: Path) -> None:
    folder = tmp_path / "sweep"
    result = golden_sweep(folder)
    key = result.cells[3].runs[0].key
    (folder / "runs" / key / "report.html").write_text("")
    write_sweep_page(result, folder, folder / "report.html")
    assert links_of((folder / "report.html").read_text(encoding="utf-8")) == [f"runs/{key}/report.html"]
    write_sweep_page(result, folder, tmp_path / "elsewhere" / "page.html")
    page = (tmp_path / "elsewhere" / "page.html").read_text(encoding="utf-8")
    assert links_of(page) == [f"../sweep/runs/{key}/report.html"]
    assert list((tmp_path / "elsewhere").iterdir()) == [tmp_path / "elsewhere" / "page.html"]


@pytest.mark.parametrize("key", ["..", "../sweep", "a/b", "", "javascript:alert(1)", 'x"y'])
def test_a_key_that_is_no_folder_s_name_is_not_linked(tmp_path: Path, key: str) -> None:
    result = golden_sweep(None)
    run = result.cells[0].runs[0].model_copy(update={"key": key})
    cell = result.cells[0].model_copy(update={"runs": [run]})
    (tmp_path / "report.html").write_text("")
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "report.html").write_text("")
    page = render_sweep(result.model_copy(update={"cells": [cell]}), tmp_path)
    assert links_of(page) == []


def test_missing_and_damaged_pictures_do_not_break_the_page(tmp_path: Path) -> None:
    result = golden_sweep(None)
    assert "no picture" in text_of(render_sweep(result, None))
    assert "no picture" in text_of(render_sweep(result, tmp_path))
    sized = b"\x89PNG\r\n\x1a\n" + struct.pack(">I4sII", 13, b"IHDR", 300, 300) + b"cut off"
    name = result.cells[0].runs[0].examples[0].reconstruction or ""
    (tmp_path / name).parent.mkdir(parents=True)
    (tmp_path / name).write_bytes(sized)
    assert Album(tmp_path).picture(name) is None
    assert "no picture" in text_of(render_sweep(result, tmp_path))
    huge = b"\x89PNG\r\n\x1a\n" + struct.pack(">I4sII", 13, b"IHDR", 2**31 - 1, 2**31 - 1)
    (tmp_path / name).write_bytes(huge)
    assert Album(tmp_path).picture(name) is None


def test_a_picture_outside_the_folder_is_refused(tmp_path: Path) -> None:
    result = golden_sweep(tmp_path / "sweep")
    example = result.cells[0].runs[0].examples[0].model_copy(update={"reconstruction": "../secret.png"})
    run = result.cells[0].runs[0].model_copy(update={"examples": [example]})
    cell = result.cells[0].model_copy(update={"runs": [run]})
    with pytest.raises(InputError, match="must stay inside"):
        render_sweep(result.model_copy(update={"cells": [cell]}), tmp_path / "sweep")


def test_the_album_keeps_to_its_budget_and_counts_what_it_leaves_out(tmp_path: Path) -> None:
    result = golden_sweep(tmp_path)
    names = [run.examples[0].reconstruction for cell in result.cells for run in cell.runs if run.examples]
    whole = Album(tmp_path)
    assert all(whole.picture(name) is not None for name in names)
    sizes = [len(plate.source) for plate in whole.plates]
    budget = sum(sizes[:3]) + 1
    small = Album(tmp_path, budget)
    assert [small.picture(name) is not None for name in names] == [True] * 3 + [False] * (len(names) - 3)
    assert small.left_out == len(names) - 3
    assert small.picture(names[0]) == whole.picture(names[0])
    assert sum(len(plate.source) for plate in small.plates) <= budget


def test_large_pictures_are_scaled_down_and_films_become_one_sheet(tmp_path: Path) -> None:
    result = photo_sweep(tmp_path, seeds=1, count=1, frames=3, size=200, most=1)
    run = result.cells[0].runs[0]
    album = Album(tmp_path)
    shot = album.picture(run.examples[0].reconstruction)
    assert shot is not None
    assert (shot.width, shot.height) == (96, 96)
    film = album.film([frame.image for frame in run.strip] + [None, "images/missing.png"])
    assert [frame and (frame.left, frame.width) for frame in film] == [
        (0, 80),
        (80, 80),
        (160, 80),
        None,
        None,
    ]
    assert len(album.plates) == 2
    assert all(plate.source.startswith("data:image/jpeg;base64,") for plate in album.plates)


def random_png(name: str) -> tuple[bytes, int, int]:
    """64 x 64 pixels of noise, as large as such a picture can be, another for every name."""
    noise = random.Random(name)
    lines = b"".join(b"\0" + noise.randbytes(192) for _ in range(64))

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 64, 64, 8, 2, 0, 0, 0))
    return (
        b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(lines, 0)) + chunk(b"IEND", b""),
        64,
        64,
    )


def test_200_cells_of_noise_stay_below_20_megabytes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sweep_album, "read_picture", lambda folder, name: random_png(name))
    result = photo_sweep(
        None, protocols=PROTOCOLS, attacks=ATTACKS, seeds=1, count=8, frames=8, size=8, most=200
    )
    assert len(result.cells) == 200
    page = render_sweep(result, tmp_path)
    assert len(page.encode()) < 20_000_000
    assert "pictures are left out" in page
    heat = page[page.index('id="heat"') : page.index('id="utility"')]
    assert heat.count('aria-label="reconstruction"') == heat.count('aria-label="original"') == 198


def test_the_page_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    result = golden_sweep(None)
    (tmp_path / "taken").mkdir()
    with pytest.raises(InputError, match="not a regular file"):
        write_sweep_page(result, None, tmp_path / "taken")
    assert [path.name for path in tmp_path.iterdir()] == ["taken"]


def lightness(colour: str) -> float:
    """CIE L* of a hexadecimal sRGB colour."""
    parts = [int(colour[i : i + 2], 16) / 255 for i in (0, 2, 4)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    luminance = sum(weight * c for weight, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))
    return 116 * luminance ** (1 / 3) - 16 if luminance > 0.008856 else 903.3 * luminance


def test_the_colours_of_the_heat_table_grow_lighter_by_even_steps(pages: dict[str, str]) -> None:
    found = re.findall(r"\.h(\d+) \{ --heat: #([0-9a-f]{6}); --on: #([0-9a-f]+); \}", pages["photos"])
    assert [int(level) for level, _, _ in found] == list(range(LEVELS + 1))
    steps = [lightness(b) - lightness(a) for (_, a, _), (_, b, _) in pairwise(found)]
    assert min(steps) > 0.7 * sum(steps) / len(steps)
    assert max(steps) < 1.3 * sum(steps) / len(steps)
