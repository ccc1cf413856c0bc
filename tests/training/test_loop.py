"""Whole runs on a few digits: what they leave, and how they stop and go on."""

import contextlib
import dataclasses
import io
import json
import os
import re
import shutil
import signal
import time

import jax
import numpy as np
import optax
import pytest
import tiny
from tiny import CONFIG, OVERRIDES, tiny_model, train
from waiting import wait_for

import nlcg_optax
from nlcg_optax.training import cli, data, loop, metrics, report, steps
from nlcg_optax.training.config import (
    ConfigError,
    apply_overrides,
    load_config,
    typed,
)
from nlcg_optax.training.data.sources import Arrays, Subset
from nlcg_optax.training.mesh import create_mesh

# Runs of one config compile once, and some tests share one: xdist leaves them together.
pytestmark = pytest.mark.xdist_group("runs")


def tiny_config(*overrides):
    config = load_config(CONFIG)
    apply_overrides(config, [*OVERRIDES, *overrides])
    return config


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("uninterrupted")
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        result = train(tiny_config(), workdir)
    (workdir / "printed.txt").write_text(printed.getvalue())
    return workdir, result


def test_a_run_leaves_everything_it_promises(uninterrupted):
    workdir, result = uninterrupted
    assert result.step == 12 and result.signal is None
    rows = metrics.read_metrics(workdir / "metrics.jsonl")
    train = [row for row in rows if row["split"] == "train"]
    assert [row["step"] for row in train] == list(range(1, 13))
    wanted = {"loss", "accuracy", "learning_rate", "base_step", "beta", "step_size"}
    assert all(wanted <= row.keys() for row in train)
    tests = [row for row in rows if row["split"] == "test"]
    assert [row["step"] for row in tests] == [6, 12]
    assert tests[-1]["accuracy"] == result.metrics["test"]["accuracy"]
    # 360 images, each counted once.
    assert (tests[-1]["accuracy"] * 360) == pytest.approx(
        round(tests[-1]["accuracy"] * 360), abs=1e-6
    )
    assert (workdir / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert list((workdir / "tensorboard").glob("events.*"))
    saved = json.loads((workdir / "config.json").read_text())
    assert saved["batch_size"] == 40 and saved["optimizer"]["name"] == "nlcg"


def test_the_summary_and_the_end_tell_the_truth(uninterrupted):
    workdir, result = uninterrupted
    printed = (workdir / "printed.txt").read_text()
    told = dict(re.findall(r"^  (\w+) +(.*)$", printed, re.MULTILINE))
    device = jax.devices()[0].device_kind
    assert told["devices"] == f"1 × {device}, 1 process; mesh data=1, fsdp=1"
    parameters = sum(x.size for x in jax.tree.leaves(result.state.params))
    assert told["model"] == f"resnet8, {parameters:,} parameters"
    assert told["data"].startswith("digits, 96 training, 360 test images of 8×8×1, 10")
    assert told["batch"] == "40 images, 40 per device"
    assert told["steps"] == "12: 5 epochs of 2.4 steps"
    assert told["optimizer"] == (
        "nlcg (fletcher_reeves, diagonal_bfgs), learning rate 0.4; "
        "warm-up of 5 epochs, then cosine to 0"
    )
    state = sum(x.nbytes for x in jax.tree.leaves(result.state))
    assert told["state"].startswith(f"{report.size(state)} per device: ")
    # The step holds the training set and a batch's indices too, and a few metrics.
    held = state + 96 * (64 + 4) + 40 * 4
    (total, images, temporary) = re.findall(r"([\d.]+) kB", told["memory"])
    assert held <= 1000 * float(images) + 50 < held + 1000
    assert float(total) == pytest.approx(float(images) + float(temporary), abs=0.2)
    assert told["folder"] == f"{workdir}: a new run"
    command = f"tensorboard --logdir={workdir / 'tensorboard'}"
    assert told["watch"].startswith(command)
    assert told["TensorBoard"].startswith(command)

    tests = [
        (row["accuracy"], row["step"] / 2.4)
        for row in metrics.read_metrics(workdir / "metrics.jsonl")
        if row["split"] == "test"
    ]
    (best, epoch), (final, _) = max(tests, key=lambda row: row[0]), tests[-1]
    end = f"done: test accuracy {final:.4f} (best {best:.4f} at epoch {epoch:g}); 12 st"
    assert end in printed
    assert told["curves"] == str(workdir / "curves.png")
    assert told["checkpoints"] == f"{workdir / 'checkpoints'}, the last of step 12"
    assert "step  6 of 12 (epoch 2.5): train loss " in printed


def test_quiet_prints_the_last_line_alone(uninterrupted, capfd):
    workdir, result = uninterrupted
    overrides = [f"--config.{override}" for override in OVERRIDES]
    args = ["--config=digits_resnet8", f"--workdir={workdir}", *overrides]
    assert cli.main([*args, "--quiet"], train) == 0
    out, err = capfd.readouterr()
    accuracy = result.metrics["test"]["accuracy"]
    assert out.startswith(f"done: test accuracy {accuracy:.4f} (best ")
    assert out.endswith(f"all in {workdir}\n") and out.count("\n") == 1
    assert err == ""


def test_verbose_tells_the_config_and_every_step(tmp_path, capfd):
    train(tiny_config(), tmp_path, "verbose")
    out, err = capfd.readouterr()
    assert "config.optimizer.learning_rate = 0.4\n" in out
    assert f", jax {jax.__version__}, " in out
    assert re.findall(r"^step +(\d+) of 12 .*grad_norm", out, re.MULTILINE) == [
        str(step) for step in range(1, 13)
    ]
    assert "\033" not in out and err == ""


def assert_same_bits(a, b):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


def assert_same_run(result, workdir, expected, whole):
    """The state at its end, and every row of its metrics."""
    assert_same_bits(result.state, expected.state)
    assert metrics.read_metrics(workdir / "metrics.jsonl") == metrics.read_metrics(
        whole / "metrics.jsonl"
    )


def before_each_batch(patch, happens):
    """Patches the loop, so that `happens(step)` is called before it reads a batch."""
    make_input = loop.make_input

    def make(*args):
        next_batch, step_fn = make_input(*args)

        def read(step):
            happens(step)
            return next_batch(step)

        return read, step_fn

    patch.setattr(loop, "make_input", make)


def test_a_resumed_run_ends_with_the_same_bits(uninterrupted, tmp_path, monkeypatch):
    """Stopped by SIGTERM in the middle of the run, and gone on with."""
    whole, expected = uninterrupted

    def stop(step):
        if step == 7:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        before_each_batch(patch, stop)
        first = train(tiny_config(), tmp_path)
    assert first.signal == signal.SIGTERM and first.step == 8
    second = train(tiny_config(), tmp_path)
    assert second.signal is None
    assert_same_run(second, tmp_path, expected, whole)


def test_an_error_loses_no_row(uninterrupted, tmp_path, monkeypatch):
    """What reads a batch fails, while the metrics of the step before are unread."""
    whole, expected = uninterrupted

    def fail(step):
        if step == 7:
            raise OSError("the disk is gone")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="disk is gone"):
        before_each_batch(patch, fail)
        train(tiny_config(), tmp_path)
    result = train(tiny_config(), tmp_path)
    assert_same_run(result, tmp_path, expected, whole)


