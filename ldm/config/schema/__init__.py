"""The configuration's schema: one module a section, each key with its type, default and a line of documentation."""

from ldm.config.rules import FLOW_SOLVERS, TRACKERS
from ldm.config.schema.base import Section
from ldm.config.schema.budget import BudgetConfig, BudgetPoint
from ldm.config.schema.classifier import ClassifierConfig
from ldm.config.schema.config import Config
from ldm.config.schema.data import BucketConfig, DataConfig, SourceConfig, as_sources
from ldm.config.schema.distillation import DistillConfig
from ldm.config.schema.evaluation import EvaluateConfig
from ldm.config.schema.finetune import ADAPTERS, FinetuneConfig
from ldm.config.schema.run import RunConfig
from ldm.config.schema.sample import SOLVERS, SPACINGS, SampleConfig
from ldm.config.schema.stage1 import AlignConfig, GanConfig, Stage1Config
from ldm.config.schema.stage2 import CONDITIONS, Stage2Config
from ldm.config.schema.text import TextConfig
from ldm.config.schema.training import WIDEST, Training

__all__ = [
    "ADAPTERS",
    "CONDITIONS",
    "FLOW_SOLVERS",
    "SOLVERS",
    "SPACINGS",
    "TRACKERS",
    "WIDEST",
    "AlignConfig",
    "BucketConfig",
    "BudgetConfig",
    "BudgetPoint",
    "ClassifierConfig",
    "Config",
    "DataConfig",
    "DistillConfig",
    "EvaluateConfig",
    "FinetuneConfig",
    "GanConfig",
    "RunConfig",
    "SampleConfig",
    "Section",
    "SourceConfig",
    "Stage1Config",
    "Stage2Config",
    "TextConfig",
    "Training",
    "as_sources",
]
