"""Triton's interpreter, without patching the whole language again at every call of a device function.

At each launch, and at each call of one jitted function by another, Triton 3.7 searches all members of `triton.language`
and replaces them by what computes with numpy; the first call of a launch has done so already. Half of the time of the
tests under the interpreter was this search.
"""

from __future__ import annotations

import functools

from triton.runtime import interpreter


def patch_once_a_launch() -> None:
    if not hasattr(interpreter, "_LangPatchScope"):  # an older Triton
        return
    patch, launch, find = interpreter._patch_lang, interpreter.GridExecutor.__call__, interpreter._get_np_dtype
    patched: set[int] | None = None  # the namespaces of functions, since the launch began

    def patch_lang(function):
        namespace = id(function.__globals__)
        if patched is None:
            return patch(function)
        if namespace in patched:
            return interpreter._LangPatchScope()  # nothing to restore
        patched.add(namespace)
        return patch(function)

    def launch_kernel(*arguments, **named):
        nonlocal patched
        patched = set()
        try:
            return launch(*arguments, **named)
        finally:
            patched = None

    of_scalar = functools.cache(find)

    def np_dtype(dtype):
        return find(dtype) if dtype.scalar.is_ptr() else of_scalar(dtype.scalar)

    interpreter._patch_lang = patch_lang
    interpreter.GridExecutor.__call__ = launch_kernel
    interpreter._get_np_dtype = np_dtype
