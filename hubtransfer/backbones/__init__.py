"""Backbones: any timm, transformers or plain torch network behind one face."""

from hubtransfer.backbones.backbone import Backbone
from hubtransfer.backbones.features import Features
from hubtransfer.backbones.probe import LayerInfo
from hubtransfer.backbones.processor import Processor
from hubtransfer.backbones.towers import Towers

__all__ = ["Backbone", "Features", "LayerInfo", "Processor", "Towers"]
