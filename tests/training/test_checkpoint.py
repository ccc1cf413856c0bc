"""Crashes, full disks and damaged checkpoints: no progress is lost, none is made up."""

import errno
import json
import os
import random
import shutil
import subprocess
import sys
import time

import fuzz
import jax
import numpy as np
import pytest
import tiny
from jax.sharding import Mesh
from test_distributed import rows, start_two
from waiting import wait_for

import nlcg_optax
from nlcg_optax.matrices import for_devices, plan
from nlcg_optax.training import loop
from nlcg_optax.training.checkpoint import (
    CheckpointError,
    Checkpoints,
    check_config,
    check_shared,
    locked,
)
from nlcg_optax.training.config import (
    ConfigError,
    apply_overrides,
    base_config,
    load_config,
    typed,
)
from nlcg_optax.training.mesh import state_shardings
from nlcg_optax.training.run_config import MeshConfig

# Runs of one config compile once, and some tests share one: xdist leaves them together.
pytestmark = pytest.mark.xdist_group("runs")


def steps_saved(workdir):
    names = [path.name for path in (workdir / "checkpoints").glob("*")]
    return sorted(int(name) for name in names if name.isdigit())


@pytest.fixture(scope="module")
def complete(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("complete")
    tiny.run(workdir)
    return workdir


def damage(checkpoint):
    """Cuts the largest file in half, as a disk that lost its end would."""
    path = max(checkpoint.rglob("*"), key=lambda path: path.stat().st_size)
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    return path


def test_what_is_no_checkpoint_is_named(tmp_path):
    """As where one was copied to another name, or linked to a disk that is gone."""
    folder = tmp_path / "checkpoints"
    (folder / "02").mkdir(parents=True)
    (folder / "7").symlink_to(tmp_path / "gone")
    (folder / "damaged-3-1").mkdir()
    (folder / "12").mkdir()
    checkpoints = Checkpoints(tmp_path, keep=3)
    (note,) = checkpoints.notes
    assert note.startswith(f"2 in {folder} are no checkpoints") and "02, 7." in note
    checkpoints.close()


def files(folder):
    return {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_a_damaged_checkpoint_is_named_and_the_one_before_it_restored(
    complete, tmp_path
):
    workdir = tmp_path / "run"
    shutil.copytree(complete, workdir)
    older, newest = steps_saved(workdir)
    damaged = damage(workdir / "checkpoints" / str(newest))
    output = tiny.run(workdir)
    assert f"The checkpoint of step {newest} is damaged: {damaged} is not" in output
    assert f"the run goes on from that of step {older}." in output
    assert f"resumed from the checkpoint of step {older}" in output
    assert rows(workdir) == rows(complete)
    assert steps_saved(workdir) == [older, newest]
    assert len([*(workdir / "checkpoints").glob(f"damaged-{newest}-*")]) == 1
    # Where all are damaged, nothing is changed.
    for step in (older, newest):
        damage(workdir / "checkpoints" / str(step))
    before = files(workdir / "checkpoints")
    said = f"^No checkpoint in {workdir / 'checkpoints'} is whole"
    with pytest.raises(CheckpointError, match=said):
        tiny.run(workdir)
    assert files(workdir / "checkpoints") == before


@pytest.mark.parametrize("kind", ["flipped", "cut", "missing", "longer", "no sums"])
def test_damage_of_every_kind_is_refused(tmp_path, kind):
    """Each of the files that Orbax reads, and that of the checksums."""
    state = {"w": np.arange(600, dtype=np.float32)}
    checkpoints = Checkpoints(tmp_path, keep=2)
    checkpoints.save(3, state)
    checkpoints.close()
    folder = tmp_path / "checkpoints" / "3"
    chance, refused = random.Random(0), 0
    paths = sorted(p for p in folder.rglob("*") if p.is_file())
    if kind == "no sums":  # as of an earlier version
        paths = [folder / "checksums.json"]
    for path in paths:
        whole = path.read_bytes()
        if kind in ("missing", "no sums"):
            path.unlink()
        elif kind == "longer":
            path.write_bytes(whole + b" ")
        else:
            place = chance.randrange(len(whole))
            flipped = bytes([whole[place] ^ 1 << chance.randrange(8)])
            rest = flipped + whole[place + 1 :] if kind == "flipped" else b""
            path.write_bytes(whole[:place] + rest)
        checkpoints = Checkpoints(tmp_path, keep=2)
        try:
            np.testing.assert_array_equal(checkpoints.restore(state)["w"], state["w"])
        except CheckpointError as error:
            assert str(path) in str(error)
            refused += 1
        if kind == "no sums":
            assert "cannot be verified" in checkpoints.notes[0] and not refused
        checkpoints.close()
        path.write_bytes(whole)
    # All but those that Orbax writes last, where there are no numbers, and (if it is
    # missing or longer) that of the checksums.
    assert refused >= (0 if kind == "no sums" else len(paths) - 3)


def test_a_checkpoint_under_the_name_of_another_step_is_refused(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=3)
    for step in (1, 2):
        checkpoints.save(step, {"w": np.full(600, step, np.float32)})
    checkpoints.close()
    folder = tmp_path / "checkpoints"
    (folder / "2").rename(folder / "7")
    checkpoints = Checkpoints(tmp_path, keep=3)
    assert checkpoints.restore({"w": np.zeros(600, np.float32)})["w"][0] == 1
    assert "is the checkpoint of step 2" in checkpoints.notes[0]
    checkpoints.close()


def test_a_list_of_checksums_that_lacks_files_is_damage(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=3)
    checkpoints.save(1, {"w": np.zeros(600, np.float32)})
    checkpoints.close()
    path = tmp_path / "checkpoints" / "1" / "checksums.json"
    listed = json.loads(path.read_text())
    del listed["files"][min(listed["files"])]
    path.write_text(json.dumps(listed))
    with pytest.raises(CheckpointError, match="does not list all files"):
        Checkpoints(tmp_path, keep=3).restore({"w": np.zeros(600, np.float32)})


BROKEN = tiny.ROOT / "tests" / "workers" / "broken_checkpoints.py"


def test_a_damaged_checkpoint_is_whole_or_refused(run_on_devices, tmp_path):
    """Many files of one, each damaged somehow: never is anything made up."""
    count = fuzz.cases(100)
    done = run_on_devices(BROKEN, 1, tmp_path, str(count))
    outcomes = json.loads(done.stdout)
    # By the checksums most are told; those of what Orbax writes last are not.
    assert min(outcomes.values()) >= 5 and sum(outcomes.values()) == count, outcomes


def test_a_checkpoint_of_another_model_is_refused(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=2)
    checkpoints.save(3, {"w": np.zeros((2, 3), np.float32)})
    checkpoints.wait()
    for like in ({"w": np.zeros((3, 2), np.float32)}, {"v": np.zeros((2, 3))}):
        with pytest.raises(CheckpointError, match="checkpoint of step 3, .*3, cannot"):
            checkpoints.restore(like)
    checkpoints.close()


def test_what_is_spread_over_devices_is_restored_on_others(tmp_path, monkeypatch):
    monkeypatch.setattr(plan, "OPERATIONS_PER_BYTE", 0)
    monkeypatch.setattr(plan, "OPERATIONS_PER_COLLECTIVE", 0)
    tx = nlcg_optax.scale_by_soap()
    grads = {k: np.ones((4, 6), np.float32) for k in "abc"}
    _, first = jax.jit(tx.update)(grads, tx.init(grads))  # as one device would
    for count, number in enumerate((8, 2, 1)):
        mesh = Mesh(np.array(jax.devices()[:number])[:, None], ("data", "fsdp"))
        like = jax.eval_shape(lambda n=number: for_devices(first, n))
        shardings = state_shardings(like, mesh, MeshConfig())
        checkpoints = Checkpoints(tmp_path, keep=1)
        if count:
            like = jax.tree.map(
                lambda x, at: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=at),
                like,
                shardings,
            )
            state = checkpoints.restore(like)
        else:
            state = jax.device_put(for_devices(first, number), shardings)
        assert state.factors["a"].left.shape[1] == number
        assert jax.tree.map(lambda x: x.sharding, state) == shardings
        checkpoints.save(count, state)
        checkpoints.close()
    jax.tree.map(np.testing.assert_array_equal, state, first)


def test_a_full_disk_is_told_and_costs_nothing_that_was_saved(complete, tmp_path):
    """A limit on the size of files stands for a disk without space."""
    workdir = tmp_path / "run"
    shutil.copytree(complete, workdir)
    (workdir / "config.json").unlink()
    saved = steps_saved(workdir)
    longer = ("num_epochs=15", "checkpoint_every_epochs=5")
    args = [f"--config.{override}" for override in longer]
    for name, less in (("checkpoint", "--config.log_every_steps=100"), ("metrics", "")):
        # Too little for the arrays of a checkpoint, and then for the metrics too.
        limit = 12_000 if name == "checkpoint" else 4_000
        limited = tiny.start(workdir, *args, *filter(None, [less]), limit=limit)
        (output,) = tiny.finish(limited, code=4)
        told = {
            "checkpoint": f"The last whole one: step {saved[-1]}.\n",
            "metrics": f"File too large: '{workdir / 'metrics.jsonl'}",
        }
        # Last, and alone.
        assert "error: " in output and told[name] in output, output
        assert output.splitlines()[-1].startswith("error: "), output
        assert "Traceback" not in output, output
        assert steps_saved(workdir) == saved
    output = tiny.run(workdir, *longer)
    assert f"resumed from the checkpoint of step {saved[-1]}" in output


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    config = load_config(tiny.CONFIG)
    apply_overrides(config, tiny.OVERRIDES)
    with pytest.raises(ConfigError, match="--workdir=.*file.* Choose another"):
        loop.train_and_evaluate(config, tmp_path / "file" / "run")
    with pytest.raises(ConfigError, match="--workdir=.*file"):
        loop.train_and_evaluate(config, tmp_path / "file")


def test_a_folder_that_becomes_unwritable(tmp_path, monkeypatch):
    """A file in its place stands for one that takes no files: root may write all."""
    folder, away = tmp_path / "checkpoints", tmp_path / "away"
    state = {"w": np.arange(6, dtype=np.float32)}
    checkpoints = Checkpoints(tmp_path, keep=2)
    checkpoints.save(1, state)
    checkpoints.wait()
    folder.rename(away)
    folder.write_text("")
    asked = []
    with monkeypatch.context() as patch:
        # Its threads would wait for five minutes when the program ends.
        patch.setattr(checkpoints._manager, "save", lambda *args, **_: asked.append(1))
        with pytest.raises(CheckpointError, match="Cannot write a checkpoint .*ints"):
            checkpoints.save(2, state)
    assert not asked
    folder.unlink()
    away.rename(folder)
    checkpoints.save(2, state)  # it goes on
    checkpoints.close()
    assert steps_saved(tmp_path) == [1, 2]
    fresh = Checkpoints(tmp_path, keep=2)
    np.testing.assert_array_equal(fresh.restore(state)["w"], state["w"])
    fresh.close()


def test_a_folder_that_was_removed_is_made_again(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=2)
    shutil.rmtree(tmp_path / "checkpoints")
    checkpoints.save(1, {"w": np.zeros(3)})
    checkpoints.close()
    assert steps_saved(tmp_path) == [1]


HOLD = """\
import pathlib, sys, time
from nlcg_optax.training.checkpoint import locked
with locked(pathlib.Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(1e6)
"""


def test_the_lock_of_a_folder_dies_with_its_process(tmp_path):
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, env=env
    )
    try:
        assert holder.stdout.readline() == b"held\n"
        with pytest.raises(ConfigError, match=f"Another run, process {holder.pid} on"):
            with locked(tmp_path):
                pass
    finally:
        holder.kill()
        holder.communicate()
    for _ in range(2):  # and it is given back
        with locked(tmp_path):
            with pytest.raises(ConfigError, match=f"process {os.getpid()} on"):
                with locked(tmp_path):
                    pass


