"""Splits layers into actions, lowers schedules to tick tables, and runs both as one program.

The package can be called: `jaxpipe.pipeline(...)` is `jaxpipe.pipeline.pipelined.pipeline`.
"""

import sys
import types
from typing import Any


class _Callable(types.ModuleType):
  def __call__(self, *args: Any, **options: Any) -> Any:
    from jaxpipe.pipeline.pipelined import pipeline

    return pipeline(*args, **options)


sys.modules[__name__].__class__ = _Callable
