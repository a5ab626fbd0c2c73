"""Where pages lie: one file per kind of place. Drivers are imported when a URL asks for them."""

from hf_kvcache.sequential.backends.backend import Backend, Collected, Entry, open_backend

__all__ = ["Backend", "Collected", "Entry", "open_backend"]