def test_a_batch_that_is_not_finite_is_not_skipped(
    uninterrupted, tmp_path, monkeypatch
):
    """The step after it is finite again, and under way before its loss is read."""
    whole, expected = uninterrupted
    load_dataset, config = loop.load_dataset, tiny_config()

    def with_a_broken_label(options):
        dataset = load_dataset(options)
        labels = dataset.train.labels.copy()
        broken, after = (
            data.batch_indices(step, config.batch_size, len(labels), config.seed)
            for step in (1, 2)
        )
        labels[np.setdiff1d(broken, after)[0]] = 10  # there are ten classes, from 0
        train = data.Split.from_arrays(dataset.train.images, labels)
        return dataclasses.replace(dataset, train=train)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "load_dataset", with_a_broken_label)
        with pytest.raises(loop.NonFiniteLossError, match="At step 2 the loss was nan"):
            train(config, tmp_path)
    saved = loop.Checkpoints(tmp_path, 2)
    assert saved.latest_step() == 1
    saved.close()
    result = train(config, tmp_path)
    assert_same_run(result, tmp_path, expected, whole)


def test_a_clock_that_jumps_changes_nothing(uninterrupted, tmp_path, monkeypatch):
    """Set forward by years, then back: what a run does depends on its steps alone."""
    whole, expected = uninterrupted
    clock, offset = time.time, [0.0]
    monkeypatch.setattr(time, "time", lambda: clock() + offset[0])

    def jump(step):
        # While the checkpoint of the step before is being written.
        offset[0] = {5: 1e8, 9: -1e8}.get(step, offset[0])

    before_each_batch(monkeypatch, jump)
    result = train(tiny_config(), tmp_path)
    assert offset == [-1e8]
    saved = [sorted(p.name for p in w.glob("checkpoints/*")) for w in (tmp_path, whole)]
    assert saved[0] == saved[1]
    assert_same_run(result, tmp_path, expected, whole)


