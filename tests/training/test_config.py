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


def test_unknown_field_lists_the_known_ones():
    with pytest.raises(ConfigError, match="'optimizer.lr'.*optimizer.learning_rate"):
        config_lib.apply_overrides(config_lib.base_config(), ["optimizer.lr=1"])
    with pytest.raises(ConfigError, match="'optimizer'"):  # a group is no field
        config_lib.apply_overrides(config_lib.base_config(), ["optimizer=nlcg"])


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


def test_unknown_name_lists_the_built_in_ones():
    known = "cifar10_resnet32, cifar100_resnet32, digits_resnet8, imagenet_resnet50"
    with pytest.raises(ConfigError, match=f"no config 'digits'.*one of {known}"):
        config_lib.load_config("digits")


def test_file_without_get_config(tmp_path):
    (tmp_path / "empty.py").write_text("")
    with pytest.raises(ConfigError, match="get_config"):
        config_lib.load_config(tmp_path / "empty.py")


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
