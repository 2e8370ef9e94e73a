"""jaxpipe: any stack of Flax layers, trained over a pipeline of devices, exactly.

The public names. They are loaded when first used, so that `python -m jaxpipe.schedules` and other
tools that need no JAX do not import it.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
  from jaxpipe.parallel.mesh import MeshError, make_mesh
  from jaxpipe.parallel.placing import place, unplace
  from jaxpipe.parallel.rules import Rules
  from jaxpipe.pipeline.check import check
  from jaxpipe.pipeline.costs.layer_costs import layer_costs
  from jaxpipe.pipeline.costs.memory import MemoryReport, memory_report
  from jaxpipe.pipeline.costs.packing import PackingReport, packing_report
  from jaxpipe.pipeline.executor import pipeline_forward, pipeline_value_and_grad
  from jaxpipe.pipeline.loss_scale import LossScale, all_finite
  from jaxpipe.pipeline.partitioned import partitioned
  from jaxpipe.pipeline.pipelined import pipeline
  from jaxpipe.pipeline.reference import reference_value_and_grad
  from jaxpipe.pipeline.update.by_variable import by_variable
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
  from jaxpipe.stack.context import Whole
  from jaxpipe.stack.errors import StackError
  from jaxpipe.stack.linen import linen
  from jaxpipe.stack.module.given import layer
  from jaxpipe.stack.stack import LayerStack
  from jaxpipe.stack.vocabulary import Tables
  from jaxpipe.training.lm.load import load
  from jaxpipe.training.plan.choose import choose_schedule

__version__ = "0.1.0"  # that of pyproject.toml

_HOME = {
  "Action": "jaxpipe.schedules",
  "Costs": "jaxpipe.schedules",
  "Kind": "jaxpipe.schedules",
  "LayerCost": "jaxpipe.schedules.partition",
  "LayerStack": "jaxpipe.stack.stack",
  "LossScale": "jaxpipe.pipeline.loss_scale",
  "MemoryReport": "jaxpipe.pipeline.costs.memory",
  "MeshError": "jaxpipe.parallel.mesh",
  "Partition": "jaxpipe.schedules.partition",
  "Placement": "jaxpipe.schedules",
  "Rules": "jaxpipe.parallel.rules",
  "Schedule": "jaxpipe.schedules",
  "ScheduleError": "jaxpipe.schedules",
  "StackError": "jaxpipe.stack.errors",
  "Tables": "jaxpipe.stack.vocabulary",
  "Whole": "jaxpipe.stack.context",
  "Timeline": "jaxpipe.schedules",
  "all_finite": "jaxpipe.pipeline.loss_scale",
  "by_variable": "jaxpipe.pipeline.update.by_variable",
  "check": "jaxpipe.pipeline.check",
  "choose_schedule": "jaxpipe.training.plan.choose",
  "layer": "jaxpipe.stack.module.given",
  "layer_costs": "jaxpipe.pipeline.costs.layer_costs",
  "linen": "jaxpipe.stack.linen",
  "load": "jaxpipe.training.lm.load",
  "make_mesh": "jaxpipe.parallel.mesh",
  "make_schedule": "jaxpipe.schedules",
  "memory_report": "jaxpipe.pipeline.costs.memory",
  "PackingReport": "jaxpipe.pipeline.costs.packing",
  "packing_report": "jaxpipe.pipeline.costs.packing",
  "pipeline": "jaxpipe.pipeline",  # the package, which can be called
  "partitioned": "jaxpipe.pipeline.partitioned",
  "pipeline_forward": "jaxpipe.pipeline.executor",
  "pipeline_value_and_grad": "jaxpipe.pipeline.executor",
  "place": "jaxpipe.parallel.placing",
  "reference_value_and_grad": "jaxpipe.pipeline.reference",
  "simulate": "jaxpipe.schedules",
  "unplace": "jaxpipe.parallel.placing",
}

# The folders, as attributes of the package without an import of their own.
_FOLDERS = ("data", "models", "parallel", "schedules", "stack", "training")

__all__ = list(_HOME)


def __dir__() -> list[str]:
  return sorted([*globals(), *_HOME, *_FOLDERS])


def __getattr__(name: str) -> Any:
  if name in _FOLDERS:
    return importlib.import_module(f"jaxpipe.{name}")
  if name not in _HOME:
    raise AttributeError(f"module 'jaxpipe' has no attribute {name!r}")
  home = importlib.import_module(_HOME[name])
  return home if _HOME[name] == f"jaxpipe.{name}" else getattr(home, name)