@pytest.mark.parametrize(
    ("overrides", "recomputed"),
    [
        (("eval_every_epochs=0.4",), 12),  # after every step
        (("eval_every_epochs=5", "precise_batch_norm_batches=0"), 0),
    ],
)
def test_evaluation_does_not_disturb_training(
    overrides, recomputed, uninterrupted, tmp_path, monkeypatch
):
    """However often, and by whatever statistics: the same bits."""
    _, expected = uninterrupted
    pool_statistics, calls = steps.pool_statistics, []

    def counted(statistics):
        calls.append(len(statistics))
        return pool_statistics(statistics)

    monkeypatch.setattr(steps, "pool_statistics", counted)
    found = train(tiny_config(*overrides), tmp_path)
    assert calls == [3] * recomputed
    assert_same_bits(found.state, expected.state)


@pytest.mark.parametrize(
    ("overrides", "images"),
    [
        ((), 120),  # all batches of an epoch of 2.4 steps
        (("precise_batch_norm_batches=1",), 40),
        (("microbatches=4",), 120),
        (("microbatches=4", "batch_norm_statistics=batch"), 120),
        (("average_decay=0.0",), 120),
        (("batch_size=9",), 0),  # more than ten steps: by running averages
    ],
)
def test_evaluation_normalizes_as_the_training_images_are(overrides, images):
    # Standardized images would have the statistics that BatchNorm starts with; by
    # ImageNet's grey digits are shifted, into three channels.
    config = typed(tiny_config(*overrides, "dataset.normalization=imagenet"))
    dataset, model = loop.load_dataset(config.dataset), tiny_model(config.model, 10)
    described = (config, (8, 8, 3), create_mesh(config.mesh))
    state = steps.create_state(model, optax.sgd(0.1), *described)
    if state.average is not None:
        state = state.replace(average=jax.tree.map(lambda x: 0.9 * x, state.params))
    found = loop.make_evaluation(config, dataset, model, described[-1])(state)
    statistics, normalize = state.batch_stats, steps.normalizer(config.dataset)
    if images:
        order = [data.epoch_indices(epoch, 96, config.seed) for epoch in (0, 1)]
        shown = dataset.train.images[np.concatenate(order)[:images]]
        pixels = np.asarray(normalize(shown), np.float64)
        statistics = {
            "BatchNorm_0": {
                "mean": pixels.mean(axis=(0, 1, 2)),
                "var": pixels.var(axis=(0, 1, 2)),
            }
        }
    logits = model.apply(
        {"params": state.average or state.params, "batch_stats": statistics},
        normalize(dataset.test.images),
        train=False,
    )
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, dataset.test.labels)
    assert found["test"]["loss"] == pytest.approx(float(loss.mean()), rel=1e-5)


def test_a_complete_run_is_only_evaluated(uninterrupted, capsys):
    workdir, expected = uninterrupted
    before = (workdir / "metrics.jsonl").read_text()
    again = train(tiny_config(), workdir)
    assert again.metrics == expected.metrics
    assert (workdir / "metrics.jsonl").read_text() == before
    assert "resumed from the checkpoint of step 12" in capsys.readouterr().out


def test_another_run_is_drawn_and_told_of(uninterrupted, tmp_path, capsys):
    theirs = tmp_path / "theirs"
    config = tiny_config("optimizer.name=momentum", "optimizer.learning_rate=0.05")
    train(config, theirs, "quiet")
    accuracies = [
        row["accuracy"]
        for row in metrics.read_metrics(theirs / "metrics.jsonl")
        if row["split"] == "test"
    ]
    ours, _ = uninterrupted
    shutil.copytree(ours, tmp_path / "ours")
    train(tiny_config(f"compare_with={theirs}"), tmp_path / "ours")
    printed = capsys.readouterr().out
    for step, accuracy in zip((6, 12), accuracies, strict=True):
        right = f"{100 * accuracy:.1f}% with momentum at 0.05\n"
        assert re.search(
            f"after {step} steps .* with nlcg, {re.escape(right)}", printed
        )
    curves = [(w / "curves.png").read_bytes() for w in (ours, tmp_path / "ours")]
    assert curves[0] != curves[1]
    # Not with a run of another length.
    config = tiny_config(f"compare_with={theirs}", "num_epochs=6", "l2_penalty=0.1")
    train(config, tmp_path / "longer")
    printed = capsys.readouterr().out
    assert "not with momentum at 0.05, which had another l2_penalty, num_ep" in printed


