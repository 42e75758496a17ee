"""The proxy between a store and its server, which `geventbatch.testing.store_contract` has too."""

from geventbatch.testing._proxy import Endpoint, Proxy, Rule

__all__ = ["Endpoint", "Proxy", "Rule"]
