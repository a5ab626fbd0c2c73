"""Where pages lie: one file per kind of place. Drivers are imported when a URL asks for them."""

from hf_kvcache.sequential.backends.backend import Backend, Entry, open_backend

__all__ = ["Backend", "Entry", "open_backend"]
