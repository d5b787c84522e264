"""Frozen dataclasses that describe a model and a run, strict YAML, and the typed errors of the package.

A config holds sizes, names and numbers: never a mesh, an array or an open file. Every stage writes its resolved
config beside its result, and that file can be fed back with `--config`.
"""

import dataclasses
import errno
import types
import typing
from pathlib import Path
from typing import Any, Literal

import yaml

UNEXPECTED = 70  # exit code of what may pass, or is a bug: EX_SOFTWARE of sysexits.h
PASSING = (  # of a file system or a network
    errno.EIO, errno.ESTALE, errno.EAGAIN, errno.ETIMEDOUT, errno.ECONNRESET, errno.ECONNABORTED, errno.ECONNREFUSED,
    errno.EHOSTUNREACH, errno.ENETUNREACH,
)  # fmt: skip


class ReadMeError(Exception):
    """Base of every error a user can cause. Programs print its one line and exit with `exit_code`."""

    exit_code = 2


class ConfigError(ReadMeError):
    """A field, flag or YAML key that does not exist or breaks a rule."""


class SourceError(ReadMeError):
    """A model or text that cannot be found, fetched or verified."""


class CheckpointError(ReadMeError):
    """Weights that are missing, truncated, tampered with, misshapen or of an unsupported kind."""


class DataError(ReadMeError):
    """Text that is empty, too short, or does not fit the tokenizer or the model."""


class ArtifactError(ReadMeError):
    """An output folder that is incomplete, changed, or belongs to another run."""


class PeerError(ReadMeError):
    """Another process of the run is gone or failed, so this one ends."""

    exit_code = 76
    advice = "Started again, the same command goes on from the last checkpoint"


class Stopped(ReadMeError):
    """No error: asked to stop (SIGTERM, SIGINT), the run has saved itself; the same command goes on from there."""

    exit_code = 75


def exit_code(error: BaseException) -> int:
    """Exit code of a program that `error` ends: 2 for what somebody must mend first, UNEXPECTED for all that may pass
    (a device, a file system that fails, a bug), 130 after Ctrl-C."""
    if isinstance(error, ReadMeError):
        return error.exit_code
    if isinstance(error, KeyboardInterrupt):
        return 130
    if isinstance(error, MemoryError | OSError):
        return UNEXPECTED if getattr(error, "errno", None) in PASSING else ReadMeError.exit_code
    return UNEXPECTED


def require(ok: bool, message: str, error: type[ReadMeError] = ConfigError) -> None:
    """Raise `error(message)` unless `ok`: the one way this package states a rule."""
    if not ok:
        raise error(message)


def free(default: Any) -> Any:
    """A dataclass field that decides how or where a stage runs, not what comes out: no part of a result's identity.

    A run may be resumed, or a finished result asked for again, with another value.
    """
    return dataclasses.field(default=default, metadata={"free": True})


