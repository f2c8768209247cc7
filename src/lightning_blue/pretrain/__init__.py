"""Making a small language model that knows given facts."""

from lightning_blue.pretrain.data import FactCorpusModule
from lightning_blue.pretrain.module import PretrainModule

__all__ = ["FactCorpusModule", "PretrainModule"]
