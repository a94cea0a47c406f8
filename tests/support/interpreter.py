"""Triton's interpreter without the search it repeats.

At every call of a helper such as tl.sum, the interpreter searches all of triton.language for functions to replace. The
launch has replaced them already. The search takes a third of the time of interpreted tests.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from types import ModuleType
from typing import Any

import triton.language as tl
from triton.runtime import interpreter


def search_once_a_launch() -> None:
    """From now on, in this process. What a launch replaces is put back when it ends, so each one searches again."""
    search = interpreter._patch_lang

    def replace(function: Callable[..., Any]) -> interpreter._LangPatchScope:
        if any(tl.core.is_builtin(module.load) for module in _languages(function)):
            return search(function)
        return interpreter._LangPatchScope()  # of no changes

    interpreter._patch_lang = replace


@cache
def _languages(function: Callable[..., Any]) -> tuple[ModuleType, ...]:
    """The modules in which the interpreter replaces what `function` may use."""
    return tuple({id(each): each for each in function.__globals__.values() if each is tl or each is tl.core}.values())
