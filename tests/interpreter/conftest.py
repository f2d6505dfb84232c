"""Triton's interpreter without what it does again and again, which is half of its time.

It looks through all of triton.language for what to replace by its interpreted form: at each launch,
where the names are known after the first, and once more at each call of a device function, where
nothing is left to replace. It makes a table of NumPy's dtypes for each tensor.
"""

import functools
import inspect
import os
from collections.abc import Callable
from types import ModuleType
from typing import Any

if os.environ.get("TRITON_INTERPRET") == "1":
    from triton import language
    from triton.language.core import block_type, is_builtin, pointer_type
    from triton.runtime import interpreter

    _patch_lang, _np_dtype = interpreter._patch_lang, interpreter._get_np_dtype
    _np_dtype_of_scalar = functools.cache(_np_dtype)

    @functools.cache
    def _builtins(package: Any) -> list[str]:
        return [name for name, member in inspect.getmembers(package) if is_builtin(member)]

    @functools.cache
    def _languages(function: Callable[..., Any]) -> list[ModuleType]:
        known = (language, language.core)
        return [value for value in function.__globals__.values() if any(value is one for one in known)]

    def _patch_known_builtins(package: Any, builder: Any, scope: Any) -> None:
        for name in _builtins(package):
            member = getattr(package, name)
            if is_builtin(member):
                interpreter._patch_attr(package, name, member, builder, scope)

    def _patch_lang_once(function: Callable[..., Any]) -> Any:
        if any(is_builtin(one.load) for one in _languages(function)):
            return _patch_lang(function)
        return interpreter._LangPatchScope()

    def _known_np_dtype(dtype: Any) -> Any:
        scalar = dtype.element_ty if isinstance(dtype, block_type) else dtype
        return (_np_dtype if isinstance(scalar, pointer_type) else _np_dtype_of_scalar)(scalar)

    interpreter._patch_builtin = _patch_known_builtins
    interpreter._patch_lang = _patch_lang_once
    interpreter._get_np_dtype = _known_np_dtype
