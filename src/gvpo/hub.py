"""The Hugging Face hub: is it there to be asked?"""

from __future__ import annotations

import os
import socket
from typing import Literal
from urllib.parse import urlsplit
from urllib.request import getproxies

from gvpo.errors import UserError

_SECONDS = 5.0


def check_hub(kind: Literal["model", "dataset"], name: str, advice: str) -> None:
    """Refuse the name at once where the hub cannot be reached: its client would try for a minute.

    advice: what else to give. What is in the hub's cache needs no hub. Raises UserError.
    """
    from huggingface_hub import constants

    # Behind a proxy a direct connection says nothing.
    if constants.HF_HUB_OFFLINE or getproxies():
        return
    if os.path.isdir(os.path.join(constants.HF_HUB_CACHE, f"{kind}s--{name.replace('/', '--')}")):
        return
    endpoint = urlsplit(constants.ENDPOINT)
    port = endpoint.port or (80 if endpoint.scheme == "http" else 443)
    try:
        socket.create_connection((endpoint.hostname, port), timeout=_SECONDS).close()
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise UserError(
            f"{kind} {name!r}: not found here, and the hub cannot be reached ({reason}); {advice}"
        ) from error
