"""The service: images in over HTTP, verdicts out, a page for the person who looks, and a normal set that learns.

`server` starts an `app`: the routes of `web` around one `service`. That has a detector of each gallery's newest commit
(`generations`), by which images that come in, or lie in a folder (`watch`), are searched (`inspecting`, `pool`) and
judged again (`judging`). `normal_set` and `calibrations` change what is normal. All is written to the `log`; `exports`,
`events`, `metrics` and `delivery` tell it to others.
"""

from .settings import ServiceSettings as ServiceSettings

__all__ = ["ServiceSettings"]
