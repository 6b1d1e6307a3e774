# SPDX-License-Identifier: Apache-2.0
"""Objects that are taken apart by their value, not by their attributes: those hold caches, file handles, parents.

Each kind names the plain parts that an object is made of, and makes it of them again. Libraries are known by the names
of their classes; none is imported here.
"""

import enum
import inspect
import pathlib
import sys
import zoneinfo
from collections.abc import Callable
from copyreg import __newobj__  # type: ignore[attr-defined]
from functools import lru_cache
from types import BuiltinFunctionType, FunctionType
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray


class Kind(NamedTuple):
    """How objects of a class are taken apart by value.

    Attributes:
        parts: From an object to its parts: numbers, strings, arrays, objects of other kinds, in dicts, lists, tuples.
        make: From its class and its parts to an equal object; None where Python's protocol for copies does it.
        take: From an object and places to what stands there, in this order; None where it has no rows.
        is_closed: Whether a class that somebody else derived may hold more than the parts.
    """

    parts: Callable[[Any], Any]
    make: Callable[[Any, Any], Any] | None = None
    take: Callable[[Any, NDArray[np.intp]], Any] | None = None
    is_closed: bool = False


# Parts by name that all rows have in common, even where they are as many as the rows.
COMMON = frozenset(
    ("attrs", "categories", "columns", "dtype", "fill", "freq", "hard", "levels", "name", "names", "ordered", "range")
)


def kind_of(cls: Any) -> Kind | None:
    """The kind of a class's objects, or None: then they are what their attributes, or their parts, are."""
    return _kind_of(cls)


@lru_cache(maxsize=1024)
def _kind_of(cls: Any) -> Kind | None:
    home, bases = _home(cls), inspect.getmro(cls)
    for base in bases:
        kind = _KINDS.get(f"{_home(base)}.{base.__qualname__}")
        if kind is not None:
            return kind._replace(make=None) if kind.is_closed and _home(base) != home else kind
    return None


def is_opaque(value: Any) -> bool:
    """Whether an object's attributes say nothing of it that counts."""
    return kind_of(type(value)) is not None


def reduced(value: Any) -> tuple[Any, ...]:
    """What Python's protocol for copies makes of an object: a function, its arguments, a state, and so on.

    Raises:
        Exception: If it cannot be copied, or is a name only.
    """
    cls: Any = type(value)
    if _is_graph(cls):
        return __newobj__, (cls,), dict(vars(value))  # a batch is else made by a function of its own
    kind = kind_of(cls)
    if kind is not None and kind.is_closed and kind.make is None:
        raise TypeError("of a class derived from one that is taken apart by value")
    found = value.__reduce_ex__(2)
    if not isinstance(found, tuple):
        raise TypeError(f"known by its name {found} only")
    return found


@lru_cache(maxsize=64)
def _is_graph(cls: Any) -> bool:
    return any(_home(base) == "torch_geometric" and base.__qualname__ == "BaseData" for base in cls.__mro__)


def is_cached(cls: Any, name: str) -> bool:
    """Whether an entry of an object's ``__dict__`` is the cached value of a property of its class."""
    return _is_cached(cls, name)


@lru_cache(maxsize=4096)
def _is_cached(cls: Any, name: str) -> bool:
    found = inspect.getattr_static(cls, name, None)
    return hasattr(type(found), "__get__") and not hasattr(type(found), "__set__") and not isinstance(found, _METHODS)


_METHODS = (FunctionType, BuiltinFunctionType, classmethod, staticmethod, type)  # as a dataclass has them for defaults


def _home(cls: type) -> str:
    return cls.__module__.partition(".")[0]


def _pandas() -> Any:
    return sys.modules["pandas"]  # there: the object is one of its


def _array_of(values: Any) -> Any:
    """The array behind an Index or a Series: NumPy's where there is one."""
    return np.array(values.to_numpy()) if isinstance(values.dtype, np.dtype) else values.array


def _index_parts(index: Any) -> dict[str, Any]:
    if hasattr(index, "levels"):
        return {"levels": list(index.levels), "codes": list(map(np.array, index.codes)), "names": list(index.names)}
    if hasattr(index, "step"):
        return {"range": [index.start, index.stop, index.step], "name": index.name}
    freq = getattr(index, "freqstr", None) if isinstance(index.dtype, np.dtype) or hasattr(index, "tz") else None
    return {"array": _array_of(index), "name": index.name, "freq": freq}


def _index(cls: Any, parts: Any) -> Any:
    if "levels" in parts:
        return cls(parts["levels"], parts["codes"], names=parts["names"])
    if "range" in parts:
        return cls(*parts["range"], name=parts["name"])
    made = _pandas().Index(parts["array"], dtype=parts["array"].dtype, name=parts["name"])
    if parts["freq"] is not None:
        made.freq = parts["freq"]
    return made


def _series_parts(series: Any) -> dict[str, Any]:
    return {"array": _array_of(series), "index": series.index, "name": series.name, "attrs": series.attrs}


def _series(cls: Any, parts: Any) -> Any:
    made = cls(parts["array"], index=parts["index"], name=parts["name"], dtype=parts["array"].dtype)
    made.attrs.update(parts["attrs"])
    return made


