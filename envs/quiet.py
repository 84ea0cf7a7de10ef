"""MJX, without the messages it prints on import about missing backends that are not used here."""

import contextlib
import io

with contextlib.redirect_stdout(io.StringIO()):
    from mujoco import mjx

__all__ = ["mjx"]
