import pytest

from nlcg_optax.training import config as config_lib
from nlcg_optax.training.config import ConfigError


def test_overrides_set_fields_of_every_type():
    config = config_lib.base_config()
    config_lib.apply_overrides(
        config,
        [
            "optimizer.learning_rate=2",
            "optimizer.name=momentum",
            "batch_size=64",
            "dataset.flip=false",
            "dataset.data_dir=/data=x",
            "dataset.image_size=24",
            "schedule.boundaries=(3, 5)",
            "optimizer.nlcg.beta_bounds=[0.0, 0.9]",
        ],
    )
    assert config.optimizer.learning_rate == 2.0
    assert isinstance(config.optimizer.learning_rate, float)
    assert config.optimizer.name == "momentum"
    assert config.batch_size == 64
    assert config.dataset.flip is False
    assert config.dataset.data_dir == "/data=x"
    assert config.dataset.image_size == 24
    assert tuple(config.schedule.boundaries) == (3, 5)
    assert tuple(config.optimizer.nlcg.beta_bounds) == (0.0, 0.9)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("optimizer.lr=1", "'optimizer.lr': did you mean optimizer.learning_rate?"),
        ("lr=1", "'lr': did you mean optimizer.learning_rate?"),
        ("optimiser.learning_rate=1", "did you mean optimizer.learning_rate?"),
        ("batchsize=1", "'batchsize': did you mean batch_size?"),
        ("epochs=1", "'epochs': did you mean num_epochs?"),
        ("optimizer.nlcg.betarule=x", "did you mean optimizer.nlcg.beta_rule?"),
        (
            "optimizer=nlcg",
            "'optimizer' is a group of fields: did you mean optimizer.n",
        ),
        ("mesh=2", "is a group of fields: set one of mesh.data, mesh.fsdp, mesh.min_"),
        (
            "model.depth=2",
            "expected one of model.batch_norm_epsilon, model.batch_norm_",
        ),
        ("nothing_like_it=2", "expected one of average_decay, batch_norm_statistics, "),
        ("batch_size", "--config.batch_size needs a value: --config.batch_size=VALUE."),
    ],
)
def test_a_wrong_field_and_what_may_be_meant(override, said):
    with pytest.raises(ConfigError) as info:
        config_lib.apply_overrides(config_lib.base_config(), [override])
    message = str(info.value)
    assert said in message and "\n" not in message and len(message) < 450
    assert message.startswith(f"--config.{override.partition('=')[0]}")


@pytest.mark.parametrize(
    "override",
    ["batch_size=many", "batch_size=0.5", "dataset.flip=perhaps", "num_epochs=(1,2)"],
)
def test_value_that_does_not_fit(override):
    field = override.partition("=")[0]
    with pytest.raises(ConfigError, match=f"--config.{field}=.*does not fit: expected"):
        config_lib.apply_overrides(config_lib.base_config(), [override])


def test_missing_file_names_its_neighbours(tmp_path):
    (tmp_path / "near.py").write_text("")
    with pytest.raises(ConfigError, match=r"no config .*far.py.*near.py.*digits_res"):
        config_lib.load_config(tmp_path / "far.py")
    with pytest.raises(ConfigError, match=r"near' \(did you mean .*near.py\?\): expec"):
        config_lib.load_config(tmp_path / "near")


def test_unknown_name_lists_the_built_in_ones():
    known = "cifar10_resnet32, cifar100_resnet32, digits_resnet8, imagenet_resnet50"
    with pytest.raises(
        ConfigError, match=f"'digits' .did you mean digits_resnet8.*one of {known}"
    ):
        config_lib.load_config("digits")


