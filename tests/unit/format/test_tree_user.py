"""Classes of the user's program: what needs no registration, what register_type adds, and what a file can't do."""

from __future__ import annotations

import dataclasses
import json
import sys
import types
from enum import Enum, Flag, IntEnum, IntFlag, auto
from functools import cached_property
from typing import Any, ClassVar, Generic, NamedTuple, TypeVar

import pytest
from pydantic import BaseModel, ConfigDict, PrivateAttr

from ckptstore.errors import ConfigError, FormatError, StateError
from ckptstore.format import tree
from ckptstore.format.manifest import canonical

CALLS: list[str] = []


class Colour(Enum):
    RED = 1
    ALIAS = 1  # noqa: PIE796 - an alias on purpose
    BLUE = object()  # by name, so that its value need not be stored


class Level(IntEnum):
    LOW = 1


class Name(str, Enum):
    A = "a"


class Right(Flag):
    READ = auto()
    WRITE = auto()


class Bits(IntFlag):
    A = 1
    B = 4


class Point(NamedTuple):
    x: float
    y: Any = 2


@dataclasses.dataclass
class Config:
    lr: float
    names: list[str] = dataclasses.field(default_factory=list)
    nested: Any = None
    derived: float = dataclasses.field(init=False)
    kinds: ClassVar[int] = 3

    def __post_init__(self) -> None:
        CALLS.append("post_init")
        self.derived = self.lr * 2
        self.not_a_field = {"kept": True}

    @cached_property
    def slow(self) -> int:
        return 5


@dataclasses.dataclass(frozen=True)
class Frozen:
    a: int
    b: tuple[int, ...] = ()


@dataclasses.dataclass(slots=True)
class Slotted:
    a: int
    b: int = dataclasses.field(init=False)


T = TypeVar("T")


@dataclasses.dataclass
class Box(Generic[T]):
    inner: T


class Child(Config):
    pass


class Model(BaseModel):
    model_config = ConfigDict(extra="allow")
    lr: float = 0.1
    tags: set[str] = set()
    child: Any = None
    _secret: int = PrivateAttr(default=3)


class Strict(BaseModel):
    model_config = ConfigDict(frozen=True)
    a: int


class Outer:
    @dataclasses.dataclass
    class Inner:
        a: int


class Dangling:
    def __init__(self) -> None:
        CALLS.append("init")


def _config() -> Config:
    config = Config(0.5, ["a"], Frozen(1, (2, 3)))
    assert config.slow == 5
    return config


def _model() -> Model:
    model = Model(lr=0.25, child=Strict(a=1), extra_field=[1, (2,)])
    model._secret = 9
    return model


USER: list[Any] = [
    Colour.RED, Colour.ALIAS, Colour.BLUE, Level.LOW, Name.A, Right.READ, Right.READ | Right.WRITE, Right(0),
    Bits.A | Bits.B,
    Bits(64), Point(1.5), Point((1,), y=Point(1, 2)), _config(), Frozen(1), Slotted(4), Box([1, Colour.RED]),
    Child(1.0),
    Outer.Inner(2), _model(), Model(), Strict(a=5),
]  # fmt: skip


@pytest.mark.parametrize("value", USER, ids=lambda v: f"{type(v).__name__}")
def test_user_value_comes_back_unchanged_without_registration(value: Any, through_json: Any, assert_same: Any) -> None:
    CALLS.clear()
    assert_same({"k": [value]}, through_json({"k": [value]}))
    assert CALLS == []


def test_user_value_comes_back_when_it_is_a_key(through_json: Any) -> None:
    state = {Colour.RED: 1, Level.LOW: 2, Point(1): 3, Frozen(1, (2,)): 4, Right.READ: 5}
    back = through_json(state)
    assert back == state
    assert [type(k) for k in back] == [type(k) for k in state]


def test_tensors_inside_user_values_are_found_when_encoding() -> None:
    weight = object()
    node = tree.encode({"c": Box({"w": weight}), "p": Point(weight)}, lambda path, value: (
        tree.TensorRef(".".join(map(str, path))) if value is weight else value
    ))  # fmt: skip
    assert tree.tensor_names(json.loads(canonical(node))) == ["c.inner.w", "p.x"]
    back = tree.decode(node, lambda ref: weight, trusted="loaded")
    assert back == {"c": Box({"w": weight}), "p": Point(weight)}


