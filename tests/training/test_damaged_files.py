"""Files that are damaged at random: read at their true values, or refused by name.

``FUZZ=10000 pytest tests/training/test_damaged_files.py`` tries so many of each kind.
"""

import io
import itertools
import json
import random

import fuzz
import numpy as np
import pytest
from PIL import Image

from nlcg_optax.training import checkpoint, config, metrics, run_config
from nlcg_optax.training.data import errors, images


def damaged(content, rng):
    """What becomes of a file, and how."""
    content, place = bytearray(content), rng.randrange(len(content))
    kind = rng.choice(["cut", "flipped", "zeros", "noise", "longer", "tail of zeros"])
    if kind == "cut":
        del content[place:]
    elif kind == "flipped":
        content[place] ^= 1 << rng.randrange(8)
    elif kind == "longer":
        content[place:place] = rng.randbytes(rng.randint(1, 9))
    else:
        end = len(content) if kind == "tail of zeros" else place + rng.randint(1, 99)
        size = len(content[place:end])
        content[place:end] = rng.randbytes(size) if kind == "noise" else bytes(size)
    return bytes(content), kind


# --- Images ---------------------------------------------------------------------------


def encoded(image, kind, **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def originals():
    noise = np.random.default_rng(0).integers(0, 256, (24, 32, 3), np.uint8)
    colour = Image.fromarray(noise)
    palette, wide = colour.quantize(20), Image.fromarray(noise[..., 0] * np.uint16(257))
    return {
        "PNG": encoded(colour, "PNG"),
        "PNG, palette": encoded(palette, "PNG"),
        "PNG, 16 bits": encoded(wide, "PNG"),
        "JPEG": encoded(colour, "JPEG"),
        "JPEG, progressive": encoded(colour, "JPEG", progressive=True),
        "JPEG, CMYK": encoded(colour.convert("CMYK"), "JPEG"),
        "BMP": encoded(colour, "BMP"),
        "GIF": encoded(palette, "GIF"),
        "PPM": encoded(colour, "PPM"),
        "TIFF": encoded(colour, "TIFF"),
        "TIFF, LZW": encoded(colour, "TIFF", compression="tiff_lzw"),
        "TIFF, 16 bits": encoded(wide, "TIFF"),
        "WebP": encoded(colour, "WEBP"),
        "WebP, lossless": encoded(colour, "WEBP", lossless=True),
    }


ORIGINALS = originals()


@pytest.mark.parametrize("kind", ORIGINALS)
def test_a_damaged_image_is_read_or_refused_by_name(kind, capfd):
    """Of what a file breaks off nothing is made up, and of a PNG nothing at all."""
    rng, original = random.Random(kind), ORIGINALS[kind]
    expected = images.read_image(original, "whole", 3)
    for _ in range(fuzz.cases(15)):
        content, how = damaged(original, rng)
        try:
            got = images.read_image(content, "this one", 3)
        except errors.BrokenImage as error:
            assert "this one" in str(error)
            continue
        told = how == "cut" or kind.startswith("PNG")
        told |= kind.startswith("JPEG") and how == "tail of zeros"
        if told:  # elsewhere there is no checksum that could tell
            np.testing.assert_array_equal(got, expected, err_msg=how)
    capfd.readouterr()  # libtiff's


# --- What a run leaves behind ---------------------------------------------------------


def test_damaged_metrics_are_read_or_refused_in_a_sentence(tmp_path):
    path, rng = tmp_path / "metrics.jsonl", random.Random(0)
    rows = [
        {"step": step, "split": split, "loss": 1.5 / (step + 1), "accuracy": 0.5}
        for step, split in itertools.product(range(4), ("train", "test"))
    ]
    whole = "".join(json.dumps(row) + "\n" for row in rows).encode()
    for _ in range(fuzz.cases(150)):
        content, how = damaged(whole, rng)
        path.write_bytes(content)
        try:
            got = metrics.read_metrics(path)
        except metrics.MetricsError as error:
            assert str(path) in str(error)
            continue
        if how == "cut":
            assert got == rows[: len(got)]


def odd_values(rng):
    """Whatever JSON has."""
    inner = rng.choice([{}, [], {"name": None}, [[1]], 1])
    return rng.choice(
        [None, True, -1, 10**400, 1e308, "", "nan", [], {}, [inner], {"x": inner}]
    )


@pytest.mark.parametrize("place", ["text", "value", "group", "row"])
def test_odd_json_is_refused_in_a_sentence(tmp_path, place):
    rng, here = random.Random(place), run_config.RunConfig()
    saved = config.to_json(here)
    path = tmp_path / "config.json"
    for _ in range(fuzz.cases(30)):
        if place == "row":
            row = {"step": 1, "split": "train", "loss": 0.5}
            row[rng.choice([*row])] = odd_values(rng)
            path = tmp_path / "metrics.jsonl"
            path.write_text(json.dumps(row) + "\n")
            try:
                metrics.read_metrics(path)
                metrics.MetricsWriter(tmp_path, 5).close()
            except metrics.MetricsError as error:
                assert f"{path}, line 1 is no row" in str(error)
            continue
        changed = json.loads(json.dumps(saved))
        if place == "value":
            group = rng.choice([k for k, v in changed.items() if isinstance(v, dict)])
            name = rng.choice([*changed[group]])
            changed[group][name] = odd_values(rng)
        elif place == "group":
            changed[rng.choice([*changed])] = odd_values(rng)
        content = json.dumps(changed).encode()
        if place == "text":
            content, _ = damaged(content, rng)
        path.write_bytes(content)
        try:
            checkpoint.check_config(here, tmp_path)
        except config.ConfigError as error:
            assert str(tmp_path) in str(error)


def test_a_config_that_leads_nowhere_is_no_new_run(tmp_path):
    (tmp_path / "config.json").symlink_to(tmp_path / "gone")
    with pytest.raises(config.ConfigError, match="config.json cannot be read"):
        checkpoint.check_config(run_config.RunConfig(), tmp_path)


@pytest.mark.parametrize("epochs", [[], "12", None, True, {"a": 1}, 0, -1])
def test_epochs_that_are_no_number_are_another_config(tmp_path, epochs):
    saved = config.to_json(run_config.RunConfig()) | {"num_epochs": epochs}
    (tmp_path / "config.json").write_text(json.dumps(saved))
    with pytest.raises(config.ConfigError, match=r"num_epochs.*\(was "):
        checkpoint.check_config(run_config.RunConfig(), tmp_path)
