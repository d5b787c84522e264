"""Strict YAML: what a dataclass says is what is read, everything else is named; rules of the model's sizes."""

import dataclasses
from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from readme_jax import config
from readme_jax.config import (
    ConfigError,
    ExpertConfig,
    ModelConfig,
    RopeScaling,
    RouterConfig,
    from_dict,
    load_yaml,
    save_yaml,
    to_dict,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Inner:
    """Nested."""

    lr: float
    warm: int = 0

    def __post_init__(self):
        config.require(self.lr > 0, f"lr={self.lr} must be positive")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outer:
    """One field of every kind."""

    path: Path
    kind: Literal["a", "b"]
    inner: Inner
    flag: bool = False
    name: str | None = None
    maybe: Inner | None = None
    either: int | str = 0
    table: dict[str, Inner] = dataclasses.field(default_factory=dict)
    row: tuple[int, ...] = ()
    some: list[float] = dataclasses.field(default_factory=list)
    free: Any = None
    made: int = dataclasses.field(init=False, default=7)


GOOD = {"path": "x/y", "kind": "a", "inner": {"lr": 1}}


def test_every_kind_is_converted():
    got = from_dict(
        Outer,
        GOOD
        | {
            "flag": True,
            "maybe": {"lr": "3e-4", "warm": 2.0},
            "table": {"x": {"lr": 0.5}},
            "row": [1, 2.0, "3"],
            "some": [1, "2e-1"],
            "free": {"any": [1]},
            "either": "word",
        },
    )
    assert got == Outer(
        path=Path("x/y"),
        kind="a",
        inner=Inner(lr=1.0),
        flag=True,
        maybe=Inner(lr=3e-4, warm=2),
        table={"x": Inner(lr=0.5)},
        row=(1, 2, 3),
        some=[1.0, 0.2],
        free={"any": [1]},
        either="word",
    )
    assert type(got.inner.lr) is float and type(got.maybe.warm) is int and got.made == 7


@pytest.mark.parametrize(
    "change, message",
    [
        ({"stepz": 1}, "stepz: no such key; known keys: path, kind, inner, flag"),
        ({"made": 1}, "made: no such key"),
        ({"inner": {"lr": 1, "wram": 2}}, "inner.wram: no such key; known keys: lr, warm"),
        ({"inner": {}}, "inner.lr: missing, and it has no default"),
        ({"inner": {"lr": -1}}, "inner: lr=-1.0 must be positive"),
        ({"inner": 3}, "inner: expected a mapping, got int"),
        ({"inner": {"lr": "fast"}}, "inner.lr: expected a number, got 'fast'"),
        ({"inner": {"lr": True}}, "inner.lr: expected a number, got True"),
        ({"inner": {"lr": None}}, "inner.lr: expected a number, got None"),
        ({"inner": {"lr": 1, "warm": 1.5}}, "inner.warm: expected a whole number, got 1.5"),
        ({"inner": {"lr": 1, "warm": float("inf")}}, "inner.warm: expected a whole number, got inf"),
        ({"inner": {"lr": 1, "warm": float("nan")}}, "inner.warm: expected a whole number, got nan"),
        ({"kind": "c"}, "kind: 'c' is not one of 'a', 'b'"),
        ({"kind": ["a"]}, "kind: ['a'] is not one of"),
        ({"flag": "yes"}, "flag: expected true or false, got 'yes'"),
        ({"flag": 1}, "flag: expected true or false, got 1"),
        ({"name": 3}, "name: expected str, got 3"),
        ({"path": 3}, "path: expected a path, got 3"),
        ({"table": [1]}, "table: expected a mapping, got [1]"),
        ({"table": {"x": {"lr": 0}}}, "table.x: lr=0.0 must be positive"),
        ({"table": {3: {"lr": 1}}}, "table: expected str, got 3"),
        ({"row": "12"}, "row: expected a list, got '12'"),
        ({"row": [1, "b"]}, "row[1]: expected a number, got 'b'"),
        ({"maybe": {"lr": 1, "x": 2}}, "maybe.x: no such key"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_named(change, message):
    with pytest.raises(ConfigError) as caught:
        from_dict(Outer, GOOD | change)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_required_fields_are_named():
    for name in GOOD:
        with pytest.raises(ConfigError, match=f"{name}: missing, and it has no default"):
            from_dict(Outer, {k: v for k, v in GOOD.items() if k != name})
    with pytest.raises(ConfigError, match="config: expected a mapping, got list"):
        from_dict(Outer, [1])


@settings(deadline=None)
@given(
    st.builds(
        Outer,
        path=st.sampled_from([Path("a"), Path("/b/c d")]),
        kind=st.sampled_from("ab"),
        inner=st.builds(Inner, lr=st.floats(1e-300, 1e300), warm=st.integers()),
        flag=st.booleans(),
        name=st.none() | st.text(),
        maybe=st.none() | st.builds(Inner, lr=st.floats(1e-9, 1)),
        table=st.dictionaries(st.text(min_size=1), st.builds(Inner, lr=st.floats(1e-9, 1)), max_size=3),
        row=st.lists(st.integers(-(2**50), 2**50), max_size=3).map(tuple),
        some=st.lists(st.floats(allow_nan=False, allow_infinity=False), max_size=3),
    )
)
def test_yaml_gives_back_what_was_saved(tmp_path_factory, value):
    path = tmp_path_factory.getbasetemp() / "round.yaml"
    save_yaml(value, path)
    assert load_yaml(Outer, path) == value
    assert from_dict(Outer, to_dict(value)) == value


def test_yaml_files(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text("path: p\nkind: b\ninner: {lr: 3e-4}\n")
    assert load_yaml(Outer, path) == load_yaml(Outer, tmp_path) == Outer(path=Path("p"), kind="b", inner=Inner(lr=3e-4))
    for text, message in (
        ("a: [", "not YAML"),
        ("[" * 5000, "not YAML"),
        ("path: p\nkind: a\ninner: {lr: 1}\npath: q\n", "key 'path' is given twice"),
        ("path: p\nkind: a\ninner: {lr: 1, lr: 2}\n", "key 'lr' is given twice"),
        ("inner: {lr: 0}\npath: p\nkind: a\n", "inner: lr=0.0 must be positive"),
        ("- 1\n", "expected a mapping, got list"),
        ("", "path: missing"),
    ):
        path.write_text(text)
        with pytest.raises(ConfigError) as caught:
            load_yaml(Outer, path)
        assert str(caught.value).startswith(f"{path}: ") and message in str(caught.value)
        assert "\n" not in str(caught.value)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="not YAML"):
        load_yaml(Outer, path)
    with pytest.raises(ConfigError, match="none.yaml: no such config file"):
        load_yaml(Outer, tmp_path / "none.yaml")


MODEL = dict(
    family="llama", vocab=64, embed=32, mlp=48, layer=2, head=4, kv_head=2, head_dim=8, norm_eps=1e-5,
    rope_theta=1e4, max_position=64, tied=True,
)  # fmt: skip


@pytest.mark.parametrize(
    "change, message",
    [
        ({"vocab": 0}, "vocab=0 must be at least 1"),
        ({"layer": -1}, "layer=-1 must be at least 1"),
        ({"kv_head": 3}, "num_attention_heads=4 must be a multiple of num_key_value_heads=3"),
        ({"head_dim": 7}, "head_dim=7 must be even"),
        ({"windows": (4,)}, "windows has 1 entries, the model 2 layers"),
    ],
)
def test_model_rules(change, message):
    with pytest.raises(ConfigError, match=message):
        ModelConfig(**(MODEL | change))


def test_model_config_is_a_static_argument():
    scaling = RopeScaling(kind="llama3", factor=4.0)
    first, second = (ModelConfig(**MODEL, rope_scaling=scaling, windows=(0, 8)) for _ in range(2))
    assert hash(first) == hash(second) and first == second and first.group == 2
    assert from_dict(ModelConfig, to_dict(first)) == first
    with pytest.raises(dataclasses.FrozenInstanceError):
        first.vocab = 3  # type: ignore[misc]


def test_expert_and_router_rules():
    good = dict(
        experts=2, channels=4, storage="tied", names=("a", "b"), importance="energy", carving="domain"
    )  # fmt: skip
    assert from_dict(ExpertConfig, to_dict(ExpertConfig(**good))) == ExpertConfig(**good)
    for change, message in (
        ({"experts": 0, "names": ()}, "experts=0 must be at least 1"),
        ({"channels": 0}, "channels=0 must be at least 1"),
        ({"names": ("a",)}, "names has 1 entries for experts=2"),
    ):
        with pytest.raises(ConfigError, match=message):
            ExpertConfig(**(good | change))
    for change, message in (
        ({"width": 12}, r"router width=12 must be a multiple of 2 \* heads=8"),
        ({"layers": 0}, "router layers=0 must be at least 1"),
        ({"heads": 0}, "router heads=0 must be at least 1"),
    ):
        with pytest.raises(ConfigError, match=message):
            RouterConfig(**change)
