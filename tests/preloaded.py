"""What a command and its workers import, once for all that `commands` forks."""

import gc
from importlib import import_module

import composing  # noqa: F401  # its import makes Hydra remember
import PIL.Image
import sqlalchemy.orm

from kdsweep.config import composition
from kdsweep.evaluation import latency

for name in (
    "alembic.migration",
    "hydra_plugins.kdsweep_lockstep",
    "kdsweep.__main__",
    "kdsweep.sweep.executors.local",
    "kdsweep.sweep.launcher",
    "kdsweep.sweep.rehearsal",
    "kdsweep.sweep.status",
    "kdsweep.tracking.sync",
    "kdsweep.training.group",
    "mlflow.store.tracking.sqlalchemy_store",
    "monai.metrics",
    "pyarrow.pandas_compat",
    "sklearn.model_selection",
    "tabulate",
    "torch._dynamo",  # by the first step of an optimizer
):
    import_module(name)
PIL.Image.init()  # its readers of all formats
for words in ["path=none"], ["path=L", "teacher_aug=weak"], ["path=H", "loss=mse"], ["path=HR"]:
    composition.compose_config(["profile=quick", "data=busi", *words])
latency.ENOUGH_S = 0.0  # one timed step instead of five: an estimate's precision does not matter here
sqlalchemy.orm.configure_mappers()
gc.collect()
gc.freeze()  # else each collection that the package asks for goes through all modules, and copies their memory