# ---- the model --------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """Rotary frequency scaling. `llama3` as in Llama 3.1 (wavelength bands); `linear` divides every frequency."""

    kind: Literal["llama3", "linear"]
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position: int = 8192


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A dense Llama-family decoder. Sizes carry the logical axis names of the sharding table; hashable, static in jit.

    `mlp` is the width of the stored FFN: the dense width for tied experts, E * C for separate ones.
    `windows` has one entry a layer: the sliding attention window in tokens, 0 for full attention.
    """

    family: Literal["llama", "mistral", "qwen2", "qwen3"]
    vocab: int
    embed: int
    mlp: int
    layer: int
    head: int
    kv_head: int
    head_dim: int
    norm_eps: float
    rope_theta: float
    max_position: int
    tied: bool
    rope_scaling: RopeScaling | None = None
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    windows: tuple[int, ...] = ()

    def __post_init__(self):
        for name in ("vocab", "embed", "mlp", "layer", "head", "kv_head", "head_dim"):
            value = getattr(self, name)
            require(value >= 1, f"{name}={value} must be at least 1")
        require(
            self.head % self.kv_head == 0,
            f"num_attention_heads={self.head} must be a multiple of num_key_value_heads={self.kv_head}",
        )
        require(self.head_dim % 2 == 0, f"head_dim={self.head_dim} must be even for rotary embedding")
        require(
            len(self.windows) in (0, self.layer),
            f"windows has {len(self.windows)} entries, the model {self.layer} layers",
        )

    @property
    def group(self) -> int:
        """Query heads per key/value head."""
        return self.head // self.kv_head


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExpertConfig:
    """What a carved model knows of its experts beside the table itself.

    `names` has one entry an expert (the domain it was carved from; expert0 .. of discovered ones). `storage`: `tied`
    experts are views of one dense FFN; `separate` experts own their rows, expert-major, F = experts * channels.
    """

    experts: int
    channels: int
    storage: Literal["tied", "separate"]
    names: tuple[str, ...]
    importance: Literal["mean_abs", "mean_abs_norm", "energy"]
    carving: Literal["domain", "static", "discovered", "learned"]

    def __post_init__(self):
        require(self.experts >= 1, f"experts={self.experts} must be at least 1")
        require(self.channels >= 1, f"channels={self.channels} must be at least 1")
        require(len(self.names) == self.experts, f"names has {len(self.names)} entries for experts={self.experts}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class RouterConfig:
    """The pre-gating router (paper, Table 1): a small causal transformer over token ids."""

    width: int = 512
    """Width of embedding, features and MLP."""
    heads: int = 4
    """Attention heads."""
    layers: int = 1
    """Blocks."""
    norm_eps: float = 1e-6
    """Added to the mean square in its norms."""

    def __post_init__(self):
        require(self.heads >= 1, f"router heads={self.heads} must be at least 1")
        require(
            self.width >= 1 and self.width % (2 * self.heads) == 0,
            f"router width={self.width} must be a multiple of 2 * heads={2 * self.heads}",
        )
        require(self.layers >= 1, f"router layers={self.layers} must be at least 1")


# ---- strict YAML ------------------------------------------------------------------------------


def from_dict(cls: type, data: Any, where: str = "") -> Any:
    """Build the dataclass `cls` from plain data, converting by annotation; unknown or missing keys raise ConfigError.

    `where` is the dotted path used in messages. PyYAML reads `3e-4` as a string: a float field accepts it.
    """
    require(isinstance(data, dict), f"{where or 'config'}: expected a mapping, got {type(data).__name__}")
    fields = {f.name: f for f in dataclasses.fields(cls) if f.init}
    prefix = f"{where}." if where else ""
    for key in data:
        require(key in fields, f"{prefix}{key}: no such key; known keys: {', '.join(fields)}")
    hints = typing.get_type_hints(cls)
    values = {key: _convert(hints[key], value, f"{prefix}{key}") for key, value in data.items()}
    for name, field in fields.items():
        missing = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        require(name in values or not missing, f"{prefix}{name}: missing, and it has no default")
    try:
        return cls(**values)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}" if where else str(error)) from None


def _convert(hint: Any, value: Any, where: str) -> Any:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return value
    if origin in (types.UnionType, typing.Union):
        if value is None and type(None) in args:
            return None
        rest = [a for a in args if a is not type(None)]
        errors = []
        for option in rest:
            try:
                return _convert(option, value, where)
            except ConfigError as error:
                errors.append(error)
        raise errors[0]
    if origin is Literal:
        require(value in args, f"{where}: {value!r} is not one of {', '.join(map(repr, args))}")
        return value
    if origin is dict:
        require(isinstance(value, dict), f"{where}: expected a mapping, got {value!r}")
        return {_convert(args[0], k, where): _convert(args[1], v, f"{where}.{k}") for k, v in value.items()}
    if origin in (tuple, list):
        require(isinstance(value, list | tuple), f"{where}: expected a list, got {value!r}")
        return origin(_convert(args[0], v, f"{where}[{i}]") for i, v in enumerate(value))
    if dataclasses.is_dataclass(hint):
        return from_dict(typing.cast(type, hint), value, where)
    if hint is Path:
        require(isinstance(value, str | Path), f"{where}: expected a path, got {value!r}")
        return Path(value)
    if hint is bool:
        require(isinstance(value, bool), f"{where}: expected true or false, got {value!r}")
        return value
    if hint in (int, float):
        require(
            not isinstance(value, bool) and isinstance(value, int | float | str),
            f"{where}: expected a number, got {value!r}",
        )
        if hint is int and isinstance(value, int):
            return value  # as it is: a float holds whole numbers up to 2^53 only
        try:
            number = float(value)
        except ValueError:
            raise ConfigError(f"{where}: expected a number, got {value!r}") from None
        if hint is float:
            return number
        require(number.is_integer(), f"{where}: expected a whole number, got {value!r}")
        return int(number)
    require(isinstance(value, hint), f"{where}: expected {hint.__name__}, got {value!r}")
    return value


def to_dict(config: Any) -> Any:
    """Plain data (dict, list, str, number) of a dataclass: what JSON and YAML can hold, and `from_dict` reads."""
    if dataclasses.is_dataclass(config):
        return {f.name: to_dict(getattr(config, f.name)) for f in dataclasses.fields(config) if f.init}
    if isinstance(config, dict):
        return {key: to_dict(value) for key, value in config.items()}
    if isinstance(config, tuple | list):
        return [to_dict(value) for value in config]
    return str(config) if isinstance(config, Path) else config


class _Loader(yaml.SafeLoader):
    """YAML without the mappings that name a key twice, of which PyYAML would silently take the last."""

    def construct_mapping(self, node, deep=False):
        seen = set()
        for key, _ in node.value:
            name, mark = key.value if isinstance(key.value, str) else None, key.start_mark
            if name in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key {name!r} is given twice", mark)
            seen.add(name)
        return super().construct_mapping(node, deep)


def load_yaml(cls: type, path: str | Path) -> Any:
    """Read a run's YAML (or the `config.yaml` of an artifact) into `cls`; errors name the file and the key."""
    path = Path(path)
    if path.is_dir():
        path = path / "config.yaml"
    require(path.is_file(), f"{path}: no such config file")
    try:
        data = yaml.load(path.read_text(), Loader=_Loader)
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise ConfigError(f"{path}: not YAML: {' '.join(str(error).split())}") from None
    try:
        return from_dict(cls, data or {})
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


def save_yaml(config: Any, path: str | Path) -> None:
    """Write the resolved config so that `load_yaml` gives it back."""
    Path(path).write_text(yaml.safe_dump(to_dict(config), sort_keys=False))