def test_another_config_in_the_same_folder_is_refused(uninterrupted):
    workdir, _ = uninterrupted
    with pytest.raises(ConfigError, match=r"batch_size=48 \(was 40\).*--workdir"):
        train(tiny_config("batch_size=48"), workdir)
    # What does not change the result may change.
    train(tiny_config("eval_batch_size=180"), workdir)


def test_a_finished_run_can_be_trained_longer(tmp_path):
    """By a schedule that does not know the end the bits are those of one long run."""
    steps = "schedule.name=step", "schedule.warmup_epochs=0", "schedule.boundaries=2.0"
    tiny.run(tmp_path / "longer", *steps, "num_epochs=1.25")
    longer = *steps, "num_epochs=2.5"
    printed = tiny.run(tmp_path / "longer", *longer)
    assert "2.5 epochs in place of 1.25: the learning rates are those of a" in printed
    tiny.run(tmp_path / "whole", *longer)
    found, expected = (
        [
            row
            for row in metrics.read_metrics(tmp_path / name / "metrics.jsonl")
            if (row["split"], row["step"]) != ("test", 3)  # at the first end alone
        ]
        for name in ("longer", "whole")
    )
    assert found == expected and found[-1]["step"] == 6
    # From now on that is its length.
    with pytest.raises(ConfigError, match=r"num_epochs=1.25 \(was 2.5\)"):
        tiny.run(tmp_path / "longer", *steps, "num_epochs=1.25")


def test_not_where_the_rate_has_come_to_its_end(uninterrupted):
    workdir, _ = uninterrupted
    with pytest.raises(ConfigError, match="'cosine' a longer run has other learning"):
        train(tiny_config("num_epochs=6"), workdir)


@pytest.mark.parametrize(
    ("pixels", "images", "parts", "size"),
    [(8, 96, 1, 96), (8, 97, 2, 96), (512, 96, 1, 8), (4096, 96, 1, 1)],
)
def test_a_batch_size_of_0_is_one_that_fits(pixels, images, parts, size):
    config = typed(tiny_config("batch_size=0", f"microbatches={parts}"))
    split = data.Split(Subset(None, np.arange(images)))
    dataset = data.Dataset("any", 2, ("a", "b"), (pixels, pixels, 3), split, split)
    assert loop._with_batch_size(config, dataset).batch_size == size
    given = typed(tiny_config("batch_size=40"))
    assert loop._with_batch_size(given, dataset) is given


