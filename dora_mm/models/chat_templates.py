"""Bounds for chat templates: programs out of models' files, which transformers renders in a sandbox of jinja2's.

That sandbox keeps a template from the machine, but not from loops that never end and texts of gigabytes. Here every
loop, call, product, comparison and text is counted, by its length, before it is made, and what is kept by the bytes
that it takes. Nor does the sandbox keep them from the clock: here they get
the day that is set by `rendering_on`, so that a row is the same whenever it is rendered. Importing this file does both
for all templates that the process compiles from then on: transformers builds its environment inside of a function, from
the class that is replaced.
"""

from __future__ import annotations

import functools
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from jinja2 import Template, nodes
from jinja2.exceptions import SecurityError
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer
from transformers.utils import chat_template_utils

from dora_mm.utils.day import Day, midnight

MOST_STEPS = 5_000_000  # of the loops of a rendering: some 4 s
CALL = 20  # the steps of a call, which takes some 15 us
MOST_SIZE = 2**22  # of a text in characters, or of a list
MOST_TOTAL = 2**30  # characters of all texts that a rendering builds
MOST_KEPT = 2**28  # bytes of texts and lists that a rendering holds at one time
SMALL = 256  # bytes of a text or list that is not looked for among them
MOST_NUMBER = 100_000  # an argument, as of a width; jinja2's own bound of a range
MOST_BITS = 4096  # of a whole number
LONG_WIDTH = re.compile(r"\d{6}|\*")  # in a format
SIZED = (str, bytes, list, tuple, dict)
OF_ITEMS = (  # filters of lists and objects that make no text of them
    *("length", "count", "list", "first", "last", "map", "select", "reject", "selectattr", "rejectattr", "items"),
    *("reverse", "batch", "slice", "default", "d", "attr"),
)
OF_KEYS = ("get", "keys", "values")  # methods of dicts that look at no value
CHARACTERS = 32  # characters or items that a filter or method reads in a step
SLOW = {  # filters that take steps for each character or item: 20 to 800 ns, and a step takes some 750
    **dict.fromkeys(("wordwrap", "urlize", "sort", "unique", "groupby", "dictsort"), 4),
    **dict.fromkeys(("title", "urlencode", "pprint", "max", "min"), 1),
    **dict.fromkeys(("join", "list", "indent", "striptags", "wordcount"), 0.25),
}


