"""jaxpipe: any stack of Flax layers, trained over a pipeline of devices, exactly.

The public names. They are loaded when first used, so that `python -m jaxpipe.schedules` and other
tools that need no JAX do not import it.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
  from jaxpipe.models.linen import linen
  from jaxpipe.models.stack import LayerStack, StackError
  from jaxpipe.models.tables import Tables
  from jaxpipe.parallel.mesh import MeshError, make_mesh
  from jaxpipe.parallel.placing import place, unplace
  from jaxpipe.parallel.rules import Rules
  from jaxpipe.pipeline.check import check
  from jaxpipe.pipeline.executor import pipeline_forward, pipeline_value_and_grad
  from jaxpipe.pipeline.layer_costs import layer_costs
  from jaxpipe.pipeline.memory import MemoryReport, memory_report
  from jaxpipe.pipeline.packing import PackingReport, packing_report
  from jaxpipe.pipeline.partition import partitioned
  from jaxpipe.pipeline.pipelined import pipeline
  from jaxpipe.pipeline.reference import reference_value_and_grad
  from jaxpipe.schedules import (
    Action,
    Costs,
    Kind,
    Placement,
    Schedule,
    ScheduleError,
    Timeline,
    make_schedule,
    simulate,
  )
  from jaxpipe.schedules.partition import LayerCost, Partition
  from jaxpipe.training.choose import choose_schedule
  from jaxpipe.training.load import load

_HOME = {
  "Action": "jaxpipe.schedules",
  "Costs": "jaxpipe.schedules",
  "Kind": "jaxpipe.schedules",
  "LayerCost": "jaxpipe.schedules.partition",
  "LayerStack": "jaxpipe.models.stack",
  "MemoryReport": "jaxpipe.pipeline.memory",
  "MeshError": "jaxpipe.parallel.mesh",
  "Partition": "jaxpipe.schedules.partition",
  "Placement": "jaxpipe.schedules",
  "Rules": "jaxpipe.parallel.rules",
  "Schedule": "jaxpipe.schedules",
  "ScheduleError": "jaxpipe.schedules",
  "StackError": "jaxpipe.models.stack",
  "Tables": "jaxpipe.models.tables",
  "Timeline": "jaxpipe.schedules",
  "check": "jaxpipe.pipeline.check",
  "choose_schedule": "jaxpipe.training.choose",
  "layer_costs": "jaxpipe.pipeline.layer_costs",
  "linen": "jaxpipe.models.linen",
  "load": "jaxpipe.training.load",
  "make_mesh": "jaxpipe.parallel.mesh",
  "make_schedule": "jaxpipe.schedules",
  "memory_report": "jaxpipe.pipeline.memory",
  "PackingReport": "jaxpipe.pipeline.packing",
  "packing_report": "jaxpipe.pipeline.packing",
  "pipeline": "jaxpipe.pipeline",  # the package, which can be called
  "partitioned": "jaxpipe.pipeline.partition",
  "pipeline_forward": "jaxpipe.pipeline.executor",
  "pipeline_value_and_grad": "jaxpipe.pipeline.executor",
  "place": "jaxpipe.parallel.placing",
  "reference_value_and_grad": "jaxpipe.pipeline.reference",
  "simulate": "jaxpipe.schedules",
  "unplace": "jaxpipe.parallel.placing",
}

__all__ = list(_HOME)


def __dir__() -> list[str]:
  return sorted([*globals(), *_HOME])


def __getattr__(name: str) -> Any:
  if name not in _HOME:
    raise AttributeError(f"module 'jaxpipe' has no attribute {name!r}")
  home = importlib.import_module(_HOME[name])
  return home if _HOME[name] == f"jaxpipe.{name}" else getattr(home, name)
