"""``--reward python:module:function``: a reward that a program computes.

The function is called once an answer, as ``function(prompt, answer, **more)``, and returns a number. ``prompt`` is the
last message of the user. ``more`` is what the function has parameters for, all of it where it takes ``**more``:

* ``messages``: the whole chat, as OpenAI's API has it;
* ``alpha``;
* ``extra``: the other keys of the prompt's line, a gold answer for example;
* each of these keys by its own name, unless another parameter has it.

A function that is ``async`` is called for several answers at once, any other for one after another.
"""

from __future__ import annotations

import importlib
import inspect
import math
import pkgutil
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager, nullcontext
from pathlib import Path
from typing import Any

from expo_serve.errors import ExpoError, UsageError
from expo_serve.sweep.at_once import ask_at_once
from expo_serve.sweep.observations import Failure, Score
from expo_serve.sweep.scored import Found, Patience, Scored, shorten

FIRST = 10
"""So many failures from the start are the function's fault, not the answers'."""
AT_ONCE = 8
"""Calls of an ``async`` function under way."""
_EXPECTED = "expected python:module:function"
_NOT_THEIRS = (__file__, pkgutil.__file__, importlib.__file__)
"""Files in a traceback that say nothing about a module."""


class PythonReward:
    """A function as a reward.

    Args:
        name: ``module:function``; the module may lie in the working directory.

    Raises:
        UsageError: there is no such function, or it does not take a prompt and an answer.
    """

    is_late = False

    def __init__(self, name: str) -> None:
        self.spec = f"python:{name}"
        self._function = _find(name, self.spec)
        self._accepted, self._taken = _parameters(self._function, self.spec)
        self._is_async = inspect.iscoroutinefunction(self._function) or inspect.iscoroutinefunction(
            getattr(self._function, "__call__", None)  # noqa: B004 - of an object, which may be async
        )
        self._patience = Patience(FIRST, self._give_up)

    def score(self, items: Sequence[Scored]) -> Iterator[Found]:
        """Yield a score for each answer, or a failure where the function raises or returns no finite number.

        Raises:
            ExpoError: it has failed for all of the first answers; none of these is yielded.
        """
        if not self._is_async:
            yield from self._patience.watch(map(self._call, items))
            return
        with closing(ask_at_once(nullcontext, items, self._await, AT_ONCE)) as results:
            yield from self._patience.watch(results)

    def _call(self, item: Scored) -> Found:
        try:
            return self._score(item, self._function(item.question, item.answer, **self._more(item)))
        except (Exception, SystemExit) as error:  # noqa: BLE001 - whatever the function raises
            return item.failure(self.spec, _describe(error))

    async def _await(self, _: None, item: Scored) -> Found:
        try:
            return self._score(item, await self._function(item.question, item.answer, **self._more(item)))
        except (Exception, SystemExit) as error:  # noqa: BLE001 - whatever the function raises
            return item.failure(self.spec, _describe(error))

    def _more(self, item: Scored) -> dict[str, Any]:
        ours = {"messages": list(item.messages), "alpha": item.alpha, "extra": item.extra}
        more = {key: value for key, value in {**item.extra, **ours}.items() if key not in self._taken}
        return more if self._accepted is None else {key: more[key] for key in more if key in self._accepted}

    def _score(self, item: Scored, found: Any) -> Found:
        value = _number(found)
        if value is None:
            return item.failure(self.spec, f"expected a finite number, the function returned {found!r:.80}")
        return Score(alpha=item.alpha, prompt=item.prompt, reward=self.spec, value=value)

    def _give_up(self, failure: Failure) -> ExpoError:
        return ExpoError(
            f"--reward {self.spec}: the function has failed for each of the first {FIRST} answers, at last with: "
            f"{failure.reason}; correct it, then go on with --resume"
        )


def _find(name: str, spec: str) -> Callable[..., Any]:
    module, _, function = name.partition(":")
    is_file = module.endswith(".py") or "/" in module
    if is_file or not all(part.isidentifier() for part in [*module.split("."), *function.split(".")]):
        hint = "; give the module's name, without folder and .py" if is_file else ""
        raise UsageError(f"--reward {spec}: {_EXPECTED}, such as python:my_reward:score{hint}")
    with _from_here():
        try:
            found = pkgutil.resolve_name(f"{module}:{function}")
        except AttributeError:
            file = getattr(sys.modules.get(module), "__file__", None)
            raise UsageError(
                f"--reward {spec}: module {module} ({file or 'built in'}) has no function {function}"
            ) from None
        except (Exception, SystemExit) as error:  # noqa: BLE001 - whatever the module does while it is imported
            raise UsageError(
                f"--reward {spec}: module {module} cannot be imported: {_describe(error)}; it is looked for in the "
                f"working directory ({Path.cwd()}) first"
            ) from None
    if not callable(found):
        raise UsageError(f"--reward {spec}: expected a function, found {type(found).__name__}")
    return found  # type: ignore[no-any-return]


@contextmanager
def _from_here() -> Iterator[None]:
    """Import from the working directory first, and after it last, where it shadows nothing of ours."""
    here = str(Path.cwd())
    sys.path.insert(0, here)
    try:
        yield
    finally:
        sys.path.remove(here)
        if here not in sys.path:
            sys.path.append(here)


def _parameters(function: Callable[..., Any], spec: str) -> tuple[set[str] | None, set[str]]:
    """Return the names that a function accepts beyond prompt and answer (None: any), and the names of these two.

    Raises:
        UsageError: it does not take two arguments.
    """
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # some that are built in have none
        return set(), set()
    try:
        taken = set(signature.bind_partial("prompt", "answer").arguments)
    except TypeError:
        raise UsageError(
            f"--reward {spec}: expected function(prompt, answer, **more), found {function.__name__}{signature}"
        ) from None
    kinds = {name: parameter.kind for name, parameter in signature.parameters.items()}
    if inspect.Parameter.VAR_KEYWORD in kinds.values():
        return None, taken
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return {name for name, kind in kinds.items() if kind in named}, taken


def _number(found: Any) -> float | None:
    """Return a finite number, NumPy's and torch's scalars too; None for anything else."""
    if isinstance(found, str | bytes | bytearray):
        return None
    try:
        value = float(found)
    except Exception:  # noqa: BLE001 - of whatever type it is
        return None
    return value if math.isfinite(value) else None


def _describe(error: BaseException) -> str:
    """Return an exception in one line, with the place that it is about."""
    text = shorten(traceback.format_exception_only(error)[-1])
    if isinstance(error, SyntaxError):
        return f"{text} ({error.filename}, line {error.lineno})"
    frames = traceback.extract_tb(error.__traceback__)
    places = [frame for frame in frames if frame.filename not in _NOT_THEIRS and Path(frame.filename).is_file()]
    return f"{text} ({places[-1].filename}, line {places[-1].lineno})" if places else text
