"""GVPO in verl, unmodified, version 0.9 and later (extra `verl`; docs/verl.md says how to switch it on).

plugin   what verl loads: registers the rest
config   beta, in verl's own configuration
driver   on the driver: options that cannot be exact are refused, rows ordered so that groups stay whole
worker   on every actor: the loss, and the worker that makes it exact

The mathematics is gvpo.objective's, the order that keeps groups whole gvpo.integrations.order.
"""

from importlib.util import find_spec
from typing import Any

if find_spec("verl") is not None:  # before any module here: verl loads the plug-in while it is imported
    import verl  # noqa: F401


def __getattr__(name: str) -> Any:
    if name != "GVPOPolicyLossConfig":
        raise AttributeError(name)
    from gvpo.integrations.verl.config import GVPOPolicyLossConfig

    return GVPOPolicyLossConfig
