"""Where a sealed entry lives: the fourth axis. One file per store."""

from hf_kvcache.stores.device import DeviceStore
from hf_kvcache.stores.host import HostStore
from hf_kvcache.stores.prefix import PrefixSource
from hf_kvcache.stores.store import Store

__all__ = ["DeviceStore", "HostStore", "PrefixSource", "Store"]
