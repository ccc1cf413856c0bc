"""Configuration of a run: the fields, config files, and overrides.

A config file defines `get_config()`, which fills in :func:`base_config`. Some are built
in: those in the folder ``configs`` of the repository.
"""

import ast
import dataclasses
import difflib
import functools
import importlib.util
import json
import operator
import pathlib
import re
import traceback
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import ml_collections
from ml_collections import config_dict

from nlcg_optax.training.run_config import ConfigError as ConfigError
from nlcg_optax.training.run_config import RunConfig, fields_of
from nlcg_optax.training.run_config import typed as typed

_Group = ml_collections.ConfigDict

if TYPE_CHECKING:
    ConfigDict = Any  # fields are attributes that no type checker can know
else:
    ConfigDict = _Group

_CONTRACT = (
    "expected a function get_config() that takes base_config(), changes fields of it "
    "and returns it"
)


def base_config() -> ConfigDict:
    """All the fields there are, with their defaults, to be filled in.

    They are those of :class:`nlcg_optax.training.run_config.RunConfig`.

    Example:
      >>> base_config().optimizer.learning_rate
      0.1
    """

    def group(defaults: Any) -> Any:
        made: Any = _Group()
        for name, (kind, optional, *_) in fields_of(type(defaults)).items():
            value = getattr(defaults, name)
            if dataclasses.is_dataclass(kind):
                value = group(value)
            elif optional:
                value = config_dict.FieldReference(value, field_type=kind)
            made[name] = value
        return made

    return group(RunConfig()).lock()


class BuiltinConfig(NamedTuple):
    """A config file that comes with the package.

    Attributes:
      name: by which :func:`load_config` knows it.
      path: the file.
      description: what it trains, in a line.
      needs: what that takes.
    """

    name: str
    path: pathlib.Path
    description: str
    needs: str


def builtin_configs() -> list[BuiltinConfig]:
    """The built-in config files, by name.

    Example:
      >>> [config.name for config in builtin_configs() if "digits" in config.name]
      ['digits_resnet8']
    """
    here = pathlib.Path(__file__).resolve().parent
    # A wheel has the folder beside this file, a checkout at the top.
    folders = (here / "configs", here.parents[1] / "configs")
    paths = next((list(f.glob("*.py")) for f in folders if f.is_dir()), [])
    configs = []
    for path in sorted(paths, key=lambda path: path.stem.split("_")):
        text = ast.get_docstring(ast.parse(path.read_text())) or ""
        paragraphs = text.split("\n\n")
        needs = [text for text in paragraphs if text.startswith("Needs: ")]
        needs = " ".join("".join(needs).removeprefix("Needs: ").split())
        configs.append(BuiltinConfig(path.stem, path, paragraphs[0], needs))
    return configs


def load_config(name: str | pathlib.Path) -> ConfigDict:
    """Runs `get_config()` of a config file.

    Args:
      name: path of the file, which ends in ``.py``, or name of a built-in one.

    Raises:
      ConfigError: if there is no such file, if it fails, or if it does not define a
        `get_config` that returns :func:`base_config` with other values. It names the
        file, the line, what was wrong there, and what is expected.

    Example:
      >>> load_config("digits_resnet8").dataset.name
      'digits'
    """
    builtin = {config.name: config.path for config in builtin_configs()}
    path = builtin.get(str(name), pathlib.Path(name))
    if path.suffix != ".py" or not path.is_file():
        beside = sorted(str(p) for p in path.parent.glob("*.py")) if path.suffix else []
        near = difflib.get_close_matches(str(name), [*beside, *builtin])
        if (with_suffix := path.with_suffix(".py")).is_file():
            near = [str(with_suffix)]
        raise ConfigError(
            f"There is no config {str(name)!r}{_did_you_mean(near)}: expected a file "
            "that ends in .py"
            + (f" (beside it there are {', '.join(beside)})" if beside else "")
            + f", or one of {', '.join(builtin)}."
        )
    spec = importlib.util.spec_from_file_location(f"config_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        get_config = getattr(module, "get_config", None)
        config = get_config() if get_config is not None else None
    except (Exception, SystemExit) as error:  # whatever the file does
        raise ConfigError(_what_failed(error, path)) from error
    if get_config is None:
        own = [
            key
            for key, value in vars(module).items()
            if callable(value) and getattr(value, "__module__", "") == module.__name__
        ]
        near = difflib.get_close_matches("get_config", own)
        raise ConfigError(
            f"{path} defines no get_config(){_did_you_mean(near)}: {_CONTRACT}."
        )
    code = getattr(get_config, "__code__", None)
    where = f"{path}, line {code.co_firstlineno}" if code else str(path)
    if not isinstance(config, _Group):
        found = "None" if config is None else f"a {type(config).__name__}"
        raise ConfigError(f"{where}: get_config() returned {found}; {_CONTRACT}.")
    known, fields = known_fields(base_config()), known_fields(config)
    for field in fields:
        if field not in known:
            raise ConfigError(f"{where}: {_no_such_field(field, known)}")
    missing = [field for field in known if field not in fields]
    if missing:
        raise ConfigError(
            f"{where}: get_config() returned a config without {', '.join(missing[:3])}"
            f"{' and others' * (len(missing) > 3)}; {_CONTRACT}."
        )
    return config.lock()


def _what_failed(error: BaseException, path: pathlib.Path) -> str:
    """One sentence: file, line, what was wrong, and what is expected."""
    frames = traceback.extract_tb(error.__traceback__)
    lines = [f.lineno for f in frames if f.filename == str(path)]
    where = f"{path}, line {lines[-1]}" if lines else str(path)
    if isinstance(error, SyntaxError):
        fault = f"{error.filename}, line {error.lineno} is no Python: {error.msg}"
        if error.filename != str(path):
            return f"{fault}. ({where} imports it.)"
        return f"{fault}; {_CONTRACT}."
    # ConfigDict's own messages contain the whole config, or name the field alone.
    if field := _field_in_error(error, lines[-1] if lines else None, path):
        return f"{where}: {_wrong_field(field)}"
    if isinstance(error, ModuleNotFoundError):
        return f"{where}: {error}; expected a package that is installed."
    what = f"{type(error).__name__}: {error}".rstrip(".: ")
    return f"{where}: {what}; {_CONTRACT}."


def _field_in_error(error: BaseException, line: int | None, path: pathlib.Path) -> str:
    """The dotted name of the field that ConfigDict refuses, or "" for another error."""
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    if not frame.f_globals.get("__name__", "").startswith("ml_collections."):
        return ""
    # The message says the field's own name; the line says in which group it is.
    match = re.match(r"\W*(?:Key\W+|Could not override field\W+)?(\w+)", str(error))
    key = match[1] if match else ""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Attribute | ast.Subscript) and line == node.lineno:
            name = _dotted(node)
            if name.rpartition(".")[2] == key:
                return name
    return key