def test_a_loss_that_is_not_finite_saves_what_came_before(tmp_path):
    config = tiny_config("optimizer.name=sgd", "optimizer.learning_rate=1e25")
    with pytest.raises(
        loop.NonFiniteLossError, match="At step .* the loss was"
    ) as info:
        train(config, tmp_path)
    assert "optimizer.learning_rate" in str(info.value)
    rows = metrics.read_metrics(tmp_path / "metrics.jsonl")
    assert not np.isfinite(rows[-1]["grad_norm"])
    saved = loop.Checkpoints(tmp_path, 2)
    assert saved.latest_step() == rows[-1]["step"] - 1
    saved.close()
    assert (tmp_path / "curves.png").exists()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("num_epochs=0.1", "num_epochs=0.1 .* no step"),
        ("batch_size=97", "batch_size=97 .* expected 1 to 96"),
        ("batch_size=-1", "batch_size=-1 .* expected 0 or more"),
        ("microbatches=3", "microbatches=3 does not divide batch_size=40; .* 2, 4"),
        ("microbatches=0", "microbatches=0 does not divide"),
        ("batch_norm_statistics=none", "'none' is unknown: .*'microbatch', 'batch'"),
        ("mesh.data=3", "mesh.data=3 and mesh.fsdp=1 do not fit 1 device"),
        ("precise_batch_norm_batches=-1", "precise_batch_norm_batches=-1 is not valid"),
        ("seed=-1", "seed=-1 is not valid: expected 0 or more"),
        ("dataset.crop_padding=-1", "dataset.crop_padding=-1 is not valid"),
        ("eval_batch_size=0", "eval_batch_size=0 is not valid: expected 1 or more"),
        ("log_every_steps=0", "log_every_steps=0 is not valid: expected 1 or more"),
        ("keep_checkpoints=0", "keep_checkpoints=0 is not valid: expected 1 or more"),
        ("eval_every_epochs=0", "eval_every_epochs=0.* is not valid: .* more than 0"),
        ("checkpoint_every_epochs=0", "checkpoint_every_epochs=0.* is not valid"),
        ("model.name=resnet9", "model: .*'resnet9'.*resnet8"),
        ("model.dtype=float8", "model: .*'float8'.*bfloat16"),
    ],
)
def test_a_config_that_cannot_run_is_an_error_before_anything_is_written(
    override, message, tmp_path
):
    with pytest.raises(ConfigError, match=message):
        train(tiny_config(override), tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optimizer.name=adm", "optimizer.name='adm' is unknown: .*'adam'"),
        ("optimizer.nlcg.preconditioner=bfgs", "'bfgs' is unknown: .*'diagonal_bfgs'"),
        ("optimizer.nlcg.step_rule=steps", "optimizer: .*'steps'"),
        ("optimizer.nlcg.beta_rule=fr", "optimizer: .*'fr'.*fletcher_reeves"),
        ("optimizer.nlcg.beta_bounds=(1.0, 0.0)", "optimizer: .*beta_bounds"),
        ("schedule.name=cosin", "schedule.name='cosin' is unknown: .*'cosine'"),
        ("model.name=resnet9", "model: .*'resnet9'.*resnet8"),
        ("dataset.normalization=none", "normalization.*'none'.*per_image"),
        ("mesh.data=3", "mesh.data=3 and mesh.fsdp=1 do not fit 1 device"),
        ("microbatches=3", "microbatches=3 does not divide batch_size=40"),
        ("batch_norm_statistics=none", "batch_norm_statistics='none' is unknown"),
        ("num_epochs=0", "num_epochs=0.0 is no step"),
    ],
)
def test_what_needs_no_data_is_checked_before_they_are_loaded(
    override, message, tmp_path, monkeypatch
):
    def load_dataset(config):
        raise AssertionError("too late")

    monkeypatch.setattr(loop, "load_dataset", load_dataset)
    with pytest.raises(ConfigError, match=message):
        train(tiny_config(override), tmp_path)
    with pytest.raises(AssertionError, match="too late"):
        train(tiny_config(), tmp_path)


@pytest.mark.parametrize("flip", [True, False])
def test_streamed_crops_are_flipped_if_the_config_says_so(flip):
    """Left is darker than right, but in what is flipped."""
    config = typed(tiny_config("dataset.image_size=8", f"dataset.flip={flip}"))
    image = np.mgrid[:16, :16][1].astype(np.uint8)[..., None]
    arrays = Arrays(np.stack([image] * 40), np.zeros(40, np.int32))
    split = data.Split(Subset(arrays, np.arange(40)))
    dataset = data.Dataset("ramps", 2, ("a", "b"), (8, 8, 1), split, split)
    mesh, schedule = create_mesh(config.mesh), optax.constant_schedule(0.1)
    model = tiny_model(config.model, 2)
    next_batch, _ = loop.make_input(
        config, dataset, model, optax.identity(), schedule, mesh, 0
    )
    images = np.asarray(next_batch(0)["image"]).reshape(40, 8, 8)
    flipped = images[:, 0, 0] > images[:, 0, -1]
    assert (10 < flipped.sum() < 30) if flip else not flipped.any()


