"""What other documents show: `results/figures.md` and `overview.png`, of the rows.

    python benchmarks/large_batch/figures.py

Guides include a table of it by its name, so that each figure stands in one place, and
nobody copies it by hand. ± is the standard error of the tested seeds, and the best of a
column is bold.
"""

import math
import pathlib
from collections.abc import Callable, Iterable
from typing import Any

import matplotlib.pyplot as plt
import protocol
import report
import targets
from workloads import WORKLOADS

CURVATURE, FULL, NLCG = "nlcg by curvature", "nlcg by full curvature", "nlcg"
SHOWN = {
    CURVATURE: "`nlcg_auto`, nothing tuned",
    FULL: "`nlcg_auto`, all of the batch, five residual directions",
    NLCG: "`nlcg`, a rate tuned",
    "nlcg_paper": "`nlcg_paper`",
    "soap": "SOAP, momentum 0.95",
    "soap β=0.8": "SOAP, momentum 0.8",
    "muon": "Muon, momentum 0.95",
    "muon β=0.8": "Muon, momentum 0.8",
    "lars": "LARS",
    "lamb": "LAMB",
    "adamw": "AdamW",
    "momentum": "momentum",
}
Cell = tuple[str, float]  # what is shown, and what is best if it is least

# Where every step has all the data: workload, batch size, what heads the column.
WHOLE = (
    ("cifar10_jpeg_all", 50_000, "`cifar10_jpeg_all`, 50,000"),
    ("cifar10_jpeg", 5_000, "`cifar10_jpeg`, 5,000"),
    ("autoencoder", 1_797, "`autoencoder`, 1,797"),
    ("autoencoder_cifar", 16_384, "`autoencoder_cifar`, 16,384"),
    ("burgers", 1, "`burgers`"),
    ("digits", 1_437, "`digits`, 1,437"),
)
# Where batches are sampled.
SAMPLED = {
    "tinyshakespeare": (32, 128, 512, 2_048),
    "autoencoder": (32, 128, 512, 1_024),
    "autoencoder_cifar": (256, 1_024, 4_096),
}
# There the loss of the test set is another than the one that is minimized.
HELD_OUT = {"cifar10_jpeg": (250, 500, 1_000, 2_500), "digits": (64, 192, 512, 720)}

# The lines of the picture on the first page, in colours that most eyes tell apart.
LINES = {
    CURVATURE: ("nlcg_auto,\nnothing tuned", "#0072B2"),
    "muon β=0.8": ("Muon, tuned", "#D55E00"),
    "soap β=0.8": ("SOAP, tuned", "#009E73"),
    "adamw": ("AdamW, tuned", "#767676"),
    "momentum": ("momentum, tuned", "#A0A0A0"),
}
APART = 0.07  # two labels, in parts of the axis