def _dotted(node: ast.expr) -> str:
    """``optimizer.lr`` of ``config.optimizer.lr``, or of ``config["optimizer"].lr``."""
    match node:
        case (
            ast.Attribute(value=value, attr=key)
            | ast.Subscript(value=value, slice=ast.Constant(value=str(key)))
        ):
            return f"{_dotted(value)}.{key}".lstrip(".")
    return ""


def _wrong_field(name: str) -> str:
    """Why a config file cannot set a field as it does."""
    config = base_config()
    known = known_fields(config)
    if name not in known:
        return _no_such_field(name, known)
    return f"the value does not fit {name}: expected {_kind(*_within(config, name))}."


def _within(config: ConfigDict, name: str) -> tuple[ConfigDict, str]:
    """The group that a field is in, and the last part of its name."""
    *groups, last = name.split(".")
    return functools.reduce(operator.getitem, groups, config), last


def _kind(group: ConfigDict, last: str) -> str:
    return f"{group.get_type(last).__name__}, as in {group[last]!r}"


def known_fields(config: ConfigDict) -> list[str]:
    """Dotted names of all the fields."""
    return list(flatten(config.to_dict()))


def near_fields(name: str, known: Iterable[str]) -> list[str]:
    """The fields that a wrong name may stand for, the most likely first.

    Example:
      >>> known = known_fields(base_config())
      >>> near_fields("optimizer.lr", known), near_fields("batchsize", known)
      (['optimizer.learning_rate'], ['batch_size'])
    """

    def similarity(a: str, b: str) -> float:
        return difflib.SequenceMatcher(None, a, b).ratio()

    group, _, last = name.rpartition(".")
    found = []
    for field in known:
        own_group, _, own_last = field.rpartition(".")
        initials = "".join(word[0] for word in own_last.split("_"))
        alike = 1.0 if last == initials else similarity(last, own_last)
        if alike > 0.7:
            found.append((alike + similarity(group, own_group) / 2, field))
    found.sort(reverse=True)
    return [field for score, field in found if score > found[0][0] - 0.05]


def _did_you_mean(near: Sequence[str]) -> str:
    return f" (did you mean {' or '.join(near)}?)" if near else ""


def _no_such_field(name: str, known: Sequence[str]) -> str:
    """What is wrong with the name of a field, and what it may be instead."""
    within = [field for field in known if field.startswith(f"{name}.")]
    if f"{name}.name" in within:
        return f"{name!r} is a group of fields: did you mean {name}.name?"
    if within:
        return f"{name!r} is a group of fields: set one of {', '.join(within)}."
    if near := near_fields(name, known):
        return f"there is no config field {name!r}: did you mean {' or '.join(near)}?"
    # The fields beside it, or the groups there are.
    group = name.rpartition(".")[0]
    beside = [field for field in known if field.rpartition(".")[0] == group]
    if not group or not beside:
        beside = list(dict.fromkeys(field.partition(".")[0] for field in known))
    return f"there is no config field {name!r}: expected one of {', '.join(beside)}."


