"""SAEs of this and other tools: `load` reads any of them, and `WRITERS` write them."""

from sparsify.formats.door import FORMATS, WRITERS, load
from sparsify.formats.loaded import LoadedSAE, LoadedSAEs, Origin

__all__ = ["FORMATS", "WRITERS", "LoadedSAE", "LoadedSAEs", "Origin", "load"]
