"""Data classes that cost next to nothing to define, for what must start fast: the launcher and the agent.

The standard library's write the source of each method of each class and compile it: 26 messages took 20 of
the 100 milliseconds until the agent's first word, and `inspect`, which they bring, 10 of the launcher's 50.
These share their methods. They are the same in all that we use of them, and the functions of `dataclasses`
take them too (its description of a class is made when first asked for); type checkers are told that they
are the standard ones.

>>> @dataclass(frozen=True, slots=True)
... class Pair:
...     left: int
...     right: int = 2
>>> replace(Pair(1), right=3)
Pair(left=1, right=3)

Not offered: order, keyword-only fields, InitVar, fields without `__init__`, inheriting a base's defaults.
Import diet: nothing at all.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from dataclasses import asdict, dataclass, field, replace
    from typing import Any

__all__ = ["asdict", "dataclass", "field", "needs", "replace"]


class _Missing:
    """No default."""


class _Factory:
    """A default that is made anew for each object."""

    __slots__ = ("make",)

    def __init__(self, make: Callable[[], Any]) -> None:
        self.make = make


if not TYPE_CHECKING:

    def field(*, default_factory):
        """A field whose default is made anew for each object."""
        return _Factory(default_factory)

    def dataclass(*, frozen=False, slots=True):
        """Make a class of annotated fields a data class; it has slots in any case."""
        return lambda cls: _made(cls, frozen)

    def replace(one, /, **changes):
        """The same with other values for some fields. Raises TypeError for a field that there is not."""
        return type(one)(**{name: getattr(one, name) for name in one.__match_args__} | changes)

    def asdict(one):
        """Its fields in their order, as a dict; so are those of data classes within."""
        return {name: _plain(getattr(one, name)) for name in one.__match_args__}


def needs(cls: type) -> dict[str, bool]:
    """A data class's fields in their order, and whether each must be given."""
    return {name: default is _Missing for name, default in cls._light.items()}  # type: ignore[attr-defined]


def _plain(value: Any) -> Any:
    if hasattr(type(value), "_light"):
        return asdict(value)
    if isinstance(value, dict):
        return {name: _plain(part) for name, part in value.items()}
    return [_plain(part) for part in value] if isinstance(value, list) else value


def _made(cls: type, frozen: bool) -> type:
    """`cls` again, with slots for its own fields, and the methods that all share."""
    space = {name: value for name, value in cls.__dict__.items() if name not in ("__dict__", "__weakref__")}
    own = [name for name, kind in cls.__annotations__.items() if not kind.startswith("ClassVar")]
    fields = {**getattr(cls, "_light", {}), **{name: space.pop(name, _Missing) for name in own}}
    methods: dict[str, Any] = {
        "__init__": _init_of(fields, "__post_init__" in space),
        "__repr__": _repr,
        "__eq__": _eq,
        "__hash__": _hash if frozen else None,
        "__reduce__": _reduce,
        "__slots__": tuple(own),
        "__match_args__": tuple(fields),
        "__dataclass_fields__": _AsStandard(),
        "_light": fields,
    }
    if frozen:
        methods |= {"__setattr__": _refuse, "__delattr__": _refuse}
    made = type(cls)(cls.__name__, cls.__bases__, methods | space)
    made.__qualname__ = cls.__qualname__
    return made


def _init_of(fields: dict[str, Any], post: bool) -> Callable[..., None]:
    names = tuple(fields)

    def __init__(self: Any, *given: Any, **named: Any) -> None:  # noqa: N807 - it becomes one
        if len(given) > len(names):
            raise TypeError(f"{type(self).__name__}() takes {len(names)} fields, {len(given)} were given")
        for name, value in zip(names, given, strict=False):
            _set(self, name, value)
        for name in names[len(given) :]:
            if name in named:
                value = named.pop(name)
            else:
                value = fields[name]
                if value is _Missing:
                    raise TypeError(f"{type(self).__name__}() misses its field {name!r}")
                if type(value) is _Factory:
                    value = value.make()
            _set(self, name, value)
        if named:
            raise TypeError(f"{type(self).__name__}() has no field {next(iter(named))!r}, or has it already")
        if post:
            self.__post_init__()

    return __init__


_set = object.__setattr__


def _refuse(self: Any, name: str, *_: object) -> None:
    raise AttributeError(f"cannot change {name!r} of a {type(self).__name__}: it is frozen")


def _values(one: Any) -> tuple[Any, ...]:
    return tuple([getattr(one, name) for name in one.__match_args__])


def _repr(self: Any) -> str:
    words = ", ".join([f"{name}={getattr(self, name)!r}" for name in self.__match_args__])
    return f"{type(self).__qualname__}({words})"


def _eq(self: Any, other: object) -> bool:
    return _values(self) == _values(other) if other.__class__ is self.__class__ else NotImplemented


def _hash(self: Any) -> int:
    return hash(_values(self))


def _reduce(self: Any) -> tuple[type, tuple[Any, ...]]:
    return type(self), _values(self)


class _AsStandard:
    """`__dataclass_fields__` as the standard library would have it, made when it is first asked for."""

    def __get__(self, _one: object, cls: Any) -> dict[str, Any]:
        import dataclasses

        kinds = {name: kind for base in reversed(cls.__mro__) for name, kind in _annotations(base).items()}
        space: dict[str, Any] = {"__annotations__": {name: kinds[name] for name in cls._light}}
        for name, default in cls._light.items():
            if type(default) is _Factory:
                space[name] = dataclasses.field(default_factory=default.make)
            elif default is not _Missing:
                space[name] = default
        space["__module__"] = cls.__module__
        twin: Any = dataclasses.dataclass(init=False, repr=False, eq=False)(type(cls.__name__, (), space))
        cls.__dataclass_fields__ = twin.__dataclass_fields__
        return dict(twin.__dataclass_fields__)


def _annotations(base: type) -> dict[str, str]:
    return {} if base is object else base.__annotations__
