"""
An adapter taken home: merged into its base, checked, and written as a model that needs neither PEFT nor this package.
"""

from .exported import Difference, Export
from .model import export_model
from .source import AdapterSource, find_adapter


__all__ = ["AdapterSource", "Difference", "Export", "export_model", "find_adapter"]