def apply_overrides(config: ConfigDict, overrides: Sequence[str]) -> None:
    """Sets fields in place from strings such as ``optimizer.learning_rate=0.1``.

    Raises:
      ConfigError: for an unknown field (with those that may have been meant), or a
        value that does not fit.
    """
    known = known_fields(config)
    for override in overrides:
        name, equals, text = override.partition("=")
        if name not in known:
            raise ConfigError(f"--config.{name}: {_no_such_field(name, known)}")
        if not equals:
            raise ConfigError(f"--config.{name} needs a value: --config.{name}=VALUE.")
        group, last = _within(config, name)
        try:
            missing = text == "none" and _optional(name)
            group[last] = None if missing else _parse(text, group.get_type(last))
        except (TypeError, ValueError, KeyError) as error:
            raise ConfigError(
                f"--config.{name}={text} does not fit: expected {_kind(group, last)}."
            ) from error


def _optional(name: str) -> bool:
    """Whether a field may have no value."""
    *groups, last = name.split(".")
    within: Any = RunConfig
    for group in groups:
        within = fields_of(within)[group][0]
    return fields_of(within)[last][1]


def _parse(text: str, kind: type) -> Any:
    """Reads a value of the given type from the command line."""
    if kind is str:
        return text
    if kind is bool:
        return {"true": True, "1": True, "false": False, "0": False}[text.lower()]
    try:
        value = ast.literal_eval(text)
        if kind is float and isinstance(value, int):
            value = float(value)
    except (SyntaxError, MemoryError, RecursionError, OverflowError) as error:
        raise ValueError(text) from error  # a number of 400 digits, say
    if kind is tuple and not isinstance(value, tuple | list):
        value = (value,)
    return value


def flatten(fields: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Fields of groups within groups, by their names with dots.

    Example:
      >>> flatten({"seed": 0, "model": {"name": "resnet8"}})
      {'seed': 0, 'model.name': 'resnet8'}
    """
    flat = {}
    for key, value in fields.items():
        within = isinstance(value, dict)
        flat |= flatten(value, f"{prefix}{key}.") if within else {prefix + key: value}
    return flat


def to_json(config: ConfigDict | RunConfig) -> dict[str, Any]:
    """The config as plain dictionaries, lists and numbers."""
    typed = isinstance(config, RunConfig)
    fields = dataclasses.asdict(config) if typed else config.to_dict()
    return json.loads(json.dumps(fields))


def differing(
    a: dict[str, Any], b: dict[str, Any], free: Sequence[str], groups: tuple[str, ...]
) -> list[str]:
    """Names in which flat fields differ, but for those and all of those groups."""
    names = sorted(n for n in a.keys() | b.keys() if a.get(n) != b.get(n))
    return [n for n in names if n not in free and not n.startswith(groups)]


def modern(saved: dict[str, Any]) -> dict[str, Any]:
    """The flat fields of a ``config.json`` in today's words, whenever it was written.

    What the curvature needs was in ``optimizer.nlcg`` once. Where it chooses the step,
    fields of the learning rate have the values that say so, whatever stood there.

    Args:
      saved: what :func:`to_json` made of a config, of any time.

    Example:
      >>> old = {"step_rule": "quadratic_model", "curvature_residuals": 5}
      >>> new = modern({"optimizer": {"name": "nlcg", "nlcg": old}})
      >>> new["optimizer.name"], new["optimizer.nlcg_auto.residuals"]
      ('nlcg_auto', 5)
    """
    # A field that the run did not have yet had what is its default now.
    defaults = flatten(to_json(RunConfig()))
    new = defaults | flatten(saved)
    nlcg, auto = "optimizer.nlcg.", "optimizer.nlcg_auto."
    moved = {
        f"{auto}{today}": new.pop(f"{nlcg}curvature_{before}")
        for today, before in (
            ("residuals", "residuals"),
            ("curvature_fraction", "fraction"),
            ("curvature_min_examples", "min_images"),
        )
        if f"{nlcg}curvature_{before}" in new
    }
    if new[f"{nlcg}step_rule"] == "quadratic_model" and new["optimizer.name"] == "nlcg":
        moved[f"{auto}preconditioner"] = new[f"{nlcg}preconditioner"]
        new |= {"optimizer.name": "nlcg_auto", **moved}
    if new[f"{nlcg}step_rule"] == "quadratic_model":  # which is refused now
        new[f"{nlcg}step_rule"] = defaults[f"{nlcg}step_rule"]
    if new["optimizer.name"] == "nlcg_auto":
        idle = (nlcg, "schedule.", "optimizer.learning_rate")
        new |= {name: x for name, x in defaults.items() if name.startswith(idle)}
        new |= {"optimizer.learning_rate": None, "schedule.name": "none"}
    return new