def test_where_the_file_system_knows_no_locks_a_run_goes_on(tmp_path, monkeypatch):
    def flock(file, operation):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", flock)
    with locked(tmp_path):
        pass
    monkeypatch.setattr("nlcg_optax.training.checkpoint.fcntl", None)  # Windows
    with locked(tmp_path):
        pass


def test_a_folder_that_not_all_processes_see(tmp_path):
    with pytest.raises(ConfigError, match="--workdir=.* does not hold what process 0"):
        check_shared(tmp_path, seconds=0)
    (tmp_path / "config.json").touch()
    check_shared(tmp_path, seconds=0)


def test_a_config_from_before_a_field_was_there_still_fits(tmp_path):
    config = base_config()
    (tmp_path / "config.json").write_text('{"seed": 0, "batch_size": 128}')
    check_config(config, tmp_path)
    config.mesh.data = 8
    config.mesh.fsdp = 4  # may change
    check_config(config, tmp_path)
    config.microbatches = 2
    with pytest.raises(ConfigError, match=r"microbatches=2 \(was 1\)"):
        check_config(config, tmp_path)
    for text in ("{", "[1]", "5", "null", '"a"', "true", "[" * 10**5, "\x00"):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(ConfigError, match="config.json cannot be read"):
            check_config(config, tmp_path)


