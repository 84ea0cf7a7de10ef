"""MJX without what it prints on import about back ends that are not installed and not used here."""

import contextlib
import io

with contextlib.redirect_stdout(io.StringIO()):
    from mujoco import mjx

__all__ = ["mjx"]