def test_streamed_images_train_and_resume(tmp_path):
    """A folder of images, read as the large sets are."""
    from PIL import Image

    rng = np.random.default_rng(0)
    for split, count in (("train", 6), ("test", 3)):
        for label in ("dark", "light"):
            folder = tmp_path / "images" / split / label
            folder.mkdir(parents=True)
            for i in range(count):
                low = 128 * (label == "light")
                pixels = rng.integers(low, low + 128, (8, 8, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{i}.png")
    overrides = (
        "dataset.name=folder",
        f"dataset.data_dir={tmp_path / 'images'}",
        "dataset.in_memory=no",
        "dataset.max_train_examples=none",
        "dataset.normalization=imagenet",
        "batch_size=5",
        "num_epochs=2.5",
    )
    config = tiny_config(*overrides)
    result = train(config, tmp_path / "run")
    assert result.step == 6
    assert set(result.metrics) == {"test"}
    # In memory the same images make the same model, and the same statistics of it.
    apply_overrides(config, ["dataset.in_memory=yes"])
    in_memory = train(config, tmp_path / "in_memory")
    loss = in_memory.metrics["test"]["loss"]
    assert result.metrics["test"]["loss"] == pytest.approx(loss, rel=1e-4)


@pytest.mark.parametrize(
    ("number", "code"),
    [(signal.SIGINT, 130), pytest.param(signal.SIGTERM, 0, marks=pytest.mark.long)],
)
def test_signals_save_and_say_where(tmp_path, number, code):
    process = tiny.start(tmp_path, "--config.num_epochs=100000")
    path = tmp_path / "metrics.jsonl"
    wait_for(lambda: path.exists() and '"test"' in path.read_text(), process)
    # A second run in its folder, meanwhile, is refused before it has written anything.
    holder = f"Another run, process {process.pid} on .*, is at work in --workdir="
    with pytest.raises(ConfigError, match=holder):
        train(tiny_config("num_epochs=100000"), tmp_path)
    process.send_signal(number)
    (out,) = tiny.finish(process, code=code)
    assert f"{number.name}: stopped after step" in out
    assert str(tmp_path / "checkpoints") in out
    saved = loop.Checkpoints(tmp_path, 2)
    step = saved.latest_step()
    saved.close()
    assert f"stopped after step {step:,} " in out
    rows = metrics.read_metrics(path)
    trained = [row["step"] for row in rows if row["split"] == "train"]
    assert trained == list(range(1, step + 1))


def auto_config():
    return tiny_config(
        "optimizer.name=nlcg_auto",
        "optimizer.nlcg_auto.residuals=1",
        "optimizer.learning_rate=none",
        "schedule.name=none",
        "dataset.crop_padding=0",
        "dataset.flip=False",
    )


def test_nlcg_auto_is_advised_of_no_learning_rate(tmp_path, monkeypatch):
    load_dataset = loop.load_dataset

    def with_broken_labels(options):
        dataset = load_dataset(options)
        labels = np.full_like(dataset.train.labels, 10)  # ten classes, from 0
        train = data.Split.from_arrays(dataset.train.images, labels)
        return dataclasses.replace(dataset, train=train)

    monkeypatch.setattr(loop, "load_dataset", with_broken_labels)
    with pytest.raises(loop.NonFiniteLossError, match="no step of nlcg_auto") as info:
        train(auto_config(), tmp_path)
    assert "learning_rate" not in str(info.value)


def test_a_mismatch_of_loss_and_curvature_is_told_since_the_run_began(
    tmp_path, monkeypatch, capsys
):
    """The optimizer counts on through a restart; the warning begins anew."""
    seen = []
    monkeypatch.setattr(
        report.Report, "loss_mismatch", lambda self, *found: seen.append(found)
    )

    def stop(step):
        if step == 7:
            os.kill(os.getpid(), signal.SIGTERM)

    # Every step tells of one more mismatch, and noise never rules.
    monkeypatch.setattr(nlcg_optax.curvature.noise, "rules", lambda *args: False)
    mismatch = nlcg_optax.curvature.trust.mismatch
    monkeypatch.setattr(
        nlcg_optax.curvature.trust,
        "mismatch",
        lambda *args: mismatch(*args) | True,
    )
    with monkeypatch.context() as patch:
        before_each_batch(patch, stop)
        train(auto_config(), tmp_path, "quiet")
    train(auto_config(), tmp_path, "quiet")
    assert seen == [(s, s) for s in range(1, 9)] + [(s, s - 8) for s in range(9, 13)]


def test_nlcg_auto_needs_no_learning_rate(tmp_path):
    printed = io.StringIO()
    config = auto_config()
    with contextlib.redirect_stdout(printed):
        train(config, tmp_path)
    text = printed.getvalue()
    assert "steps chosen by the curvature" in text
    told = re.search(r"of 40 images of each batch; .* ([\d.]+) times", text)
    # The products are taken on all of it; and of so small a model what is done with
    # matrices where noise rules counts too.
    assert told and 2 < float(told[1]) < 30
    rows = metrics.read_metrics(tmp_path / "metrics.jsonl")
    trained = [row for row in rows if row["split"] == "train"]
    assert all({"damping", "signal"} <= row.keys() for row in trained)
    along = ("gradient", "past_1", "past_2", "past_3", "residual_1")
    wanted = {f"coefficient_{name}" for name in along}
    named = [{key for key in row if key.startswith("coefficient")} for row in trained]
    assert all(names == wanted for names in named)
    assert {row["learning_rate"] for row in trained} == {1.0}
    assert trained[-1]["loss"] < 0.1 * trained[0]["loss"]
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
