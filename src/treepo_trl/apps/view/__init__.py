"""The page of `treepo-trl view`: tree logs as its data, the page as one file, and a server of it for this machine."""

from .page import Page
from .server import TreeServer, make_server
from .sources import Source, find_sources
from .trees import Decode, Index, packed_trees


__all__ = ["Decode", "Index", "Page", "Source", "TreeServer", "find_sources", "make_server", "packed_trees"]