def test_slot_that_was_never_set_stays_unset_when_stored(through_json: Any) -> None:
    slotted = through_json(Slotted(4))
    assert slotted.a == 4
    assert not hasattr(slotted, "b")


# --- trust ------------------------------------------------------------------------------------------------------------


def test_nothing_is_rebuilt_when_nothing_is_trusted() -> None:
    node = tree.encode({"cfg": {"inner": Frozen(1)}})
    with pytest.raises(FormatError, match=r"cfg\.inner.*Frozen.*not trusted") as caught:
        tree.decode(node, lambda ref: ref)
    assert caught.value.context["key"] == "cfg.inner"
    assert "allow the class" in str(caught.value.hint)


def test_listed_class_is_rebuilt_and_others_are_not_when_a_list_is_trusted() -> None:
    name = f"{Frozen.__module__}:Frozen"
    assert tree.decode(tree.encode(Frozen(1)), lambda ref: ref, trusted=[name]) == Frozen(1)
    assert tree.decode(tree.encode(Frozen(1)), lambda ref: ref, trusted=lambda cls: cls is Frozen) == Frozen(1)
    with pytest.raises(FormatError, match="Point"):
        tree.decode(tree.encode(Point(1)), lambda ref: ref, trusted=[name])


def test_opaque_value_is_stored_again_unchanged_when_its_type_is_unknown() -> None:
    state = {"cfg": _model(), "colours": {Colour.RED}, "by": {Point(1): 2}, "n": 1}
    node = tree.encode(state)
    shown = tree.decode(node, lambda ref: ref, unknown="opaque")
    assert shown["n"] == 1
    assert isinstance(shown["cfg"], tree.Opaque)
    assert shown["cfg"].name == f"{Model.__module__}:Model"
    assert canonical(tree.encode(shown)) == canonical(node)


def test_whole_tree_as_opaque_is_refused_when_a_node_was_meant() -> None:
    with pytest.raises(StateError, match="whole tree"):
        tree.encode({"a": tree.Opaque("a", tree.encode(1))})


def test_stock_leaves_mark_user_values_when_iterated() -> None:
    leaves = dict(tree.iter_leaves(tree.encode({"a": Colour.RED, "b": (1, Frozen(1)), "c": [Frozen(2)], "d": (1,)})))
    assert [type(v) for v in leaves.values()] == [tree.Opaque, tree.Opaque, tree.Opaque, tuple]


@pytest.mark.parametrize("name", [
    "antigravity:x", "this:d", "os:system", "builtins:eval", "subprocess:Popen", "", ":", "a", "a:b:c", "sys:modules",
    "ckptstore.format.tree:encode", "pydantic:BaseModel.model_validate", "nowhere.at.all:X", "é:漢", "__main__:",
])  # fmt: skip
@pytest.mark.parametrize("kind", ["enum", "namedtuple", "dataclass", "pydantic"])
def test_nothing_is_imported_or_called_when_a_file_names_it(kind: str, name: str) -> None:
    node = {"version": 1, "tree": {"~": kind, "name": name, "v": [], **({"set": []} if kind == "pydantic" else {})}}
    with pytest.raises(FormatError):
        tree.decode(node, lambda ref: ref, trusted="loaded")
    assert "antigravity" not in sys.modules
    assert "this" not in sys.modules


def test_class_is_not_used_when_a_file_calls_it_another_kind() -> None:
    name = f"{Dangling.__module__}:Dangling"
    for kind in ("enum", "namedtuple", "dataclass"):
        with pytest.raises(FormatError, match=f"not a {kind}"):
            tree.decode({"version": 1, "tree": {"~": kind, "name": name, "v": []}}, lambda ref: ref, trusted="loaded")
    assert "init" not in CALLS