def _frame_parts(frame: Any) -> dict[str, Any]:
    arrays = [_array_of(frame.iloc[:, place]) for place in range(frame.shape[1])]
    # Columns by place, since names may occur twice; in a dict, so that each may have a row a sample.
    return {
        "arrays": dict(enumerate(arrays)),
        "columns": [frame.columns],
        "index": frame.index,
        "attrs": frame.attrs,
    }


def _frame(cls: Any, parts: Any) -> Any:
    made = cls(dict(parts["arrays"]), index=parts["index"])
    (made.columns,) = parts["columns"]
    made.attrs.update(parts["attrs"])
    return made


def _rows_in_place(table: Any, places: NDArray[np.intp]) -> Any:
    return table.iloc[places].set_axis(table.index[: len(places)])


def _timestamp(cls: Any, parts: Any) -> Any:
    moment, zone = parts
    return cls(moment) if zone is None else cls(moment, tz="UTC").tz_convert(zone)


def _extension(cls: Any, parts: Any) -> Any:
    return _pandas().array(parts["values"], dtype=parts["dtype"])


def _dtype(cls: Any, name: Any) -> Any:
    found = getattr(torch, name)
    if not isinstance(found, torch.dtype):
        raise TypeError(f"torch.{name} is no dtype")
    return found


def _masked(cls: Any, parts: Any) -> Any:
    mask = np.ma.nomask if parts["mask"] is None else parts["mask"]
    return np.ma.MaskedArray(parts["data"], mask=mask, fill_value=parts["fill"], hard_mask=parts["hard"])


def _masked_parts(array: Any) -> dict[str, Any]:
    mask = None if array.mask is np.ma.nomask else np.array(array.mask)
    return {"data": np.array(array.data), "mask": mask, "fill": array.fill_value, "hard": array.hardmask}


def _picture_parts(picture: Any) -> dict[str, Any]:
    palette = picture.getpalette() if picture.mode in ("P", "PA") else None
    return {"mode": picture.mode, "palette": palette, "pixels": np.array(picture)}


def _taken(values: Any, places: NDArray[np.intp]) -> Any:
    return values.take(places)


def _sorted(values: Any) -> list[Any]:
    """The members of a set, whose order means nothing, in one that does not change."""
    return sorted(values, key=lambda value: (type(value).__qualname__, repr(value)))


_KINDS = {
    "builtins.bytes": Kind(lambda v: np.frombuffer(v, np.uint8), lambda cls, array: cls(array.tobytes())),
    "builtins.bytearray": Kind(lambda v: np.frombuffer(bytes(v), np.uint8), lambda cls, array: cls(array.tobytes())),
    "builtins.set": Kind(_sorted, lambda cls, members: cls(members)),
    "builtins.frozenset": Kind(_sorted, lambda cls, members: cls(members)),
    "builtins.ellipsis": Kind(lambda v: "...", lambda cls, parts: ...),
    f"{enum.Enum.__module__}.Enum": Kind(lambda v: v.value, lambda cls, value: cls(value)),
    f"{_home(pathlib.PurePath)}.PurePath": Kind(str, lambda cls, text: cls(text)),
    f"{_home(zoneinfo.ZoneInfo)}.ZoneInfo": Kind(str, lambda cls, key: cls(key)),
    "torch.dtype": Kind(lambda v: str(v).removeprefix("torch."), _dtype),
    "torch.device": Kind(str, lambda cls, name: cls(name)),
    "numpy.dtype": Kind(np.lib.format.dtype_to_descr, lambda cls, descr: np.lib.format.descr_to_dtype(descr)),
    "numpy.MaskedArray": Kind(_masked_parts, _masked, lambda v, places: v[places], True),
    "PIL.Image": Kind(_picture_parts),
    "pandas.Index": Kind(_index_parts, _index, _taken, True),
    "pandas.Series": Kind(_series_parts, _series, _rows_in_place, True),
    "pandas.DataFrame": Kind(_frame_parts, _frame, _rows_in_place, True),
    "pandas.Categorical": Kind(
        lambda v: {"codes": np.array(v.codes), "categories": [v.categories], "ordered": v.ordered},
        lambda cls, p: cls.from_codes(p["codes"], p["categories"][0], p["ordered"]),
        _taken,
        True,
    ),
    "pandas.NumpyExtensionArray": Kind(lambda v: np.array(v.to_numpy()), lambda cls, array: cls(array), _taken, True),
    "pandas.PandasArray": Kind(lambda v: np.array(v.to_numpy()), lambda cls, array: cls(array), _taken, True),
    "pandas.ExtensionArray": Kind(
        lambda v: {"values": list(v.astype(object)), "dtype": str(v.dtype)}, _extension, _taken, True
    ),
    "pandas.Timestamp": Kind(lambda v: [v.asm8, None if v.tz is None else str(v.tz)], _timestamp, None, True),
    "pandas.Timedelta": Kind(lambda v: v.asm8, lambda cls, span: cls(span), None, True),
    "pandas.Period": Kind(lambda v: [v.ordinal, v.freqstr], lambda cls, p: cls(ordinal=p[0], freq=p[1]), None, True),
    "pandas.Interval": Kind(lambda v: [v.left, v.right, v.closed], lambda cls, p: cls(*p), None, True),
    "pandas.NaTType": Kind(lambda v: "NaT", lambda cls, parts: _pandas().NaT),
    "pandas.NAType": Kind(lambda v: "NA", lambda cls, parts: _pandas().NA),
}