class Spent:
    """The steps and the characters of text that a rendering has taken so far, and what it may still hold.

    Texts are held here, too, by their ids. Where they take many bytes, those that nothing else refers to are dropped.
    """

    def __init__(self) -> None:
        self.steps = self.size = self.printed = 0
        self.held: dict[int, Any] = {}
        self.bytes, self.next_look = 0, MOST_KEPT // 4

    def print(self, size: int) -> None:
        """Counts the bytes of what goes into the text; raises SecurityError where they are too many."""
        self.printed += size
        if self.printed > MOST_KEPT:
            raise _refused(f"it writes {self.printed:,} bytes, of at most {MOST_KEPT:,}")

    def hold(self, value: Any) -> None:
        """Counts the bytes of a text or a list; raises SecurityError where those that are alive take too many."""
        size = sys.getsizeof(value)
        if size < SMALL or id(value) in self.held:
            return
        self.held[id(value)] = value
        self.bytes += size
        if self.bytes > self.next_look:
            self._drop()
            if self.bytes > MOST_KEPT:
                raise _refused(f"it keeps {self.bytes:,} bytes, of at most {MOST_KEPT:,}")
            self.next_look = max(MOST_KEPT // 4, 2 * self.bytes)

    def _drop(self) -> None:
        for key in list(self.held):
            value = self.held.pop(key)
            if sys.getrefcount(value) > 2:  # beside this name, and the argument
                self.held[key] = value
            del value
        self.bytes = sum(map(sys.getsizeof, self.held.values()))

    def add(self, steps: int, size: int = 0) -> None:
        """Counts; raises SecurityError where it is too much."""
        self.steps += steps
        self.size += size
        if self.steps > MOST_STEPS or self.size > MOST_TOTAL:
            raise _refused("it takes too many steps")


_spent: ContextVar[Spent | None] = ContextVar("spent", default=None)
_day: ContextVar[Day | None] = ContextVar("day", default=None)


@contextmanager
def rendering_on(day: Day) -> Iterator[None]:
    """A context in which templates that ask for the day get this one, in the thread that opens it."""
    before = _day.set(day)
    try:
        yield
    finally:
        _day.reset(before)


def strftime_now(format: str) -> str:
    """Replaces the function of this name that transformers gives to templates, which reads the clock.

    It looks up the day when it is called: compiled templates are cached.

    Raises:
        ValueError: No day is set, as for the prompts of images.
    """
    if (day := _day.get()) is None:
        raise ValueError(
            "the chat template asks for the day, which only rows of vision-language and language models have: take a "
            "text encoder whose template does not"
        )
    _check_size(12 * len(format))  # of two characters become 24 at most
    return midnight(day.request(), format)


class BoundedEnvironment(ImmutableSandboxedEnvironment):
    """jinja2's sandbox, with bounds."""

    intercepted_binops = frozenset(("*", "**", "+", "%"))

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.filters = _Filters(self.filters)
        self.finalize = _printed
        self.globals = _Globals(self.globals)
        self.template_class = _Template
        del self.globals["lipsum"]  # paragraphs of any length

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """An operator whose result may be large."""
        _check_operator(operator, left, right)
        return _counted(super().call_binop(context, operator, left, right))

    def call(self, context: Context, function: Any, *args: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        """A call of a function, a method or a macro."""
        owner = getattr(getattr(function, "__wrapped__", function), "__self__", None)  # jinja2 wraps str.format
        if owner is self:  # one of those below, which counts for itself
            return function(*args)
        named = isinstance(owner, SIZED)
        if isinstance(owner, list | tuple):  # which are searched by `count` and `index`
            _printable(owner)
        _check_arguments(function.__name__ if named else "", ((owner,) if named else ()) + args, kwargs)
        _add(CALL)
        return _counted(super().call(context, function, *args, **kwargs))

    def bounded_loop(self, values: Any, size: int) -> Any:
        """Returns the values of a loop, and counts a step and `size` characters of the template for each of them."""
        try:
            count = len(values)
        except TypeError:
            return _one_by_one(values, size)
        _add(count, count * size, written=4 * count * size)
        return values

    def bounded_join(self, *values: Any) -> str:
        """Concatenates values, as `~` does, and counts the text."""
        texts = [str(_printable(value)) for value in values]
        _check_size(sum(map(len, texts)))
        return _counted("".join(texts))

    def bounded_value(self, value: Any) -> Any:
        """Counts a part of another value, such as a slice of a text."""
        return _counted(value)

    def bounded_operand(self, value: Any) -> Any:
        """Counts a value that is compared or looked up, with all that is in it."""
        _add(_cost("", value))
        return _printable(value) if isinstance(value, list | tuple | dict) else value

    def bounded_container(self, value: Any) -> Any:
        """Counts a value in which another one is looked for: with all that is in it, but for the values of a dict."""
        return value if isinstance(value, dict) else self.bounded_operand(value)

    def getitem(self, obj: Any, argument: Any) -> Any:
        """An item, by its key."""
        return super().getitem(obj, self.bounded_operand(argument) if isinstance(argument, tuple) else argument)

    def _generate(self, source: nodes.Template, *args: Any, **kwargs: Any) -> str:
        return super()._generate(_Bounding().visit(source), *args, **kwargs)


class _Template(Template):
    """A template whose renderings begin to count anew."""

    def new_context(self, *args: Any, **kwargs: Any) -> Context:
        _spent.set(Spent())
        return super().new_context(*args, **kwargs)


class _Bounding(NodeTransformer):
    """Puts calls of the environment around what loops go over and what is joined."""

    def visit_For(self, node: nodes.For) -> nodes.For:
        self.generic_visit(node)
        size = sum(len(text.data) for text in node.find_all(nodes.TemplateData))
        node.iter = _call("bounded_loop", [node.iter, nodes.Const(size)], node)
        return node

    def visit_AssignBlock(self, node: nodes.AssignBlock) -> nodes.AssignBlock:
        self.generic_visit(node)
        inner: Any = node.filter  # which has no node inside: the text of the block takes its place
        node.filter = nodes.Filter(inner, "string", [], [], None, None, lineno=node.lineno)
        return node

    def visit_Compare(self, node: nodes.Compare) -> nodes.Compare:
        self.generic_visit(node)
        node.expr = _call("bounded_operand", [node.expr], node)
        for operand in node.ops:
            name = "bounded_container" if operand.op in ("in", "notin") else "bounded_operand"
            operand.expr = _call(name, [operand.expr], node)
        return node

    def visit_Pair(self, node: nodes.Pair) -> nodes.Pair:
        self.generic_visit(node)
        node.key = _call("bounded_operand", [node.key], node)
        return node

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:
        self.generic_visit(node)
        return _call("bounded_value", [node], node) if isinstance(node.arg, nodes.Slice) else node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Call:
        self.generic_visit(node)
        return _call("bounded_join", node.nodes, node)


def _call(name: str, arguments: list[Any], node: nodes.Node) -> nodes.Call:
    return nodes.Call(nodes.EnvironmentAttribute(name), arguments, [], None, None, lineno=node.lineno)


class _Globals(dict):
    """The globals of templates; the `strftime_now` that transformers adds later is replaced."""

    def __setitem__(self, name: str, value: Any) -> None:
        super().__setitem__(name, strftime_now if name == "strftime_now" else value)


class _Filters(dict):
    """Filters by name, each of which is bounded, also those that are added later."""

    def __init__(self, filters: dict[str, Callable[..., Any]]):
        super().__init__()
        for name, function in filters.items():
            self[name] = function

    def __setitem__(self, name: str, function: Callable[..., Any]) -> None:
        @functools.wraps(function)  # with the mark of those that take the environment
        def bounded(*args: Any, **kwargs: Any) -> Any:
            given = [arg for arg in args if isinstance(arg, (*SIZED, int, float))]
            _check_arguments(name, given, kwargs)
            return _counted(function(*args, **kwargs))

        super().__setitem__(name, bounded)


# --- what is counted --------------------------------------------------------------------------------------------------


def _refused(reason: str) -> SecurityError:
    return SecurityError(f"the bounds of a chat template: {reason}")


def _add(steps: int, size: int = 0, written: int = 0) -> None:
    if (spent := _spent.get()) is not None:  # None: while a template is compiled
        spent.add(steps, size)
        spent.print(written)


def _check_size(size: int) -> None:
    if size > MOST_SIZE:
        raise _refused(f"a text or list of {size:,} characters or items, of at most {MOST_SIZE:,}")


def _counted(value: Any) -> Any:
    """A value that was made."""
    size = len(value) if isinstance(value, SIZED) else 0
    _check_size(size)
    _add(1, size)
    if size and (spent := _spent.get()) is not None:
        spent.hold(value)
    return value


def _printed(value: Any) -> Any:
    """A value that becomes a part of the text."""
    before = spent.size if (spent := _spent.get()) is not None else 0
    _printable(value)
    if spent is not None:
        spent.print(sys.getsizeof(value) if isinstance(value, str) else 4 * (spent.size - before))
    return value


def _printable(value: Any) -> Any:
    """A value that is going to be a text, which lists in lists can make long."""
    if isinstance(value, str):
        return _counted(value)
    waiting, size = [value], 0
    while waiting:
        one = waiting.pop()
        if isinstance(one, dict):
            waiting += [*one, *one.values()]
        elif isinstance(one, list | tuple):
            waiting += one
        size += len(one) if isinstance(one, SIZED) else 20
        _check_size(max(size, len(waiting)))
    _add(1, size)
    return value


def _one_by_one(values: Iterable[Any], size: int) -> Iterator[Any]:
    for value in values:
        _add(1, size, written=4 * size)
        yield value


def _check_operator(operator: str, left: Any, right: Any) -> None:
    if isinstance(left, int) and isinstance(right, int):
        bits = left.bit_length() * right if operator == "**" else left.bit_length() + right.bit_length()
        if bits > MOST_BITS:
            raise _refused(f"a number of {bits:,} bits")
    elif operator == "%" and isinstance(left, str | bytes):
        _check_arguments("format", (left, right), {})
    elif operator == "*":
        values, times = (left, right) if isinstance(right, int) else (right, left)
        _check_size(len(values) * times if isinstance(values, SIZED) and isinstance(times, int) else 0)
    elif isinstance(left, SIZED) and isinstance(right, SIZED):
        _check_size(len(left) + len(right))


def _check_arguments(name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    """Checks the arguments of a filter or of a method of texts, the text first."""
    for value in (*args, *kwargs.values()):
        if isinstance(value, int | float) and abs(value) > MOST_NUMBER:
            raise _refused(f"the number {value:.3g} as an argument")
        deep = name and name not in (*OF_ITEMS, *OF_KEYS)
        if isinstance(value, tuple) or (isinstance(value, list | dict) and deep):
            _printable(value)
        _add(_cost(name, value))
    if (grown := _GROWING.get(name)) and args:
        texts = [value for value in (*args, *kwargs.values()) if isinstance(value, str | bytes)]
        numbers = [int(value) for value in (*args, *kwargs.values()) if isinstance(value, int | float)]
        _check_size(grown(texts, args, max(numbers, default=4)))


def _cost(name: str, value: Any) -> int:
    """The steps of reading a value."""
    size = len(value) if isinstance(value, SIZED) else 0
    return int(size * SLOW.get(name, 1 / CHARACTERS))


def _joined(texts: Sequence[Any], args: Sequence[Any], number: int) -> int:
    between = max(map(len, texts), default=0)
    items = next((value for value in args if isinstance(value, list | tuple | dict)), texts[-1] if texts else ())
    return len(items) * between


def _replaced(texts: Sequence[Any], args: Sequence[Any], number: int) -> int:
    return len(texts[0]) + texts[0].count(texts[1]) * len(texts[2]) if len(texts) > 2 else 0


def _translated(texts: Sequence[Any], args: Sequence[Any], number: int) -> int:
    longest = max((len(v) for a in args if isinstance(a, dict) for v in a.values() if isinstance(v, str)), default=1)
    return len(texts[0]) * longest if texts else 0


def _formatted(texts: Sequence[Any], args: Sequence[Any], number: int) -> int:
    if any(LONG_WIDTH.search(text) for text in texts[:1] if isinstance(text, str)):
        raise _refused("a format with a width of six digits")
    placed = sum(len(text) for text in texts[1:]) + sum(20 for _ in args)
    return len(texts[0]) + texts[0].count("%") * placed if texts else 0


_GROWING: dict[str, Callable[[Sequence[Any], Sequence[Any], int], int]] = {  # an upper bound of the size of a result
    "join": _joined,
    "replace": _replaced,
    "translate": _translated,
    "format": _formatted,
    "format_map": _formatted,
    "indent": lambda texts, args, number: sum(text.count("\n") + 1 for text in texts[:1]) * number,
    "expandtabs": lambda texts, args, number: sum(text.count("\t") + 1 for text in texts[:1]) * number,
    "tojson": lambda texts, args, number: number**2,  # an indentation of 2,000 is none
}

chat_template_utils.ImmutableSandboxedEnvironment = BoundedEnvironment