class Results:
    """The rows of all workloads, and what they say of an optimizer at a batch size."""

    def __init__(self, folder: pathlib.Path):
        self.groups, self.targets = {}, {}
        for name, make in WORKLOADS.items():
            workload = make(None)
            groups = report.group(protocol.read(folder / f"{name}.jsonl"), workload)
            size = report.target_size(groups, workload)
            found = size and targets.target(groups, report.PEERS, size)
            self.groups[name] = groups
            self.targets[name] = found[0] if found else -math.inf

    def rows(self, workload: str, optimizer: str, size: int) -> list[dict]:
        return self.groups[workload].get((optimizer, size), [])

    def accuracy(self, *group: Any) -> Cell:
        found = report.accuracy(self.rows(*group))
        if found is None:
            return "not run", math.inf
        return f"{100 * found[0]:.2f}{spread(100 * found[1], '.2f')}", -found[0]

    def loss(self, *group: Any) -> Cell:
        """That of the trajectory at its end."""
        return self._mean(lambda row: float(targets.trajectory(row)[1][-1]), *group)

    def training(self, *group: Any) -> Cell:
        """The loss of the batches of the last tenth of the steps."""

        def last_tenth(row: dict) -> float:
            part = row["curve"][-max(1, len(row["curve"]) // 10) :]
            return sum(part) / len(part)

        return self._mean(last_tenth, *group)

    def held_out(self, *group: Any) -> Cell:
        """The loss of the test set."""
        return self._mean(lambda row: row["loss"], *group)

    def _mean(self, of: Callable[[dict], float], *group: Any) -> Cell:
        rows = report.tested(self.rows(*group))
        if not rows:
            return "not run", math.inf
        if any(row["diverged"] for row in rows):
            return "diverged", math.inf
        mean, error = report.mean_and_error([of(row) for row in rows])
        return f"{mean:.4g}{spread(error, '.1g')}", mean

    def steps(self, workload: str, *group: Any) -> Cell:
        rows = self.rows(workload, *group)
        if not report.tested(rows):
            return "not run", math.inf
        at = targets.reached(rows, self.targets[workload])
        if at is None:
            return f"> {report.tested(rows)[0]['steps']:,}", math.inf
        return f"{at.steps:,.0f}", at.steps

    def seconds(self, workload: str, *group: Any) -> Cell:
        rows = self.rows(workload, *group)
        at = targets.reached(rows, self.targets[workload])
        if at is None or at.seconds is None or not report.tested(rows):
            cell = "not reached" if report.tested(rows) else "not run"
            return cell, math.inf
        return f"{at.seconds:.3g}", at.seconds

    def best_peer(self, what: str, workload: str, size: int) -> Cell:
        """That of the tuned peer that has least of it, and whose it is."""
        cells = [(*getattr(self, what)(workload, n, size), n) for n in report.PEERS]
        text, value, name = min(cells, key=lambda cell: cell[1])
        if value == math.inf:
            tried = [cell for cell in cells if cell[0] != "not run"]
            return tried[0][0] if tried else "not run", value
        return f"{text} ({SHOWN.get(name, name)})", value


def spread(error: float, digits: str) -> str:
    return " (one seed)" if math.isnan(error) else f" ± {error:{digits}}"


def change(ratio: float) -> str:
    """By how many percent a ratio is above 1."""
    return f"{100 * (ratio - 1):+.1f}%".replace("-", "−")


def table(
    corner: str, header: Iterable[str], rows: dict[str, list[Cell]]
) -> Iterable[str]:
    """Markdown; the best of each column is bold."""
    least = [min(x for _, x in column) for column in zip(*rows.values(), strict=True)]
    cells = [
        [name]
        + [
            f"**{text}**" if value == best < math.inf else text
            for (text, value), best in zip(row, least, strict=True)
        ]
        for name, row in rows.items()
    ]
    return report.table([corner, *header], cells)


def by_optimizer(
    names: Iterable[str],
    cell: Callable[[str, str, int], Cell],
    columns: Iterable[tuple[str, int, str]],
) -> Iterable[str]:
    columns = list(columns)
    rows = {
        SHOWN[name]: [cell(workload, name, size) for workload, size, _ in columns]
        for name in names
    }
    return table("optimizer", [head for *_, head in columns], rows)


def whole(results: Results, what: str) -> Iterable[str]:
    """Steps, losses or seconds where every step has all the data."""
    cell = getattr(results, what)
    rows = {
        SHOWN[name]: [cell(workload, name, size) for workload, size, _ in WHOLE]
        for name in (CURVATURE, FULL, NLCG)
    }
    rows["best tuned peer"] = [
        results.best_peer(what, workload, size) for workload, size, _ in WHOLE
    ]
    return table("all data in every step", [head for *_, head in WHOLE], rows)


def beside_the_best(results: Results) -> Iterable[str]:
    """Our loss and the best tuned peer's where batches are sampled."""
    cells = []
    for workload, sizes in SAMPLED.items():
        for size in sizes:
            ours, loss = results.loss(workload, CURVATURE, size)
            best, least = results.best_peer("loss", workload, size)
            cells.append([f"`{workload}`, {size:,}", ours, best, change(loss / least)])
    return report.table(
        ["sampled batches", SHOWN[CURVATURE], "best tuned peer", ""], cells
    )


def training_and_test(results: Results) -> Iterable[str]:
    """What a rate that was chosen by validation does to the loss that is minimized."""
    cells = []
    for workload, sizes in HELD_OUT.items():
        for size in sizes:
            row = [f"`{workload}`, {size:,}"]
            for what in ("held_out", "training"):
                ours, _ = getattr(results, what)(workload, CURVATURE, size)
                row += [ours, results.best_peer(what, workload, size)[0]]
            cells.append(row)
    header = ("test loss", "best tuned peer", "training loss", "lowest of these peers")
    return report.table(["sampled batches", *header], cells)


def batches(workload: str, *sizes: int) -> list[tuple[str, int, str]]:
    return [(workload, size, f"batch {size:,}") for size in sizes]


def figures(results: Results) -> str:
    best = ("soap β=0.8", "muon β=0.8")
    jpeg = batches("cifar10_jpeg", 250, 1_000, 2_500, 5_000)
    ten_times = batches("cifar10_jpeg_all", 50_000)
    accuracies = by_optimizer(
        (CURVATURE, NLCG, *best, "muon", "lars", "nlcg_paper", "adamw"),
        results.accuracy,
        [*jpeg, *ten_times],
    )
    steps = by_optimizer(
        (CURVATURE, NLCG, "soap β=0.8", "muon", "lars", "momentum"),
        results.steps,
        batches("cifar10_jpeg", 250, 500, 1_000, 2_500, 5_000),
    )
    lines = ["# Figures that other documents show", ""]

    def add(name: str, text: str, rows: Iterable[str]) -> None:
        lines.extend([f"## {name.capitalize()}", "", f"<!-- {name} -->", ""])
        lines.extend([text, "", *rows, "", "<!-- end -->", ""])

    add(
        "accuracy",
        "Test accuracy in percent of `cifar10_jpeg`, at 50,000 of "
        "`cifar10_jpeg_all`, after 30 epochs.",
        accuracies,
    )
    add(
        "steps",
        "Steps to the target of `cifar10_jpeg`, a training loss of "
        f"{results.targets['cifar10_jpeg']:.4g}.",
        steps,
    )
    for what in ("steps", "loss", "seconds"):
        text = {
            "steps": "Steps to each workload's target.",
            "loss": "The loss at the end.",
            "seconds": "Seconds of a core to each workload's target.",
        }[what]
        add(f"whole {what}", text, whole(results, what))
    for workload, sizes in SAMPLED.items():
        rows = by_optimizer(
            (CURVATURE, NLCG, "soap", *best), results.loss, batches(workload, *sizes)
        )
        add(f"sampled {workload}", f"The loss of `{workload}` at the end.", rows)
    add(
        "beside the best",
        "The loss at the end, beside that of the best tuned peer.",
        beside_the_best(results),
    )
    add(
        "training and test",
        "`nlcg_auto` and peers, whose rates were chosen by the loss of a validation "
        "split: the loss of the test set, and of the batches of the last tenth of the "
        "steps.",
        training_and_test(results),
    )
    return "\n".join(lines).rstrip() + "\n"


def overview(results: Results, path: pathlib.Path) -> None:
    """The picture of the first page: accuracy by batch size, a name at each line."""
    sizes = WORKLOADS["cifar10_jpeg"](None).batch_sizes
    # On a phone the letters are as large as the text's.
    figure, axes = plt.subplots(figsize=(5, 3.4), layout="constrained")
    ends = {}
    for name, (_, colour) in LINES.items():
        rows = [report.accuracy(results.rows("cifar10_jpeg", name, s)) for s in sizes]
        points = [
            (s, 100 * x[0]) for s, x in zip(sizes, rows, strict=True) if x is not None
        ]
        width = 3 if name == CURVATURE else 1.5
        axes.plot(
            *zip(*points, strict=True), "o-", color=colour, lw=width, ms=width + 2
        )
        ends[name] = points[-1][1]
    low, high = axes.get_ylim()
    at = math.inf
    for name in sorted(ends, key=ends.__getitem__, reverse=True):
        label, colour = LINES[name]
        at = min(ends[name], at - APART * (high - low))
        axes.annotate(
            label,
            (1.02, at),
            xycoords=("axes fraction", "data"),
            color=colour,
            weight="bold" if name == CURVATURE else "normal",
            va="center",
            annotation_clip=False,
        )
    axes.set_xscale("log")
    axes.set_xticks(sizes, [f"{size:,}" for size in sizes])
    axes.minorticks_off()
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", alpha=0.3)
    axes.set(xlabel="images in a batch, of 5,000", ylabel="test accuracy, %")
    axes.set_title("A ResNet-8 on CIFAR-10 after 30 epochs", loc="left")
    figure.savefig(path, dpi=180, facecolor="white")
    plt.close(figure)


if __name__ == "__main__":
    folder = pathlib.Path(__file__).resolve().parent / "results"
    rows = Results(folder)
    (folder / "figures.md").write_text(figures(rows))
    overview(rows, folder / "overview.png")
