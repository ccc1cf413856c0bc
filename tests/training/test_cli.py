"""What the command line answers without training."""

import importlib
import os
import re
import subprocess
import sys
import tomllib

import pytest
from tiny import CONFIG, ROOT
from waiting import HANGING_SECONDS

import nlcg_optax
from nlcg_optax.training import cli, data
from nlcg_optax.training.config import builtin_configs


def test_the_installed_command_is_main():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    module, _, name = project["scripts"]["nlcg-train"].partition(":")
    assert getattr(importlib.import_module(module), name) is cli.main


def test_every_package_is_in_the_wheel():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    setuptools = project["tool"]["setuptools"]
    folders = {
        setuptools.get("package-dir", {}).get(name, name.replace(".", "/"))
        for name in setuptools["packages"]
    }
    files = [*ROOT.glob("nlcg_optax/**/*.py"), *ROOT.glob("configs/*.py")]
    assert folders == {str(path.parent.relative_to(ROOT)) for path in files}
    # And what is no Python.
    patterns = setuptools["package-data"]["nlcg_optax.training.configs"]
    for path in (ROOT / "configs").iterdir():
        if path.is_file() and path.suffix != ".py":
            assert any(path.match(pattern) for pattern in patterns), path


def test_command_line_reports_mistakes_in_one_line(tmp_path, capsys):
    args = [f"--config={CONFIG}", f"--workdir={tmp_path}"]
    assert cli.main([*args, "--config.optimizer.lr=1"]) == 2
    assert "optimizer.learning_rate" in capsys.readouterr().err
    assert cli.main([*args, "--config.dataset.name=cifar"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and "digits" in error
    with pytest.raises(SystemExit) as info:
        cli.main([*args, "--learning_rate=1"])
    assert info.value.code == 2
    assert "--config.FIELD=VALUE" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        cli.main([*args, "--num_processes=2"])
    assert "need --coordinator=HOST:PORT" in capsys.readouterr().err
    assert cli.main([*args, "--coordinator=localhost:1", "--process_id=2"]) == 2
    assert "0 <= I < N; they are None and 2." in capsys.readouterr().err
    assert cli.main([*args, "--config=digits"]) == 2
    assert "or one of cifar10_resnet32, " in capsys.readouterr().err
    with pytest.raises(SystemExit):
        cli.main([])
    assert "--workdir=FOLDER is needed" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        cli.main([*args, "--quiet", "--verbose"])
    assert "not allowed with" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (
            ["--config.batch_size", "100"],
            "--config.batch_size needs '=' and a value: --config.batch_size=100",
        ),
        (
            ["--config.batch_size", "--quiet"],
            "--config.batch_size needs '=' and a value: --config.batch_size=VALUE",
        ),
        (["--lr=1"], "'--lr=1': did you mean --config.optimizer.learning_rate=1?"),
        (["--optimizer.name=adam"], "did you mean --config.optimizer.name=adam?"),
        (["--workdr=a"], "unknown argument '--workdr=a': did you mean --workdir?"),
        (["--list-datasts"], "did you mean --list-datasets?"),
        (["a"], "unknown argument 'a': fields are set by --config.FIELD=VALUE"),
    ],
)
def test_an_argument_that_is_none_and_what_may_be_meant(arguments, said, capsys):
    with pytest.raises(SystemExit) as info:
        cli.main(["--workdir=unused", *arguments])
    assert info.value.code == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.endswith(said), error


@pytest.mark.parametrize(
    "text", ["def get_config(:", "import no_such_package", "get_config = dict"]
)
def test_a_wrong_config_file_is_a_sentence_and_exit_code_2(text, tmp_path, capsys):
    (tmp_path / "mine.py").write_text(text)
    args = [f"--config={tmp_path / 'mine.py'}", f"--workdir={tmp_path / 'run'}"]
    assert cli.main(args) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1, error
    assert not (tmp_path / "run").exists()


def test_version(capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(["--version"])
    assert ended.value.code == 0
    assert capsys.readouterr().out == f"nlcg-optax {nlcg_optax.__version__}\n"


def test_help_tells_the_flags_and_the_exit_codes(capsys):
    with pytest.raises(SystemExit) as info:
        cli.main(["--help"])
    assert info.value.code == 0
    out = capsys.readouterr().out
    for flag in ("--config.FIELD=VALUE", "--list-configs", "--quiet", "--coordinator"):
        assert flag in out
    codes = re.findall(r"^ +(\d+)  ", out, re.MULTILINE)
    assert codes == ["0", "1", "2", "3", "4", "130"]
    assert max(map(len, out.splitlines())) <= 88


def test_list_configs_names_every_one(capsys):
    assert cli.main(["--list-configs"]) == 0
    out = capsys.readouterr().out
    paths = list((ROOT / "configs").glob("*.py"))
    assert len(paths) >= 4
    for path in paths:
        assert re.search(rf"^{path.stem}( \(the default\))?$", out, re.MULTILINE)
    for config in builtin_configs():
        assert f"\n  {config.description}\n  needs {config.needs}\n" in out
    assert cli.DEFAULT_CONFIG in out and "\033" not in out


def test_list_datasets_names_them_and_where_they_are_read_from(capsys, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", "/data/tfds")
    assert cli.main(["--list-datasets"]) == 0
    out = capsys.readouterr().out
    for name in ("digits", "folder", *data.TFDS_DATASETS):
        assert re.search(rf"(^|\s){re.escape(name)}(\s|$)", out), name
    assert "/data/tfds" in out and "--config.dataset.data_dir=DIR" in out
    assert "caltech101 (102)" in out and "\xa0" not in out


BLOCKER = """
import sys

class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {blocked}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Missing())
from nlcg_optax.training.cli import main

try:
    main(["--help"])
except SystemExit as stop:
    assert stop.code == 0
sys.exit(main(["--workdir", sys.argv[1]]))
"""


def test_without_the_extra_one_sentence_says_what_to_install(tmp_path):
    blocked = ("flax", "ml_collections", "orbax", "sklearn", "tensorboardX", "tqdm")
    done = subprocess.run(
        [sys.executable, "-c", BLOCKER.format(blocked=blocked), tmp_path / "run"],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=HANGING_SECONDS,
    )
    assert done.returncode == 2, done.stderr
    assert "pip install 'nlcg-optax[train]'" in done.stderr
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert "--list-configs" in done.stdout  # --help needs nothing
    assert not (tmp_path / "run").exists()