def test_class_with_finaliser_is_never_rebuilt_nor_stored() -> None:
    finalised: list[object] = []

    class Gun:
        pass

    cls = dataclasses.make_dataclass(
        "Finalised", ["path"], namespace={"__del__": lambda self: finalised.append(self.path), "__module__": __name__}
    )
    globals()["Finalised"] = cls
    node = {"version": 1, "tree": {"~": "dataclass", "name": f"{__name__}:Finalised", "v": ["path", "/"]}}
    with pytest.raises(FormatError, match="not a dataclass"):
        tree.decode(node, lambda ref: ref, trusted="loaded")
    assert finalised == []
    with pytest.raises(StateError, match="no stored form"):
        tree.encode(cls("/"))
    with pytest.raises(StateError):
        tree.encode(Gun())


def test_module_attribute_hook_does_not_run_when_a_class_is_looked_up(monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType("lazy_module")
    module.__getattr__ = lambda name: CALLS.append(name)  # type: ignore[method-assign]
    monkeypatch.setitem(sys.modules, "lazy_module", module)
    CALLS.clear()
    with pytest.raises(FormatError, match="not loaded"):
        tree.decode(
            {"version": 1, "tree": {"~": "enum", "name": "lazy_module:X", "v": "A"}}, lambda r: r, trusted="loaded"
        )
    assert CALLS == []


def test_made_up_attributes_reach_no_descriptor_when_a_dataclass_is_rebuilt() -> None:
    node = tree.encode(_config())
    node["tree"]["v"] += ["__class__", 5, "slow", 7]
    node["tree"]["v"] = [v for i, v in enumerate(node["tree"]["v"]) if i // 2 != node["tree"]["v"].index("slow") // 2]
    config = tree.decode(node, lambda ref: ref, trusted="loaded")
    assert type(config) is Config


# --- classes that change ----------------------------------------------------------------------------------------------


def _stored_with(node: dict[str, Any], drop: str) -> dict[str, Any]:
    flat = node["tree"]["v"]
    at = flat.index(drop)
    node["tree"]["v"] = flat[:at] + flat[at + 2 :]
    return node


def test_new_field_gets_its_plain_default_when_the_class_has_grown() -> None:
    old = tree.decode(_stored_with(tree.encode(Frozen(1, (2,))), "b"), lambda ref: ref, trusted="loaded")
    assert old == Frozen(1, ())
    old = tree.decode(_stored_with(tree.encode(_config()), "names"), lambda ref: ref, trusted="loaded")
    assert old.names == []
    assert tree.decode(_stored_with(tree.encode(Point(1, 3)), "y"), lambda ref: ref, trusted="loaded") == Point(1, 2)
    model = tree.decode(_stored_with(tree.encode(Model(lr=3)), "lr"), lambda ref: ref, trusted="loaded")
    assert model.lr == 0.1


@pytest.mark.parametrize("value,field", [(Frozen(1), "a"), (Point(1), "x"), (Strict(a=1), "a")], ids=repr)
def test_error_names_the_field_when_the_class_needs_one_that_is_not_stored(value: Any, field: str) -> None:
    with pytest.raises(FormatError, match=rf"changed.*missing fields \['{field}'\]"):
        tree.decode(_stored_with(tree.encode(value), field), lambda ref: ref, trusted="loaded")


def test_error_names_the_field_when_the_class_has_lost_it() -> None:
    node = tree.encode(Slotted(1))
    node["tree"]["v"] += ["gone", 1]
    with pytest.raises(FormatError, match=r"unknown fields \['gone'\]"):
        tree.decode(node, lambda ref: ref, trusted="loaded")


def test_error_names_the_member_when_an_enum_has_lost_it() -> None:
    node = tree.encode(Colour.RED)
    node["tree"]["v"] = "GREEN"
    with pytest.raises(FormatError, match="no member 'GREEN'"):
        tree.decode(node, lambda ref: ref, trusted="loaded")


# --- refused ----------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Grown(dict):  # type: ignore[type-arg]
    a: int = 1


class Loose(Point):
    pass


def test_class_is_refused_when_it_can_not_be_found_by_name() -> None:
    @dataclasses.dataclass
    class Local:
        a: int

    with pytest.raises(StateError, match="can't be found by that name") as caught:
        tree.encode({"cfg": Local(1)})
    assert "top level" in str(caught.value.hint)


def test_class_is_refused_when_fields_do_not_say_all() -> None:
    with pytest.raises(StateError, match="Grown is a subclass of dict"):
        tree.encode({"a": Grown()})
    loose = Loose(1)
    loose.more = 1  # type: ignore[attr-defined]
    with pytest.raises(StateError, match="beside its fields"):
        tree.encode({"a": loose})


def test_field_is_named_when_it_has_no_stored_form() -> None:
    with pytest.raises(StateError) as caught:
        tree.encode({"cfg": Box(Box(lambda: 1))})
    assert caught.value.context["key"] == "cfg.inner.inner"


# --- register_type ----------------------------------------------------------------------------------------------------


class Vocabulary:
    def __init__(self, words: list[str]) -> None:
        self.words = words


def _register(**how: Any) -> None:
    tree.register_type(Vocabulary, **{"encode": lambda v: v.words, "decode": Vocabulary, "name": "vocabulary"} | how)


def test_registered_type_comes_back_when_its_name_is_registered(through_json: Any) -> None:
    _register(
        encode=lambda v: {"words": tuple(v.words), "w": tree.TensorRef("w")},
        decode=lambda d: Vocabulary([*d["words"], d["w"]]),
    )
    node = tree.encode({"v": Vocabulary(["a"])})
    assert node["tree"]["v"]["name"] == "vocabulary"
    back = tree.decode(node, lambda ref: ref.name)  # type: ignore[union-attr]
    assert back["v"].words == ["a", "w"]
    assert tree.tensor_names(node) == ["w"]


def test_stock_leaves_do_not_depend_on_registrations_when_iterated() -> None:
    _register()
    (leaf,) = dict(tree.iter_leaves(tree.encode({"v": Vocabulary(["a"])}))).values()
    assert isinstance(leaf, tree.Opaque)


def test_registered_type_is_unknown_when_another_process_reads_it() -> None:
    node = tree.encode({"v": tree.Opaque("not.here", {"~": "type", "name": "not.here", "v": [1]})})
    with pytest.raises(FormatError, match=r"'not\.here' is not registered") as caught:
        tree.decode(node, lambda ref: ref, trusted="loaded")
    assert "register_type" in str(caught.value.hint)
    assert tree.decode(node, lambda ref: ref, unknown="opaque")["v"].name == "not.here"


def test_registered_name_stands_for_the_newest_class_when_registered_again() -> None:
    _register()

    class Newer(Vocabulary):
        pass

    tree.register_type(Newer, encode=lambda v: v.words, decode=Newer, name="vocabulary")
    assert type(tree.decode(tree.encode(Newer(["a"])), lambda ref: ref)) is Newer
    with pytest.raises(StateError, match="no stored form"):
        tree.encode(Vocabulary([]))
    _register()


def test_failing_functions_are_named_when_a_registered_type_breaks() -> None:
    _register(encode=lambda v: 1 / 0)
    with pytest.raises(StateError, match=r"a\.0.*encoder of vocabulary failed: ZeroDivisionError") as caught:
        tree.encode({"a": [Vocabulary([])]})
    assert caught.value.context["key"] == "a.0"
    _register(decode=lambda v: 1 / 0)
    node = tree.encode({"a": Vocabulary([])})
    with pytest.raises(FormatError, match="decoder of vocabulary failed: ZeroDivisionError"):
        tree.decode(node, lambda ref: ref)
    assert isinstance(tree.decode(node, lambda ref: ref, unknown="opaque")["a"], tree.Opaque)
    _register()


@pytest.mark.parametrize("cls,name", [
    (dict, None), (int, None), (list, "mine"), ("text", None), (Vocabulary, ""), (Vocabulary, "a\nb"),
    (Vocabulary, "x" * 301), (Vocabulary, "\ud800"),
])  # fmt: skip
def test_registration_is_refused_when_it_can_not_work(cls: Any, name: str | None) -> None:
    with pytest.raises(ConfigError):
        tree.register_type(cls, encode=lambda v: v, decode=lambda v: v, name=name)


def test_subclass_is_refused_when_only_its_base_is_registered() -> None:
    _register()

    class Sub(Vocabulary):
        pass

    with pytest.raises(StateError, match="Sub is a subclass of Vocabulary"):
        tree.encode(Sub([]))