OLD_NLCG = {
    "step_rule": "quadratic_model",
    "preconditioner": "none",
    "curvature_fraction": 0.5,
    "curvature_min_images": 250,
    "curvature_residuals": 2,
}


def test_a_run_from_before_nlcg_auto_still_fits(tmp_path):
    old = {"optimizer": {"name": "nlcg", "learning_rate": 0.01, "nlcg": OLD_NLCG}}
    old["schedule"] = {"name": "cosine", "warmup_epochs": 5.0}
    (tmp_path / "config.json").write_text(json.dumps(old))
    config = base_config()
    config.optimizer.name = "nlcg_auto"
    config.optimizer.nlcg_auto.curvature_fraction = 0.5
    with pytest.raises(ConfigError, match="preconditioner=.* .was 'none'"):
        check_config(config, tmp_path)
    config.optimizer.nlcg_auto.preconditioner = "none"
    check_config(typed(config), tmp_path)
    config.optimizer.learning_rate, config.schedule.name = None, "none"
    check_config(typed(config), tmp_path)
    config.optimizer.nlcg_auto.residuals = 3
    with pytest.raises(ConfigError, match=r"residuals=3 \(was 2\)"):
        check_config(typed(config), tmp_path)
    # Where another optimizer was chosen those fields had no effect.
    old["optimizer"]["nlcg"] = OLD_NLCG | {"step_rule": "step"}
    (tmp_path / "config.json").write_text(json.dumps(old))
    config = base_config()
    config.optimizer.nlcg.preconditioner = "none"
    config.optimizer.learning_rate = 0.01
    config.schedule.update(name="cosine", warmup_epochs=5.0)
    check_config(typed(config), tmp_path)


