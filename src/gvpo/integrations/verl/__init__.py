"""GVPO in verl, unmodified, version 0.9 and later (extra `verl`; docs/verl.md says how to switch it on).

plugin   what verl loads: registers the rest
config   beta, in verl's own configuration
driver   on the driver: options that cannot be exact are refused, rows ordered so that groups stay whole
worker   on every actor: the loss, and the worker that makes it exact
groups   the mathematics between them; imports torch alone
"""

from importlib.util import find_spec

if find_spec("verl") is not None:
    # Before any module of this folder: verl loads the plug-in while it is imported, and with it all of them.
    import verl  # noqa: F401

    from gvpo.integrations.verl.config import GVPOPolicyLossConfig as GVPOPolicyLossConfig
