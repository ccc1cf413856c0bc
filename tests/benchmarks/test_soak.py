import importlib.util
import pathlib

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def soak():
    path = ROOT / "benchmarks" / "soak" / "run.py"
    spec = importlib.util.spec_from_file_location("soak", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def rows(**slopes):
    start = {"memory": 500.0, "files": 20, "threads": 5, "compiled": 30}
    return [
        {k: v + slopes.get(k, 0) * max(t - 10, -5) for k, v in start.items()}
        for t in range(100)
    ]


def test_what_is_flat_has_not_grown(soak):
    table, grown = soak.judge(rows())
    assert not grown
    assert [row[0] for row in table] == ["memory", "files", "threads", "compiled"]
    assert table[0][1:] == (500, 500, 500)


@pytest.mark.parametrize(
    ("name", "slope"),
    [("memory", 0.5), ("files", 0.1), ("threads", 0.1), ("compiled", 0.02)],
)
def test_what_grows_is_named(soak, name, slope):
    _, grown = soak.judge(rows(**{name: slope}))
    assert len(grown) == 1 and grown[0].startswith(f"{name} grew from")


def test_growth_at_the_start_is_none(soak):
    warm = rows()
    for row in warm[:10]:
        row["memory"], row["compiled"] = 100.0, 0
    assert soak.judge(warm)[1] == []


def test_a_line_that_is_being_written_is_not_read(soak):
    assert soak.last_step([]) == 0
    assert soak.last_step(['{"step": 3}', '{"step": 4, "sp']) == 3