HEAD = "from nlcg_optax.training.config import base_config\n"
CHANGES = HEAD + "def get_config():\n    c = base_config()\n"
CONTRACT = (
    "expected a function get_config() that takes base_config(), changes fields of"
)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            "def get_config(:\n",
            ", line 1 is no Python: invalid syntax; expected a funct",
        ),
        (CHANGES + "  x = 1\n", ", line 4 is no Python: unindent does not match any"),
        (
            HEAD + "def get_config():\n    raise ValueError('not today')\n",
            f", line 3: ValueError: not today; {CONTRACT}",
        ),
        (HEAD + "assert base_config() is None", ", line 2: AssertionError; expected a"),
        (
            "import os\nimport no_such_package\n",
            ", line 2: No module named 'no_such_package'; expected a package that is",
        ),
        (HEAD + "c = base_confg()\n", ", line 2: NameError: name 'base_confg' is not"),
        (
            "import sys\nsys.exit('no')\n",
            ", line 2: SystemExit: no; expected a function",
        ),
        (
            "def get_config():\n    return {}",
            ", line 1: get_config() returned a dict; ex",
        ),
        (CHANGES, ", line 2: get_config() returned None; expected a function get_conf"),
        (
            "import ml_collections\nget_config = lambda: ml_collections.ConfigDict()",
            ", line 2: get_config() returned a config without average_decay, batch_nor",
        ),
        ("", f" defines no get_config(): {CONTRACT}"),
        (
            "def getconfig():\n    pass",
            " defines no get_config() (did you mean getconfi",
        ),
        (
            "get_config = 3",
            ": TypeError: 'int' object is not callable; expected a funct",
        ),
        (
            CHANGES + "    c.optimizer.lr = 1.0\n",
            ", line 4: there is no config field 'optimizer.lr': did you mean "
            "optimizer.learning_rate?",
        ),
        (
            CHANGES + "    c['optimizer'].lr = (\n        c.seed)\n",
            ", line 4: there is no config field 'optimizer.lr': did you mean optimizer",
        ),
        (
            CHANGES + "    o = c.optimizer\n    c.batch_size = o.learningrate\n",
            ", line 5: there is no config field 'learningrate': did you mean optimizer",
        ),
        (
            CHANGES + "    c.unlock()\n    c.batchsize = 3\n    return c\n",
            ", line 2: there is no config field 'batchsize': did you mean batch_size?",
        ),
        (
            CHANGES + "    c.batch_size = 'many'\n",
            ", line 4: the value does not fit batch_size: expected int, as in 128.",
        ),
        (
            CHANGES + "    c.optimizer = 'adam'\n",
            ", line 4: 'optimizer' is a group of fields: did you mean optimizer.name?",
        ),
    ],
)
def test_a_wrong_file_is_told_in_one_sentence(text, said, tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(text)
    with pytest.raises(ConfigError) as info:
        config_lib.load_config(path)
    message = str(info.value)
    assert message.startswith(f"{path}{said}"), message
    assert "\n" not in message and "!!python" not in message
    assert len(message.removeprefix(str(path))) < 250


def test_a_wrong_file_that_is_imported_is_the_one_at_fault(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "broken_module.py").write_text("x = 1\nx = = 1\n")
    (tmp_path / "mine.py").write_text("import broken_module\n")
    said = r"broken_module.py, line 2 is no Python: .*mine.py, line 1 imports it"
    with pytest.raises(ConfigError, match=f"^{tmp_path}/{said}"):
        config_lib.load_config(tmp_path / "mine.py")


def test_none_takes_a_value_away_where_there_need_be_none():
    config = config_lib.load_config("digits_resnet8")
    assert config.compare_with
    names = ("compare_with", "dataset.data_dir", "optimizer.learning_rate")
    config_lib.apply_overrides(config, [f"{name}=none" for name in names])
    assert config.compare_with is None and config.dataset.data_dir is None
    with pytest.raises(ConfigError, match="num_epochs=none does not fit"):
        config_lib.apply_overrides(config, ["num_epochs=none"])


def test_every_committed_config_loads(request):
    builtin = {config.path: config for config in config_lib.builtin_configs()}
    paths = set((request.config.rootpath / "configs").glob("*.py"))
    assert len(paths) >= 4 and builtin.keys() == paths
    fields = set(config_lib.known_fields(config_lib.base_config()))
    for path in paths:
        config = config_lib.load_config(path)
        assert config_lib.load_config(path.stem).to_dict() == config.to_dict()
        assert builtin[path].name == path.stem
        assert builtin[path].description and "\n" not in builtin[path].description
        assert config.dataset.name in builtin[path].needs + builtin[path].name
        assert set(config_lib.known_fields(config)) == fields, path
        source = path.read_text()
        assert f"nlcg-train --config={path.stem} --workdir=runs/" in source
        assert "esult: not measured here" in source or "Result (" in source, path
