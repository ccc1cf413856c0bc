import pytest

from nlcg_optax.training import curves
from nlcg_optax.training.comparison import OtherRun


def run(steps, loss=1.0, accuracy=0.5, **more):
    return [
        {"step": s, "split": split, "loss": loss, "accuracy": accuracy, **more}
        for s in steps
        for split in ("train", "test")
    ]


@pytest.mark.parametrize("rows", [[], run(range(1, 4), beta=0.1)])
def test_curves_are_drawn_whatever_there_is(tmp_path, rows):
    others = [OtherRun("none", {}, rows)]
    for path, beside in ((tmp_path / "a.png", []), (tmp_path / "b.png", others)):
        curves.plot_curves(rows, path, "title", "ours", beside)
        assert path.read_bytes().startswith(b"\x89PNG")


def test_a_comparison_says_its_numbers_and_leaves_the_penalty_out(
    tmp_path, monkeypatch
):
    figures = []
    figure = "matplotlib.figure.Figure.savefig"
    monkeypatch.setattr(figure, lambda self, *args, **options: figures.append(self))
    ours = run((10, 60), loss=2.0, accuracy=0.9752, cross_entropy=0.25)
    old = OtherRun("old", {}, run((10, 60), accuracy=1.0))  # which has it not apart
    curves.plot_curves(ours, tmp_path / "curves.png", "title", "ours", [old])
    loss, accuracy, *_ = figures[0].axes
    assert [list(line.get_ydata()) for line in loss.lines] == [[0.25] * 2, [1.0] * 2]
    said = [text.get_text() for text in accuracy.texts]
    assert said == [f"{n} steps: 97.5%\nagainst 100.0%" for n in (10, 60)]
    # What is wrong, the less the higher; none at all is not infinitely high.
    low, high = accuracy.get_ylim()
    assert low > 1 - 0.9752 > high > 0