@pytest.mark.long
def test_killed_at_any_moment(tmp_path, monkeypatch, capsys):
    """Kill -9 of one of two processes, ten times and more, most within a write."""
    args = (
        "--config.num_epochs=60",  # 144 steps
        "--config.checkpoint_every_epochs=0.4",  # every step
        "--config.eval_every_epochs=30",
    )
    whole = tmp_path / "whole"
    tiny.finish(*start_two(whole, *args, devices=1))
    workdir = tmp_path / "killed"
    checkpoints = workdir / "checkpoints"
    chance = random.Random(0)
    kills, within_write, reached = 0, 0, 0
    while kills < 12:
        processes = start_two(workdir, *args, devices=1)
        # Not before it has gone on, so that the run comes to an end; and every other
        # time within a write.
        after, writing = reached + chance.randrange(5), kills % 2

        def time_to_kill(after=after, writing=writing):
            names = [path.name for path in checkpoints.glob("*")]
            return max(map(int, filter(str.isdigit, names)), default=0) > after and (
                not writing or any("tmp" in name for name in names)
            )

        wait_for(time_to_kill, *processes)
        processes[chance.randrange(2)].kill()
        # The other would end too, in half a minute; a cluster does not wait so long.
        time.sleep(chance.uniform(0, 0.3))
        for process in processes:
            process.kill()
        tiny.finish(*processes, code=None)
        kills += 1
        names = [path.name for path in checkpoints.iterdir()]
        within_write += any("tmp" in name for name in names)
        reached = steps_saved(workdir)[-1]
        if reached == 144:
            break
    outputs = tiny.finish(*start_two(workdir, *args, devices=1))
    assert f"resumed from the checkpoint of step {reached}" in outputs[0]
    with capsys.disabled():
        print(f"\n{kills} kills, {within_write} within a write, last at {reached}")
    assert kills >= 10 and within_write > 0
    assert rows(workdir) == rows(whole)
    # The last checkpoints hold the same bits: a complete run only restores its own.
    assert steps_saved(workdir)[-1] == steps_saved(whole)[-1] == 144
    config = load_config(tiny.CONFIG)
    overrides = [arg.removeprefix("--config.") for arg in args]
    apply_overrides(config, [*tiny.OVERRIDES, *overrides])
    states = [tiny.train(config, path).state for path in (workdir, whole)]
    for p, q in zip(*map(jax.tree.leaves, states), strict=True):
        np.testing.assert_array_equal(np.asarray(p), np.asarray(q))
