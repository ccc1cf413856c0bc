"""What is published agrees with itself, and every example is run by a test."""

import pathlib
import re

import pytest
import smoke

import nlcg_optax

ROOT = pathlib.Path(__file__).resolve().parents[1]

# Every example, the file that runs or imports it, and by which words.
RUN_BY = {
    "digits_mlp.py": ("tests/test_examples.py", '"digits_mlp", '),
    "finetune_text.py": ("tests/test_examples.py", '"finetune_text", '),
    "mesh_jit.py": ("tests/test_front_doors.py", '("mesh_jit", '),
    "mesh_pmap.py": ("tests/test_front_doors.py", '("mesh_pmap", '),
    "mesh_shard_map.py": ("tests/test_front_doors.py", '("mesh_shard_map", '),
    "physics_informed.py": (
        "tests/test_examples.py",
        '"physics_informed", monkeypatch',
    ),
    "train.py": ("tests/training/test_main_job.py", '"examples" / "train.py"'),
}


def test_every_example_is_run_by_a_test():
    examples = ROOT / "examples"
    found = {str(path.relative_to(examples)) for path in examples.rglob("*.py")}
    assert found == set(RUN_BY), "run each example in a test, and name it in RUN_BY"
    readme = (examples / "README.md").read_text()
    assert not [name for name in RUN_BY if f"`{name}`" not in readme]
    for user, words in RUN_BY.values():
        assert words in (ROOT / user).read_text(), (user, words)


def test_version_and_date_are_the_same_everywhere():
    changelog = (ROOT / "CHANGELOG.md").read_text()
    heads = re.findall(r"^## (.*)$", changelog, re.MULTILINE)
    newest = next(head for head in heads if head != "Unreleased")
    version, date = newest.split(" - ")
    citation = (ROOT / "CITATION.cff").read_text().splitlines()
    assert f"version: {version}" in citation
    assert f"date-released: {date}" in citation
    assert nlcg_optax.__version__ == version


def test_what_the_manifest_names_is_there():
    for line in (ROOT / "MANIFEST.in").read_text().splitlines():
        command, *paths = line.split()
        if command in ("include", "graft"):
            for path in paths:
                assert (ROOT / path).exists(), line


@pytest.mark.standard_promotion  # optax's schedules promote
def test_smoke():
    smoke.trains()
    smoke.minimizes()
